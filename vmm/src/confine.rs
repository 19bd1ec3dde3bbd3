//! What the threads that a guest can reach may ask of the kernel: seccomp filters.
//!
//! A guest that takes over a vCPU's thread, or a device's, by a mistake of ours finds that it can run its
//! machine and little else: no programs, sockets or processes, and no file that is not open, but for
//! reading by the block device's, whose base may be in the store. What is not allowed fails with EPERM
//! rather than killing the process, so that a library that asks for something it can do without
//! goes on. Threads that no guest talks to are as they were. See `Documentation/userspace-api/seccomp_filter.rst`.

use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use crate::error::{Result, VmmError};

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It runs a vCPU, and devices without a thread of their own.
    Vcpu,
    /// It serves a virtio device.
    Device,
    /// It serves the socket device, which listens and connects on the host.
    Sockets,
}

static IS_OFF: AtomicBool = AtomicBool::new(false);

/// Leaves threads that are started from now on as they are, in this process.
pub fn turn_off() {
    IS_OFF.store(true, Ordering::Relaxed);
}

/// What every thread needs to live: memory, locks, signals, time, its own end; and to tell what it
/// met.
const ALWAYS: [i64; 37] = [
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_fstat,
    libc::SYS_lseek,
    // The C library has every thread do so when the process stops being root.
    libc::SYS_setgroups,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
];

/// Besides, a device's: files that are open, or are opened for reading, and waiting for several.
const DEVICE: [i64; 19] = [
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_fallocate,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_flock,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getdents64,
    libc::SYS_newfstatat,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_readv,
    libc::SYS_statx,
    libc::SYS_sync_file_range,
];

/// Besides, the socket device's: streams of Unix sockets.
const SOCKETS: [i64; 11] = [
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_getsockopt,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_readv,
];

/// The second argument of an ioctl has KVM's number here (`KVMIO`).
const IOCTL_TYPE: u64 = 0xff00;
const KVMIO: u64 = 0xae00;
/// What opening a file for reading does not have among its flags.
const OPENS_TO_CHANGE: u64 =
    (libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC | libc::O_APPEND) as u64;

/// Confines the calling thread to what `role` needs, for good, unless that is [off](turn_off).
///
/// # Errors
/// [`VmmError::Host`] if the kernel has no seccomp.
pub(crate) fn confine(role: Role) -> Result<()> {
    static VCPU: OnceLock<BpfProgram> = OnceLock::new();
    static DEVICE: OnceLock<BpfProgram> = OnceLock::new();
    static SOCKETS: OnceLock<BpfProgram> = OnceLock::new();
    if IS_OFF.load(Ordering::Relaxed) {
        return Ok(());
    }
    let made = match role {
        Role::Vcpu => &VCPU,
        Role::Device => &DEVICE,
        Role::Sockets => &SOCKETS,
    };
    let filter = if let Some(filter) = made.get() {
        filter
    } else {
        let filter = filter(role).map_err(failed)?;
        made.get_or_init(|| filter)
    };
    seccompiler::apply_filter(filter).map_err(failed)
}

fn failed(error: impl Into<seccompiler::Error>) -> VmmError {
    let error = std::io::Error::other(error.into());
    VmmError::host("confine a thread (--no-seccomp does without)")(error)
}

fn filter(role: Role) -> Result<BpfProgram, seccompiler::BackendError> {
    let argument = |number, mask, value| {
        let masked = SeccompCmpOp::MaskedEq(mask);
        SeccompCondition::new(number, SeccompCmpArgLen::Dword, masked, value)
    };
    let only = |condition| Ok(vec![SeccompRule::new(vec![condition])?]);
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        ALWAYS.into_iter().map(|call| (call, Vec::new())).collect();
    match role {
        Role::Vcpu => {
            rules.insert(libc::SYS_ioctl, only(argument(1, IOCTL_TYPE, KVMIO)?)?);
        }
        Role::Device => {
            rules.extend(DEVICE.into_iter().map(|call| (call, Vec::new())));
            rules.insert(libc::SYS_openat, only(argument(2, OPENS_TO_CHANGE, 0)?)?);
        }
        Role::Sockets => {
            rules.extend(SOCKETS.into_iter().map(|call| (call, Vec::new())));
            rules.insert(libc::SYS_socket, only(argument(0, u64::MAX, libc::AF_UNIX as u64)?)?);
            rules.insert(libc::SYS_ioctl, only(argument(1, u64::MAX, libc::FIONBIO)?)?);
        }
    }
    let denied = SeccompAction::Errno(libc::EPERM as u32);
    SeccompFilter::new(rules, denied, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};
    use std::io::{ErrorKind, Write};
    use std::net::UdpSocket;
    use std::process::Command;

    use super::*;

    /// What `attempt` comes to in a thread that was confined.
    fn confined<T: Send>(role: Role, attempt: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                confine(role).unwrap();
                attempt()
            });
            thread.join().unwrap()
        })
    }

    fn is_denied<T>(result: std::io::Result<T>) -> bool {
        result.err().is_some_and(|error| error.kind() == ErrorKind::PermissionDenied)
    }

    #[test]
    fn threads_do_their_work_and_little_else() {
        let mut scratch = tempfile::tempfile().unwrap();
        let path = std::env::temp_dir().join(format!("confined-{}", std::process::id()));
        for role in [Role::Vcpu, Role::Device, Role::Sockets] {
            let results = confined(role, || {
                [
                    is_denied(Command::new("/bin/true").spawn()),
                    is_denied(UdpSocket::bind("127.0.0.1:0")),
                    is_denied(OpenOptions::new().append(true).create(true).open(&path)),
                    is_denied(std::thread::Builder::new().spawn(|| ())),
                    is_denied(File::open("/proc/self/maps")),
                    // What they are for.
                    scratch.write_all(&vec![1; 1 << 20]).is_ok(),
                ]
            });
            assert_eq!(results, [true, true, true, true, role != Role::Device, true], "{role:?}");
        }
        assert!(!path.exists());
        // Others are as they were.
        assert!(File::open("/proc/self/maps").is_ok());
    }
}
