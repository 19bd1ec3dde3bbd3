//! Unix sockets that only their owner may connect to.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

/// Creates a nonblocking listener at `socket` that only this user may connect to. Replaces a socket
/// that a dead process left behind.
///
/// # Errors
/// If another process listens there, something other than a socket is there, or a call fails.
pub(crate) fn listen(socket: &Path) -> io::Result<UnixListener> {
    if UnixStream::connect(socket).is_ok() {
        let kind = io::ErrorKind::AddrInUse;
        return Err(io::Error::new(kind, "another process is listening there"));
    }
    match fs::symlink_metadata(socket) {
        Ok(found) if found.file_type().is_socket() => fs::remove_file(socket)?,
        Ok(_) => {
            let kind = io::ErrorKind::AlreadyExists;
            return Err(io::Error::new(kind, "it exists and is not a socket"));
        }
        Err(_nothing_there) => {}
    }
    let listener = UnixListener::bind(socket)?;
    fs::set_permissions(socket, fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}
