//! The pure core of rsprune: no Python, no globals, no printing.
//!
//! Layers, lowest first; a module uses only those above it in this list:
//! `error`, `disk`, `buffer`, `par` | `kernels` (matrix tiles) | `linalg` (GEMM, Gram, Cholesky) | `pattern` |
//! `solve` (the methods) and, beside them, `shard` (safetensors files).

pub mod buffer;
pub mod disk;
pub mod error;
pub mod float;
pub mod kernels;
pub mod linalg;
pub mod par;
pub mod pattern;
pub mod shard;
pub mod solve;

pub use error::{Error, Result};
