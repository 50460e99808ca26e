//! Dense linear algebra on row-major `f32`: packed products, Gram sums, one Cholesky, one
//! inverse, one largest eigenvalue, one assignment. Everything is serial inside of a row block; blocks run in parallel.

mod assignment;
mod cholesky;
mod gemm;
mod gram;
mod inverse;
mod pack;
mod power;
mod triangular;

pub use assignment::assign;
pub use cholesky::reversed_cholesky;
pub use gemm::{ROW_BLOCK, dot, gemm, gemm_add, gemm_columns};
pub use gram::GramSum;
pub use inverse::invert;
pub use pack::{PackedB, Scratch};
pub use power::largest_eigenvalue;
pub use triangular::solve_rows;
