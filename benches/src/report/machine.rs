//! The machine that figures were measured on.

use std::fs;

use jiff::{Timestamp, tz::TimeZone};

/// Facts about the machine and the versions that matter: pairs of name and value.
pub(super) fn facts(file_system: &str) -> Vec<(&'static str, String)> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let now = Timestamp::now().to_zoned_datetime(TimeZone::system());
    let measured = now.strftime("%Y-%m-%d %H:%M %Z").to_string();
    let mut facts = vec![
        ("measured", measured),
        ("command", std::env::args().collect::<Vec<_>>().join(" ")),
        ("processor", format!("{}, {cores} cores", value_of("/proc/cpuinfo", "model name"))),
        ("memory", memory()),
        ("kernel", format!("Linux {}", kernel.trim())),
        ("KVM", kvm()),
        ("stores on", file_system.to_owned()),
        ("frazil", env!("CARGO_PKG_VERSION").to_owned()),
        ("zstd", zstd::zstd_safe::version_string().to_owned()),
    ];
    if let Some(version) = crate::suites::peers::qemu_version() {
        facts.push(("QEMU", version));
    }
    facts
}

/// The value of the first line `key : value` of a kernel file.
fn value_of(path: &str, key: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.trim().strip_prefix(':'));
    line.map_or("unknown", str::trim).to_owned()
}

/// The memory that the kernel has, in GiB.
fn memory() -> String {
    let total = value_of("/proc/meminfo", "MemTotal");
    let kib = total.strip_suffix(" kB").and_then(|kib| kib.parse::<f64>().ok());
    kib.map_or(total, |kib| format!("{:.1} GiB", kib / f64::from(1 << 20)))
}

/// KVM's module, and whether this machine is itself a guest.
fn kvm() -> String {
    let modules = ["kvm_intel", "kvm_amd", "kvm_pvm"];
    let loaded = |name: &&str| fs::metadata(format!("/sys/module/{name}")).is_ok();
    let module = modules.into_iter().find(loaded).unwrap_or("built in, or unknown");
    let guest = fs::read_to_string("/proc/cpuinfo")
        .is_ok_and(|text| text.split_whitespace().any(|word| word == "hypervisor"));
    format!("{module}{}", if guest { ", on a virtual machine" } else { "" })
}
