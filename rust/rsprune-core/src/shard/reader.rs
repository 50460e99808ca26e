//! Lends the tensors of one safetensors file, by copy or by memory map.
//!
//! Two ways, because they differ in what they cost: `read_into` copies into the caller's memory
//! and leaves nothing else resident; `map` copies nothing, but the pages that are touched count
//! as RssFile until the map is dropped or released.
#![allow(unsafe_code)] // memory maps: the file can change under us, see `Shard::map`

use super::header::{Header, TensorInfo};
use super::{broken, io_error};
use crate::error::{Error, Result};
use memmap2::{Advice, Mmap, MmapOptions, UncheckedAdvice};
use std::collections::BTreeMap;
use std::fs::{File, Metadata, OpenOptions};
use std::ops::{Deref, Range};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Bytes of one `pread`, so that a failing disk is reported near the byte that failed.
const CHUNK: usize = 64 << 20;

/// One open safetensors file with a validated header.
#[derive(Debug)]
pub struct Shard {
    path: PathBuf,
    file: File,
    header: Header,
    state: State,
}

/// What tells whether a file was written to: its length and the time of its last change, in
/// seconds and nanoseconds.
type State = (u64, i64, i64);

fn state(meta: &Metadata) -> State {
    (meta.len(), meta.mtime(), meta.mtime_nsec())
}

impl Shard {
    /// Opens `path` and validates its header; no tensor byte is read.
    pub fn open(path: impl Into<PathBuf>) -> Result<Shard> {
        let path = path.into();
        // A pipe would block in `open` until somebody writes to it; regular files do not care.
        let mut options = OpenOptions::new();
        let opened = options.read(true).custom_flags(libc::O_NONBLOCK).open(&path);
        let file = opened.map_err(io_error(&path, "open"))?;
        let meta = file.metadata().map_err(io_error(&path, "stat"))?;
        if !meta.is_file() {
            return Err(broken(&path, "expected a regular file"));
        }
        let header = Header::read(&file, &path, meta.len())?;
        Ok(Shard { path, file, header, state: state(&meta) })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tensors, sorted by offset.
    pub fn infos(&self) -> &[TensorInfo] {
        &self.header.tensors
    }

    /// The strings of `__metadata__`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.header.metadata
    }

    /// The tensor of that name.
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        match self.header.position(name) {
            Some(i) => Ok(&self.header.tensors[i]),
            None => Err(Error::MissingTensor { path: self.path.clone(), name: name.to_string() }),
        }
    }

    /// Copies the bytes of tensor `name` into `out`, which must have exactly their number.
    pub fn read_into(&self, name: &str, out: &mut [u8]) -> Result<()> {
        let nbytes = self.info(name)?.nbytes;
        if out.len() as u64 != nbytes {
            return Err(Error::Shape {
                what: format!("buffer for tensor {name:?} of {}", self.path.display()),
                expected: format!("{nbytes} bytes"),
                found: format!("{} bytes", out.len()),
            });
        }
        self.read_part(name, 0, out)
    }

    /// Copies the bytes of tensor `name` from its byte `start` on into `out`.
    ///
    /// A file that was written to since it was opened is refused: its bytes are not those of the
    /// header that was validated.
    pub fn read_part(&self, name: &str, start: u64, out: &mut [u8]) -> Result<()> {
        let info = self.info(name)?;
        let end = start.checked_add(out.len() as u64);
        if end.is_none_or(|end| end > info.nbytes) {
            return Err(Error::Shape {
                what: format!("part of tensor {name:?} of {}", self.path.display()),
                expected: format!("at most {} bytes from byte {start} on", info.nbytes),
                found: format!("{} bytes", out.len()),
            });
        }
        self.check_unchanged(info)?;
        for (i, chunk) in out.chunks_mut(CHUNK).enumerate() {
            let offset = info.offset + start + (i * CHUNK) as u64;
            self.file.read_exact_at(chunk, offset).map_err(|e| {
                let length = chunk.len();
                let action = format!("read of {length} bytes at {offset} for tensor {name:?}");
                io_error(&self.path, action)(e)
            })?;
        }
        self.check_unchanged(info) // or it may have changed while it was read
    }

    /// Maps the pages of tensor `name`, read-only and nothing else of the file.
    ///
    /// The risk, which no reader of maps can remove: if another process overwrites the file, the
    /// bytes change under the map; if it truncates the file, touching the map raises SIGBUS.
    /// A file that was replaced by rename (as ours are) is safe: the map holds the old one.
    pub fn map(&self, name: &str) -> Result<Mapped> {
        let info = self.info(name)?;
        let path = self.path.clone();
        if info.nbytes == 0 {
            return Ok(Mapped { path, map: None }); // the system refuses maps of zero bytes
        }
        self.check_unchanged(info)?;
        let action = format!("map of {} bytes at {} for {name:?}", info.nbytes, info.offset);
        let mut options = MmapOptions::new();
        // On a 32-bit host a length beyond its address space becomes one that no map can have.
        let length = usize::try_from(info.nbytes).unwrap_or(usize::MAX);
        options.offset(info.offset).len(length);
        // SAFETY: the map is read-only and lies inside the file as it is now; later changes of
        // the file by others are the risk described above.
        let map = unsafe { options.map(&self.file) }.map_err(io_error(&path, action))?;
        // Advice only, and weights are read front to back; a kernel without it loses nothing.
        let _ = map.advise(Advice::Sequential);
        Ok(Mapped { path, map: Some(map) })
    }

    /// Refuses a file that was cut or written to since it was opened.
    fn check_unchanged(&self, info: &TensorInfo) -> Result<()> {
        let now = state(&self.file.metadata().map_err(io_error(&self.path, "stat"))?);
        if now == self.state {
            return Ok(());
        }
        let (name, Range { start, end }) = (&info.name, info.offset..info.offset + info.nbytes);
        let reason = if now.0 < end {
            format!(
                "the file shrank after it was opened: tensor {name:?} ends at byte {end}, file \
                 has {}",
                now.0
            )
        } else {
            format!(
                "the file was written to after it was opened: tensor {name:?}, bytes {start} to \
                 {end}, can no longer be trusted"
            )
        };
        Err(broken(&self.path, reason))
    }
}

/// The bytes of one tensor, as a read-only view of the file. Dropping it unmaps them.
#[derive(Debug)]
pub struct Mapped {
    path: PathBuf,
    map: Option<Mmap>,
}

impl Mapped {
    /// Gives the resident pages back to the system. The view stays valid: a later access reads
    /// the file again. For callers that must keep the view, but are done with a pass over it.
    pub fn release(&self) -> Result<()> {
        let Some(map) = &self.map else { return Ok(()) };
        // SAFETY: in a shared read-only file map MADV_DONTNEED only drops pages that equal the
        // file; the same bytes come back on the next access.
        unsafe { map.unchecked_advise(UncheckedAdvice::DontNeed) }
            .map_err(io_error(&self.path, "release of mapped pages"))
    }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.map.as_deref().unwrap_or(&[])
    }
}
