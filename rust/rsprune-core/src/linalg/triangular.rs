//! Upper triangular `R`: `Z R R^T = B` for many rows at once, and its inverse.

use super::gemm::ROW_BLOCK;
use crate::error::Result;
use crate::kernels::Kernel;
use crate::par::Job;

/// Overwrites the rows `b [m, n]` with `B (R R^T)^-1` for upper triangular `r [n, n]`.
///
/// Both substitutions walk along rows of `R`: `Y R^T = B` from the last column by dot products,
/// then `Z R = Y` from the first by row updates.
pub fn solve_rows(job: &Job, b: &mut [f32], r: &[f32], n: usize) -> Result<()> {
    job.map_blocks(b, (ROW_BLOCK / 4) * n, |_, rows| {
        for row in rows.chunks_exact_mut(n) {
            for j in (0..n).rev() {
                let r_row = &r[j * n + j..(j + 1) * n];
                let inner: f32 = r_row[1..].iter().zip(&row[j + 1..]).map(|(a, b)| a * b).sum();
                row[j] = (row[j] - inner) / r_row[0];
            }
            for j in 0..n {
                let r_row = &r[j * n + j..(j + 1) * n];
                let z = row[j] / r_row[0];
                row[j] = z;
                row[j + 1..].iter_mut().zip(&r_row[1..]).for_each(|(y, r)| *y -= z * r);
            }
        }
        Ok(())
    })?;
    Ok(())
}

/// Overwrites upper triangular `r [n, n]` with its inverse.
///
/// `U R = I` row by row, from the first row on: row `i` needs the rows of `R` from `i` on, so those
/// above may be inverses already. Blocks of rows are read from a copy while they are overwritten.
pub fn invert_upper(job: &Job, kernel: &Kernel, r: &mut [f32], n: usize) -> Result<()> {
    const BLOCK: usize = 64;
    const TEAM: usize = 8; // rows that share what they read of R
    for first in (0..n).step_by(BLOCK) {
        let last = (first + BLOCK).min(n);
        let own = r[first * n..last * n].to_vec();
        let (above, below) = r.split_at_mut(last * n);
        let below = &*below;
        let row_of = |j: usize| {
            if j < last { &own[(j - first) * n..] } else { &below[(j - last) * n..] }
        };
        job.map_blocks(&mut above[first * n..], TEAM * n, |team, rows| {
            for (k, row) in rows.chunks_exact_mut(n).enumerate() {
                row.fill(0.0);
                row[first + team * TEAM + k] = 1.0;
            }
            kernel.vectorised(|| {
                for j in first..n {
                    let r_row = &row_of(j)[j..n];
                    for row in rows.chunks_exact_mut(n).filter(|row| row[j] != 0.0) {
                        let u = row[j] / r_row[0];
                        row[j] = u;
                        row[j + 1..].iter_mut().zip(&r_row[1..]).for_each(|(y, r)| *y -= u * r);
                    }
                }
            });
            Ok(())
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::par::Pool;
    use std::sync::atomic::AtomicBool;

    #[test]
    fn the_solution_multiplies_back() {
        let (pool, flag) = (Pool::new(2).unwrap(), AtomicBool::new(false));
        let n = 23;
        let mut r = vec![0.0f32; n * n];
        for i in 0..n {
            for j in i..n {
                r[i * n + j] = if i == j { 2.0 } else { ((i * 5 + j * 3) % 7) as f32 * 0.05 };
            }
        }
        let b: Vec<f32> = (0..3 * n).map(|i| (i as f32 * 0.37).sin()).collect();
        let mut z = b.clone();
        solve_rows(&Job::new(&pool, &flag), &mut z, &r, n).unwrap();
        for row in 0..3 {
            for j in 0..n {
                let mut sum = 0.0f64;
                for i in 0..n {
                    let h: f64 = (0..n).map(|p| f64::from(r[i * n + p] * r[j * n + p])).sum();
                    sum += f64::from(z[row * n + i]) * h;
                }
                assert!((sum - f64::from(b[row * n + j])).abs() < 1e-4);
            }
        }
    }

    #[test]
    fn the_inverse_multiplies_back() {
        let (pool, flag) = (Pool::new(2).unwrap(), AtomicBool::new(false));
        let kernel = Kernel::select().unwrap();
        for n in [1, 7, 64, 150] {
            let at = |i: usize, j: usize| match i.cmp(&j) {
                std::cmp::Ordering::Greater => 0.0f32,
                std::cmp::Ordering::Equal => 1.5,
                std::cmp::Ordering::Less => ((i * 5 + j * 3) % 7) as f32 * 0.02 - 0.05,
            };
            let mut u: Vec<f32> = (0..n * n).map(|k| at(k / n, k % n)).collect();
            invert_upper(&Job::new(&pool, &flag), &kernel, &mut u, n).unwrap();
            for i in 0..n {
                for j in 0..n {
                    let sum: f64 = (0..n).map(|k| f64::from(u[i * n + k] * at(k, j))).sum();
                    assert!((sum - f64::from(u8::from(i == j))).abs() < 1e-4, "{n} {i} {j}");
                }
            }
        }
    }
}
