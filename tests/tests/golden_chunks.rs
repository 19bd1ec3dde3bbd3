//! Golden state chunks, of every version that frazil ever saved: they are understood for ever, and
//! the present version saves them again unchanged.
//!
//! They come from a stock Linux guest with every device in use, and from earlier versions.
//! `cargo test -p frazil-tests --test e2e_linux -- --ignored write_golden_chunks` writes those that
//! are missing, to be added when a version goes up. Existing golden chunks never change.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use frazil_snapstore::StateChunk;
use frazil_tests::rng::Rng;
use frazil_tests::vm_harness::kvm_or_skip;
use frazil_vmm::devices::Device;
use frazil_vmm::devices::platform::{self, SavedPlatform};
use frazil_vmm::devices::rtc::{HostClock, Rtc, SavedRtc, TimeAfterResume};
use frazil_vmm::devices::serial::SavedSerial;
use frazil_vmm::devices::vmgenid::SavedVmGenId;
use frazil_vmm::disk::{Disk, DiskConfig, OverlayOptions, SavedDisk};
use frazil_vmm::kvm::{Hypervisor, VmShell};
use frazil_vmm::memory::GuestRam;
use frazil_vmm::state::{ChunkSet, Saved, chunk};
use frazil_vmm::vcpu::saved::SavedVcpu;
use frazil_vmm::virtio::balloon::Balloon;
use frazil_vmm::virtio::block::Block;
use frazil_vmm::virtio::net::{MacAddress, Net, Tap};
use frazil_vmm::virtio::vsock::{Unreachable, Vsock};
use frazil_vmm::virtio::{Interrupt, SavedVirtio, VirtioDevice, VirtioMmio, ZeroedPages, rng};
use frazil_vmm::{SavedGuest, SavedMachine};
use serde_json::{Value, json};

/// Returns the golden chunks by their file names without the extension.
fn golden() -> BTreeMap<String, StateChunk> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden-chunks");
    let entries = fs::read_dir(folder).expect("golden chunks").map(|entry| entry.expect("a file"));
    let read = |path: &Path| -> StateChunk {
        let chunk: Value = serde_json::from_slice(&fs::read(path).expect("a file")).expect("JSON");
        let text = |field: &str| chunk[field].as_str().expect("text").to_owned();
        let version = chunk["version"].as_u64().and_then(|version| version.try_into().ok());
        StateChunk {
            name: text("name"),
            kind: text("kind"),
            version: version.expect("a version"),
            body: chunk["body"].clone(),
        }
    };
    entries
        .map(|entry| {
            let path = entry.path();
            let stem = path.file_stem().and_then(|stem| stem.to_str()).expect("a name").to_owned();
            (stem, read(&path))
        })
        .collect()
}

fn take<T: Saved>(golden: &StateChunk) -> T {
    let mut chunks = ChunkSet::new(vec![golden.clone()]).expect("one");
    let taken = chunks.take(&golden.name).expect("it is understood");
    chunks.finish().expect("nothing is left");
    taken
}

/// Fails the test unless a chunk of the present version is saved again unchanged, and of an older
/// one no field is lost.
fn understood<T: Saved>(golden: &StateChunk) {
    let again = chunk(&golden.name, &take::<T>(golden)).expect("it can be saved");
    assert_eq!((&again.kind, again.version), (&golden.kind, T::VERSION));
    if golden.version == T::VERSION {
        assert_eq!(again.body, golden.body, "{}", golden.name);
    }
    for (field, value) in golden.body.as_object().expect("fields") {
        assert_eq!(again.body[field], *value, "{} version {}", golden.name, golden.version);
    }
}

#[test]
fn every_chunk_that_was_ever_saved_is_understood() {
    let golden = golden();
    let mut kinds: BTreeMap<&str, BTreeSet<u32>> = BTreeMap::new();
    for chunk in golden.values() {
        kinds.entry(&chunk.kind).or_default().insert(chunk.version);
        match chunk.kind.as_str() {
            SavedMachine::KIND => understood::<SavedMachine>(chunk),
            SavedVcpu::KIND => understood::<SavedVcpu>(chunk),
            SavedDisk::KIND => understood::<SavedDisk>(chunk),
            SavedSerial::KIND => understood::<SavedSerial>(chunk),
            SavedRtc::KIND => understood::<SavedRtc>(chunk),
            SavedVmGenId::KIND => understood::<SavedVmGenId>(chunk),
            SavedVirtio::KIND => understood::<SavedVirtio>(chunk),
            // KVM's own three chunks are taken together, in another test.
            "kvm.irqchip" | "kvm.pit2" | "kvm.clock" => {}
            other => panic!("nobody knows {other}"),
        }
    }
    let versions = |kind: &str, newest: u32| {
        let all: BTreeSet<u32> = (1..=newest).collect();
        assert_eq!(kinds.get(kind), Some(&all), "a golden chunk of each version of {kind}");
    };
    versions(SavedMachine::KIND, SavedMachine::VERSION);
    versions(SavedVcpu::KIND, SavedVcpu::VERSION);
    versions(SavedDisk::KIND, SavedDisk::VERSION);
    versions(SavedSerial::KIND, SavedSerial::VERSION);
    versions(SavedRtc::KIND, SavedRtc::VERSION);
    versions(SavedVmGenId::KIND, SavedVmGenId::VERSION);
    versions(SavedVirtio::KIND, SavedVirtio::VERSION);
    let devices: BTreeSet<&str> = golden
        .values()
        .filter(|chunk| chunk.kind == SavedVirtio::KIND)
        .map(|chunk| chunk.body["device"]["kind"].as_str().expect("a kind"))
        .collect();
    assert_eq!(devices, BTreeSet::from(["balloon", "block", "net", "rng", "vsock"]));
}

#[test]
fn machines_of_old_had_what_they_had_and_nothing_else() {
    let golden = golden();
    let machine = |name: &str| take::<SavedMachine>(&golden[name]);
    let first = machine("machine-v1");
    assert_eq!(
        (first.disks, first.devices.len(), first.rtc, first.generation),
        (0, 0, false, false)
    );
    assert!(matches!(first.guest, SavedGuest::Workload { .. }) && first.workload().is_some());
    let second = machine("machine-v2");
    assert_eq!((second.disks, second.devices.len(), second.rtc), (0, 0, false));
    assert!(!second.generation);
    let third = machine("machine-v3");
    assert!(third.rtc && third.generation && third.devices.len() > 3);
    assert!(matches!(third.guest, SavedGuest::Kernel { .. }));
}

/// Returns the chunks of KVM's own devices, with the clock's chunk `clock`.
fn platform(clock: &str) -> ChunkSet {
    let golden = golden();
    let chunks = ["irqchip-v1", "pit-v1", clock].map(|name| golden[name].clone());
    ChunkSet::new(chunks.to_vec()).expect("three")
}

#[test]
fn kvms_own_devices_take_their_states_and_give_them_back() {
    if !kvm_or_skip() {
        return;
    }
    for clock in ["clock-v1", "clock-v2"] {
        let mut chunks = platform(clock);
        let saved = SavedPlatform::take(&mut chunks).expect("they are understood");
        chunks.finish().expect("nothing is left");
        // Version 1 has no date, so no time has passed.
        assert_eq!(saved.age().is_zero(), clock == "clock-v1");
        let ram = Arc::new(GuestRam::new(2 << 20).expect("memory"));
        let shell = VmShell::new(&Hypervisor::open().expect("KVM"), ram, None).expect("a VM");
        platform::restore(&shell.fd, saved, Duration::ZERO).expect("KVM takes them");
        let again = platform::capture(&shell.fd).expect("they are read");
        let again = again.save().expect("they are saved");
        let (golden, found) = (golden()["irqchip-v1"].clone(), &again[0]);
        assert_eq!(found.body["ioapic"]["redirtbl"], golden.body["ioapic"]["redirtbl"]);
        assert_eq!(found.body["pics"], golden.body["pics"]);
        let mode = |chunk: &StateChunk| chunk.body["channels"][0]["mode"].clone();
        assert_eq!(mode(&again[1]), mode(&self::golden()["pit-v1"]));
        let kvmclock = |chunk: &StateChunk| {
            let text = chunk.body["kvmclock_ns"].as_str().and_then(|text| text.strip_prefix("0x"));
            u64::from_str_radix(text.expect("a number"), 16).expect("a number")
        };
        assert!(kvmclock(&again[2]) >= kvmclock(&self::golden()[clock]));
    }
}

#[derive(Debug)]
struct Unwired;

impl Interrupt for Unwired {
    fn raise(&self) {}
}

/// Devices in mid-use are rebuilt from their saved states.
#[test]
fn devices_are_built_from_their_states() {
    let golden = golden();
    let clock: SavedRtc = take(&golden["rtc-v1"]);
    let rtc =
        Rtc::restore(Box::new(HostClock), &clock, TimeAfterResume::Snapshot).expect("a clock");
    let again = rtc.state();
    assert_eq!((&again.bytes, again.index), (&clock.bytes, clock.index));
    assert!(again.unix_seconds - clock.unix_seconds < 60);
    let rng: SavedVirtio = take(&golden["rng-v1"]);
    assert!(rng.status & 4 != 0 && rng.queues[0].ready, "its driver was there");
    let ram = Arc::new(GuestRam::new(256 << 20).expect("memory"));
    let device = Arc::new(rng::Rng);
    let built = VirtioMmio::restore("rng", device, ram, Arc::new(Unwired), &rng).expect("it fits");
    assert_eq!(built.save(), rng);
}

/// The error about an invalid chunk names the chunk.
#[test]
fn chunks_that_are_not_what_they_say_are_refused_by_name() {
    for (stem, good) in golden() {
        let refused = |change: &dyn Fn(&mut StateChunk)| {
            let mut bad = good.clone();
            change(&mut bad);
            let mut chunks = ChunkSet::new(vec![bad]).expect("one");
            let error = match good.kind.as_str() {
                SavedMachine::KIND => chunks.take::<SavedMachine>(&good.name).map(drop),
                SavedVcpu::KIND => chunks.take::<SavedVcpu>(&good.name).map(drop),
                SavedDisk::KIND => chunks.take::<SavedDisk>(&good.name).map(drop),
                SavedSerial::KIND => chunks.take::<SavedSerial>(&good.name).map(drop),
                SavedRtc::KIND => chunks.take::<SavedRtc>(&good.name).map(drop),
                SavedVmGenId::KIND => chunks.take::<SavedVmGenId>(&good.name).map(drop),
                SavedVirtio::KIND => chunks.take::<SavedVirtio>(&good.name).map(drop),
                _ => return,
            };
            let error = error.expect_err("it is not good").to_string();
            assert!(error.contains(&format!("chunk `{}`", good.name)), "{stem}: {error}");
        };
        refused(&|chunk| chunk.kind.push('x'));
        refused(&|chunk| chunk.version = 0);
        refused(&|chunk| chunk.version += 1000);
        refused(&|chunk| chunk.body = json!(null));
        refused(&|chunk| chunk.body = json!([1]));
        refused(&|chunk| chunk.body["unheard of"] = json!(1));
        // Every field is needed.
        for field in good.body.as_object().expect("fields").keys() {
            refused(&|chunk| drop(chunk.body.as_object_mut().expect("fields").remove(field)));
        }
        let error = ChunkSet::new(vec![good.clone(), good.clone()]).expect_err("two").to_string();
        assert!(error.contains(&good.name) && error.contains("two"), "{error}");
        let chunks = ChunkSet::new(vec![good.clone()]).expect("one");
        let error = chunks.finish().expect_err("it is left over").to_string();
        assert!(error.contains(&good.name), "{error}");
    }
}

/// Replaces `value`, or a random value inside it, by something else.
fn scribble(rng: &mut Rng, value: &mut Value) {
    let inside = match value {
        Value::Object(fields) if rng.below(8) > 0 => {
            let at = rng.below(fields.len().max(1) as u64) as usize;
            fields.values_mut().nth(at)
        }
        Value::Array(items) if rng.below(8) > 0 => {
            let at = rng.below(items.len().max(1) as u64) as usize;
            items.get_mut(at)
        }
        _ => None,
    };
    if let Some(inside) = inside {
        return scribble(rng, inside);
    }
    let number = rng.bits() >> rng.below(64);
    *value = match (rng.below(9), &mut *value) {
        (0 | 1, Value::Array(items)) => {
            let item = items.first().cloned().unwrap_or(json!(0));
            Value::Array(vec![item; rng.below(300) as usize])
        }
        (0 | 1, Value::String(text)) => {
            let half = rng.below(text.len() as u64 + 1) as usize;
            json!(text.get(half..).unwrap_or_default())
        }
        (0..=2, _) => json!(number),
        (3, _) => json!(format!("{number:#x}")),
        (4, _) => json!(u64::MAX >> rng.below(2)),
        (5, _) => json!(-1),
        (6, _) => json!(null),
        (7, _) => json!([]),
        (_, _) => json!(rng.below(2) == 0),
    };
}

/// Makes a device of the given kind.
fn device(kind: &str, file: &Path, ram: &Arc<GuestRam>) -> Arc<dyn VirtioDevice> {
    match kind {
        "balloon" => {
            let free = ZeroedPages::new(Arc::clone(ram), true);
            Arc::new(Balloon::new(Arc::new(free)).expect("a balloon"))
        }
        "block" => {
            let config = DiskConfig { file: file.to_owned(), read_only: false, serial: None };
            let disk = Disk::open(0, &config, &OverlayOptions::default()).expect("a disk");
            Arc::new(Block::new(Arc::new(disk)).expect("a block device"))
        }
        "net" => {
            let tap = Tap::unplugged().expect("sockets");
            Arc::new(Net::new(MacAddress([2, 0, 0, 0, 0, 1]), tap).expect("a card"))
        }
        "rng" => Arc::new(rng::Rng),
        "vsock" => {
            let nobody = Unreachable::new().expect("an eventfd");
            Arc::new(Vsock::new(3, Arc::new(nobody)).expect("sockets"))
        }
        other => panic!("nobody knows {other}"),
    }
}

/// Whatever is written into chunks, nothing panics; a device that accepts its state goes on with it
/// and can be saved again.
#[test]
fn chunks_that_anybody_has_written_into_are_refused_or_understood() {
    let disk = tempfile::NamedTempFile::new().expect("a file");
    disk.as_file().set_len(1 << 20).expect("room");
    let mut any = Rng::new(6);
    let (mut taken, mut refused) = (0, 0);
    let mut note = |is_taken: bool| if is_taken { taken += 1 } else { refused += 1 };
    for good in golden().into_values() {
        let ram = Arc::new(GuestRam::new(256 << 20).expect("memory"));
        for _ in 0..150 {
            let mut bad = good.clone();
            (0..=any.below(3)).for_each(|_| scribble(&mut any, &mut bad.body));
            let mut chunks = ChunkSet::new(vec![bad]).expect("one");
            let name = good.name.as_str();
            match good.kind.as_str() {
                SavedMachine::KIND => note(chunks.take::<SavedMachine>(name).is_ok()),
                SavedVcpu::KIND => note(chunks.take::<SavedVcpu>(name).is_ok()),
                SavedDisk::KIND => note(chunks.take::<SavedDisk>(name).is_ok()),
                SavedSerial::KIND => note(chunks.take::<SavedSerial>(name).is_ok()),
                SavedVmGenId::KIND => note(chunks.take::<SavedVmGenId>(name).is_ok()),
                SavedRtc::KIND => {
                    let clock = chunks.take(name).and_then(|saved| {
                        let clock = Box::new(HostClock);
                        Rtc::restore(clock, &saved, TimeAfterResume::Snapshot)
                    });
                    note(clock.map(|clock| clock.state()).is_ok());
                }
                SavedVirtio::KIND => {
                    let kind = good.body["device"]["kind"].as_str().expect("a kind");
                    let device = device(kind, disk.path(), &ram);
                    let built = chunks.take(name).and_then(|saved| {
                        let (ram, line) = (Arc::clone(&ram), Arc::new(Unwired));
                        VirtioMmio::restore(name, device, ram, line, &saved)
                    });
                    note(built.is_ok());
                    if let Ok(device) = built {
                        device.go_on();
                        drop(device.drain(Duration::from_mins(1)).expect("it can be still"));
                        let again = chunk(name, &device.save()).expect("it can be saved");
                        assert_eq!(again.kind, SavedVirtio::KIND);
                    }
                }
                _ => {}
            }
        }
    }
    assert!(taken > 50 && refused > 500, "{taken} were taken, {refused} refused");
}
