//! The one place where a core error becomes a Python exception.

use pyo3::PyErr;
use pyo3::exceptions::{
    PyFileNotFoundError, PyKeyError, PyKeyboardInterrupt, PyOSError, PyValueError,
};
use rsprune_core::Error;
use std::io::ErrorKind;

/// `ValueError` for what a user can mend in the input, `OSError` for what the system refused.
pub fn to_py(error: Error) -> PyErr {
    let message = error.to_string();
    match error {
        Error::Io { source, .. } if source.kind() == ErrorKind::NotFound => {
            PyFileNotFoundError::new_err(message)
        }
        Error::Io { source, .. } => match source.raw_os_error() {
            Some(code) => PyOSError::new_err((code, message)),
            None => PyOSError::new_err(message),
        },
        Error::MissingTensor { .. } => PyKeyError::new_err(message),
        Error::Cancelled => PyKeyboardInterrupt::new_err(message),
        Error::Format { .. }
        | Error::Shape { .. }
        | Error::Packed { .. }
        | Error::Pattern(_)
        | Error::Option(_)
        | Error::NonFinite { .. }
        | Error::NotPositiveDefinite { .. } => PyValueError::new_err(message),
    }
}
