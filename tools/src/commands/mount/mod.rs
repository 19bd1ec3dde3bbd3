//! `frazil mount`: a store as a read-only file system, over FUSE.

mod files;
mod fuse;
mod node;
#[cfg(test)]
mod tests;
mod view;

use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use frazil_snapstore::Store;
use fuser::{Config, MountOption, Session, SessionACL, SessionUnmounter};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::geteuid;
use serde_json::json;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use self::fuse::Fuse;
use self::view::View;
use super::{open_store, print_json};
use crate::cli::MountArgs;

/// The device through which FUSE talks to the kernel.
const DEVICE: &str = "/dev/fuse";
/// Programs that mount for users other than root.
const HELPERS: [&str; 2] = ["fusermount3", "fusermount"];
/// Requests served at once: some wait for the disk while others decompress.
const THREADS_MIN: usize = 4;
const THREADS_MAX: usize = 16;
/// A signal that comes within this time of the first is the same one, sent twice.
const SIGNAL_ECHO: Duration = Duration::from_millis(500);
/// If serving has not ended this long after unmounting, somebody uses the mount.
const IN_USE_AFTER: Duration = Duration::from_secs(2);

pub(crate) fn mount(args: &MountArgs, json: bool) -> anyhow::Result<()> {
    let store = open_store(Some(&args.store))?;
    check_device()?;
    let folder = check_folder(&args.folder, &store)?;
    // Before mounting: a signal that arrives in between would otherwise leave a dead mount.
    let signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("cannot handle signals")?;
    let mut session =
        Session::new(Fuse::new(View::new(Arc::clone(&store))), &folder, &config(args, &store))
            .map_err(|error| cannot_mount(&error, &folder))?;
    let asked_to_end = Arc::new(AtomicBool::new(false));
    unmount_on_signals(signals, session.unmount_callable(), &folder, &asked_to_end)?;
    announce(args, &store, &folder, json)?;
    let served = session.run();
    // Errors after a requested unmount are of no interest.
    if !asked_to_end.load(Ordering::Relaxed) {
        served.context("cannot serve the mounted store any more")?;
    }
    Ok(())
}

fn config(args: &MountArgs, store: &Store) -> Config {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let mut config = Config::default();
    let store = store.folder().and_then(|folder| folder.canonicalize().ok());
    let source = store.unwrap_or_default().display().to_string();
    // A comma would end the mount option.
    let source = source.replace(|c: char| c == ',' || c.is_control(), "?");
    config.mount_options = vec![
        MountOption::RO,
        MountOption::NoSuid,
        MountOption::NoDev,
        MountOption::NoExec,
        MountOption::NoAtime,
        MountOption::DefaultPermissions,
        MountOption::FSName(source),
        MountOption::Subtype("frazil".to_owned()),
    ];
    config.acl = if args.allow_other { SessionACL::All } else { SessionACL::Owner };
    config.n_threads = Some(cores.clamp(THREADS_MIN, THREADS_MAX));
    config.clone_fd = true;
    config
}

fn announce(args: &MountArgs, store: &Store, folder: &Path, json: bool) -> anyhow::Result<()> {
    if json {
        return print_json(&json!({
            "store": args.store, "folder": folder, "pid": std::process::id(),
            "snapshots": store.snapshots().len(),
        }));
    }
    outln!(
        "{} is mounted on {}: Ctrl-C or `umount {1}` unmounts it",
        store.describe(),
        folder.display()
    );
    Ok(())
}

/// Checks that FUSE is there and that this user may mount, to give a better error than mounting
/// would.
fn check_device() -> anyhow::Result<()> {
    match OpenOptions::new().read(true).write(true).open(DEVICE) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => bail!(
            "mount needs {DEVICE}, which does not exist: load the kernel module (`modprobe fuse`), \
             or give the container the device (`--device {DEVICE} --cap-add SYS_ADMIN`); `frazil \
             export` needs neither"
        ),
        Err(error) => bail!(
            "mount needs {DEVICE}, which cannot be opened ({error}): make it readable and writable \
             for this user (the package `fuse3` gives it mode 0666)"
        ),
    }
    let root = geteuid().is_root();
    if !root && !HELPERS.iter().any(|name| is_in_path(OsStr::new(name))) {
        bail!(
            "only root may mount without a helper: expected {} in $PATH, found neither: install \
             the package `fuse3`",
            HELPERS.join(" or ")
        );
    }
    Ok(())
}

fn is_in_path(name: &OsStr) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(name).is_file())
}

/// Checks the folder to mount on. Returns its absolute path.
fn check_folder(folder: &Path, store: &Store) -> anyhow::Result<PathBuf> {
    let given = folder;
    let what = given.display();
    if is_left_over(given) {
        // Its process is gone, so nobody will ever answer there.
        if unmount(given, UnmountFlags::DETACH).is_err() {
            // Users other than root need a helper to unmount.
            HELPERS.iter().any(|helper| {
                let mut command = Command::new(helper);
                command.args(["-u", "-z", "-q", "--"]).arg(given).stderr(Stdio::null());
                command.status().is_ok()
            });
        }
        if is_left_over(given) {
            bail!(
                "{what}: the process that served this mount has died: run `umount {what}` or \
                 `fusermount3 -u {what}`, and try again"
            );
        }
        errln!("frazil: {what}: unmounted a mount whose process had died");
    }
    let folder = given
        .canonicalize()
        .with_context(|| format!("{what}: expected a folder to mount on (`mkdir` makes one)"))?;
    let mut entries =
        folder.read_dir().with_context(|| format!("{what}: expected a folder to mount on"))?;
    if entries.next().is_some() {
        if is_mount_point(&folder) {
            bail!(
                "{what}: expected an empty folder, found one with something already mounted on it"
            );
        }
        bail!("{what}: expected an empty folder, found one with files, which would be hidden");
    }
    // A store below the mounted folder would be hidden from this process, which would wait for
    // itself.
    let store = store.folder().and_then(|store| store.canonicalize().ok());
    if let Some(store) =
        store.filter(|store| store.starts_with(&folder) || folder.starts_with(store))
    {
        bail!(
            "{what}: expected a folder that neither contains nor is in the store, {}",
            store.display()
        );
    }
    Ok(folder)
}

/// The error of the kernel or its helper, with advice where there is any.
fn cannot_mount(error: &io::Error, folder: &Path) -> anyhow::Error {
    let said = error.to_string();
    let advice = if said.contains("user_allow_other") {
        ": for users other than root, --allow-other needs the line `user_allow_other` in \
         /etc/fuse.conf"
    } else if error.kind() == io::ErrorKind::PermissionDenied && !geteuid().is_root() {
        ": expected a folder owned by this user"
    } else {
        ""
    };
    anyhow::anyhow!("cannot mount on {}: {}{advice}", folder.display(), said.trim_end())
}

/// True if `folder` is on another file system than its parent.
fn is_mount_point(folder: &Path) -> bool {
    let device = |path: &Path| path.metadata().ok().map(|metadata| metadata.dev());
    folder.parent().is_some_and(|parent| device(parent) != device(folder))
}

/// True if `folder` is the mount point of a file system whose process is gone.
fn is_left_over(folder: &Path) -> bool {
    let error = folder.metadata().err().and_then(|error| error.raw_os_error());
    error == Some(rustix::io::Errno::NOTCONN.raw_os_error())
}

/// Ctrl-C and `kill` unmount. While the folder is in use, it is detached instead and keeps working
/// for those who use it; a second signal ends this process at once.
fn unmount_on_signals(
    mut signals: Signals,
    mut unmounter: SessionUnmounter,
    folder: &Path,
    asked: &Arc<AtomicBool>,
) -> anyhow::Result<()> {
    let (folder, asked) = (folder.to_owned(), Arc::clone(asked));
    std::thread::Builder::new().name("frazil-signals".into()).spawn(move || {
        let mut first: Option<Instant> = None;
        for signal in signals.forever() {
            if first.is_some_and(|first| first.elapsed() > SIGNAL_ECHO) {
                std::process::exit(128 + signal);
            }
            if first.is_some() {
                continue;
            }
            first = Some(Instant::now());
            asked.store(true, Ordering::Relaxed);
            match unmounter.unmount() {
                // Without root, the helper always detaches the mount, and does not say whether it
                // is in use.
                Ok(()) => {
                    let folder = folder.clone();
                    std::thread::spawn(move || {
                        std::thread::sleep(IN_USE_AFTER);
                        tell_in_use(&folder, "");
                    });
                }
                Err(error) => match unmount(&folder, UnmountFlags::DETACH) {
                    Ok(()) => tell_in_use(&folder, &format!(" ({error})")),
                    Err(error) => errln!(
                        "frazil: cannot unmount {} ({error}): run `umount {0}`",
                        folder.display()
                    ),
                },
            }
        }
    })?;
    Ok(())
}

fn tell_in_use(folder: &Path, why: &str) {
    errln!(
        "frazil: {} is in use{why}: nothing more can be opened there, and frazil exits when the \
         last open file is closed; another Ctrl-C exits at once",
        folder.display()
    );
}
