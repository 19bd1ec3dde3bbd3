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
