//! What makes names durable, and two folders change places in one step.
#![allow(unsafe_code)] // renameat2, which std does not have

use super::io_error;
use crate::error::Result;
use std::fs::File;
use std::path::Path;

/// Makes a rename in the folder of `path` durable.
pub(super) fn sync_folder(path: &Path) -> Result<()> {
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    let opened = File::open(folder).map_err(io_error(folder, "open"))?;
    match opened.sync_all() {
        // Some network file systems have no fsync of folders; there is nothing better to call.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        result => result.map_err(io_error(folder, "fsync of the folder")),
    }
}

/// Lets two folders of one file system change their names, at once: at no instant is either name
/// missing. `false` where the system cannot; nothing has happened then.
#[cfg(target_os = "linux")]
pub fn exchange(one: &Path, other: &Path) -> Result<bool> {
    use std::ffi::CString;
    use std::io;
    use std::os::unix::ffi::OsStrExt;

    let name = |path: &Path| {
        CString::new(path.as_os_str().as_bytes())
            .map_err(io::Error::other)
            .map_err(io_error(path, "exchange of names"))
    };
    let (a, b) = (name(one)?, name(other)?);
    let here = libc::AT_FDCWD;
    // SAFETY: both are NUL-terminated and live for the whole call.
    let code = unsafe {
        libc::syscall(
            libc::SYS_renameat2,
            here,
            a.as_ptr(),
            here,
            b.as_ptr(),
            libc::RENAME_EXCHANGE,
        )
    };
    if code == 0 {
        sync_folder(one)?;
        return Ok(true);
    }
    match io::Error::last_os_error() {
        e if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS)) => Ok(false),
        e => Err(io_error(one, format!("exchange of names with {}", other.display()))(e)),
    }
}

/// Elsewhere there is no such call.
#[cfg(not(target_os = "linux"))]
pub fn exchange(_: &Path, _: &Path) -> Result<bool> {
    Ok(false)
}
