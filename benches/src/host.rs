//! What the host must have, and what it says of itself.

use std::path::Path;

use anyhow::Context;
use frazil_vmm::kvm::Hypervisor;

/// Name of the file system that is no disk.
pub(crate) const TMPFS: &str = "tmpfs";

/// Checks that there is a KVM and a userfaultfd to measure with.
pub(crate) fn check() -> anyhow::Result<()> {
    Hypervisor::open()?;
    frazil_snapstore::pager::probe()?;
    Ok(())
}

/// Memory that can be had without swapping; None if the host does not say.
pub(crate) fn available_bytes() -> Option<u64> {
    kib_of("/proc/meminfo", "MemAvailable:")
}

/// Memory this process has resident, that of its guests included; None if the host does not say.
pub(crate) fn resident_bytes() -> Option<u64> {
    kib_of("/proc/self/status", "VmRSS:")
}

/// Memory of this process that no file is behind; None if the host does not say.
pub(crate) fn anonymous_bytes() -> Option<u64> {
    kib_of("/proc/self/smaps_rollup", "Anonymous:")
}

/// The bytes that line `key` of a file of the kernel's gives in KiB.
fn kib_of(path: &str, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(path).ok()?;
    let rest = text.lines().find_map(|line| line.strip_prefix(key))?;
    Some(rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

/// Name of the file system `path` is on.
pub(crate) fn file_system(path: &Path) -> anyhow::Result<String> {
    let stat = rustix::fs::statfs(path)
        .with_context(|| format!("cannot tell the file system of {}", path.display()))?;
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
