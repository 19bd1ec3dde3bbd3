//! The snapshot shared by the tests of `frazil inspect`.

use std::sync::OnceLock;

use serde_json::Value;

use crate::vm_harness::{Host, kvm_or_skip, text};

/// A snapshot of the built-in guest with two vCPUs, its RAM, and the state of its vCPUs.
#[derive(Debug)]
pub struct Bed {
    /// The host whose store holds the snapshot.
    pub host: Host,
    /// The snapshot, as `STORE@REFERENCE`.
    pub at: String,
    /// All of its RAM.
    pub ram: Vec<u8>,
    /// The bodies of its vCPUs' state chunks, as `frazil show --json` prints them.
    pub vcpus: Vec<Value>,
}

/// Returns the one bed of this process, which no test changes; `None` if there is no KVM.
///
/// # Panics
/// If the guest does not run, or is not saved.
#[must_use]
pub fn bed() -> Option<&'static Bed> {
    static BED: OnceLock<Option<Bed>> = OnceLock::new();
    let make = || {
        if !kvm_or_skip() {
            return None;
        }
        let host = Host::new();
        let vm = host.run(
            "looked-at",
            "touch=24MiB,rate=2000,content=text,report=0",
            &["--memory", "64MiB", "--cpus", "2"],
        );
        vm.wait_populated();
        let _first = host.json(&["checkpoint", "looked-at"]);
        vm.wait_beyond(vm.turns() + 500);
        let _second = host.json(&["checkpoint", "looked-at", "--exit", "--tag", "gold"]);
        vm.expect_ended("suspended");
        let (at, file) = (host.at("gold"), host.path("ram.raw"));
        let _exported = host.json(&["export", &at, &file.display().to_string()]);
        let ram = std::fs::read(&file).expect("it was written");
        let show = host.json(&["show", &at]);
        let chunks = show["state"].as_array().expect("chunks");
        let vcpu = |name: &str| {
            chunks.iter().find(|chunk| chunk["name"] == name).expect("a vCPU")["body"].clone()
        };
        let vcpus = vec![vcpu("vcpu0"), vcpu("vcpu1")];
        Some(Bed { host, at, ram, vcpus })
    };
    BED.get_or_init(make).as_ref()
}

impl Bed {
    /// Returns what `frazil inspect --json` prints about the snapshot, one value a line.
    #[must_use]
    pub fn inspect(&self, args: &[&str]) -> Vec<Value> {
        self.host.ok(&[&["inspect", &self.at, "--json"], args].concat()).json_lines()
    }

    /// Fails the test unless `frazil inspect` exits with `code`, having printed all of `says` on
    /// standard error and little on standard output.
    ///
    /// # Panics
    /// If not.
    pub fn refused(&self, code: i32, args: &[&str], says: &[&str]) {
        let refused = self.host.frazil(&[&["inspect", &self.at], args].concat());
        refused.expect_code(code).expect_says(says);
        assert!(refused.stdout.len() < 1000, "{refused:?}");
    }

    /// Returns a general register of a vCPU.
    #[must_use]
    pub fn register(&self, vcpu: usize, name: &str) -> u64 {
        hex(text(&self.vcpus[vcpu]["regs"], name))
    }

    /// Returns `len` bytes of RAM at `gpa`, as hexadecimal digits.
    #[must_use]
    pub fn ram_hex(&self, gpa: u64, len: usize) -> String {
        let bytes = &self.ram[gpa as usize..][..len];
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Parses a hexadecimal number that begins with `0x`.
///
/// # Panics
/// If `text` is not one.
#[must_use]
pub fn hex(text: &str) -> u64 {
    u64::from_str_radix(text.strip_prefix("0x").expect("0x"), 16).expect("hex digits")
}
