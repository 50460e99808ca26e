//! Reversed Cholesky `H = R R^T` with `R` upper triangular, blocked.
//!
//! Its columns carry the error feedback of column-by-column pruning: with `H^-1 = U^T U`
//! (the usual form) `U = R^-1`, so no inverse is ever taken. Seen from the last column
//! backwards it is the ordinary algorithm:
//! ```text
//! for block b from the last to the first:
//!     R_bb = chol_reversed(H_bb)                  (f64, small)
//!     R_ab = H_ab R_bb^-T       for all a < b     (f64, row by row)
//!     H_aa -= R_ab R_ab^T       for all a < b     (f32 GEMM: nearly all of the work)
//! ```

use super::gemm::{ROW_BLOCK, gemm};
use super::pack::{PackedB, Scratch};
use crate::error::{Error, Result};
use crate::kernels::Kernel;
use crate::par::Job;

const BLOCK: usize = 64;

/// Factors `h [n, n]` (full, symmetric; overwritten) into upper triangular `R` with `h = R R^T`.
/// `damping` is only named in the error.
pub fn reversed_cholesky(
    job: &Job,
    kernel: &Kernel,
    h: &mut [f32],
    n: usize,
    damping: f64,
) -> Result<()> {
    let blocks = n.div_ceil(BLOCK);
    for b in (0..blocks).rev() {
        let (b0, b1) = (b * BLOCK, ((b + 1) * BLOCK).min(n));
        let diagonal = factor_diagonal(h, n, b0, b1, damping)?;
        solve_above(job, h, n, (b0, b1), &diagonal)?;
        update_remainder(job, kernel, h, n, (b0, b1))?;
    }
    for i in 0..n {
        h[i * n..i * n + i].fill(0.0);
    }
    Ok(())
}

/// Factors the diagonal block in f64, writes it back, returns it (`w x w`, row-major).
fn factor_diagonal(
    h: &mut [f32],
    n: usize,
    b0: usize,
    b1: usize,
    damping: f64,
) -> Result<Vec<f64>> {
    let w = b1 - b0;
    let mut r = vec![0.0f64; w * w];
    for j in (0..w).rev() {
        for i in (0..=j).rev() {
            let inner: f64 = (j + 1..w).map(|p| r[i * w + p] * r[j * w + p]).sum();
            let rest = f64::from(h[(b0 + i) * n + b0 + j]) - inner;
            if i < j {
                r[i * w + j] = rest / r[j * w + j];
            } else if rest > 0.0 && rest.is_finite() {
                r[j * w + j] = rest.sqrt();
            } else {
                return Err(Error::NotPositiveDefinite { size: n, pivot: b0 + j, damping });
            }
        }
    }
    for i in 0..w {
        for j in i..w {
            h[(b0 + i) * n + b0 + j] = r[i * w + j] as f32;
        }
    }
    Ok(r)
}

/// `R_ab = H_ab R_bb^-T`: per row, back substitution from the last column of the block.
fn solve_above(
    job: &Job,
    h: &mut [f32],
    n: usize,
    (b0, b1): (usize, usize),
    r: &[f64],
) -> Result<()> {
    let w = b1 - b0;
    job.map_blocks(&mut h[..b0 * n], ROW_BLOCK * n, |_, rows| {
        let mut x = vec![0.0f64; w];
        for row in rows.chunks_exact_mut(n) {
            let row = &mut row[b0..b1];
            for j in (0..w).rev() {
                let inner: f64 = (j + 1..w).map(|p| x[p] * r[j * w + p]).sum();
                x[j] = (f64::from(row[j]) - inner) / r[j * w + j];
            }
            row.iter_mut().zip(&x).for_each(|(out, v)| *out = *v as f32);
        }
        Ok(())
    })?;
    Ok(())
}

/// `H_aa -= R_ab R_ab^T` on what is not factored yet (both triangles: rows stay independent).
fn update_remainder(
    job: &Job,
    kernel: &Kernel,
    h: &mut [f32],
    n: usize,
    (b0, b1): (usize, usize),
) -> Result<()> {
    let w = b1 - b0;
    let mut transposed = vec![0.0f32; w * b0];
    for i in 0..b0 {
        for p in 0..w {
            transposed[p * b0 + i] = h[i * n + b0 + p];
        }
    }
    let packed = PackedB::shared(job, kernel, &transposed, (w, b0), b0)?;
    job.map_blocks(&mut h[..b0 * n], ROW_BLOCK * n, |_, rows| {
        let count = rows.len() / n;
        let mut product = vec![0.0f32; count * b0];
        let left = (&rows[b0..], count, n);
        gemm(kernel, &mut Scratch::default(), left, &packed, &mut product);
        for (row, minus) in rows.chunks_exact_mut(n).zip(product.chunks_exact(b0)) {
            row[..b0].iter_mut().zip(minus).for_each(|(x, m)| *x -= m);
        }
        Ok(())
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::par::Pool;
    use std::sync::atomic::AtomicBool;

    fn spd(n: usize) -> Vec<f32> {
        let a: Vec<f32> =
            (0..n * n).map(|i| ((i * 7919 + 13) % 101) as f32 / 101.0 - 0.5).collect();
        let mut h = vec![0.0f32; n * n];
        for i in 0..n {
            for j in 0..n {
                let dot: f32 = (0..n).map(|p| a[i * n + p] * a[j * n + p]).sum();
                h[i * n + j] = dot + if i == j { 0.5 } else { 0.0 };
            }
        }
        h
    }

    #[test]
    fn the_factor_multiplies_back() {
        let (pool, flag) = (Pool::new(2).unwrap(), AtomicBool::new(false));
        for n in [1, 5, 64, 65, 200] {
            let h = spd(n);
            for kernel in Kernel::available() {
                let mut r = h.clone();
                reversed_cholesky(&Job::new(&pool, &flag), &kernel, &mut r, n, 0.0).unwrap();
                for i in 0..n {
                    for j in 0..n {
                        assert!(j >= i || r[i * n + j] == 0.0);
                        let back: f64 =
                            (0..n).map(|p| f64::from(r[i * n + p]) * f64::from(r[j * n + p])).sum();
                        assert!((back - f64::from(h[i * n + j])).abs() < 2e-3, "{n} {i} {j}");
                    }
                }
            }
        }
    }

    #[test]
    fn an_indefinite_matrix_is_refused_by_its_pivot() {
        let (pool, flag) = (Pool::new(1).unwrap(), AtomicBool::new(false));
        let kernel = Kernel::select().unwrap();
        let mut h = vec![1.0f32, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0];
        let error = reversed_cholesky(&Job::new(&pool, &flag), &kernel, &mut h, 3, 0.01);
        assert!(matches!(error, Err(Error::NotPositiveDefinite { pivot: 1, .. })));
    }
}
