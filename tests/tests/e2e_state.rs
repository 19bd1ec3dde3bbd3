//! Forged state of processors and devices in snapshots: resume and rewind refuse it by the name of
//! its chunk, before anything in the running VM has changed.

use std::sync::Arc;

use frazil_snapstore::{Description, SnapshotId, StateChunk, Store, StoreOptions};
use frazil_tests::vm_harness::{kvm_or_skip, wait_for, wait_populated};
use frazil_vmm::devices::serial::SerialOutput;
use frazil_vmm::disk::DiskConfig;
use frazil_vmm::{
    CheckpointRequest, Guest, HostConfig, Loading, MachineConfig, NetConfig, Vm, VsockConfig,
};
use serde_json::{Value, json};
use tempfile::TempDir;

const RAM_BYTES: u64 = 34 << 20;

/// A guest with every device there is, and a checkpoint of it.
struct Bed {
    vm: Vm,
    store: Arc<Store>,
    good: SnapshotId,
    _folder: TempDir,
}

impl Bed {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open_or_create(&folder.path().join("store"), StoreOptions::default())
            .expect("a store");
        let file = folder.path().join("disk");
        std::fs::write(&file, vec![7; 16 << 10]).expect("the folder is writable");
        let guest = Guest::Workload("touch=1MiB,rate=500,report=0".parse().expect("a workload"));
        let disk = DiskConfig { file, read_only: false, serial: None };
        let config = MachineConfig {
            disks: vec![disk.clone(), disk],
            nets: vec![NetConfig { tap: None, mac: None }],
            rng: true,
            balloon: true,
            vsock: Some(VsockConfig { cid: None, socket: None }),
            acpi_devices: true,
            ..MachineConfig::new("forged", RAM_BYTES, 2, guest)
        };
        let vm = Vm::boot(&config, host(&store)).expect("it boots");
        vm.go().expect("it runs");
        wait_populated(&vm);
        let good = vm.checkpoint(&CheckpointRequest::default()).expect("a checkpoint").id;
        Self { vm, store, good, _folder: folder }
    }

    fn chunks(&self) -> Vec<StateChunk> {
        self.store.snapshot(self.good).and_then(|good| good.states()).expect("good chunks")
    }

    /// Publishes the good snapshot with other chunks.
    fn forge(&self, state: Vec<StateChunk>) -> SnapshotId {
        let good = self.store.snapshot(self.good).expect("it");
        let mut transaction = self.store.begin(Some(self.good)).expect("a transaction");
        for region in &good.manifest().regions {
            transaction.region(&region.name, region.pages).expect("as it was");
        }
        let name = good.manifest().name.clone();
        let description = Description { name, state, ..Description::default() };
        transaction.commit(description).expect("the store looks into none of them").id
    }

    fn resume(&self, id: SnapshotId) -> Result<Vm, String> {
        let snapshot = self.store.snapshot(id).expect("it");
        Vm::resume(&snapshot, "other".into(), host(&self.store), Loading::Eager)
            .map_err(|error| error.to_string())
    }

    /// Fails the test unless resuming from `state` and rewinding to it are refused with each of
    /// `says`, and have no other effect.
    #[track_caller]
    fn refused(&self, state: Vec<StateChunk>, says: &[&str]) {
        let id = self.forge(state);
        let resumed = self.resume(id).err().unwrap_or_else(|| panic!("resumed: {says:?}"));
        self.rewind_refused(id, says);
        for say in says {
            assert!(resumed.contains(say), "resume: expected `{say}` in: {resumed}");
        }
    }

    #[track_caller]
    fn rewind_refused(&self, id: SnapshotId, says: &[&str]) {
        let head = self.vm.head();
        let error = self.vm.rewind_to(Some(&id.to_string())).expect_err("a rewind").to_string();
        assert_eq!(self.vm.ended(), None, "{error}");
        assert_eq!(self.vm.head(), head);
        for say in says {
            assert!(error.contains(say), "rewind: expected `{say}` in: {error}");
        }
    }

    /// Fails the test unless the guest goes on with all of its memory, and can be rewound.
    fn expect_well(&self) {
        let turns = || self.vm.workload().expect("the workload").turns();
        let from = turns();
        wait_for("progress", || (turns() > from + 50).then_some(()));
        self.vm.verify_workload().expect("it can be verified").expect("memory is right");
        self.vm.rewind_to(Some(&self.good.to_string())).expect("what is good is taken");
        self.vm.verify_workload().expect("it can be verified").expect("memory is right");
    }
}

fn host(store: &Arc<Store>) -> HostConfig {
    HostConfig::new(SerialOutput::Null, Some(Arc::clone(store)))
}

fn named<'a>(chunks: &'a mut [StateChunk], name: &str) -> &'a mut StateChunk {
    chunks.iter_mut().find(|chunk| chunk.name == name).unwrap_or_else(|| panic!("a chunk {name}"))
}

#[test]
fn chunks_are_known_whole_and_once() {
    if !kvm_or_skip() {
        return;
    }
    let bed = Bed::new();
    let good = bed.chunks();
    let names: Vec<&str> = good.iter().map(|chunk| chunk.name.as_str()).collect();
    for expected in [
        "machine", "vcpu0", "vcpu1", "irqchip", "pit", "clock", "serial0", "rtc", "vmgenid",
        "disk0", "disk1", "block0", "block1", "net0", "rng", "balloon", "vsock",
    ] {
        assert!(names.contains(&expected), "{expected} in {names:?}");
    }
    for (index, StateChunk { name, version, .. }) in good.iter().enumerate() {
        let with = |change: &dyn Fn(&mut StateChunk)| {
            let mut chunks = good.clone();
            change(&mut chunks[index]);
            chunks
        };
        let named = format!("chunk `{name}`");
        bed.refused(with(&|chunk| chunk.kind = "toaster".into()), &[&named, "kind", "toaster"]);
        let newer = format!("version {}", version + 1);
        bed.refused(with(&|chunk| chunk.version += 1), &[&named, &newer, "newer frazil"]);
        bed.refused(with(&|chunk| chunk.version = 0), &[&named, "never written"]);
        bed.refused(with(&|chunk| chunk.body = json!([])), &[&named, "a body of"]);
        bed.refused(with(&|chunk| chunk.body["toast"] = 1.into()), &[&named, "toast"]);
        let mut without = good.clone();
        without.remove(index);
        let lacks = [named.as_str(), "found none"];
        let no_machine = ["expected a snapshot of a machine"];
        bed.refused(without, if name == "machine" { &no_machine } else { &lacks });
    }
    let toaster =
        StateChunk { name: "toaster".into(), kind: "toaster".into(), version: 1, body: json!({}) };
    let left_over = [good.clone(), vec![toaster]].concat();
    bed.refused(left_over, &["toaster", "a device this frazil knows", "newer frazil"]);
    bed.expect_well();
}

/// State that no machine can have: the chunk, a JSON pointer into its body, the forged value, and
/// part of the error.
fn forgeries() -> Vec<(&'static str, &'static str, Value, &'static str)> {
    let zeros = |bytes: usize| Value::from("00".repeat(bytes));
    let queue = "/queues/0/ready";
    let ones = "0xffffffffffffffff";
    vec![
        ("block0", "/device", json!({"kind": "rng"}), "Rng"),
        ("block0", "/device/disk", "disk1".into(), "disk1"),
        ("net0", "/device", json!({"kind": "block", "disk": "disk0"}), "Block"),
        ("rng", "/device", json!({"kind": "vsock", "guest_cid": 3}), "Vsock"),
        ("balloon", "/device", json!({"kind": "rng"}), "Rng"),
        ("vsock", "/device", json!({"kind": "rng"}), "Rng"),
        ("rng", "/device", json!({"kind": "toaster"}), "toaster"),
        ("rng", "/status", 0x30.into(), "a status"),
        ("rng", "/status", 4.into(), "a status"),
        ("rng", "/status", 8.into(), "a status"),
        ("rng", "/status", 15.into(), "features"),
        ("rng", "/interrupt_status", 4.into(), "interrupt"),
        ("rng", "/queues", json!([]), "[]"),
        ("rng", "/queues/0/max_size", 3.into(), "3"),
        ("rng", queue, true.into(), "before the features are settled"),
        ("rtc", "/bytes", zeros(127), "127 bytes"),
        ("rtc", "/nanoseconds", 1_000_000_000.into(), "less than a second"),
        ("vmgenid", "/id", zeros(15), "15 bytes"),
        ("vmgenid", "/address", "0xff001".into(), "multiple of 8"),
        ("vmgenid", "/address", "0x2200000".into(), "in RAM"),
        ("vmgenid", "/address", "0xfffffffffffffff8".into(), "in RAM"),
        ("serial0", "/in_buffer", json!(vec![0; 65]), "16550A"),
        ("irqchip", "/ioapic/redirtbl", json!([]), "24 inputs"),
        ("pit", "/channels", json!([]), "a body of"),
        ("vcpu1", "/lapic", zeros(1023), "local APIC"),
        ("vcpu1", "/xsave", zeros(4095), "XSAVE"),
        ("vcpu1", "/xcrs/0/value", "0x0".into(), "extended control registers"),
        ("vcpu1", "/sregs/cr4", ones.into(), "segment registers"),
        ("vcpu1", "/sregs/efer", "0x0".into(), "segment registers"),
        ("vcpu1", "/debug_regs/dr7", ones.into(), "debug registers"),
        ("vcpu1", "/events/flags", u32::MAX.into(), "events"),
        ("vcpu1", "/mp_state", 77.into(), "a valid MP state"),
        ("vcpu1", "/msrs/0/index", "0x100000010".into(), "32-bit MSR number"),
        ("vcpu1", "/msrs/0/index", "0xdead".into(), "MSR 0xdead"),
        ("vcpu1", "/msrs", json!(vec![json!({"index": "0x10", "value": "0x0"}); 1000]), "MSRs"),
    ]
}

#[test]
fn what_no_machine_can_have_is_refused_by_name() {
    if !kvm_or_skip() {
        return;
    }
    let bed = Bed::new();
    let good = bed.chunks();
    for (name, place, value, says) in forgeries() {
        let mut chunks = good.clone();
        let body = &mut named(&mut chunks, name).body;
        let found = body.pointer_mut(place).unwrap_or_else(|| panic!("{name} has {place}"));
        assert_ne!(*found, value, "{name}{place}");
        *found = value;
        bed.refused(chunks, &[&format!("chunk `{name}`"), says]);
    }
    // A rewind takes another gsi for another machine's, a resume for an invalid one; both refuse
    // it.
    for gsi in [4, 9 + 15, 16, u32::MAX] {
        let mut chunks = good.clone();
        named(&mut chunks, "vmgenid").body["gsi"] = gsi.into();
        bed.refused(chunks, &["chunk `vmgenid`", &gsi.to_string()]);
    }
    bed.expect_well();
}

#[test]
fn lists_of_devices_that_no_machine_had_are_refused() {
    if !kvm_or_skip() {
        return;
    }
    let bed = Bed::new();
    let good = bed.chunks();
    let devices = named(&mut good.clone(), "machine").body["devices"].clone();
    let names: Vec<&str> = devices
        .as_array()
        .expect("a list")
        .iter()
        .map(|slot| slot["name"].as_str().expect("text"))
        .collect();
    assert_eq!(names, ["block0", "block1", "net0", "rng", "balloon", "vsock"]);
    for (slot, place, value, says) in [
        (1, "/device/disk", json!(0), "its own name and disk"),
        (1, "/device/disk", json!(7), "one of the machine's 2 disks"),
        (1, "/name", json!("block0"), "its own name"),
        (1, "/name", json!("a b"), "printable"),
        (1, "/gsi", json!(16), "an interrupt of its own"),
        (1, "/gsi", json!(4), "an interrupt of its own"),
        (1, "/base", devices[0]["base"].clone(), "bytes of its own"),
        (1, "/base", json!("0x1000"), "bytes of its own"),
        (1, "/base", json!("0xc0000800"), "bytes of its own"),
        (5, "/device/cid", json!(2), "context id"),
    ] {
        let mut chunks = good.clone();
        let list = &mut named(&mut chunks, "machine").body["devices"];
        *list[slot].pointer_mut(place).expect("it is there") = value;
        let id = bed.forge(chunks);
        let error = bed.resume(id).err().unwrap_or_else(|| panic!("resumed: {says}"));
        assert!(error.contains(says), "expected `{says}` in: {error}");
        if place != "/device/cid" {
            bed.rewind_refused(id, &["another machine"]);
        }
    }
    bed.expect_well();
}
