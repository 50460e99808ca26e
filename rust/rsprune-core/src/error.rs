//! One error type for the whole core: a variant per cause, with what was expected and what was found.

use std::path::PathBuf;

/// What can go wrong in the core.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be opened, read, written, synced or renamed.
    #[error("{path}: {action} failed: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What was being done, such as "read 512 bytes at offset 8".
        action: String,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// A checkpoint file breaks its format.
    #[error("{path}: {reason}")]
    Format {
        /// The file.
        path: PathBuf,
        /// Which rule is broken, with the offending name and numbers.
        reason: String,
    },
    /// A tensor that a caller asked for is not there.
    #[error("{path}: no tensor named {name:?}")]
    MissingTensor {
        /// The shard.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
    /// Two things that must agree in size do not.
    #[error("{what}: expected {expected}, found {found}")]
    Shape {
        /// Which argument.
        what: String,
        /// What would have been right.
        expected: String,
        /// What was there.
        found: String,
    },
    /// A sparsity pattern that cannot be parsed or does not fit.
    #[error("{0}")]
    Pattern(String),
    /// An option outside of its range.
    #[error("{0}")]
    Option(String),
    /// Packed bytes that are not of their format, or a weight that has no such form.
    #[error("{part}: {reason}")]
    Packed {
        /// The tensor of the format.
        part: &'static str,
        /// Where, what was expected and what was found.
        reason: String,
    },
    /// A value that is NaN or infinite.
    #[error("{what}: non-finite value at flat index {index}")]
    NonFinite {
        /// Which array.
        what: String,
        /// Where, in row-major order.
        index: usize,
    },
    /// A Gram matrix that has no Cholesky factor at the given damping.
    #[error(
        "the Gram matrix ({size} x {size}) is not positive definite at pivot {pivot} with \
         damping {damping}: use more calibration tokens or a larger damping"
    )]
    NotPositiveDefinite {
        /// Rows of the matrix.
        size: usize,
        /// The first pivot that is not positive.
        pivot: usize,
        /// The relative damping that was in force.
        damping: f64,
    },
    /// The caller asked to stop.
    #[error("cancelled")]
    Cancelled,
}

/// The core's result.
pub type Result<T> = std::result::Result<T, Error>;
