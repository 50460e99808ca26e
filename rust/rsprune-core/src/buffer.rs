//! Large arrays of f32: in memory of our own, or in the pages of a file that the system may write
//! back. Values do not depend on where they lie.
#![allow(unsafe_code)] // a map of a file that nobody else can open; lines and pages seen as f32

use crate::disk::reserve;
use crate::error::{Error, Result};
use memmap2::MmapMut;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// f32 values, zeros at first. They start on a cache line, so no vector load straddles two.
pub struct Buffer {
    pages: Pages,
    len: usize,
}

enum Pages {
    Memory(Vec<Line>),
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
        Buffer { pages: Pages::Memory(vec![Line([0.0; 16]); len.div_ceil(16)]), len }
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
        let start = match &self.pages {
            Pages::Memory(lines) => lines.as_ptr().cast(),
            Pages::File(map) => map.as_ptr().cast(),
        };
        // SAFETY: a map starts on a page and lines are aligned; both hold at least `len` f32.
        unsafe { std::slice::from_raw_parts(start, self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        let start = match &mut self.pages {
            Pages::Memory(lines) => lines.as_mut_ptr().cast(),
            Pages::File(map) => map.as_mut_ptr().cast(),
        };
        // SAFETY: as in `deref`, and `&mut self` is the only way to the values.
        unsafe { std::slice::from_raw_parts_mut(start, self.len) }
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
                assert_eq!(room.copy(&values[..len]).unwrap()[..], values[..len]);
            }
        }
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
        fs::remove_dir_all(&folder).unwrap();
        let error = Room::Folder(&folder).zeros(1).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("rsprune-buffer"), "{error}");
    }
}
