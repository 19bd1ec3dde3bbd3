//! `frazil pager`: brings in memory for VMs in other processes.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use frazil_snapstore::StoreOptions;
use frazil_snapstore::pager::{self, ImageServer, PagerOptions, Replay};

use super::find_snapshot;
use crate::cli::{PagerArgs, WorkingSetArg};

/// How long the memory of a snapshot is kept for VMs to come.
const LINGER: Duration = Duration::from_secs(5);
/// How long the first may take.
const FIRST_PATIENCE: Duration = Duration::from_mins(1);
/// How long a resumed VM is watched for what it touches, if nobody says otherwise.
const RECORD: Duration = Duration::from_secs(1);

/// What the command line says about how memory is brought in.
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
    let socket = std::io::stdin().as_fd().try_clone_to_owned();
    pager::serve_one(socket.context("standard input is no socket")?)?;
    Ok(())
}

/// Until nobody has used it for a while.
fn serve_many(args: &PagerArgs, snapshot: &str, socket: &Path) -> anyhow::Result<()> {
    let Some(_lock) = lock_unless_served(socket)? else { return say_ready() };
    let (_, store, id) = find_snapshot(snapshot, StoreOptions::default())?;
    let image = frazil_vmm::shared_image(&store.pin(id)?)?;
    let options = options(args.no_fill, args.fill_rate, args.working_set, args.record_working_set);
    let server = Arc::new(ImageServer::new(image, options)?);
    // Of a server that is no more: we have its lock.
    let _none = std::fs::remove_file(socket);
    let at = || format!("cannot listen at {}", socket.display());
    // From the first moment on for nobody else.
    let before = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let listener = pager::listen(socket).with_context(at);
    rustix::process::umask(before);
    let listener = listener?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600)).with_context(at)?;
    let log = log_beside(socket)?;
    say_ready()?;
    let mut idle_until = Instant::now() + FIRST_PATIENCE;
    while server.users() > 0 || Instant::now() < idle_until {
        if server.users() > 0 {
            idle_until = Instant::now() + LINGER;
        }
        if let Some(user) = pager::accept(&listener, Duration::from_millis(200)).with_context(at)? {
            // It is not counted before its thread runs.
            idle_until = Instant::now() + LINGER;
            serve(&server, user)?;
        }
    }
    // Nobody finds it any more; who did a moment ago is served.
    let _gone = std::fs::remove_file(socket);
    while let Some(user) = pager::accept(&listener, Duration::ZERO).with_context(at)? {
        serve(&server, user)?;
        std::thread::sleep(Duration::from_millis(200));
    }
    while server.users() > 0 {
        std::thread::sleep(Duration::from_millis(200));
    }
    // Whatever went wrong with a VM, that VM has told; nobody else needs it now.
    let _gone = std::fs::remove_file(log);
    Ok(())
}

/// Has standard error go to a file beside the socket. This process is everybody's who shares the memory,
/// and may outlive the command that started it: whoever waits for the end of what that command prints
/// must not wait for us.
fn log_beside(socket: &Path) -> anyhow::Result<PathBuf> {
    let path = PathBuf::from(format!("{}.log", socket.display()));
    let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    rustix::stdio::dup2_stderr(&file).context("cannot redirect standard error")?;
    Ok(path)
}

fn serve(server: &Arc<ImageServer>, user: OwnedFd) -> anyhow::Result<()> {
    let server = Arc::clone(server);
    let serve = move || {
        if let Err(error) = server.serve(user) {
            tracing::warn!(%error, "a VM is not served");
        }
    };
    std::thread::Builder::new().name("frazil-user".into()).spawn(serve)?;
    Ok(())
}

/// None if another process serves there, and can be reached: whoever started this one can go there.
fn lock_unless_served(socket: &Path) -> anyhow::Result<Option<File>> {
    let until = Instant::now() + FIRST_PATIENCE;
    loop {
        if let Some(lock) = lock(socket)? {
            return Ok(Some(lock));
        }
        if pager::connect(socket).is_ok() {
            return Ok(None);
        }
        // It is about to begin, or to end.
        ensure!(
            Instant::now() < until,
            "another process holds {}.lock and does not serve at {}",
            socket.display(),
            socket.display()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// None if another process serves there.
fn lock(socket: &Path) -> anyhow::Result<Option<File>> {
    let path = PathBuf::from(format!("{}.lock", socket.display()));
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path);
    let file = file.with_context(|| format!("cannot create {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("cannot lock {}", path.display()))
        }
    }
}

/// Tells whoever started this process that VMs may connect.
fn say_ready() -> anyhow::Result<()> {
    let mut stdout = std::io::stdout();
    stdout.write_all(b"ready\n").and_then(|()| stdout.flush()).context("nobody waits")
}
