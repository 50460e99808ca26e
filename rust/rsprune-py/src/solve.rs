//! Statistics and methods.

use crate::buffers::{Stored, matrix, row_major, store};
use crate::enter::run;
use crate::errors::to_py;
use numpy::{PyArray1, PyArray2, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{IntoPyDict, PyDict};
use rsprune_core::Result;
use rsprune_core::kernels::Kernel;
use rsprune_core::par::Job;
use rsprune_core::pattern::{Pattern as CorePattern, Scope};
use rsprune_core::solve::{
    self, AdmmOptions, Certificate, FistaOptions, FistaPlusOptions, PolishOptions, Solution, Task,
    WarmStart,
};
use std::sync::RwLock;

/// A sparsity pattern: "2:4" or "50%" with scope "row" or "matrix".
#[pyclass(frozen, module = "rsprune._core")]
struct Pattern(CorePattern);

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
        let (values, cols) = (stored.widen()?, stored.shape().1);
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

/// Sums over the tokens of one shared input of `width` channels; see the core's `Statistics`.
#[pyclass(frozen, module = "rsprune._core")]
struct Statistics {
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

    fn read<T>(&self, f: impl FnOnce(&solve::Statistics) -> T) -> T {
        f(&self.inner.read().unwrap_or_else(|e| e.into_inner()))
    }
}

type Square<'py> = Bound<'py, PyArray2<f64>>;

#[pymethods]
impl Statistics {
    #[new]
    #[pyo3(signature = (width, *, corrected = false))]
    fn new(width: usize, corrected: bool) -> PyResult<Statistics> {
        if width == 0 {
            return Err(PyValueError::new_err("width: expected at least one channel, found 0"));
        }
        Ok(Statistics { inner: RwLock::new(solve::Statistics::new(width, corrected)) })
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
            inner.add(job, &Kernel::select()?, x, dense)
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

type Pruned<'py> = (Bound<'py, PyAny>, Bound<'py, PyDict>);

/// One operator as the methods take it: everything but the method's own options.
#[derive(FromPyObject)]
struct Operator<'py> {
    weight: Bound<'py, PyAny>,
    dtype: String,
    pattern: Py<Pattern>,
    calibration: Py<Statistics>,
    heldout: Option<Py<Statistics>>,
}

fn solve_with<'py>(
    py: Python<'py>,
    operator: &Operator<'py>,
    threads: Option<usize>,
    method: impl FnOnce(&Job, &Task) -> Result<Solution> + Send,
) -> PyResult<Pruned<'py>> {
    let stored = Stored::extract(&operator.weight, &operator.dtype)?;
    let (weight, float, shape) = (stored.widen()?, stored.float(), stored.shape());
    let pattern = operator.pattern.get().0;
    let (calibration, heldout) = (operator.calibration.get(), operator.heldout.as_ref());
    let heldout = heldout.map(|h| h.get());
    pattern.check("weight", shape.1).map_err(to_py)?;
    check_width("calibration", calibration, shape.1)?;
    heldout.map_or(Ok(()), |h| check_width("heldout", h, shape.1))?;
    let solution = run(py, threads, |job| {
        let calibration = calibration.inner.read().unwrap_or_else(|e| e.into_inner());
        let heldout = heldout.map(|h| h.inner.read().unwrap_or_else(|e| e.into_inner()));
        let heldout = heldout.as_deref();
        method(job, &Task { weight: &weight, float, pattern, calibration: &calibration, heldout })
    })?;
    let certificate = certificate_dict(py, &solution.certificate)?;
    Ok((store(py, solution.values, shape, float)?, certificate))
}

fn check_width(what: &str, statistics: &Statistics, columns: usize) -> PyResult<()> {
    match statistics.read(solve::Statistics::width) {
        width if width == columns => Ok(()),
        width => Err(PyValueError::new_err(format!(
            "{what}: expected statistics of {columns} channels (the weight's columns), found {width}"
        ))),
    }
}

fn certificate_dict<'py>(py: Python<'py>, c: &Certificate) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("error", c.error)?;
    dict.set_item("heldout_error", c.heldout)?;
    dict.set_item("sparsity", c.sparsity)?;
    dict.set_item("tokens", c.tokens)?;
    dict.set_item("dead_channels", c.dead_channels)?;
    dict.set_item("lambda", c.lambda)?;
    dict.set_item("rounds", c.rounds)?;
    dict.set_item("iterations", c.iterations)?;
    dict.set_item("converged", c.converged)?;
    c.damping.map_or(Ok(()), |v| dict.set_item("refit_damping", v))?;
    c.search.map_or(Ok(()), |kept| dict.set_item("search_kept", kept))?;
    if !c.candidates.is_empty() {
        dict.set_item("candidates", c.candidates.clone().into_py_dict(py)?)?;
    }
    Ok(dict)
}

/// Keeps the largest |w|.
#[pyfunction]
#[pyo3(signature = (operator, *, threads = None))]
fn magnitude<'py>(
    py: Python<'py>,
    operator: Operator<'py>,
    threads: Option<usize>,
) -> PyResult<Pruned<'py>> {
    solve_with(py, &operator, threads, solve::magnitude)
}

/// Keeps the largest |w| sqrt(G_jj).
#[pyfunction]
#[pyo3(signature = (operator, *, threads = None))]
fn wanda<'py>(
    py: Python<'py>,
    operator: Operator<'py>,
    threads: Option<usize>,
) -> PyResult<Pruned<'py>> {
    solve_with(py, &operator, threads, solve::wanda)
}

/// Column by column with error feedback.
#[pyfunction]
#[pyo3(signature = (operator, *, damping, threads = None))]
fn sparsegpt<'py>(
    py: Python<'py>,
    operator: Operator<'py>,
    damping: f64,
    threads: Option<usize>,
) -> PyResult<Pruned<'py>> {
    solve_with(py, &operator, threads, |job, task| solve::sparsegpt(job, task, damping))
}

/// l1 relaxation by FISTA, rounded, lambda adapted.
#[pyfunction]
#[pyo3(signature = (operator, *, warm_start, iterations, xi, patience, lambda_start, damping, threads = None))]
#[allow(clippy::too_many_arguments)] // the method's published constants, by keyword
fn fista<'py>(
    py: Python<'py>,
    operator: Operator<'py>,
    warm_start: &str,
    iterations: usize,
    xi: f64,
    patience: usize,
    lambda_start: f64,
    damping: f64,
    threads: Option<usize>,
) -> PyResult<Pruned<'py>> {
    let warm_start = match warm_start {
        "wanda" => WarmStart::Wanda,
        "sparsegpt" => WarmStart::SparseGpt,
        other => {
            let message = format!("warm_start {other:?}: expected \"wanda\" or \"sparsegpt\"");
            return Err(PyValueError::new_err(message));
        }
    };
    let lambda = lambda_start;
    let options = FistaOptions {
        iterations,
        xi,
        patience,
        lambda,
        damping,
        warm_start,
        ..FistaOptions::default()
    };
    solve_with(py, &operator, threads, |job, task| solve::fista(job, task, &options))
}

/// FISTA in scaled variables with restarts, refits and a held-out choice.
#[pyfunction]
#[pyo3(signature = (operator, *, iterations, xi, patience, lambda_start, threads = None))]
fn fista_plus<'py>(
    py: Python<'py>,
    operator: Operator<'py>,
    iterations: usize,
    xi: f64,
    patience: usize,
    lambda_start: f64,
    threads: Option<usize>,
) -> PyResult<Pruned<'py>> {
    let options = FistaPlusOptions {
        iterations,
        xi,
        patience,
        lambda: lambda_start,
        ..FistaPlusOptions::default()
    };
    solve_with(py, &operator, threads, |job, task| solve::fista_plus(job, task, &options))
}

/// ADMM with a growing penalty; `slow` takes about twice the iterations.
#[pyfunction]
#[pyo3(signature = (operator, *, damping, slow, threads = None))]
fn admm<'py>(
    py: Python<'py>,
    operator: Operator<'py>,
    damping: f64,
    slow: bool,
    threads: Option<usize>,
) -> PyResult<Pruned<'py>> {
    let schedule = if slow { AdmmOptions::slow() } else { AdmmOptions::published() };
    let options = AdmmOptions { damping, ..schedule };
    solve_with(py, &operator, threads, |job, task| solve::admm(job, task, &options))
}

/// The best of several methods by held-out error, within `budget` products with the Gram.
#[pyfunction]
#[pyo3(signature = (operator, *, budget, threads = None))]
fn best<'py>(
    py: Python<'py>,
    operator: Operator<'py>,
    budget: usize,
    threads: Option<usize>,
) -> PyResult<Pruned<'py>> {
    solve_with(py, &operator, threads, |job, task| solve::best(job, task, budget))
}

/// Refit and local search from `values [m, n]` (as they are stored), guarded by held-out error.
#[pyfunction]
#[pyo3(signature = (operator, values, *, refit, search, threads = None))]
fn polish<'py>(
    py: Python<'py>,
    operator: Operator<'py>,
    values: &Bound<'py, PyAny>,
    refit: bool,
    search: bool,
    threads: Option<usize>,
) -> PyResult<Pruned<'py>> {
    let values = Stored::extract(values, &operator.dtype)?.widen()?;
    let options = PolishOptions { refit, search, ..PolishOptions::default() };
    solve_with(py, &operator, threads, |job, task| solve::polish(job, task, values, &options))
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<Pattern>()?;
    m.add_class::<Statistics>()?;
    m.add_function(wrap_pyfunction!(magnitude, m)?)?;
    m.add_function(wrap_pyfunction!(wanda, m)?)?;
    m.add_function(wrap_pyfunction!(sparsegpt, m)?)?;
    m.add_function(wrap_pyfunction!(fista, m)?)?;
    m.add_function(wrap_pyfunction!(fista_plus, m)?)?;
    m.add_function(wrap_pyfunction!(admm, m)?)?;
    m.add_function(wrap_pyfunction!(best, m)?)?;
    m.add_function(wrap_pyfunction!(polish, m)?)
}
