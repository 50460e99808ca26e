//! Room on disk, taken before it is needed.
#![allow(unsafe_code)] // fallocate and fstatvfs, which std does not have

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;

/// Gives `file` its length with the disk blocks behind it, where the file system can.
pub fn reserve(file: &File, length: u64) -> io::Result<()> {
    // Asked first, because a reservation that fails has filled the disk for a moment, for others.
    if free_bytes(file)?.is_some_and(|free| free < length) {
        return Err(io::Error::from_raw_os_error(libc::ENOSPC));
    }
    match allocate(file, length).map_err(|e| (e.raw_os_error(), e)) {
        Err((Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOSYS), _)) => file.set_len(length),
        result => result.map_err(|(_, e)| e),
    }
}

/// What is free for us on the file system of `file`; `None` where it does not say.
fn free_bytes(file: &File) -> io::Result<Option<u64>> {
    let mut stat = MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: the descriptor is open for the whole call, and `stat` has the struct's size.
    if unsafe { libc::fstatvfs(file.as_raw_fd(), stat.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a call that succeeded has filled it.
    let stat = unsafe { stat.assume_init() };
    let known = stat.f_blocks > 0; // some network file systems say 0 of everything
    #[allow(clippy::unnecessary_cast)] // both types differ between systems
    let free = (stat.f_bavail as u64).saturating_mul(stat.f_frsize as u64);
    Ok(known.then_some(free))
}

/// `fallocate` and not `posix_fallocate`: where the file system cannot, glibc's version of the
/// latter writes into every block of the file instead of saying so.
#[cfg(target_os = "linux")]
fn allocate(file: &File, length: u64) -> io::Result<()> {
    let length = libc::off64_t::try_from(length).map_err(io::Error::other)?;
    loop {
        // SAFETY: the descriptor is open for the whole call, which touches no memory of ours.
        if unsafe { libc::fallocate64(file.as_raw_fd(), 0, 0, length) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn allocate(_: &File, _: u64) -> io::Result<()> {
    Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
}
