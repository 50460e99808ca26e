//! What solvers are given: a pattern, and sums over tokens.

use crate::buffers::{Stored, matrix, row_major};
use crate::enter::run;
use crate::errors::to_py;
use numpy::{PyArray1, PyArray2, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use rsprune_core::buffer::Room;
use rsprune_core::kernels::Kernel;
use rsprune_core::pattern::{Pattern as CorePattern, Scope};
use rsprune_core::solve;
use std::path::PathBuf;
use std::sync::{RwLock, RwLockReadGuard};

/// A sparsity pattern: "2:4" or "50%" with scope "row" or "matrix".
#[pyclass(frozen, module = "rsprune._core")]
pub struct Pattern(pub CorePattern);

#[pymethods]
impl Pattern {
    #[new]
    #[pyo3(signature = (text, scope = "row"))]
    fn new(text: &str, scope: &str) -> PyResult<Pattern> {
        let scope = match scope {
            "row" => Scope::Row,
            "matrix" => Scope::Matrix,
            _ => {
                let message = format!("scope {scope:?}: expected \"row\" or \"matrix\"");
                return Err(PyValueError::new_err(message));
            }
        };
        CorePattern::parse(text, scope).map(Pattern).map_err(to_py)
    }

    /// Raises ValueError where a row of `columns` cannot be cut in whole groups.
    fn check(&self, name: &str, columns: usize) -> PyResult<()> {
        self.0.check(name, columns).map_err(to_py)
    }

    /// Whether `weight [m, n]` has at least the zeros of the pattern, everywhere.
    fn holds(&self, py: Python<'_>, weight: &Bound<'_, PyAny>, dtype: &str) -> PyResult<bool> {
        let stored = Stored::extract(weight, dtype)?;
        let (values, cols) = (stored.widen(Room::Memory)?, stored.shape().1);
        crate::enter::detach(py, || Ok(self.0.holds(&values, cols.max(1))))
    }

    /// The fraction of zeros that the pattern asks for.
    #[getter]
    fn sparsity(&self) -> f64 {
        match self.0 {
            CorePattern::KeepOf { keep, of } => 1.0 - keep as f64 / of as f64,
            CorePattern::Ratio { sparsity, .. } => sparsity,
        }
    }

    fn __str__(&self) -> String {
        self.0.to_string()
    }
}

/// Sums over the tokens of one shared input of `width` channels; see the core's `Statistics`. With
/// `spill`, a folder, their values lie in files without a name on its disk instead of in memory.
#[pyclass(frozen, module = "rsprune._core")]
pub struct Statistics {
    inner: RwLock<solve::Statistics>,
}

impl Statistics {
    fn activations<'py>(
        &self,
        what: &str,
        array: &Bound<'py, PyAny>,
    ) -> PyResult<PyReadonlyArray2<'py, f32>> {
        let width = self.read(solve::Statistics::width);
        let found: PyReadonlyArray2<'py, f32> = array.extract().map_err(|_| {
            PyTypeError::new_err(format!("{what}: expected a float32 array [tokens, {width}]"))
        })?;
        if found.shape()[1] != width {
            let message = format!("{what}: expected {width} columns, found {}", found.shape()[1]);
            return Err(PyValueError::new_err(message));
        }
        Ok(found)
    }

    pub fn read<T>(&self, f: impl FnOnce(&solve::Statistics) -> T) -> T {
        f(&self.lock())
    }

    /// The sums, for as long as the guard lives.
    pub fn lock(&self) -> RwLockReadGuard<'_, solve::Statistics> {
        self.inner.read().unwrap_or_else(|e| e.into_inner())
    }
}

type Square<'py> = Bound<'py, PyArray2<f64>>;

#[pymethods]
impl Statistics {
    #[new]
    #[pyo3(signature = (width, *, corrected = false, spill = None))]
    fn new(width: usize, corrected: bool, spill: Option<PathBuf>) -> PyResult<Statistics> {
        if width == 0 {
            return Err(PyValueError::new_err("width: expected at least one channel, found 0"));
        }
        let room = spill.as_deref().map_or(Room::Memory, Room::Folder);
        let inner = solve::Statistics::new(width, corrected, room).map_err(to_py)?;
        Ok(Statistics { inner: RwLock::new(inner) })
    }

    /// Adds inputs `x [tokens, width]` and, if corrected, the `dense` model's for the same tokens.
    #[pyo3(signature = (x, dense = None, *, threads = None))]
    fn add(
        &self,
        py: Python<'_>,
        x: &Bound<'_, PyAny>,
        dense: Option<&Bound<'_, PyAny>>,
        threads: Option<usize>,
    ) -> PyResult<()> {
        let x = self.activations("x", x)?;
        let dense = dense.map(|d| self.activations("dense", d)).transpose()?;
        if let Some(dense) = dense.as_ref().filter(|d| d.shape() != x.shape()) {
            let message = format!("dense: expected {:?}, found {:?}", x.shape(), dense.shape());
            return Err(PyValueError::new_err(message));
        }
        let x = row_major("x", &x)?;
        let dense = dense.as_ref().map(|d| row_major("dense", d)).transpose()?;
        run(py, threads, |job| {
            let mut inner = self.inner.write().unwrap_or_else(|e| e.into_inner());
            inner.add(&job, &Kernel::select()?, x, dense)
        })
    }

    #[getter]
    fn width(&self) -> usize {
        self.read(solve::Statistics::width)
    }

    #[getter]
    fn tokens(&self) -> u64 {
        self.read(solve::Statistics::tokens)
    }

    #[getter]
    fn dead_channels(&self) -> usize {
        self.read(solve::Statistics::dead_channels)
    }

    /// `diag(G) [width]`.
    fn diagonal<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<f64>> {
        PyArray1::from_vec(py, self.read(solve::Statistics::diagonal))
    }

    /// `G = sum x* x*^T [width, width]`.
    fn gram<'py>(&self, py: Python<'py>) -> PyResult<Square<'py>> {
        matrix(py, self.read(solve::Statistics::gram), self.width(), self.width())
    }

    /// `P = sum (x* - x) x*^T [width, width]`, None unless corrected.
    fn cross<'py>(&self, py: Python<'py>) -> PyResult<Option<Square<'py>>> {
        let values = self.read(solve::Statistics::cross);
        values.map(|v| matrix(py, v, self.width(), self.width())).transpose()
    }

    /// `Q = sum (x* - x)(x* - x)^T [width, width]`, None unless corrected.
    fn drift<'py>(&self, py: Python<'py>) -> PyResult<Option<Square<'py>>> {
        let values = self.read(solve::Statistics::drift);
        values.map(|v| matrix(py, v, self.width(), self.width())).transpose()
    }
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<Pattern>()?;
    m.add_class::<Statistics>()
}
