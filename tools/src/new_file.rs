//! Files that commands write, which appear only when they are complete.
//!
//! Until then a file has no name, so that nothing is left of it however the process ends. On a file
//! system without unnamed files it has a temporary name that ends in `.part`.

use std::fs::{File, FileType};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat};
use rustix::io::Errno;
use tempfile::TempPath;

/// The folder of this process's open files, by number.
const OPEN_FILES: &str = "/proc/self/fd";

/// A file that is being written.
#[derive(Debug)]
pub(crate) struct NewFile {
    file: File,
    /// Its temporary name, if it must have one.
    part: Option<TempPath>,
    target: PathBuf,
    replace: bool,
}

impl NewFile {
    /// Permissions for the owner alone: the contents may be secret.
    pub(crate) const PRIVATE: u32 = 0o600;
    /// The usual permissions of a file that a command writes.
    pub(crate) const SHARED: u32 = 0o666;

    /// Begins to write the file `path`, with permissions `mode` less the umask. With `replace`, an
    /// existing regular file is replaced; if `path` is a link, the file it leads to.
    ///
    /// # Errors
    /// If something else exists there; if its folder cannot be written to.
    pub(crate) fn create(path: &Path, replace: bool, mode: u32) -> anyhow::Result<Self> {
        let target = target(path, replace)?;
        let failed = || format!("cannot write {}", path.display());
        let folder = folder_of(&target);
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let (file, part) = match rustix::fs::open(folder, flags, Mode::from_raw_mode(mode)) {
            Ok(file) if Path::new(OPEN_FILES).is_dir() => (file.into(), None),
            // The file system has no unnamed files, or /proc is missing, without which one cannot
            // be named.
            Ok(_) | Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {
                let mut builder = part_name();
                let named = builder.permissions(PermissionsExt::from_mode(mode));
                let (file, part) = named.tempfile_in(folder).with_context(failed)?.into_parts();
                (file, Some(part))
            }
            Err(error) => return Err(error).with_context(failed),
        };
        Ok(Self { file, part, target, replace })
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Makes the file durable, and gives it its final name.
    ///
    /// # Errors
    /// If that fails; without `replace`, if something else has taken that name meanwhile.
    pub(crate) fn publish(self) -> anyhow::Result<()> {
        let Self { file, part, target, replace } = self;
        let what = target.display();
        let failed = || format!("cannot write {what}");
        file.sync_all().with_context(failed)?;
        let folder = folder_of(&target);
        let named = match part {
            None if !replace => link(&file, &target),
            None => part_name().make_in(folder, |name| link(&file, name)).and_then(|named| {
                named.into_temp_path().persist(&target).map_err(|error| error.error)
            }),
            Some(part) if replace => part.persist(&target).map_err(|error| error.error),
            Some(part) => part.persist_noclobber(&target).map_err(|error| error.error),
        };
        match named {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                bail!("{what}: expected no such file, found one created meanwhile")
            }
            named => named.with_context(failed)?,
        }
        // Makes its name durable too, where folders can be synced.
        let _as_far_as_that_goes = File::open(folder).and_then(|folder| folder.sync_all());
        Ok(())
    }
}

/// The path to write for `path`: where links lead.
fn target(path: &Path, replace: bool) -> anyhow::Result<PathBuf> {
    let what = path.display();
    if path.file_name().is_none() || path.as_os_str().as_bytes().ends_with(b"/") {
        bail!("{what}: expected the name of a file, found that of a folder");
    }
    match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(path.to_owned()),
        Err(error) => return Err(error).with_context(|| format!("cannot write {what}")),
        Ok(_) => {}
    }
    let target = path.canonicalize().with_context(|| {
        format!("{what}: expected a file or nothing, found a link that leads nowhere")
    })?;
    let kind = target.metadata().with_context(|| format!("cannot write {what}"))?.file_type();
    ensure!(kind.is_file(), "{what}: expected a file or nothing, found {}", kind_name(kind));
    ensure!(replace, "{what}: expected no such file, found one: --force replaces it");
    Ok(target)
}

/// The kind of a file, in words.
pub(crate) fn kind_name(kind: FileType) -> &'static str {
    match kind {
        kind if kind.is_dir() => "a folder",
        kind if kind.is_fifo() => "a pipe",
        kind if kind.is_socket() => "a socket",
        kind if kind.is_char_device() => "a character device",
        kind if kind.is_block_device() => "a block device",
        kind if kind.is_symlink() => "a link",
        kind if kind.is_file() => "a file",
        _ => "something else",
    }
}

fn folder_of(target: &Path) -> &Path {
    target.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn part_name() -> tempfile::Builder<'static, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".frazil-").suffix(".part");
    builder
}

/// Gives an unnamed file a name.
fn link(file: &File, name: &Path) -> io::Result<()> {
    let open = format!("{OPEN_FILES}/{}", file.as_raw_fd());
    Ok(linkat(CWD, open, CWD, name, AtFlags::SYMLINK_FOLLOW)?)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;
    use std::os::unix::fs::symlink;

    use super::*;

    fn entries(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn write(path: &Path, replace: bool, text: &str) -> anyhow::Result<()> {
        let new = NewFile::create(path, replace, NewFile::PRIVATE)?;
        new.file().write_all(text.as_bytes())?;
        new.publish()
    }

    #[test]
    fn a_file_is_there_when_it_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new");
        let new = NewFile::create(&path, false, NewFile::PRIVATE).unwrap();
        new.file().write_all(b"one").unwrap();
        // On file systems with unnamed files, such as those that tests run on.
        assert_eq!(entries(folder.path()), [""; 0]);
        drop(new);
        assert_eq!(entries(folder.path()), [""; 0]);
        write(&path, false, "two").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "two");
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let refused = write(&path, false, "three").unwrap_err().to_string();
        assert!(refused.contains("--force"), "{refused}");
        write(&path, true, "three").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "three");
        assert_eq!(entries(folder.path()), ["new"]);
    }

    #[test]
    fn what_comes_in_between_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new");
        let [one, two] = [(); 2].map(|()| NewFile::create(&path, false, NewFile::PRIVATE).unwrap());
        one.publish().unwrap();
        let refused = two.publish().unwrap_err().to_string();
        assert!(refused.contains("meanwhile"), "{refused}");
        assert_eq!(entries(folder.path()), ["new"]);
    }

    #[test]
    fn a_part_with_a_name_goes_the_same_way() {
        let folder = tempfile::tempdir().unwrap();
        let part = |replace| {
            let (file, part) = part_name().tempfile_in(folder.path()).unwrap().into_parts();
            NewFile { file, part: Some(part), target: folder.path().join("new"), replace }
        };
        part(false).publish().unwrap();
        part(false).publish().unwrap_err();
        part(true).publish().unwrap();
        drop(part(true));
        assert_eq!(entries(folder.path()), ["new"]);
    }

    #[test]
    fn only_files_are_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir(at("folder")).unwrap();
        rustix::fs::mknodat(CWD, at("pipe"), rustix::fs::FileType::Fifo, Mode::RUSR, 0).unwrap();
        symlink("/dev/null", at("null")).unwrap();
        symlink("nowhere", at("dangling")).unwrap();
        for (name, says) in [
            ("folder", "a folder"),
            ("pipe", "a pipe"),
            ("null", "a character device"),
            ("dangling", "leads nowhere"),
            ("new/", "that of a folder"),
            ("..", "that of a folder"),
        ] {
            for replace in [false, true] {
                let refused = write(&at(name), replace, "x").unwrap_err().to_string();
                assert!(refused.contains(says), "{name}: {refused}");
            }
        }
        let missing = format!("{:#}", write(&at("no/new"), true, "x").unwrap_err());
        assert!(missing.contains("No such file"), "{missing}");
        // A link to a file stays a link.
        fs::write(at("file"), "old").unwrap();
        symlink("file", at("link")).unwrap();
        write(&at("link"), true, "new").unwrap();
        assert_eq!(fs::read_to_string(at("file")).unwrap(), "new");
        assert!(at("link").symlink_metadata().unwrap().is_symlink());
    }
}
