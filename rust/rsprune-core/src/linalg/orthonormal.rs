//! Orthonormal rows by Gram-Schmidt, every row twice, with sums in f64.
//!
//! ```text
//! for each row v:  twice:  c = Q v;  v -= Q^T c        (Q: the rows before it)
//!                  v /= |v|
//! ```
//! Twice is enough: after the second time rows are orthogonal to the last digits of f32 whatever the
//! condition, where a factor of the Gram (Cholesky QR) fails from 1e4 on.

use super::gemm::dot;
use crate::error::Result;
use crate::par::Job;

const BLOCK: usize = 4096;
/// What is left of a row, relative to it, when it lies in the span of those before.
const DEPENDENT: f64 = 1e-6;

/// Replaces `rows [k, n]` by `Q` and returns the lower triangle `L [k, k]` with `rows = L Q`.
///
/// A row that depends on those before it becomes zero, and so does its diagonal entry of `L`.
pub fn orthonormalise(job: &Job, rows: &mut [f32], n: usize) -> Result<Vec<f64>> {
    let k = rows.len() / n.max(1);
    let mut lower = vec![0.0f64; k * k];
    for i in 0..k {
        let (done, rest) = rows.split_at_mut(i * n);
        let row = &mut rest[..n];
        let before = dot(row, row).sqrt();
        for _ in 0..2 {
            let inner = job.map(i, |j| Ok(dot(&done[j * n..(j + 1) * n], row)))?;
            subtract(job, row, done, &inner)?;
            lower[i * k..].iter_mut().zip(&inner).for_each(|(l, c)| *l += c);
        }
        let norm = dot(row, row).sqrt();
        if norm <= DEPENDENT * before {
            row.fill(0.0);
        } else {
            lower[i * k + i] = norm;
            row.iter_mut().for_each(|x| *x = (f64::from(*x) / norm) as f32);
        }
    }
    Ok(lower)
}

/// `row -= sum_j inner[j] done[j]`
fn subtract(job: &Job, row: &mut [f32], done: &[f32], inner: &[f64]) -> Result<()> {
    let n = row.len();
    job.map_blocks(row, BLOCK, |block, part| {
        let mut sum = vec![0.0f64; part.len()];
        for (other, c) in done.chunks_exact(n).zip(inner) {
            let other = &other[block * BLOCK..][..part.len()];
            sum.iter_mut().zip(other).for_each(|(s, x)| *s += c * f64::from(*x));
        }
        part.iter_mut().zip(&sum).for_each(|(x, s)| *x = (f64::from(*x) - s) as f32);
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
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn rows_are_orthonormal_and_multiply_back(
            k in 1usize..12, extra in 0usize..6000, dependent: bool, seed: u32,
        ) {
            let n = k + extra;
            let value = |i: usize| ((i as u32 + 1).wrapping_mul(seed | 1) >> 16) as f32 / 65536.0 - 0.5;
            let mut rows: Vec<f32> = (0..k * n).map(value).collect();
            if dependent && k > 1 {
                let first: Vec<f32> = rows[..n].iter().map(|x| x * 2.0).collect();
                rows[(k - 1) * n..].copy_from_slice(&first);
            }
            let flag = AtomicBool::new(false);
            let found = [1, 2, 5].map(|threads| {
                let (pool, mut q) = (Pool::new(threads).unwrap(), rows.clone());
                let lower = orthonormalise(&Job::new(&pool, &flag), &mut q, n).unwrap();
                (q, lower)
            });
            prop_assert_eq!(&found[0], &found[1]);
            prop_assert_eq!(&found[0], &found[2]);
            let (q, lower) = &found[0];
            for i in 0..k {
                for j in 0..k {
                    let inner = dot(&q[i * n..(i + 1) * n], &q[j * n..(j + 1) * n]);
                    let unit = f64::from(u8::from(i == j && lower[i * k + i] > 0.0));
                    prop_assert!((inner - unit).abs() < 2e-6);
                    prop_assert!(j <= i || lower[i * k + j] == 0.0);
                }
                for e in (0..n).step_by(7) {
                    let back: f64 = (0..k).map(|j| lower[i * k + j] * f64::from(q[j * n + e])).sum();
                    prop_assert!((back - f64::from(rows[i * n + e])).abs() < 1e-5);
                }
            }
            if dependent && k > 1 {
                prop_assert!(lower[k * k - 1] == 0.0);
            }
        }
    }
}
