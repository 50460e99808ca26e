//! Writes safetensors files whose layout is planned before the first byte is known.
//!
//! plan -> create (temp file, whole length reserved) -> put in any order -> finish (fsync,
//! rename, fsync of the folder). A file that stands under its own name is complete and on disk;
//! a run that dies leaves at most a `.tmp`, which the next run replaces.

use super::folder::sync_folder;
use super::layout::Layout;
use super::reader::Shard;
use super::{broken, io_error};
use crate::disk::reserve;
use crate::error::{Error, Result};
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Names listed in one message.
const LISTED: usize = 5;

/// Bytes of one step of a copy.
const PIECE: u64 = 4 << 20;

/// A file that is being filled. Dropped before [`Writer::finish`], it removes its temp file.
#[derive(Debug)]
pub struct Writer {
    temp: Temp,
    layout: Layout,
    done: Vec<bool>,
}

impl Writer {
    /// Creates `<path>.tmp` with its full length reserved, so that a full disk is an error now
    /// and not after hours, and writes the header.
    pub fn create(path: impl Into<PathBuf>, layout: Layout) -> Result<Writer> {
        let temp = Temp::create(path.into())?;
        let length = layout.file_len();
        reserve(&temp.file, length)
            .map_err(io_error(&temp.path, format!("reservation of {length} bytes")))?;
        temp.write_at(layout.header_bytes(), 0, "the header")?;
        let done = vec![false; layout.infos().len()];
        Ok(Writer { temp, layout, done })
    }

    /// The plan that is being filled.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Writes all bytes of the tensor `name` to their planned place. In any order, each once.
    pub fn put(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let i = self.expect(name, bytes.len() as u64)?;
        let offset = self.layout.infos()[i].offset;
        self.temp.write_at(bytes, offset, &format!("tensor {name:?}"))?;
        self.done[i] = true;
        Ok(())
    }

    /// Copies to tensor `name` what `source` calls `from`, a piece at a time.
    pub fn copy(&mut self, name: &str, source: &Shard, from: &str) -> Result<()> {
        let nbytes = source.info(from)?.nbytes;
        let i = self.expect(name, nbytes)?;
        let offset = self.layout.infos()[i].offset;
        let mut piece = vec![0; nbytes.min(PIECE) as usize];
        for start in (0..nbytes).step_by(PIECE as usize) {
            let piece = &mut piece[..(nbytes - start).min(PIECE) as usize];
            source.read_part(from, start, piece)?;
            self.temp.write_at(piece, offset + start, &format!("tensor {name:?}"))?;
        }
        self.done[i] = true;
        Ok(())
    }

    /// The place of tensor `name`, which is about to be written with `nbytes` bytes.
    fn expect(&self, name: &str, nbytes: u64) -> Result<usize> {
        let path = &self.temp.target;
        let Some(i) = self.layout.position(name) else {
            let (path, name) = (path.clone(), name.to_string());
            return Err(Error::MissingTensor { path, name });
        };
        let info = &self.layout.infos()[i];
        if nbytes != info.nbytes {
            return Err(Error::Shape {
                what: format!("bytes of tensor {name:?} for {}", path.display()),
                expected: format!("{} ({} {:?})", info.nbytes, info.dtype, info.shape),
                found: nbytes.to_string(),
            });
        }
        if self.done[i] {
            return Err(broken(path, format!("tensor {name:?} was put twice")));
        }
        Ok(i)
    }

    /// Makes the file durable and shows it under its name; an error if a tensor was not put.
    pub fn finish(mut self) -> Result<()> {
        let infos = self.layout.infos().iter().zip(&self.done);
        let missing: Vec<_> = infos.filter(|(_, done)| !**done).map(|(t, _)| &t.name).collect();
        if !missing.is_empty() {
            let (count, all) = (missing.len(), self.done.len());
            let listed = &missing[..count.min(LISTED)];
            let dots = if count > LISTED { ", ..." } else { "" };
            let reason = format!("{count} of {all} tensors were never put: {listed:?}{dots}");
            return Err(broken(&self.temp.target, reason));
        }
        self.temp.commit()
    }
}

/// Writes a small file as a whole: a reader sees the old bytes or the new ones, never a part.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut temp = Temp::create(path.to_path_buf())?;
    temp.write_at(bytes, 0, "the file")?;
    temp.commit()
}

/// `<target>.tmp`, until it is renamed or dropped.
#[derive(Debug)]
struct Temp {
    file: File,
    path: PathBuf,
    target: PathBuf,
    renamed: bool,
}

impl Temp {
    /// Replaces a stale temp file, but never writes into one: it may be a link or still open.
    fn create(target: PathBuf) -> Result<Temp> {
        let mut path = OsString::from(&target);
        path.push(".tmp");
        let path = PathBuf::from(path);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(io_error(&path, "removal of a stale temp file")(e));
            }
            _ => {}
        }
        let mut options = OpenOptions::new();
        let file = options.write(true).create_new(true).open(&path);
        Ok(Temp { file: file.map_err(io_error(&path, "create"))?, path, target, renamed: false })
    }

    fn write_at(&self, bytes: &[u8], offset: u64, what: &str) -> Result<()> {
        self.file.write_all_at(bytes, offset).map_err(|e| {
            let action = format!("write of {what}, {} bytes at {offset}", bytes.len());
            io_error(&self.path, action)(e)
        })
    }

    /// fsync, rename, fsync of the folder, in this order: a name never points to missing bytes.
    fn commit(&mut self) -> Result<()> {
        self.file.sync_all().map_err(io_error(&self.path, "fsync"))?;
        if !self.is_ours() {
            let reason = "another process has replaced this temp file: two runs, one output?";
            return Err(broken(&self.path, reason));
        }
        fs::rename(&self.path, &self.target)
            .map_err(io_error(&self.path, format!("rename to {}", self.target.display())))?;
        self.renamed = true;
        sync_folder(&self.target)
    }

    /// Whether the name of the temp file still means the file that we opened.
    fn is_ours(&self) -> bool {
        match (self.file.metadata(), fs::symlink_metadata(&self.path)) {
            (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
            _ => false,
        }
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        if !self.renamed && self.is_ours() {
            // Nobody is left to hear of a failure, and the next run removes a stale file.
            let _ = fs::remove_file(&self.path);
        }
    }
}
