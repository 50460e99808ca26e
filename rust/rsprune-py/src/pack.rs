//! Packed weights.

use crate::buffers::{Stored, contiguous};
use crate::enter::detach;
use crate::errors::to_py;
use crate::statistics::Pattern;
use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use rsprune_core::float::Float;
use rsprune_core::pack::{self as core, Dense, Element, Format};

/// (part, dtype, shape) as Python says it.
type Planned = (&'static str, &'static str, Vec<usize>);

/// A weight of this type and shape.
pub fn described(dtype: &str, (rows, cols): (usize, usize)) -> PyResult<Dense> {
    let float = Float::parse(dtype).map_err(to_py)?;
    Dense::new(float, rows, cols).map_err(to_py)
}

/// A format by its name, and the parts that it gives the weight.
pub fn parsed(format: &str, dense: &Dense) -> PyResult<(Format, Vec<core::Part>)> {
    let format = Format::parse(format).map_err(to_py)?;
    let layout = format.layout(dense).map_err(to_py)?;
    Ok((format, layout))
}

/// The bytes of an array, in place: NumPy's own view of them.
fn bytes_of<'py>(what: &str, array: &Bound<'py, PyAny>) -> PyResult<PyReadonlyArray1<'py, u8>> {
    let flat = || array.call_method1("reshape", (-1,))?.call_method1("view", ("u1",));
    let wrong = |_| PyTypeError::new_err(format!("{what}: expected a C-contiguous array"));
    if !array.getattr("flags")?.getattr("c_contiguous")?.extract::<bool>()? {
        return Err(PyTypeError::new_err(format!("{what}: expected a C-contiguous array")));
    }
    flat()?.extract().map_err(wrong)
}

/// The bytes of all parts, in the layout's order.
pub fn lent<'py>(
    parts: &Bound<'py, PyDict>,
    layout: &[core::Part],
) -> PyResult<Vec<PyReadonlyArray1<'py, u8>>> {
    let lent = layout.iter().map(|part| match parts.get_item(part.name)? {
        Some(array) => bytes_of(part.name, &array),
        None => Err(PyValueError::new_err(format!("part {}: missing", part.name))),
    });
    let lent = lent.collect::<PyResult<Vec<_>>>()?;
    if lent.len() != parts.len() {
        let expected: Vec<_> = layout.iter().map(|part| part.name).collect();
        let (expected, found) = (expected.join(", "), parts.keys());
        return Err(PyValueError::new_err(format!("parts: expected {expected}, found {found}")));
    }
    Ok(lent)
}

/// Bytes as an array of `shape` with elements of `size` bytes: bits of half types as uint16.
fn array_of<'py>(
    py: Python<'py>,
    bytes: Vec<u8>,
    element: Element,
    shape: &[usize],
) -> PyResult<Bound<'py, PyAny>> {
    let kind = match element {
        Element::Float(Float::F32) => "<f4",
        Element::Float(_) => "<u2",
        Element::Byte => "u1",
    };
    let array = PyArray1::from_vec(py, bytes).call_method1("view", (kind,))?;
    array.call_method1("reshape", (shape.to_vec(),))
}

/// A weight in and its bytes and description out.
fn weight_of<'py>(
    weight: &Bound<'py, PyAny>,
    dtype: &str,
) -> PyResult<(PyReadonlyArray1<'py, u8>, Dense)> {
    let shape = Stored::extract(weight, dtype)?.shape();
    Ok((bytes_of("weight", weight)?, described(dtype, shape)?))
}

/// The smallest format that holds `weight`, which has the pattern.
#[pyfunction]
fn pack_format(
    py: Python<'_>,
    weight: &Bound<'_, PyAny>,
    dtype: &str,
    pattern: &Bound<'_, Pattern>,
) -> PyResult<String> {
    let (lent, dense) = weight_of(weight, dtype)?;
    let (bytes, pattern) = (contiguous(lent.as_slice())?, pattern.get().0);
    Ok(detach(py, || Format::choose(bytes, &dense, &pattern))?.to_string())
}

/// The parts of a packed weight of `shape`: name, dtype and shape of each, in order.
#[pyfunction]
fn pack_layout(format: &str, dtype: &str, shape: (usize, usize)) -> PyResult<Vec<Planned>> {
    let (_, layout) = parsed(format, &described(dtype, shape)?)?;
    Ok(layout.into_iter().map(|part| (part.name, part.element.name(), part.shape)).collect())
}

/// Packs `weight`: part -> array; halves travel as uint16 bit patterns.
#[pyfunction]
fn pack<'py>(
    py: Python<'py>,
    weight: &Bound<'py, PyAny>,
    dtype: &str,
    format: &str,
) -> PyResult<Bound<'py, PyDict>> {
    let (lent, dense) = weight_of(weight, dtype)?;
    let (format, layout) = parsed(format, &dense)?;
    let bytes = contiguous(lent.as_slice())?;
    let parts = detach(py, || core::pack(bytes, &dense, &format))?;
    let packed = PyDict::new(py);
    for (part, bytes) in layout.iter().zip(parts) {
        packed.set_item(part.name, array_of(py, bytes, part.element, &part.shape)?)?;
    }
    Ok(packed)
}

/// The weight of `shape` that `parts` hold, or its rows from `start` to before `stop`.
#[pyfunction]
#[pyo3(signature = (parts, dtype, format, shape, *, start=0, stop=None))]
fn unpack<'py>(
    py: Python<'py>,
    parts: &Bound<'py, PyDict>,
    dtype: &str,
    format: &str,
    shape: (usize, usize),
    start: usize,
    stop: Option<usize>,
) -> PyResult<Bound<'py, PyAny>> {
    let dense = described(dtype, shape)?;
    let (format, layout) = parsed(format, &dense)?;
    let rows = start..stop.unwrap_or(dense.rows);
    let lent = lent(parts, &layout)?;
    let slices = lent.iter().map(|part| contiguous(part.as_slice()));
    let slices = slices.collect::<PyResult<Vec<_>>>()?;
    let height = rows.len();
    let unpacked = detach(py, || core::unpack(&slices, &dense, &format, rows))?;
    array_of(py, unpacked, Element::Float(dense.float), &[height, dense.cols])
}

/// Adds the functions of this module.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("PACK_VERSION", core::VERSION)?;
    m.add_function(wrap_pyfunction!(pack_format, m)?)?;
    m.add_function(wrap_pyfunction!(pack_layout, m)?)?;
    m.add_function(wrap_pyfunction!(pack, m)?)?;
    m.add_function(wrap_pyfunction!(unpack, m)?)
}
