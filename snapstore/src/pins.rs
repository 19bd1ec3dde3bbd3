//! Pins in a directory: one file per pin, whose `flock` shows that its owner is alive.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::storage::Pin;

/// Number of pins this process has made so far, to give their files different names.
static COUNT: AtomicU64 = AtomicU64::new(0);

#[derive(Debug)]
struct DirPin {
    path: PathBuf,
    // The kernel drops the flock when the descriptor closes, however the process ends.
    _file: File,
}

impl Pin for DirPin {}

impl Drop for DirPin {
    fn drop(&mut self) {
        // If the file stays, the next `pinned` finds it unlocked and removes it.
        let _left_behind = fs::remove_file(&self.path);
    }
}

pub(crate) fn pin(folder: &Path, name: &str) -> io::Result<Box<dyn Pin>> {
    match fs::create_dir(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    loop {
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = folder.join(format!("{name}.{}.{count}", std::process::id()));
        let file = match OpenOptions::new().write(true).create_new(true).open(&path) {
            // Left by an earlier process with the same id: use another name.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
            other => other?,
        };
        // Until we have the lock, `pinned` may take the file for a dead process's and remove it.
        match file.try_lock() {
            Ok(()) if file.metadata()?.nlink() > 0 => {
                return Ok(Box::new(DirPin { path, _file: file }));
            }
            Ok(()) | Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => {
                let _left_behind = fs::remove_file(&path);
                return Err(error);
            }
        }
    }
}

pub(crate) fn pinned(folder: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let file_name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // Other files in the folder are not pins.
        let Some(name) = file_name.split('.').next().filter(|name| is_hex(name)) else { continue };
        // Open for writing if possible: some file systems lock only writable descriptors.
        let opened = OpenOptions::new().write(true).open(&path).or_else(|_| File::open(&path));
        let file = match opened {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            other => other?,
        };
        match file.try_lock() {
            Ok(()) => {
                // Nobody owns it. If its owner is just about to lock it, it then checks that the
                // file still exists. A directory is not a pin.
                fs::remove_file(&path).or_else(|error| match error.kind() {
                    io::ErrorKind::NotFound | io::ErrorKind::IsADirectory => Ok(()),
                    _ => Err(error),
                })?;
            }
            Err(TryLockError::WouldBlock) => names.push(name.to_owned()),
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
    Ok(names)
}

fn is_hex(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_are_seen_until_they_are_dropped() {
        let scratch = tempfile::tempdir().unwrap();
        let folder = scratch.path().join("pins");
        assert!(pinned(&folder).unwrap().is_empty(), "no folder is no pins");
        let (one, again) = (pin(&folder, "aa").unwrap(), pin(&folder, "aa").unwrap());
        let other = pin(&folder, "bb").unwrap();
        let mut found = pinned(&folder).unwrap();
        found.sort();
        assert_eq!(found, ["aa", "aa", "bb"]);
        drop(one);
        drop(other);
        assert_eq!(pinned(&folder).unwrap(), ["aa"]);
        drop(again);
        assert!(pinned(&folder).unwrap().is_empty());
        fs::write(folder.join("notes.txt"), "").unwrap();
        fs::create_dir(folder.join("beef")).unwrap();
        assert!(pinned(&folder).is_ok_and(|names| names.is_empty()));
        assert!(folder.join("notes.txt").exists(), "what is not ours stays");
    }

    #[test]
    fn the_pin_of_a_dead_process_is_cleared_away() {
        let scratch = tempfile::tempdir().unwrap();
        fs::write(scratch.path().join("aa.1.0"), "").unwrap();
        assert!(pinned(scratch.path()).unwrap().is_empty());
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0);
    }
}
