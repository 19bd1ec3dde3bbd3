//! What the host must have, and figures that it reports.

use std::path::Path;

use anyhow::Context;
use frazil_vmm::kvm::Hypervisor;

/// Name of the file system that is not on a disk.
pub(crate) const TMPFS: &str = "tmpfs";

/// Checks that KVM and userfaultfd are there to measure with.
pub(crate) fn check() -> anyhow::Result<()> {
    Hypervisor::open()?;
    frazil_snapstore::pager::probe()?;
    Ok(())
}

/// Memory available without swapping; None if the host does not say.
pub(crate) fn available_bytes() -> Option<u64> {
    kib_of("/proc/meminfo", "MemAvailable:")
}

/// Resident memory of this process, guests included; None if the host does not say.
pub(crate) fn resident_bytes() -> Option<u64> {
    kib_of("/proc/self/status", "VmRSS:")
}

/// Memory of this process not backed by a file; None if the host does not say.
pub(crate) fn anonymous_bytes() -> Option<u64> {
    kib_of("/proc/self/smaps_rollup", "Anonymous:")
}

/// The value in KiB on line `key` of a kernel file, in bytes.
fn kib_of(path: &str, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(path).ok()?;
    let rest = text.lines().find_map(|line| line.strip_prefix(key))?;
    Some(rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

/// Name of the file system that `path` is on.
pub(crate) fn file_system(path: &Path) -> anyhow::Result<String> {
    let stat = rustix::fs::statfs(path)
        .with_context(|| format!("cannot determine the file system of {}", path.display()))?;
    // Magic numbers from linux/magic.h.
    Ok(match stat.f_type as u64 {
        0x0102_1994 => TMPFS.to_owned(),
        0xef53 => "ext4".to_owned(),
        0x5846_5342 => "xfs".to_owned(),
        0x9123_683e => "btrfs".to_owned(),
        0x794c_7630 => "overlayfs".to_owned(),
        0x6969 => "nfs".to_owned(),
        other => format!("file system {other:#x}"),
    })
}
