//! The methods.

use crate::buffers::{Stored, store};
use crate::enter::run;
use crate::errors::to_py;
use crate::statistics::{Pattern, Statistics};
use numpy::PyArray1;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{IntoPyDict, PyDict};
use rsprune_core::Result;
use rsprune_core::buffer::Room;
use rsprune_core::par::Job;
use rsprune_core::solve::{
    self, AdmmOptions, Certificate, FistaOptions, FistaPlusOptions, PolishOptions, Solution, Task,
    WarmStart,
};
use std::path::PathBuf;

pub type Pruned<'py> = (Bound<'py, PyAny>, Bound<'py, PyDict>);

/// One operator as the methods take it: everything but the method's own options.
#[derive(FromPyObject)]
pub struct Operator<'py> {
    pub weight: Bound<'py, PyAny>,
    pub dtype: String,
    pattern: Py<Pattern>,
    calibration: Py<Statistics>,
    heldout: Option<Py<Statistics>>,
    spill: Option<PathBuf>,
}

impl Operator<'_> {
    /// Where large arrays lie while the operator is solved.
    fn room(&self) -> Room<'_> {
        self.spill.as_deref().map_or(Room::Memory, Room::Folder)
    }
}

/// Runs a method: the weight as it is stored, and its certificate.
pub fn solve_with<'py>(
    py: Python<'py>,
    operator: &Operator<'py>,
    threads: Option<usize>,
    method: impl FnOnce(&Job, &Task) -> Result<Solution> + Send,
) -> PyResult<Pruned<'py>> {
    let solution = with_task(py, operator, threads, method)?;
    pruned(py, operator, solution)
}

/// A solution as Python takes it.
pub fn pruned<'py>(
    py: Python<'py>,
    operator: &Operator<'py>,
    solution: Solution,
) -> PyResult<Pruned<'py>> {
    let stored = Stored::extract(&operator.weight, &operator.dtype)?;
    let certificate = certificate_dict(py, &solution.certificate)?;
    Ok((store(py, &solution.values, stored.shape(), stored.float())?, certificate))
}

/// Checks the operator, detaches, and hands it to the core.
pub fn with_task<T: Send>(
    py: Python<'_>,
    operator: &Operator<'_>,
    threads: Option<usize>,
    call: impl FnOnce(&Job, &Task) -> Result<T> + Send,
) -> PyResult<T> {
    let stored = Stored::extract(&operator.weight, &operator.dtype)?;
    let (float, shape) = (stored.float(), stored.shape());
    let pattern = operator.pattern.get().0;
    let (calibration, heldout) = (operator.calibration.get(), operator.heldout.as_ref());
    let heldout = heldout.map(|h| h.get());
    pattern.check("weight", shape.1).map_err(to_py)?;
    check_width("calibration", calibration, shape.1)?;
    heldout.map_or(Ok(()), |h| check_width("heldout", h, shape.1))?;
    let room = operator.room();
    let weight = stored.widen(room)?;
    run(py, threads, |job| {
        let job = &job.spilling(room);
        let calibration = calibration.lock();
        let heldout = heldout.map(Statistics::lock);
        // Sums of no tokens judge nothing: every point would have the error zero.
        let heldout = heldout.as_deref().filter(|sums| sums.tokens() > 0);
        call(job, &Task { weight: &weight, float, pattern, calibration: &calibration, heldout })
    })
}

fn check_width(what: &str, statistics: &Statistics, columns: usize) -> PyResult<()> {
    match statistics.read(solve::Statistics::width) {
        width if width == columns => Ok(()),
        width => Err(PyValueError::new_err(format!(
            "{what}: expected statistics of {columns} channels (the weight's columns), found {width}"
        ))),
    }
}

pub fn certificate_dict<'py>(py: Python<'py>, c: &Certificate) -> PyResult<Bound<'py, PyDict>> {
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
    if let Some(bits) = c.bits {
        dict.set_item("packed_bits", bits.exact)?;
        dict.set_item("nominal_bits", bits.nominal)?;
    }
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
#[pyo3(signature = (operator, *, warm_start, iterations, xi, patience, lambda_start, damping, max_rounds = None, threads = None))]
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
    max_rounds: Option<usize>,
    threads: Option<usize>,
) -> PyResult<Pruned<'py>> {
    let (warm_start, lambda) = (parse_start("warm_start", warm_start)?, lambda_start);
    let max_rounds = max_rounds.unwrap_or(FistaOptions::default().max_rounds);
    let options =
        FistaOptions { iterations, xi, patience, max_rounds, lambda, damping, warm_start };
    solve_with(py, &operator, threads, |job, task| solve::fista(job, task, &options))
}

fn parse_start(option: &str, name: &str) -> PyResult<WarmStart> {
    match name {
        "wanda" => Ok(WarmStart::Wanda),
        "sparsegpt" => Ok(WarmStart::SparseGpt),
        other => {
            let message = format!("{option} {other:?}: expected \"wanda\" or \"sparsegpt\"");
            Err(PyValueError::new_err(message))
        }
    }
}

/// FISTA in scaled variables with restarts, refits and a held-out choice; with `floor`, a warm start,
/// the published method is run from there as well, under the same caps, and the result is never
/// worse than its.
#[pyfunction]
#[pyo3(signature = (operator, *, iterations, xi, patience, lambda_start, floor, max_rounds = None, polish_steps = 20, threads = None))]
#[allow(clippy::too_many_arguments)] // the method's constants, by keyword
fn fista_plus<'py>(
    py: Python<'py>,
    operator: Operator<'py>,
    iterations: usize,
    xi: f64,
    patience: usize,
    lambda_start: f64,
    floor: Option<&str>,
    max_rounds: Option<usize>,
    polish_steps: usize,
    threads: Option<usize>,
) -> PyResult<Pruned<'py>> {
    let published = FistaOptions::default();
    let published = FistaOptions {
        iterations: iterations.min(published.iterations),
        max_rounds: max_rounds.unwrap_or(published.max_rounds),
        warm_start: floor.map_or(Ok(published.warm_start), |name| parse_start("floor", name))?,
        ..published
    };
    let options = FistaPlusOptions {
        floor: floor.map(|_| published),
        iterations,
        xi,
        patience,
        max_rounds: max_rounds.unwrap_or(FistaPlusOptions::default().max_rounds),
        lambda: lambda_start,
        polish: PolishOptions::of(polish_steps),
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
#[pyo3(signature = (operator, values, *, refit, search, steps = 20, threads = None))]
fn polish<'py>(
    py: Python<'py>,
    operator: Operator<'py>,
    values: &Bound<'py, PyAny>,
    refit: bool,
    search: bool,
    steps: usize,
    threads: Option<usize>,
) -> PyResult<Pruned<'py>> {
    let (values, weight) = (
        Stored::extract(values, &operator.dtype)?,
        Stored::extract(&operator.weight, &operator.dtype)?,
    );
    if values.shape() != weight.shape() {
        let (expected, found) = (weight.shape(), values.shape());
        let message = format!("values: expected the weight's shape {expected:?}, found {found:?}");
        return Err(PyValueError::new_err(message));
    }
    let values = values.widen(operator.room())?;
    let options = PolishOptions { refit, search, ..PolishOptions::of(steps) };
    solve_with(py, &operator, threads, |job, task| solve::polish(job, task, values, &options))
}

/// The order of an operator's input channels that keeps most under its keep-of pattern.
#[pyfunction]
#[pyo3(signature = (operator, *, segment, repeats, threads = None))]
fn group_channels<'py>(
    py: Python<'py>,
    operator: Operator<'py>,
    segment: usize,
    repeats: usize,
    threads: Option<usize>,
) -> PyResult<Bound<'py, PyArray1<i64>>> {
    let channels = solve::Channels { segment, repeats };
    let order =
        with_task(py, &operator, threads, |job, task| solve::group_channels(job, task, channels))?;
    Ok(PyArray1::from_iter(py, order.into_iter().map(|j| j as i64)))
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(magnitude, m)?)?;
    m.add_function(wrap_pyfunction!(wanda, m)?)?;
    m.add_function(wrap_pyfunction!(sparsegpt, m)?)?;
    m.add_function(wrap_pyfunction!(fista, m)?)?;
    m.add_function(wrap_pyfunction!(fista_plus, m)?)?;
    m.add_function(wrap_pyfunction!(admm, m)?)?;
    m.add_function(wrap_pyfunction!(best, m)?)?;
    m.add_function(wrap_pyfunction!(polish, m)?)?;
    m.add_function(wrap_pyfunction!(group_channels, m)?)
}
