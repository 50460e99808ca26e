//! Sizes of weight gradients, from what enters a linear and what comes back to it.

use crate::buffers::{Stored, row_major};
use crate::enter::run;
use numpy::{PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use rsprune_core::kernels::Kernel;
use rsprune_core::linalg;

type Matrix<'py> = PyReadonlyArray2<'py, f32>;

/// `(sum |G|, sum G^2, sum |w o G|)` of `G = D^T A`, for `deltas D [T, m]`, `inputs A [T, n]` and
/// the weight `w [m, n]` as it is stored.
#[pyfunction]
#[pyo3(signature = (deltas, inputs, weight, dtype, *, threads = None))]
fn gradient_sizes(
    py: Python<'_>,
    deltas: Matrix<'_>,
    inputs: Matrix<'_>,
    weight: &Bound<'_, PyAny>,
    dtype: &str,
    threads: Option<usize>,
) -> PyResult<(f64, f64, f64)> {
    let stored = Stored::extract(weight, dtype)?;
    let (m, n) = (deltas.shape()[1], inputs.shape()[1]);
    if stored.shape() != (m, n) {
        let found = stored.shape();
        return Err(PyValueError::new_err(format!("weight: expected {m} x {n}, found {found:?}")));
    }
    let (d, a) = (row_major("deltas", &deltas)?, row_major("inputs", &inputs)?);
    let rows = stored.rows()?;
    let sizes = run(py, threads, |job| {
        let row = |r: usize, values: &mut [f32]| rows.widen(r, values);
        linalg::gradient_sizes(&job, &Kernel::select()?, (d, m), (a, n), row)
    })?;
    Ok((sizes.l1, sizes.squares, sizes.taylor))
}

/// `sum (D^T A)^2` for `deltas D [T, m]` and `inputs A [T, n]`.
#[pyfunction]
#[pyo3(signature = (deltas, inputs, *, threads = None))]
fn gradient_squares(
    py: Python<'_>,
    deltas: Matrix<'_>,
    inputs: Matrix<'_>,
    threads: Option<usize>,
) -> PyResult<f64> {
    let (m, n) = (deltas.shape()[1], inputs.shape()[1]);
    let (d, a) = (row_major("deltas", &deltas)?, row_major("inputs", &inputs)?);
    run(py, threads, |job| linalg::gradient_squares(&job, &Kernel::select()?, (d, m), (a, n)))
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(gradient_sizes, m)?)?;
    m.add_function(wrap_pyfunction!(gradient_squares, m)?)
}
