//! Maps of low rank: truncated SVDs, the pair metric, and regressions from sums over tokens.

use crate::buffers::{Stored, matrix, row_major};
use crate::enter::run;
use crate::errors::to_py;
use numpy::{PyArray1, PyArray2, PyReadonlyArray1, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use rsprune_core::buffer::Room;
use rsprune_core::kernels::Kernel;
use rsprune_core::linalg::{self, Svd};
use rsprune_core::lowrank::{self, Map};
use std::sync::{RwLock, RwLockReadGuard};

type Matrix<'py> = Bound<'py, PyArray2<f32>>;
type Values<'py> = Bound<'py, PyArray1<f64>>;
type Triples<'py> = (Matrix<'py>, Values<'py>, Matrix<'py>);
type Factors<'py> = (Option<Matrix<'py>>, Matrix<'py>);
type Given<'py> =
    (PyReadonlyArray2<'py, f32>, PyReadonlyArray1<'py, f64>, PyReadonlyArray2<'py, f32>);

fn check_rank(rank: usize, most: usize) -> PyResult<()> {
    if (1..=most).contains(&rank) {
        return Ok(());
    }
    Err(PyValueError::new_err(format!("rank: expected 1 to {most}, found {rank}")))
}

/// The `rank` leading singular triples of `weight [m, n]`: `(left [rank, m], values, right [rank, n])`.
#[pyfunction]
#[pyo3(signature = (weight, dtype, *, rank, seed = 0, threads = None))]
fn truncated_svd<'py>(
    py: Python<'py>,
    weight: &Bound<'py, PyAny>,
    dtype: &str,
    rank: usize,
    seed: u64,
    threads: Option<usize>,
) -> PyResult<Triples<'py>> {
    let stored = Stored::extract(weight, dtype)?;
    let (m, n) = stored.shape();
    check_rank(rank, m.min(n))?;
    let values = stored.widen(Room::Memory)?;
    let svd = run(py, threads, |job| {
        linalg::truncated_svd(&job, &Kernel::select()?, &values, (m, n), rank, seed)
    })?;
    Ok((
        matrix(py, svd.left, rank, m)?,
        PyArray1::from_vec(py, svd.values),
        matrix(py, svd.right, rank, n)?,
    ))
}

/// The squared distance of two matrices, given as `truncated_svd` does, up to a rank-r correction.
#[pyfunction]
#[pyo3(signature = (one, other, *, rank, threads = None))]
fn pair_distance<'py>(
    py: Python<'py>,
    one: Given<'py>,
    other: Given<'py>,
    rank: usize,
    threads: Option<usize>,
) -> PyResult<f64> {
    let shape = |g: &Given<'py>| (g.0.shape()[1], g.2.shape()[1]);
    if shape(&one) != shape(&other) {
        let (expected, found) = (shape(&one), shape(&other));
        let message = format!("other: expected a matrix {expected:?}, found {found:?}");
        return Err(PyValueError::new_err(message));
    }
    let (one, other) = (svd(&one)?, svd(&other)?);
    run(py, threads, |job| lowrank::pair_distance(&job, &one, &other, rank))
}

fn svd(given: &Given<'_>) -> PyResult<Svd> {
    let values = crate::buffers::contiguous(given.1.as_slice())?.to_vec();
    let rows = [given.0.shape()[0], given.2.shape()[0]];
    if rows != [values.len(); 2] {
        let message = format!("triples: expected {} rows, found {rows:?}", values.len());
        return Err(PyValueError::new_err(message));
    }
    Ok(Svd {
        left: row_major("left", &given.0)?.to_vec(),
        values,
        right: row_major("right", &given.2)?.to_vec(),
    })
}

/// Sums over tokens from which maps `inputs -> outputs` are fitted; see the core's `Regression`.
#[pyclass(frozen, module = "rsprune._core")]
pub struct Regression {
    inner: RwLock<lowrank::Regression>,
}

impl Regression {
    fn lock(&self) -> RwLockReadGuard<'_, lowrank::Regression> {
        self.inner.read().unwrap_or_else(|e| e.into_inner())
    }
}

#[pymethods]
impl Regression {
    /// Sums of nothing; with `outputs` 0, of inputs alone.
    #[new]
    #[pyo3(signature = (inputs, outputs))]
    fn new(inputs: usize, outputs: usize) -> PyResult<Regression> {
        if inputs == 0 {
            return Err(PyValueError::new_err("inputs: expected at least one channel, found 0"));
        }
        let inner = lowrank::Regression::new(inputs, outputs).map_err(to_py)?;
        Ok(Regression { inner: RwLock::new(inner) })
    }

    /// Adds `x [tokens, inputs]` and `targets [tokens, outputs]`, both float32.
    #[pyo3(signature = (x, targets = None, *, threads = None))]
    fn add(
        &self,
        py: Python<'_>,
        x: PyReadonlyArray2<'_, f32>,
        targets: Option<PyReadonlyArray2<'_, f32>>,
        threads: Option<usize>,
    ) -> PyResult<()> {
        let inputs = self.lock().widths().0;
        if x.shape()[1] != inputs {
            let message = format!("x: expected {inputs} columns, found {}", x.shape()[1]);
            return Err(PyValueError::new_err(message));
        }
        let x = row_major("x", &x)?;
        let targets = match &targets {
            Some(array) => row_major("targets", array)?,
            None => &[],
        };
        run(py, threads, |job| {
            let mut inner = self.inner.write().unwrap_or_else(|e| e.into_inner());
            inner.add(&job, &Kernel::select()?, x, targets)
        })
    }

    #[getter]
    fn tokens(&self) -> u64 {
        self.lock().tokens()
    }

    /// The best map over `dampings`, judged on `heldout`: `(output [rank, outputs] or None, input,
    /// facts)`; the map is `output^T input`, or `input` itself where `rank` is None.
    #[pyo3(signature = (heldout, *, rank, dampings, threads = None))]
    fn fit<'py>(
        &self,
        py: Python<'py>,
        heldout: Option<&Regression>,
        rank: Option<usize>,
        dampings: Vec<f64>,
        threads: Option<usize>,
    ) -> PyResult<(Option<Matrix<'py>>, Matrix<'py>, Bound<'py, PyDict>)> {
        let (inputs, outputs) = self.lock().widths();
        rank.map_or(Ok(()), |rank| check_rank(rank, inputs.min(outputs)))?;
        let found = run(py, threads, |job| {
            let (own, other) = (self.lock(), heldout.map(Regression::lock));
            lowrank::fit(&job, &Kernel::select()?, &own, other.as_deref(), rank, &dampings)
        })?;
        let facts = PyDict::new(py);
        facts.set_item("damping", found.damping)?;
        facts.set_item("loss", found.loss.to_vec())?;
        facts.set_item("heldout", found.heldout.map(|h| h.to_vec()))?;
        let (output, input) = factors(py, found.map, inputs, outputs)?;
        Ok((output, input, facts))
    }

    /// `(output [rank, m], input [rank, inputs])`: the product of that rank which is closest to
    /// `weight [m, inputs]` on the summed inputs.
    #[pyo3(signature = (weight, dtype, *, rank, threads = None))]
    fn factors<'py>(
        &self,
        py: Python<'py>,
        weight: &Bound<'py, PyAny>,
        dtype: &str,
        rank: usize,
        threads: Option<usize>,
    ) -> PyResult<Factors<'py>> {
        let stored = Stored::extract(weight, dtype)?;
        let ((m, n), inputs) = (stored.shape(), self.lock().widths().0);
        if n != inputs {
            let message = format!("weight: expected {inputs} columns, found {n}");
            return Err(PyValueError::new_err(message));
        }
        check_rank(rank, m.min(n))?;
        let values = stored.widen(Room::Memory)?;
        let map =
            run(py, threads, |job| self.lock().factors(&job, &Kernel::select()?, &values, rank))?;
        factors(py, map, inputs, m)
    }
}

fn factors<'py>(
    py: Python<'py>,
    map: Map,
    inputs: usize,
    outputs: usize,
) -> PyResult<Factors<'py>> {
    let rows = |values: &[f32], width: usize| values.len() / width.max(1);
    let count = rows(&map.input, inputs);
    let output = map.output.map(|o| matrix(py, o, count, outputs)).transpose()?;
    Ok((output, matrix(py, map.input, count, inputs)?))
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<Regression>()?;
    m.add_function(wrap_pyfunction!(truncated_svd, m)?)?;
    m.add_function(wrap_pyfunction!(pair_distance, m)?)
}
