//! A mounted store as a FUSE file system: the kernel's requests and their replies.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty,
    ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, Request,
};
use rustix::process::{getgid, getuid};

use super::files::{OpenFiles, Seek};
use super::node::{Node, Part};
use super::view::{Attr, Kind, Refused, Result, View};
use crate::output;

/// How long the kernel may cache what cannot change.
const FOR_EVER: Duration = Duration::from_hours(24);
/// Requests in the background, such as read-ahead, that the kernel may have under way at once.
const BACKGROUND_REQUESTS_MAX: u16 = 64;
/// The most distinct messages about damage; each is printed once.
const DAMAGE_PRINTED_MAX: usize = 1000;

/// The FUSE file system.
pub(super) struct Fuse {
    view: View,
    files: OpenFiles,
    uid: u32,
    gid: u32,
    /// Messages about damage that were printed.
    printed: Mutex<HashSet<String>>,
}

impl Fuse {
    pub(super) fn new(view: View) -> Self {
        Self {
            view,
            files: OpenFiles::default(),
            uid: getuid().as_raw(),
            gid: getgid().as_raw(),
            printed: Mutex::default(),
        }
    }

    fn attr(&self, attr: &Attr) -> FileAttr {
        let time = SystemTime::UNIX_EPOCH + Duration::from_millis(attr.time_unix_ms);
        let (kind, perm, nlink) = match attr.kind {
            // A link count of 1 means that the number of subfolders is unknown; `find` then looks
            // itself.
            Kind::Folder => (FileType::Directory, 0o555, 1),
            Kind::File => (FileType::RegularFile, 0o444, 1),
            Kind::Link => (FileType::Symlink, 0o777, 1),
        };
        FileAttr {
            ino: INodeNo(attr.node.ino()),
            size: attr.len_bytes,
            blocks: attr.data_bytes.div_ceil(512),
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind,
            perm,
            nlink,
            uid: self.uid,
            gid: self.gid,
            rdev: 0,
            // The default size of a frame, which is decompressed as a whole.
            blksize: 64 << 10,
            flags: 0,
        }
    }

    /// The error number for the kernel. Damage to the store is also reported on standard error.
    fn errno(&self, refused: Refused, place: &dyn Fn() -> String) -> Errno {
        match refused {
            Refused::NotFound => Errno::ENOENT,
            Refused::NotAFolder => Errno::ENOTDIR,
            Refused::IsAFolder => Errno::EISDIR,
            Refused::BadHandle => Errno::EBADF,
            Refused::Beyond => Errno::ENXIO,
            Refused::Damaged(error) => {
                let error = output::error(&error);
                let mut printed = self.printed.lock().unwrap_or_else(PoisonError::into_inner);
                if printed.len() < DAMAGE_PRINTED_MAX && printed.insert(error.clone()) {
                    errln!("frazil: {}: {}", place(), output::plain(&error));
                    if printed.len() == DAMAGE_PRINTED_MAX {
                        errln!("frazil: there may be more damage: `frazil verify` finds all of it");
                    }
                }
                Errno::EIO
            }
        }
    }

    fn node(ino: INodeNo) -> Result<Node> {
        Node::of(ino.0).ok_or(Refused::NotFound)
    }

    /// What `ino` is part of, for messages.
    fn place(&self, ino: INodeNo) -> String {
        match Node::of(ino.0) {
            Some(Node::In(number, _)) => {
                let name = self.view.id(number).map(|(_, name)| name).unwrap_or_default();
                format!("ids/{name}")
            }
            _ => "the store".to_owned(),
        }
    }

    /// How long the kernel may cache what it was told of `node`.
    fn cache_time(node: Node) -> Duration {
        match node {
            // The folder itself goes away when the snapshot is forgotten.
            Node::In(_, part) if part != Part::Folder => FOR_EVER,
            _ => Duration::ZERO,
        }
    }
}

impl Filesystem for Fuse {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Older kernels do without, and are only slower.
        let _supported = config.add_capabilities(InitFlags::FUSE_PARALLEL_DIROPS);
        let _before = config.set_max_background(BACKGROUND_REQUESTS_MAX);
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = name
            .to_str()
            .ok_or(Refused::NotFound)
            .and_then(|name| self.view.lookup(Self::node(parent)?, name));
        match found {
            Ok(attr) => {
                reply.entry(&Self::cache_time(attr.node), &self.attr(&attr), Generation(0));
            }
            Err(refused) => reply.error(self.errno(refused, &|| self.place(parent))),
        }
    }

    fn getattr(
        &self,
        _request: &Request,
        ino: INodeNo,
        handle: Option<FileHandle>,
        reply: ReplyAttr,
    ) {
        // An open file keeps its attributes, even if its snapshot is gone.
        let open = handle.and_then(|handle| self.files.get(handle.0).ok()?.attr());
        let attr = open.map_or_else(|| self.view.attr(Self::node(ino)?), Ok);
        match attr {
            Ok(attr) => reply.attr(&Self::cache_time(attr.node), &self.attr(&attr)),
            Err(refused) => reply.error(self.errno(refused, &|| self.place(ino))),
        }
    }

    fn readlink(&self, _request: &Request, ino: INodeNo, reply: ReplyData) {
        match Self::node(ino).and_then(|node| self.view.link(node)) {
            Ok(target) => reply.data(target.as_bytes()),
            Err(refused) => reply.error(self.errno(refused, &|| self.place(ino))),
        }
    }

    fn open(&self, _request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match Self::node(ino).and_then(|node| self.files.open(&self.view, node)) {
            // Pages of it in the page cache stay valid for ever.
            Ok(handle) => reply.opened(
                FileHandle(handle),
                FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH,
            ),
            Err(refused) => reply.error(self.errno(refused, &|| self.place(ino))),
        }
    }

    fn read(
        &self,
        _request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let open = self.files.get(handle.0);
        let read = open.as_ref().map_err(|_gone| Refused::BadHandle);
        match read.and_then(|open| open.read(offset, size)) {
            Ok(bytes) => reply.data(&bytes),
            Err(refused) => {
                let place = || match &open {
                    Ok(open) => format!("{}, from byte {offset} on", open.path()),
                    Err(_gone) => self.place(ino),
                };
                reply.error(self.errno(refused, &place));
            }
        }
    }

    fn lseek(
        &self,
        _request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let what = match whence {
            libc::SEEK_DATA => Seek::Data,
            libc::SEEK_HOLE => Seek::Hole,
            // The kernel handles the other kinds itself.
            _ => return reply.error(Errno::EINVAL),
        };
        let found = u64::try_from(offset)
            .map_err(|_negative| Refused::Beyond)
            .and_then(|offset| self.files.get(handle.0)?.seek(offset, what));
        match found {
            Ok(place) => reply.offset(i64::try_from(place).unwrap_or(i64::MAX)),
            Err(refused) => reply.error(self.errno(refused, &|| self.place(ino))),
        }
    }

    fn release(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.files.close(handle.0);
        reply.ok();
    }

    fn opendir(&self, _request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match Self::node(ino).and_then(|node| self.files.open(&self.view, node)) {
            Ok(handle) => reply.opened(FileHandle(handle), FopenFlags::empty()),
            Err(refused) => reply.error(self.errno(refused, &|| self.place(ino))),
        }
    }

    fn readdir(
        &self,
        _request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let open = match self.files.get(handle.0) {
            Ok(open) => open,
            Err(refused) => return reply.error(self.errno(refused, &|| self.place(ino))),
        };
        let super::files::Open::Folder(entries) = &*open else {
            return reply.error(Errno::ENOTDIR);
        };
        let up = Self::node(ino).map_or(Node::Root, Node::parent);
        let dots = [(ino.0, Kind::Folder, "."), (up.ino(), Kind::Folder, "..")];
        let entries =
            entries.iter().map(|entry| (entry.node.ino(), entry.kind, entry.name.as_str()));
        let all = dots.into_iter().chain(entries).zip(1_u64..);
        for ((ino, kind, name), next) in all.skip(usize::try_from(offset).unwrap_or(usize::MAX)) {
            let kind = match kind {
                Kind::Folder => FileType::Directory,
                Kind::File => FileType::RegularFile,
                Kind::Link => FileType::Symlink,
            };
            if reply.add(INodeNo(ino), next, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.files.close(handle.0);
        reply.ok();
    }

    fn statfs(&self, _request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        // Free space has no meaning here; names may have up to 255 bytes.
        reply.statfs(0, 0, 0, 0, 0, 4096, 255, 4096);
    }
}
