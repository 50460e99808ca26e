//! The methods that leave a bit or a few of a weight.

use crate::errors::to_py;
use crate::solve::{Operator, Pruned, certificate_dict, pruned, solve_with, with_task};
use crate::statistics::Pattern;
use numpy::PyArray1;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use rsprune_core::Result;
use rsprune_core::binarize::{self as core, Packed, Stage};
use rsprune_core::pack::Element;
use rsprune_core::par::Job;
use rsprune_core::solve::Task;

/// Weight, certificate, and the packed form: the format's name and part -> array.
type WithParts<'py> = (Bound<'py, PyAny>, Bound<'py, PyDict>, (String, Bound<'py, PyDict>));

fn packed_with<'py>(
    py: Python<'py>,
    operator: &Operator<'py>,
    threads: Option<usize>,
    method: impl FnOnce(&Job, &Task) -> Result<Packed> + Send,
) -> PyResult<WithParts<'py>> {
    let Packed { solution, format, parts } = with_task(py, operator, threads, method)?;
    let arrays = PyDict::new(py);
    for (part, bytes) in parts {
        let kind = if part.element == Element::Byte { "u1" } else { "<u2" };
        let array = PyArray1::from_vec(py, bytes).call_method1("view", (kind,))?;
        arrays.set_item(part.name, array.call_method1("reshape", (part.shape,))?)?;
    }
    let (weight, certificate) = pruned(py, operator, solution)?;
    Ok((weight, certificate, (format, arrays)))
}

/// Signs with exact compensation; `stage` is static, compensated, greedy or search.
#[pyfunction]
#[pyo3(signature = (operator, *, damping, stage = "search", threads = None))]
fn pbs2p_exact<'py>(
    py: Python<'py>,
    operator: Operator<'py>,
    damping: f64,
    stage: &str,
    threads: Option<usize>,
) -> PyResult<Pruned<'py>> {
    let stage = match stage {
        "static" => Stage::Static,
        "compensated" => Stage::Compensated,
        "greedy" => Stage::Greedy,
        "search" => Stage::Search,
        other => {
            let expected = "static, compensated, greedy or search";
            let message = format!("stage: expected {expected}, found {other:?}");
            return Err(PyValueError::new_err(message));
        }
    };
    solve_with(py, &operator, threads, |job, task| core::exact(job, task, damping, stage))
}

/// Two planes of signs with exact compensation; the second has the codes of the pattern.
#[pyfunction]
#[pyo3(signature = (operator, *, damping, threads = None))]
fn pbs2p_residual<'py>(
    py: Python<'py>,
    operator: Operator<'py>,
    damping: f64,
    threads: Option<usize>,
) -> PyResult<WithParts<'py>> {
    packed_with(py, &operator, threads, |job, task| core::exact_residual(job, task, damping))
}

/// Certificates of `pbs2p_exact` and `pbs2p_residual` with every one of `codes`: the pattern of the
/// first plane of signs, and that of the second or None.
#[pyfunction]
#[pyo3(signature = (operator, codes, *, damping, threads = None))]
fn pbs2p_losses<'py>(
    py: Python<'py>,
    operator: Operator<'py>,
    codes: Vec<(Bound<'py, Pattern>, Option<Bound<'py, Pattern>>)>,
    damping: f64,
    threads: Option<usize>,
) -> PyResult<Vec<Bound<'py, PyDict>>> {
    let codes: Vec<core::Code> =
        codes.iter().map(|(a, b)| (a.get().0, b.as_ref().map(|b| b.get().0))).collect();
    let found =
        with_task(py, &operator, threads, |job, task| core::losses(job, task, damping, &codes))?;
    found.iter().map(|certificate| certificate_dict(py, certificate)).collect()
}

/// Stepwise pruning with binarization optimisation.
#[pyfunction]
#[pyo3(signature = (operator, *, damping, threads = None))]
fn pbs2p<'py>(
    py: Python<'py>,
    operator: Operator<'py>,
    damping: f64,
    threads: Option<usize>,
) -> PyResult<WithParts<'py>> {
    packed_with(py, &operator, threads, |job, task| core::pbs2p(job, task, damping))
}

/// Signs in two magnitude groups, twice in salient columns.
#[pyfunction]
#[pyo3(signature = (operator, *, damping, threads = None))]
fn billm<'py>(
    py: Python<'py>,
    operator: Operator<'py>,
    damping: f64,
    threads: Option<usize>,
) -> PyResult<WithParts<'py>> {
    packed_with(py, &operator, threads, |job, task| core::billm(job, task, damping))
}

/// Signs with scales of rows and of columns.
#[pyfunction]
#[pyo3(signature = (operator, *, damping, threads = None))]
fn arb<'py>(
    py: Python<'py>,
    operator: Operator<'py>,
    damping: f64,
    threads: Option<usize>,
) -> PyResult<WithParts<'py>> {
    packed_with(py, &operator, threads, |job, task| core::arb(job, task, damping))
}

/// Evenly spaced levels of `bits` bits, column by column with error feedback.
#[pyfunction]
#[pyo3(signature = (operator, *, damping, bits, threads = None))]
fn gptq<'py>(
    py: Python<'py>,
    operator: Operator<'py>,
    damping: f64,
    bits: usize,
    threads: Option<usize>,
) -> PyResult<WithParts<'py>> {
    packed_with(py, &operator, threads, |job, task| core::gptq(job, task, damping, bits))
}

/// Bits a weight that the codes of `pattern` take in rows of `columns`, everything counted.
#[pyfunction]
fn signs_bits(pattern: &Bound<'_, Pattern>, columns: usize) -> PyResult<f64> {
    let groups = core::groups_of(pattern.get().0).map_err(to_py)?;
    Ok(core::signs_bits(columns, groups))
}

/// Adds the functions of this module.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(pbs2p_exact, m)?)?;
    m.add_function(wrap_pyfunction!(pbs2p_residual, m)?)?;
    m.add_function(wrap_pyfunction!(pbs2p_losses, m)?)?;
    m.add_function(wrap_pyfunction!(pbs2p, m)?)?;
    m.add_function(wrap_pyfunction!(billm, m)?)?;
    m.add_function(wrap_pyfunction!(arb, m)?)?;
    m.add_function(wrap_pyfunction!(gptq, m)?)?;
    m.add_function(wrap_pyfunction!(signs_bits, m)?)
}
