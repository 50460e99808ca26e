//! The pure core of rsprune: no Python, no globals, no printing.
//!
//! Layers, lowest first; a module uses only those above it in this list:
//! `error`, `disk`, `buffer`, `par` | `kernels` (matrix tiles) | `linalg` (GEMM, Gram, Cholesky) | `pattern` |
//! `pack` (packed weights) | `packed` (products with them) | `solve` (the methods), `lowrank` (maps of
//! low rank) | `binarize` (a bit or a few a weight) and, beside them, `shard` (safetensors files).

pub mod binarize;
pub mod buffer;
pub mod disk;
pub mod error;
pub mod float;
pub mod kernels;
pub mod linalg;
pub mod lowrank;
pub mod pack;
pub mod packed;
pub mod par;
pub mod pattern;
pub mod shard;
pub mod solve;

pub use error::{Error, Result};
