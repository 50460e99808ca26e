//! The inverse of a symmetric positive definite matrix, in place, by block Gauss-Jordan.
//!
//! ```text
//! for each block b of columns:
//!     P = (H_bb)^-1                       (f64, small)
//!     H_b: = P H_b:                       (its own block becomes P)
//!     H_i: -= H_ib (P H_b:)   i != b      (rank-128 GEMM: nearly all of the 2 n^3)
//!     H_ib = -H_ib P
//! ```
//! No pivoting: every leading Schur complement of a positive definite matrix is positive definite.
//! A Cholesky factor and two triangular solves take the same work in less regular pieces.

use super::gemm::{ROW_BLOCK, gemm_add};
use super::pack::{PackedB, Scratch};
use crate::error::{Error, Result};
use crate::kernels::Kernel;
use crate::par::Job;

const BLOCK: usize = 128;

/// Replaces `h [n, n]` (full, symmetric positive definite) by its inverse.
pub fn invert(job: &Job, kernel: &Kernel, h: &mut [f32], n: usize) -> Result<()> {
    for b0 in (0..n).step_by(BLOCK) {
        let w = BLOCK.min(n - b0);
        let pivot = invert_pivot(h, n, b0, w)?;
        let panel = scaled_rows(job, kernel, h, n, (b0, w), &pivot)?;
        eliminate(job, kernel, h, n, (b0, w), &panel)?;
        for (i, row) in panel.chunks_exact(n).enumerate() {
            h[(b0 + i) * n..(b0 + i + 1) * n].copy_from_slice(row);
        }
    }
    Ok(())
}

/// `P = (H_bb)^-1 [w, w]` in f64, by scalar Gauss-Jordan.
fn invert_pivot(h: &[f32], n: usize, b0: usize, w: usize) -> Result<Vec<f32>> {
    let at = |i: usize| f64::from(h[(b0 + i / w) * n + b0 + i % w]);
    let mut a: Vec<f64> = (0..w * w).map(at).collect();
    for p in 0..w {
        let pivot = a[p * w + p];
        if !(pivot > 0.0 && pivot.is_finite()) {
            return Err(Error::NotPositiveDefinite { size: n, pivot: b0 + p, damping: 0.0 });
        }
        let mut row: Vec<f64> = a[p * w..(p + 1) * w].iter().map(|v| v / pivot).collect();
        row[p] = 1.0 / pivot;
        for (i, other) in a.chunks_exact_mut(w).enumerate() {
            if i == p {
                other.copy_from_slice(&row);
            } else {
                let factor = std::mem::take(&mut other[p]);
                other.iter_mut().zip(&row).for_each(|(x, r)| *x -= factor * r);
            }
        }
    }
    Ok(a.iter().map(|v| *v as f32).collect())
}

/// The new rows of the block, `[w, n]`: `P H_b:`, with `P` itself in the block's own columns.
fn scaled_rows(
    job: &Job,
    kernel: &Kernel,
    h: &[f32],
    n: usize,
    (b0, w): (usize, usize),
    pivot: &[f32],
) -> Result<Vec<f32>> {
    let packed = PackedB::shared(job, kernel, &h[b0 * n..], (w, n), n)?;
    let mut panel = vec![0.0f32; w * n];
    job.map_blocks(&mut panel, kernel.mr * 2 * n, |i, rows| {
        let (first, count) = (i * kernel.mr * 2, rows.len() / n);
        let left = (&pivot[first * w..], count, w);
        gemm_add(kernel, &mut Scratch::default(), left, &packed, 0..w, rows);
        for (r, row) in rows.chunks_exact_mut(n).enumerate() {
            row[b0..b0 + w].copy_from_slice(&pivot[(first + r) * w..][..w]);
        }
        Ok(())
    })?;
    Ok(panel)
}

/// All other rows: `H_i: -= H_ib panel`, their columns of the block starting from zero.
fn eliminate(
    job: &Job,
    kernel: &Kernel,
    h: &mut [f32],
    n: usize,
    (b0, w): (usize, usize),
    panel: &[f32],
) -> Result<()> {
    let packed = PackedB::shared(job, kernel, panel, (w, n), n)?;
    job.map_blocks(h, ROW_BLOCK * n, |_, rows| {
        let count = rows.len() / n;
        let mut left = vec![0.0f32; count * w];
        for (left, row) in left.chunks_exact_mut(w).zip(rows.chunks_exact_mut(n)) {
            left.iter_mut().zip(&mut row[b0..b0 + w]).for_each(|(l, x)| *l = -std::mem::take(x));
        }
        // The block's own rows are overwritten by the caller; what they get here does not matter.
        gemm_add(kernel, &mut Scratch::default(), (&left, count, w), &packed, 0..w, rows);
        Ok(())
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::par::Pool;
    use proptest::prelude::*;
    use std::sync::atomic::AtomicBool;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]
        #[test]
        fn the_inverse_multiplies_back_to_one(n in 1usize..300, seed: u32) {
            let value = |i: usize| ((i as u32 + 1).wrapping_mul(seed | 1) >> 16) as f32 / 65536.0 - 0.5;
            let h: Vec<f32> = (0..n * n)
                .map(|k| {
                    let (i, j) = ((k / n).max(k % n), (k / n).min(k % n));
                    value(i * n + j) / n as f32 + if i == j { 1.0 } else { 0.0 }
                })
                .collect();
            let flag = AtomicBool::new(false);
            for kernel in Kernel::available() {
                let mut found = Vec::new();
                for threads in [1, 2] {
                    let pool = Pool::new(threads).unwrap();
                    let mut inverse = h.clone();
                    invert(&Job::new(&pool, &flag), &kernel, &mut inverse, n).unwrap();
                    found.push(inverse);
                }
                prop_assert_eq!(&found[0], &found[1]);
                for i in (0..n).step_by(7) {
                    for j in 0..n {
                        let dot: f64 = (0..n)
                            .map(|p| f64::from(h[i * n + p]) * f64::from(found[0][p * n + j]))
                            .sum();
                        let unit = f64::from(u8::from(i == j));
                        prop_assert!((dot - unit).abs() < 1e-4);
                    }
                }
            }
        }
    }

    #[test]
    fn an_indefinite_matrix_is_refused_by_its_pivot() {
        let (pool, flag) = (Pool::new(1).unwrap(), AtomicBool::new(false));
        let mut h = vec![1.0f32, 0.0, 0.0, -1.0];
        let error = invert(&Job::new(&pool, &flag), &Kernel::select().unwrap(), &mut h, 2);
        assert!(matches!(error, Err(Error::NotPositiveDefinite { pivot: 1, .. })));
    }
}
