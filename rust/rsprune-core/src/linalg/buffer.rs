//! f32 values in memory of our own, or in the pages of a file that the system may write back.
#![allow(unsafe_code)] // a map of a file that nobody else can open

use crate::disk::reserve;
use crate::error::{Error, Result};
use memmap2::MmapMut;
use std::fs::{self, OpenOptions};
use std::ops::{Deref, DerefMut};
use std::path::Path;

/// Zeros at first.
pub enum Buffer {
    /// Anonymous memory.
    Memory(Vec<f32>),
    /// A file without a name: its pages are not anonymous, and it goes with the map.
    File(MmapMut),
}

impl Buffer {
    /// `len` zeros in memory.
    pub fn memory(len: usize) -> Buffer {
        Buffer::Memory(vec![0.0; len])
    }

    /// `len` zeros in a new file at `path`, which loses its name at once.
    pub fn file(path: &Path, len: usize) -> Result<Buffer> {
        let failed = |source| {
            let action = format!("reservation of {} bytes for sums", len * 4);
            Error::Io { path: path.to_path_buf(), action, source }
        };
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).open(path).map_err(failed)?;
        let room = reserve(&file, (len * 4).max(1) as u64);
        let named = fs::remove_file(path);
        room.and(named).map_err(failed)?;
        // SAFETY: the file has no name any more, so nobody else can open, cut or write it.
        Ok(Buffer::File(unsafe { MmapMut::map_mut(&file) }.map_err(failed)?))
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match self {
            Buffer::Memory(values) => values,
            // SAFETY: a map starts on a page, any bits are an f32, and it holds whole ones only.
            Buffer::File(map) => unsafe {
                std::slice::from_raw_parts(map.as_ptr().cast(), map.len() / 4)
            },
        }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        match self {
            Buffer::Memory(values) => values,
            // SAFETY: as in `deref`, and `&mut self` is the only way to the map.
            Buffer::File(map) => unsafe {
                std::slice::from_raw_parts_mut(map.as_mut_ptr().cast(), map.len() / 4)
            },
        }
    }
}
