//! `Z H = B` for many rows at once, from the reversed Cholesky factor of `H`.

use super::gemm::ROW_BLOCK;
use crate::buffer::Buffer;
use crate::error::Result;
use crate::par::Job;

/// The rows `Z = B (R R^T)^-1` for `b [m, n]` and upper triangular `r [n, n]`.
///
/// Both substitutions walk along rows of `R`: `Y R^T = B` from the last column by dot products,
/// then `Z R = Y` from the first by row updates.
pub fn solve_rows(job: &Job, b: &[f32], r: &[f32], n: usize) -> Result<Buffer> {
    let mut out = job.copy(b)?;
    job.map_blocks(&mut out, (ROW_BLOCK / 4) * n, |_, rows| {
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
    Ok(out)
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
        let z = solve_rows(&Job::new(&pool, &flag), &b, &r, n).unwrap();
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
}
