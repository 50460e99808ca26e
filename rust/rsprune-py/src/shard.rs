//! Checkpoint files: `Shard` lends tensors, `ShardWriter` fills a planned file.
#![allow(unsafe_code)] // the buffer protocol hands out pointers, see `MappedTensor`

use crate::buffers::contiguous;
use crate::enter::detach;
use crate::errors::to_py;
use numpy::{PyArray1, PyArrayMethods, PyReadonlyArray1, get_array_module};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use rsprune_core::shard::{self as core, Dtype, Index, Layout, Mapped, Writer};
use std::collections::BTreeMap;
use std::ffi::c_int;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

/// (name, dtype, shape) as Python says it.
type Planned = (String, String, Vec<u64>);

/// One open safetensors file with a validated header: `Shard(path)`.
#[pyclass(frozen, module = "rsprune._core")]
struct Shard(core::Shard);

#[pymethods]
impl Shard {
    #[new]
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Shard> {
        detach(py, || core::Shard::open(path)).map(Shard)
    }

    /// (name, dtype, shape, nbytes) of every tensor, sorted by offset.
    fn tensors(&self) -> Vec<(String, &'static str, Vec<u64>, u64)> {
        let infos = self.0.infos().iter();
        infos.map(|t| (t.name.clone(), t.dtype.name(), t.shape.clone(), t.nbytes)).collect()
    }

    /// The strings of `__metadata__`.
    #[getter]
    fn metadata(&self) -> BTreeMap<String, String> {
        self.0.metadata().clone()
    }

    /// The bytes of tensor `name` in memory of their own, uint8 [nbytes].
    fn read<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyArray1<u8>>> {
        let nbytes = self.0.info(name).map_err(to_py)?.nbytes;
        self.read_part(py, name, 0, nbytes)
    }

    /// `count` of these bytes, from byte `start` on.
    fn read_part<'py>(
        &self,
        py: Python<'py>,
        name: &str,
        start: u64,
        count: u64,
    ) -> PyResult<Bound<'py, PyArray1<u8>>> {
        // NumPy's own call, because it raises MemoryError where a Rust vector would abort.
        let array = get_array_module(py)?.call_method1("zeros", (count, "u1"))?;
        let array = array.cast_into::<PyArray1<u8>>()?;
        let mut lent = array.readwrite();
        let out = contiguous(lent.as_slice_mut())?;
        detach(py, || self.0.read_part(name, start, out))?;
        drop(lent);
        Ok(array)
    }

    /// The bytes of tensor `name` as a read-only view of the file, for `numpy.frombuffer`. The
    /// file must not be overwritten or truncated while the view lives.
    fn map(&self, py: Python<'_>, name: &str) -> PyResult<MappedTensor> {
        detach(py, || self.0.map(name)).map(MappedTensor)
    }

    fn __repr__(&self) -> String {
        format!("Shard({:?}, tensors={})", self.0.path(), self.0.infos().len())
    }
}

/// A read-only memory map of one tensor; unmapped when the last array on it is gone.
#[pyclass(frozen, module = "rsprune._core")]
struct MappedTensor(Mapped);

#[pymethods]
impl MappedTensor {
    /// Gives the resident pages back to the system; arrays on the map stay valid.
    fn release(&self, py: Python<'_>) -> PyResult<()> {
        detach(py, || self.0.release())
    }

    fn __len__(&self) -> usize {
        self.0.len()
    }

    /// # Safety
    /// Called by Python with a `view` that is null or may be filled.
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let bytes = &slf.get().0;
        let (pointer, length) = (bytes.as_ptr().cast_mut().cast(), bytes.len());
        let readonly = 1; // PyBuffer_FillInfo refuses requests to write
        // SAFETY: the map neither moves nor ends before `slf`, to which the view holds a
        // reference, and its length came from a slice, so it fits in isize.
        let code = unsafe {
            ffi::PyBuffer_FillInfo(view, slf.as_ptr(), pointer, length as isize, readonly, flags)
        };
        if code == 0 { Ok(()) } else { Err(PyErr::fetch(slf.py())) }
    }
}

/// A safetensors file that is filled in any order: `ShardWriter(path, tensors, metadata)`. It
/// appears under its name at `finish()`; without it the temp file is removed.
#[pyclass(frozen, module = "rsprune._core")]
struct ShardWriter {
    nbytes: u64,
    writer: Mutex<Option<Writer>>,
}

impl ShardWriter {
    /// Applies `call` to the writer without the GIL. The lock is taken inside of `detach`: a
    /// thread that waits for it while holding the GIL could wait forever.
    fn with(
        &self,
        py: Python<'_>,
        call: impl FnOnce(&mut Option<Writer>) -> Option<rsprune_core::Result<()>> + Send,
    ) -> PyResult<()> {
        let outcome = detach(py, || {
            // A put that panicked has not been marked as done, so the writer is still right.
            let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
            call(&mut writer).transpose()
        })?;
        outcome.ok_or_else(|| PyValueError::new_err("this writer is finished or aborted"))
    }
}

#[pymethods]
impl ShardWriter {
    #[new]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        tensors: Vec<Planned>,
        metadata: BTreeMap<String, String>,
    ) -> PyResult<ShardWriter> {
        let layout = plan(tensors, &metadata)?;
        let nbytes = layout.file_len();
        let writer = Mutex::new(Some(detach(py, || Writer::create(path, layout))?));
        Ok(ShardWriter { nbytes, writer })
    }

    /// Length of the finished file.
    #[getter]
    fn nbytes(&self) -> u64 {
        self.nbytes
    }

    /// Writes the bytes of tensor `name`, a C-contiguous uint8 [nbytes], to their planned place.
    fn put(&self, py: Python<'_>, name: &str, data: &Bound<'_, PyAny>) -> PyResult<()> {
        let wrong = || {
            let expected = "expected a 1-D C-contiguous uint8 array";
            PyTypeError::new_err(format!("data of tensor {name:?}: {expected}"))
        };
        let data: PyReadonlyArray1<'_, u8> = data.extract().map_err(|_| wrong())?;
        let bytes = data.as_slice().map_err(|_| wrong())?;
        self.with(py, |writer| Some(writer.as_mut()?.put(name, bytes)))
    }

    /// Copies to tensor `name` what the file `source` calls `renamed_from` (default: the same), a
    /// piece at a time.
    #[pyo3(signature = (name, source, *, renamed_from = None))]
    fn copy(
        &self,
        py: Python<'_>,
        name: &str,
        source: &Shard,
        renamed_from: Option<&str>,
    ) -> PyResult<()> {
        let from = renamed_from.unwrap_or(name);
        self.with(py, |writer| Some(writer.as_mut()?.copy(name, &source.0, from)))
    }

    /// Makes the file durable and gives it its name. Raises if a tensor was not put; the writer
    /// has ended either way.
    fn finish(&self, py: Python<'_>) -> PyResult<()> {
        self.with(py, |writer| Some(writer.take()?.finish()))
    }

    /// Ends the writer and removes its temp file; does nothing after `finish` or `abort`.
    fn abort(&self, py: Python<'_>) -> PyResult<()> {
        self.with(py, |writer| {
            drop(writer.take());
            Some(Ok(()))
        })
    }
}

fn plan(tensors: Vec<Planned>, metadata: &BTreeMap<String, String>) -> PyResult<Layout> {
    let parsed = tensors.into_iter().map(|(name, dtype, shape)| {
        let dtype = dtype.parse::<Dtype>();
        let dtype = dtype.map_err(|e| PyValueError::new_err(format!("tensor {name:?}: {e}")))?;
        Ok((name, dtype, shape))
    });
    let tensors = parsed.collect::<PyResult<Vec<_>>>()?;
    Layout::plan(&tensors, metadata).map_err(to_py)
}

/// Length in bytes of the file that `ShardWriter` would write.
#[pyfunction]
fn plan_shard(tensors: Vec<Planned>, metadata: BTreeMap<String, String>) -> PyResult<u64> {
    Ok(plan(tensors, &metadata)?.file_len())
}

/// Tensor name -> file name of the checkpoint in `folder`, confirmed by the files' headers.
#[pyfunction]
fn checkpoint_index(py: Python<'_>, folder: PathBuf) -> PyResult<BTreeMap<String, String>> {
    Ok(detach(py, || Index::open(folder))?.weight_map)
}

/// Writes a small file as a whole: a reader sees the old bytes or the new ones, never a part.
#[pyfunction]
fn write_file(py: Python<'_>, path: PathBuf, data: &[u8]) -> PyResult<()> {
    detach(py, || core::write_file(&path, data))
}

/// Lets two folders of one file system change their names, at once; `False` where the system cannot.
#[pyfunction]
fn exchange(py: Python<'_>, one: PathBuf, other: PathBuf) -> PyResult<bool> {
    detach(py, || core::exchange(&one, &other))
}

/// Adds the classes and functions of this module.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<Shard>()?;
    m.add_class::<MappedTensor>()?;
    m.add_class::<ShardWriter>()?;
    m.add_function(wrap_pyfunction!(plan_shard, m)?)?;
    m.add_function(wrap_pyfunction!(checkpoint_index, m)?)?;
    m.add_function(wrap_pyfunction!(write_file, m)?)?;
    m.add_function(wrap_pyfunction!(exchange, m)?)
}
