//! NumPy arrays in, NumPy arrays out. Arrays must be C-contiguous: a copy is never made silently.

use crate::errors::to_py;
use numpy::{PyArray2, PyArrayMethods, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use rsprune_core::buffer::{Buffer, Room};
use rsprune_core::float::Float;

/// Weights as they are stored: f32, or the bits of a half type.
pub enum Stored<'py> {
    Single(PyReadonlyArray2<'py, f32>),
    Half(PyReadonlyArray2<'py, u16>, Float),
}

impl<'py> Stored<'py> {
    /// `array [m, n]`: float32 for dtype "F32", uint16 bit patterns for "BF16" and "F16".
    pub fn extract(array: &Bound<'py, PyAny>, dtype: &str) -> PyResult<Stored<'py>> {
        let float = Float::parse(dtype).map_err(to_py)?;
        let wrong = |_| {
            let kind = if float == Float::F32 { "float32" } else { "uint16 (bit patterns)" };
            PyTypeError::new_err(format!("weight: {dtype} needs a 2-D C-contiguous {kind} array"))
        };
        match float {
            Float::F32 => Ok(Stored::Single(array.extract().map_err(wrong)?)),
            _ => Ok(Stored::Half(array.extract().map_err(wrong)?, float)),
        }
    }

    pub fn float(&self) -> Float {
        match self {
            Stored::Single(_) => Float::F32,
            Stored::Half(_, float) => *float,
        }
    }

    pub fn shape(&self) -> (usize, usize) {
        let shape = match self {
            Stored::Single(a) => a.shape(),
            Stored::Half(a, _) => a.shape(),
        };
        (shape[0], shape[1])
    }

    /// The rows, for workers to widen one at a time.
    pub fn rows(&self) -> PyResult<Rows<'_>> {
        let columns = self.shape().1;
        Ok(match self {
            Stored::Single(a) => Rows::Single(row_major("weight", a)?, columns),
            Stored::Half(a, float) => Rows::Half(row_major("weight", a)?, columns, *float),
        })
    }

    /// The values in f32, in `room`.
    pub fn widen(&self, room: Room) -> PyResult<Buffer> {
        match self {
            Stored::Single(a) => room.copy(row_major("weight", a)?).map_err(to_py),
            Stored::Half(a, float) => {
                let bits = row_major("weight", a)?;
                let mut values = room.zeros(bits.len()).map_err(to_py)?;
                values.iter_mut().zip(bits).for_each(|(v, b)| *v = float.from_bits(*b));
                Ok(values)
            }
        }
    }
}

/// A weight's rows, and how many columns they have.
pub enum Rows<'a> {
    Single(&'a [f32], usize),
    Half(&'a [u16], usize, Float),
}

impl Rows<'_> {
    /// Writes row `r` to `out` in f32.
    pub fn widen(&self, r: usize, out: &mut [f32]) {
        match self {
            Rows::Single(values, n) => out.copy_from_slice(&values[r * n..][..*n]),
            Rows::Half(bits, n, float) => {
                let row = &bits[r * n..][..*n];
                out.iter_mut().zip(row).for_each(|(v, b)| *v = float.from_bits(*b));
            }
        }
    }
}

/// `values [m, n]`, already rounded to `float`, as an array of the stored kind.
pub fn store<'py>(
    py: Python<'py>,
    values: &[f32],
    (rows, cols): (usize, usize),
    float: Float,
) -> PyResult<Bound<'py, PyAny>> {
    match float {
        Float::F32 => Ok(matrix(py, values.to_vec(), rows, cols)?.into_any()),
        _ => {
            let bits = values.iter().map(|v| float.to_bits(*v)).collect::<Vec<u16>>();
            Ok(matrix(py, bits, rows, cols)?.into_any())
        }
    }
}

/// A 2-D array that owns `values`.
pub fn matrix<T: numpy::Element>(
    py: Python<'_>,
    values: Vec<T>,
    rows: usize,
    cols: usize,
) -> PyResult<Bound<'_, PyArray2<T>>> {
    numpy::PyArray1::from_vec(py, values).reshape([rows, cols])
}

/// The values of a matrix row by row; a transposed view is refused, not read as if it were one.
pub fn row_major<'a, T: numpy::Element>(
    what: &str,
    array: &'a PyReadonlyArray2<'_, T>,
) -> PyResult<&'a [T]> {
    if !array.is_c_contiguous() {
        return Err(PyValueError::new_err(format!("{what}: expected C-contiguous memory")));
    }
    contiguous(array.as_slice())
}

/// The slice of a one-dimensional array.
pub fn contiguous<T, E>(slice: Result<T, E>) -> PyResult<T> {
    slice.map_err(|_| PyValueError::new_err("array: expected C-contiguous memory"))
}
