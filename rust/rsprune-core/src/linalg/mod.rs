//! Dense linear algebra on row-major `f32`: packed products, Gram sums, one Cholesky, one
//! inverse, leading singular vectors and eigenvectors, one assignment, sizes of gradients. Everything is serial inside of a row block; blocks run in parallel.

mod assignment;
mod cholesky;
mod gemm;
mod gradient;
mod gram;
mod inverse;
mod jacobi;
mod orthonormal;
mod pack;
mod power;
mod subspace;
mod triangular;

pub use assignment::assign;
pub use cholesky::reversed_cholesky;
pub use gemm::{ROW_BLOCK, dot, gemm, gemm_add, gemm_columns};
pub use gradient::{GradientSizes, gradient_sizes, gradient_squares};
pub use gram::GramSum;
pub use inverse::invert;
pub use jacobi::{Eigen, symmetric_eigen};
pub use orthonormal::orthonormalise;
pub use pack::{PackedB, Scratch};
pub use power::largest_eigenvalue;
pub use subspace::{
    Svd, rows_times, times_transposed, top_eigenvectors, transposed, truncated_svd,
};
pub use triangular::{invert_upper, solve_rows};
