//! Large arrays of f32: in memory of our own, or in the pages of a file that the system may write
//! back. Values do not depend on where they lie.
#![allow(unsafe_code)] // a map of a file that nobody else can open, seen as f32

use crate::disk::reserve;
use crate::error::{Error, Result};
use memmap2::MmapMut;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};

/// Values of a cache line.
const LINE: usize = 16;

/// f32 values, zeros at first. They start on a cache line, so no vector load straddles two.
pub struct Buffer {
    pages: Pages,
    len: usize,
}

enum Pages {
    /// With where the first line begins. Not allocated as aligned: glibc's heap does not use the
    /// holes again that aligned arrays leave (a solver took 23 matrices instead of 8).
    Memory(Vec<f32>, usize),
    /// A file without a name: its pages are not anonymous, and it goes with the map.
    File(MmapMut),
}

/// Where buffers are made.
#[derive(Clone, Copy)]
pub enum Room<'a> {
    /// In anonymous memory.
    Memory,
    /// In files without a name on the disk of a folder.
    Folder(&'a Path),
}

impl Room<'_> {
    /// `len` zeros.
    pub fn zeros(self, len: usize) -> Result<Buffer> {
        match self {
            Room::Memory => Ok(Buffer::memory(len)),
            Room::Folder(folder) => Buffer::file(folder, len),
        }
    }

    /// The same values once more.
    pub fn copy(self, values: &[f32]) -> Result<Buffer> {
        let mut buffer = self.zeros(values.len())?;
        buffer.copy_from_slice(values);
        Ok(buffer)
    }
}

impl Buffer {
    /// `len` zeros in memory.
    pub fn memory(len: usize) -> Buffer {
        let values = vec![0.0f32; len + LINE - 1];
        let first = values.as_ptr().align_offset(LINE * 4);
        Buffer { pages: Pages::Memory(values, first), len }
    }

    /// Keeps the first `len` values; the room of the others is not given back.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    fn file(folder: &Path, len: usize) -> Result<Buffer> {
        let bytes = (len * 4).max(1);
        let (path, file) = nameless(folder)?;
        let failed = |source| {
            let action = format!("reservation of {bytes} bytes for sums and solvers");
            Error::Io { path: path.clone(), action, source }
        };
        reserve(&file, bytes as u64).map_err(failed)?;
        // SAFETY: the file has no name any more, so nobody else can open, cut or write it.
        let map = unsafe { MmapMut::map_mut(&file) }.map_err(failed)?;
        Ok(Buffer { pages: Pages::File(map), len })
    }
}

/// A new file that has lost its name, and which that was.
fn nameless(folder: &Path) -> Result<(PathBuf, File)> {
    for number in 0.. {
        let path = folder.join(format!("spilled-{number}"));
        let failed = |source| Error::Io { path: path.clone(), action: "creation".into(), source };
        match OpenOptions::new().read(true).write(true).create_new(true).open(&path) {
            // A process that was killed before the next line leaves a name behind.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
            Err(error) => return Err(failed(error)),
            Ok(file) => {
                fs::remove_file(&path).map_err(failed)?;
                return Ok((path, file));
            }
        }
    }
    unreachable!("some number is free")
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &self.pages {
            Pages::Memory(values, first) => &values[*first..*first + self.len],
            // SAFETY: a map starts on a page, any bits are an f32, and it holds `len` of them.
            Pages::File(map) => unsafe {
                std::slice::from_raw_parts(map.as_ptr().cast(), self.len)
            },
        }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        match &mut self.pages {
            Pages::Memory(values, first) => &mut values[*first..*first + self.len],
            // SAFETY: as in `deref`, and `&mut self` is the only way to the map.
            Pages::File(map) => unsafe {
                std::slice::from_raw_parts_mut(map.as_mut_ptr().cast(), self.len)
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_a_name_holds_what_memory_holds() {
        let folder = std::env::temp_dir().join(format!("rsprune-buffer-{}", std::process::id()));
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("spilled-0"), "left behind").unwrap();
        let values: Vec<f32> = (0..1000).map(|i| i as f32).collect();
        for len in [0, 1, 15, 16, 1000] {
            for room in [Room::Memory, Room::Folder(&folder)] {
                assert!(room.zeros(len).unwrap().iter().all(|v| *v == 0.0));
                let mut copy = room.copy(&values[..len]).unwrap();
                assert_eq!(copy[..], values[..len]);
                copy.truncate(len / 2);
                assert_eq!(copy[..], values[..len / 2]);
                assert!((copy.as_ptr() as usize).is_multiple_of(LINE * 4));
            }
        }
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
        fs::remove_dir_all(&folder).unwrap();
        let error = Room::Folder(&folder).zeros(1).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("rsprune-buffer"), "{error}");
    }
}
