//! How far two matrices are apart when a rank-r correction of their difference is free.
//!
//! ```text
//! W^_i = U_i^T S_i V_i                                   truncated SVDs, R leading triples
//! W^_i - W^_j = [U_i; U_j]^T diag(S_i, -S_j) [V_i; V_j] = Q_u^T (L_u^T diag(S_i, -S_j) L_v) Q_v
//! distance^2 = sum of the squared singular values of the 2R x 2R core beyond the first r
//! ```
//! One truncated SVD a matrix serves all its pairs; no pair is ever decomposed at full size.

use crate::error::Result;
use crate::linalg::{Svd, orthonormalise, symmetric_eigen};
use crate::par::Job;

/// `min over rank-r D of || W^_i - W^_j - D ||_F^2`, for matrices given by their leading triples.
pub fn pair_distance(job: &Job, one: &Svd, other: &Svd, rank: usize) -> Result<f64> {
    let values: Vec<f64> =
        one.values.iter().copied().chain(other.values.iter().map(|s| -s)).collect();
    let k = values.len();
    let left = joined_factor(job, &one.left, &other.left, k)?;
    let right = joined_factor(job, &one.right, &other.right, k)?;
    // core = L_u^T diag(values) L_v, both factors lower triangular.
    let mut core = vec![0.0f64; k * k];
    for (p, value) in values.iter().enumerate() {
        for i in 0..=p {
            let scaled = left[p * k + i] * value;
            let rows = core[i * k..i * k + p + 1].iter_mut().zip(&right[p * k..]);
            rows.for_each(|(c, r)| *c += scaled * r);
        }
    }
    let row = |i: usize| &core[i * k..(i + 1) * k];
    let inner = |i, j| row(i).iter().zip(row(j)).map(|(a, b)| a * b).sum::<f64>();
    let squares = (0..k * k).map(|at| inner(at / k, at % k)).collect();
    let spectrum = symmetric_eigen(squares, k).values;
    Ok(spectrum.iter().skip(rank).map(|v| v.max(0.0)).sum())
}

/// The triangle `L [k, k]` of `[one; other] = L Q`.
fn joined_factor(job: &Job, one: &[f32], other: &[f32], k: usize) -> Result<Vec<f64>> {
    let mut rows = [one, other].concat();
    let length = rows.len() / k.max(1);
    orthonormalise(job, &mut rows, length)
}
