//! Products with packed weights.

use crate::buffers::{contiguous, matrix, row_major};
use crate::enter::{detach, short};
use crate::errors::to_py;
use crate::pack::{described, lent, parsed};
use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use rsprune_core::kernels::Kernel;
use rsprune_core::packed::{Linear, Mode, relative_error};

/// A packed weight that stays where it is, ready for products; see the core's `packed`.
#[pyclass(frozen, module = "rsprune._core")]
pub struct PackedMatrix {
    linear: Linear,
    parts: Vec<Py<PyArray1<u8>>>,
    rows: usize,
    cols: usize,
}

#[pymethods]
impl PackedMatrix {
    #[new]
    fn new(
        py: Python<'_>,
        parts: &Bound<'_, PyDict>,
        dtype: &str,
        format: &str,
        shape: (usize, usize),
    ) -> PyResult<PackedMatrix> {
        let dense = described(dtype, shape)?;
        let (format, layout) = parsed(format, &dense)?;
        let lent = lent(parts, &layout)?;
        let slices = lent.iter().map(|part| contiguous(part.as_slice()));
        let slices = slices.collect::<PyResult<Vec<_>>>()?;
        let kernel = Kernel::select().map_err(to_py)?;
        let linear = detach(py, || Linear::new(kernel, &format, dense, &slices))?;
        let parts = lent.iter().map(|part| (**part).clone().unbind()).collect();
        Ok(PackedMatrix { linear, parts, rows: dense.rows, cols: dense.cols })
    }

    /// `x [tokens, cols] W^T`, float32.
    #[pyo3(signature = (x, *, mode = "float32", threads = None))]
    fn linear<'py>(
        &self,
        py: Python<'py>,
        x: PyReadonlyArray2<'py, f32>,
        mode: &str,
        threads: Option<usize>,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let y = self.product(py, &x, Mode::parse(mode).map_err(to_py)?, threads)?;
        matrix(py, y, x.shape()[0], self.rows)
    }

    /// `||y8 - y|| / ||y||`, where `y8` is the product in mode int8 and `y` the one in float32.
    #[pyo3(signature = (x, *, threads = None))]
    fn int8_error(
        &self,
        py: Python<'_>,
        x: PyReadonlyArray2<'_, f32>,
        threads: Option<usize>,
    ) -> PyResult<f64> {
        let exact = self.product(py, &x, Mode::Float32, threads)?;
        Ok(relative_error(&self.product(py, &x, Mode::Int8, threads)?, &exact))
    }
}

impl PackedMatrix {
    fn product(
        &self,
        py: Python<'_>,
        x: &PyReadonlyArray2<'_, f32>,
        mode: Mode,
        threads: Option<usize>,
    ) -> PyResult<Vec<f32>> {
        let (tokens, cols) = (x.shape()[0], x.shape()[1]);
        if cols != self.cols {
            let message = format!("x: expected {} columns, found {cols}", self.cols);
            return Err(PyValueError::new_err(message));
        }
        let x = row_major("x", x)?;
        let lent: Vec<_> = self.parts.iter().map(|part| part.bind(py).readonly()).collect();
        let parts = lent.iter().map(|part| contiguous(part.as_slice()));
        let parts = parts.collect::<PyResult<Vec<_>>>()?;
        short(py, threads, |job| {
            let mut y = vec![0.0; tokens * self.rows];
            self.linear.apply(job, &parts, x, mode, &mut y)?;
            Ok(y)
        })
    }
}

/// Adds the class of this module.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<PackedMatrix>()
}
