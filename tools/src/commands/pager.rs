//! `frazil pager`: loads memory for VMs in other processes.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use frazil_snapstore::StoreOptions;
use frazil_snapstore::pager::{self, ImageServer, PagerOptions, Replay};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::{as_user, find_snapshot};
use crate::cli::{PagerArgs, WorkingSetArg};

/// How long a snapshot's memory is kept for further VMs.
const LINGER: Duration = Duration::from_secs(5);
/// How long to wait for the first VM.
const FIRST_PATIENCE: Duration = Duration::from_mins(1);
/// How long to wait when file descriptors or memory run out.
const SHORTAGE_WAIT: Duration = Duration::from_millis(200);
/// How many VMs may be connected without being seated; further ones wait to be let in.
const UNSEATED_MAX: usize = 256;
/// How long to record what a resumed VM touches, by default.
const RECORD: Duration = Duration::from_secs(1);

/// The pager's options, from the command line's.
pub(crate) fn options(
    no_fill: bool,
    fill_rate: Option<u64>,
    working_set: WorkingSetArg,
    record: Option<Duration>,
) -> PagerOptions {
    let (replay, first) = match working_set {
        WorkingSetArg::Auto => (Replay::Beside, Some(RECORD)),
        WorkingSetArg::Before => (Replay::Before, Some(RECORD)),
        WorkingSetArg::Off => (Replay::Off, None),
    };
    PagerOptions {
        background_fill: !no_fill,
        fill_bytes_per_s: fill_rate,
        replay: if record.is_some() { Replay::Off } else { replay },
        record: record.or(first),
        ..PagerOptions::default()
    }
}

pub(crate) fn pager(args: &PagerArgs) -> anyhow::Result<()> {
    if let (Some(snapshot), Some(socket)) = (&args.snapshot, &args.listen) {
        return serve_many(args, snapshot, socket);
    }
    if let Some(user) = &args.user {
        user.settle()?;
    }
    let socket = std::io::stdin().as_fd().try_clone_to_owned();
    pager::serve_one(socket.context("cannot use standard input as a socket")?)?;
    Ok(())
}

/// Serves the memory of a snapshot at `socket` until nobody has used it for a while.
fn serve_many(args: &PagerArgs, snapshot: &str, socket: &Path) -> anyhow::Result<()> {
    let Some(place) = Place::take_unless_served(socket)? else { return say_ready() };
    raise_descriptor_limit();
    let pinned = as_user(args.user.as_ref(), || {
        let (_, store, id) = find_snapshot(snapshot, StoreOptions::default())?;
        Ok(store.pin(id)?)
    })?;
    let image = frazil_vmm::shared_image(&pinned)?;
    let options = options(args.no_fill, args.fill_rate, args.working_set, args.record_working_set);
    let server = Arc::new(ImageServer::new(image, options)?);
    // A socket that is still there is of a server that has ended: this process holds the lock.
    let _none = std::fs::remove_file(socket);
    let at = || format!("cannot listen at {}", socket.display());
    // The umask keeps others from connecting from the first moment on.
    let before = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let listener = pager::listen(socket).with_context(at);
    rustix::process::umask(before);
    let listener = listener?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600)).with_context(at)?;
    log_to(&place.log())?;
    if let Some(user) = &args.user {
        user.settle()?;
    }
    say_ready()?;
    let mut idle_until = Instant::now() + FIRST_PATIENCE;
    while server.users() > 0 || Instant::now() < idle_until {
        if server.users() > 0 {
            idle_until = Instant::now() + LINGER;
        }
        if server.unseated_users() >= UNSEATED_MAX {
            std::thread::sleep(SHORTAGE_WAIT);
        } else if let Some(user) = next_user(&listener, Duration::from_millis(200)) {
            // A VM is not counted among the users before its thread runs.
            idle_until = Instant::now() + LINGER;
            serve(&server, user);
        }
    }
    // From here on nobody can find this server, and another may start; VMs that found it a moment
    // ago are still served.
    place.leave();
    while let Some(user) = next_user(&listener, Duration::ZERO) {
        serve(&server, user);
        std::thread::sleep(Duration::from_millis(200));
    }
    while server.users() > 0 {
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

/// Raises the limit of file descriptors, as each VM takes several: the default suits processes that
/// use `select`.
fn raise_descriptor_limit() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::warn!(%error, "cannot raise the file descriptor limit");
    }
}

/// The next VM that connects, if one does within `patience`. If it cannot be let in for lack of
/// resources, those that are connected are served all the same, and it is let in later.
fn next_user(listener: &OwnedFd, patience: Duration) -> Option<OwnedFd> {
    pager::accept(listener, patience).unwrap_or_else(|error| {
        tracing::warn!(%error, "cannot accept a VM's connection");
        std::thread::sleep(SHORTAGE_WAIT);
        None
    })
}

/// Redirects standard error to the file `log`. This process serves every VM that shares the memory,
/// and may outlive the command that started it: whoever waits for the end of that command's output
/// must not wait for this process.
fn log_to(log: &Path) -> anyhow::Result<()> {
    let file = File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
    rustix::stdio::dup2_stderr(&file).context("cannot redirect standard error")
}

fn serve(server: &Arc<ImageServer>, user: OwnedFd) {
    let server = Arc::clone(server);
    let serve = move || {
        if let Err(error) = server.serve(user) {
            tracing::warn!(%error, "cannot serve a VM");
        }
    };
    let spawned = std::thread::Builder::new().name("frazil-user".into()).spawn(serve);
    if let Err(error) = spawned {
        // The connection is closed; the VM has not begun, so whoever started it can start it again.
        tracing::warn!(%error, "cannot serve a VM");
        std::thread::sleep(SHORTAGE_WAIT);
    }
}

/// Where a server listens, and the files beside its socket. Whoever holds the lock is the server
/// there, and removes the files when it ends; after an error all but the log, which says what was
/// wrong. A server that is no longer root may have to leave the removal to others: see
/// `frazil_vmm::control::list`.
struct Place {
    socket: PathBuf,
    _lock: File,
}

impl Place {
    /// None if another process serves there and can be reached: whoever started this one can use
    /// it.
    fn take_unless_served(socket: &Path) -> anyhow::Result<Option<Self>> {
        let until = Instant::now() + FIRST_PATIENCE;
        loop {
            if let Some(lock) = lock(&beside(socket, "lock"))? {
                return Ok(Some(Self { socket: socket.to_owned(), _lock: lock }));
            }
            if pager::connect(socket).is_ok() {
                return Ok(None);
            }
            // The other process is about to begin serving, or to end.
            ensure!(
                Instant::now() < until,
                "another process holds {}.lock, but does not serve at {}",
                socket.display(),
                socket.display()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn log(&self) -> PathBuf {
        beside(&self.socket, "log")
    }

    /// Removes the log as well: each VM has reported what went wrong with it, and nobody else needs
    /// it.
    fn leave(self) {
        let _gone = std::fs::remove_file(self.log());
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // The lock goes last: a process that finds none may begin to serve.
        for path in [self.socket.clone(), beside(&self.socket, "lock")] {
            let _gone = std::fs::remove_file(path);
        }
    }
}

fn beside(socket: &Path, what: &str) -> PathBuf {
    PathBuf::from(format!("{}.{what}", socket.display()))
}

/// Locks `path`. None if another process holds the lock, or has just removed the file.
fn lock(path: &Path) -> anyhow::Result<Option<File>> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(path);
    let file = file.with_context(|| format!("cannot create {}", path.display()))?;
    let cannot = || format!("cannot lock {}", path.display());
    match file.try_lock() {
        Ok(()) if file.metadata().with_context(cannot)?.nlink() > 0 => Ok(Some(file)),
        Ok(()) | Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error).with_context(cannot),
    }
}

/// Tells whoever started this process that VMs may connect.
fn say_ready() -> anyhow::Result<()> {
    let mut stdout = std::io::stdout();
    stdout
        .write_all(b"ready\n")
        .and_then(|()| stdout.flush())
        .context("cannot report that VMs may connect")
}
