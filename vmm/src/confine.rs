//! Seccomp filters for the threads that a guest can reach.
//!
//! A guest that exploits a bug to take over the thread of a vCPU or device can run its machine and
//! little else: it can start no programs or processes, create no sockets (the socket device: Unix
//! sockets only), and open no files (devices: for reading only, since a disk's base may be in the
//! store). Forbidden calls fail with EPERM rather than killing the process, so that a library that
//! asks for something it can do without carries on. Threads that no guest talks to are not
//! confined. See `Documentation/userspace-api/seccomp_filter.rst`.

use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use crate::error::{Result, VmmError};

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Runs a vCPU, and the devices without a thread of their own.
    Vcpu,
    /// Serves a virtio device.
    Device,
    /// Serves the socket device, which listens and connects on the host.
    Sockets,
    /// Writes the guest's serial output to its destination, which is already open.
    Output,
}

static IS_OFF: AtomicBool = AtomicBool::new(false);

/// Turns filters off for all threads that this process starts from now on.
pub fn turn_off() {
    IS_OFF.store(true, Ordering::Relaxed);
}

/// Calls that every thread needs: for memory, locks, signals, time, exiting and reporting errors.
const ALWAYS: [i64; 34] = [
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
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_fstat,
    libc::SYS_lseek,
    // The C library makes every thread call these when the process stops being root.
    libc::SYS_setgroups,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
];

/// Calls that a device's thread needs too: I/O on files and waiting for several of them.
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

/// Calls that the socket device's thread needs too: Unix stream sockets.
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

/// The bits of an ioctl's request number that hold its type, which is `KVMIO` for KVM's.
const IOCTL_TYPE: u64 = 0xff00;
const KVMIO: u64 = 0xae00;
/// Flags that an open for reading does not have.
const OPENS_TO_CHANGE: u64 =
    (libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC | libc::O_APPEND) as u64;

/// Confines the calling thread to what `role` needs, for good, unless filters are [off](turn_off).
///
/// # Errors
/// [`VmmError::Host`] if the kernel has no seccomp.
pub(crate) fn confine(role: Role) -> Result<()> {
    static VCPU: OnceLock<BpfProgram> = OnceLock::new();
    static DEVICE: OnceLock<BpfProgram> = OnceLock::new();
    static SOCKETS: OnceLock<BpfProgram> = OnceLock::new();
    static OUTPUT: OnceLock<BpfProgram> = OnceLock::new();
    if IS_OFF.load(Ordering::Relaxed) {
        return Ok(());
    }
    let made = match role {
        Role::Vcpu => &VCPU,
        Role::Device => &DEVICE,
        Role::Sockets => &SOCKETS,
        Role::Output => &OUTPUT,
    };
    let filter = if let Some(filter) = made.get() {
        filter
    } else {
        let filter = filter(role).map_err(failed)?;
        made.get_or_init(|| filter)
    };
    seccompiler::apply_filter(filter).map_err(failed)
}

/// Starts a thread that confines itself to what `role` needs and then does `work`.
///
/// # Errors
/// [`VmmError::Host`] if the thread cannot be started or confined; `work` is not begun then.
pub(crate) fn spawn(
    name: String,
    role: Role,
    work: impl FnOnce() + Send + 'static,
) -> Result<JoinHandle<()>> {
    let (tell, told) = crossbeam_channel::bounded(1);
    let failed = VmmError::host(format!("start the thread {name}"));
    // Linux shows the first 15 bytes. A disk's name comes from a snapshot and may contain zero
    // bytes, which a thread's name must not.
    let thread = std::thread::Builder::new().name(name.replace('\0', "")).spawn(move || {
        let confined = confine(role);
        let is_confined = confined.is_ok();
        let _heard = tell.send(confined);
        if is_confined {
            work();
        }
    });
    let thread = thread.map_err(failed)?;
    // A thread that sent nothing has panicked, which the panic hook reported.
    told.recv().unwrap_or_else(|_| {
        Err(VmmError::NotNow(format!("the thread {name} ended before it started its work")))
    })?;
    Ok(thread)
}

fn failed(error: impl Into<seccompiler::Error>) -> VmmError {
    let error = std::io::Error::other(error.into());
    VmmError::host("confine a thread (--no-seccomp turns this off)")(error)
}

fn filter(role: Role) -> Result<BpfProgram, seccompiler::BackendError> {
    let argument = |number, mask, value| {
        let masked = SeccompCmpOp::MaskedEq(mask);
        SeccompCondition::new(number, SeccompCmpArgLen::Dword, masked, value)
    };
    let only = |condition| Ok(vec![SeccompRule::new(vec![condition])?]);
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        ALWAYS.into_iter().map(|call| (call, Vec::new())).collect();
    // No executable mappings.
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, only(argument(2, libc::PROT_EXEC as u64, 0)?)?);
    }
    // Signals only to this process's own threads, which it sends when it aborts.
    let ours = std::process::id().into();
    rules.insert(libc::SYS_tgkill, only(argument(0, u64::MAX, ours)?)?);
    match role {
        Role::Output => {}
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
    use std::os::unix::net::UnixStream;
    use std::process::Command;

    use super::*;

    /// Returns what `attempt` returns in a confined thread.
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
        for role in [Role::Vcpu, Role::Device, Role::Sockets, Role::Output] {
            let results = confined(role, || {
                [
                    is_denied(Command::new("/bin/true").spawn()),
                    is_denied(UdpSocket::bind("127.0.0.1:0")),
                    is_denied(OpenOptions::new().append(true).create(true).open(&path)),
                    is_denied(std::thread::Builder::new().spawn(|| ())),
                    is_denied(memmap2::MmapMut::map_anon(4096).unwrap().make_exec()),
                    is_denied(File::open("/proc/self/maps")),
                    is_denied(UnixStream::pair()),
                    // Allowed to all roles.
                    scratch.write_all(&vec![1; 1 << 20]).is_ok(),
                ]
            });
            let (no_files, no_sockets) = (role != Role::Device, true);
            let expected = [true, true, true, true, true, no_files, no_sockets, true];
            assert_eq!(results, expected, "{role:?}");
        }
        assert!(!path.exists());
        // Other threads are not confined.
        assert!(File::open("/proc/self/maps").is_ok());
    }

    #[test]
    fn what_cannot_be_confined_does_not_begin() {
        let refused = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                // Imitates a kernel without seccomp, also for the threads that this one starts.
                let rules =
                    BTreeMap::from([(libc::SYS_seccomp, vec![]), (libc::SYS_prctl, vec![])]);
                let (others, these) =
                    (SeccompAction::Allow, SeccompAction::Errno(libc::EINVAL as u32));
                let filter = SeccompFilter::new(rules, others, these, TargetArch::x86_64).unwrap();
                seccompiler::apply_filter(&BpfProgram::try_from(filter).unwrap()).unwrap();
                spawn("unconfined".into(), Role::Device, || panic!("it has begun"))
            });
            thread.join().unwrap().unwrap_err().to_string()
        });
        assert!(refused.contains("--no-seccomp"), "{refused}");
        spawn("confined".into(), Role::Device, || ()).unwrap().join().unwrap();
    }
}
