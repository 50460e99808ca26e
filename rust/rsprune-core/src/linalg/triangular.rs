//! Upper triangular `R`: `Z R R^T = B` for many rows at once, and its inverse.

use super::gemm::{ROW_BLOCK, gemm};
use super::pack::{PackedB, Scratch};
use crate::buffer::Room;
use crate::error::Result;
use crate::kernels::Kernel;
use crate::par::Job;
use std::ops::Range;

const BLOCK: usize = 64;

/// Overwrites the rows `b [m, n]` with `B (R R^T)^-1` for upper triangular `r [n, n]`.
///
/// Both substitutions go over blocks of columns; what the columns that are known already give to a
/// block is one product:
/// ```text
/// Y R^T = B:   Y_b = (B_b - Y_c R_bc^T) R_bb^-T     c > b, from the last block
/// Z R = Y:     Z_b = (Y_b - Z_a R_ab) R_bb^-1       a < b, from the first
/// ```
pub fn solve_rows(job: &Job, kernel: &Kernel, b: &mut [f32], r: &[f32], n: usize) -> Result<()> {
    for b0 in (0..n).step_by(BLOCK).rev() {
        let b1 = (b0 + BLOCK).min(n);
        let shape = (n - b1, b1 - b0);
        let later = PackedB::filled(job, kernel, Room::Memory, shape, |rows, columns, tile| {
            for (p, out) in rows.zip(tile.chunks_exact_mut(kernel.nr)) {
                let transposed = columns.clone().map(|c| r[(b0 + c) * n + b1 + p]);
                out.iter_mut().zip(transposed).for_each(|(out, v)| *out = v);
            }
        })?;
        let own = Corner::new(r, n, b0, b1, true);
        solve_block(job, kernel, b, n, (b0, b1..n), &later, |row| own.backwards(row))?;
    }
    for b0 in (0..n).step_by(BLOCK) {
        let b1 = (b0 + BLOCK).min(n);
        let earlier = PackedB::shared(job, kernel, &r[b0..], (b0, b1 - b0), n)?;
        let own = Corner::new(r, n, b0, b1, false);
        solve_block(job, kernel, b, n, (b0, 0..b0), &earlier, |row| own.forwards(row))?;
    }
    Ok(())
}

/// `B_b <- solve(B_b - B[:, known] factor)` for the block of columns at `b0`.
fn solve_block(
    job: &Job,
    kernel: &Kernel,
    b: &mut [f32],
    n: usize,
    (b0, known): (usize, Range<usize>),
    factor: &PackedB,
    solve: impl Fn(&mut [f32]) + Sync,
) -> Result<()> {
    let w = factor.n;
    job.map_blocks(b, ROW_BLOCK * n, |_, rows| {
        let count = rows.len() / n;
        let mut given = vec![0.0f32; count * w];
        if !known.is_empty() {
            let left = (&rows[known.start..], count, n);
            gemm(kernel, &mut Scratch::default(), left, factor, &mut given);
        }
        for (row, given) in rows.chunks_exact_mut(n).zip(given.chunks_exact(w)) {
            let row = &mut row[b0..b0 + w];
            kernel.vectorised(|| {
                row.iter_mut().zip(given).for_each(|(x, g)| *x -= g);
                solve(row);
            });
        }
        Ok(())
    })?;
    Ok(())
}

/// A diagonal block of `R`, or its transpose; rows of either are what substitution subtracts.
struct Corner {
    w: usize,
    values: Vec<f32>,
}

impl Corner {
    fn new(r: &[f32], n: usize, b0: usize, b1: usize, transposed: bool) -> Corner {
        let w = b1 - b0;
        let at = |i: usize, j: usize| r[(b0 + i) * n + b0 + j];
        let entry = |k: usize| if transposed { at(k % w, k / w) } else { at(k / w, k % w) };
        Corner { w, values: (0..w * w).map(entry).collect() }
    }

    /// `y R^T = b` in place, from the last entry; made of the transpose.
    #[inline]
    fn backwards(&self, row: &mut [f32]) {
        for j in (0..self.w).rev() {
            let column = &self.values[j * self.w..][..=j];
            let y = row[j] / column[j];
            row[j] = y;
            row[..j].iter_mut().zip(column).for_each(|(b, r)| *b -= y * r);
        }
    }

    /// `z R = y` in place, from the first entry.
    #[inline]
    fn forwards(&self, row: &mut [f32]) {
        for j in 0..self.w {
            let r_row = &self.values[j * self.w..][j..self.w];
            let z = row[j] / r_row[0];
            row[j] = z;
            row[j + 1..].iter_mut().zip(&r_row[1..]).for_each(|(y, r)| *y -= z * r);
        }
    }
}

/// Overwrites upper triangular `r [n, n]` with its inverse.
///
/// `U R = I` row by row, from the first row on: row `i` needs the rows of `R` from `i` on, so those
/// above may be inverses already. Blocks of rows are read from a copy while they are overwritten.
pub fn invert_upper(job: &Job, kernel: &Kernel, r: &mut [f32], n: usize) -> Result<()> {
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
        for (n, m) in [(1, 1), (23, 3), (64, 2), (150, 101)] {
            let mut r = vec![0.0f32; n * n];
            for i in 0..n {
                for j in i..n {
                    let other = ((i * 5 + j * 3) % 7) as f32 * 0.05 - 0.15;
                    r[i * n + j] = if i == j { 2.0 } else { other };
                }
            }
            let b: Vec<f32> = (0..m * n).map(|i| (i as f32 * 0.37).sin()).collect();
            let at = |i: usize, j: usize| f64::from(r[i * n + j]);
            let h: Vec<f64> =
                (0..n * n).map(|k| (0..n).map(|p| at(k / n, p) * at(k % n, p)).sum()).collect();
            for kernel in Kernel::available() {
                let mut z = b.clone();
                solve_rows(&Job::new(&pool, &flag), &kernel, &mut z, &r, n).unwrap();
                for (z, b) in z.chunks_exact(n).zip(b.chunks_exact(n)) {
                    for j in 0..n {
                        let sum: f64 = (0..n).map(|i| f64::from(z[i]) * h[i * n + j]).sum();
                        assert!((sum - f64::from(b[j])).abs() < 1e-4, "{n} {j} {}", kernel.name);
                    }
                }
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
