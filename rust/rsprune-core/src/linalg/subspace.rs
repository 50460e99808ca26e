//! Leading singular vectors and eigenvectors of a large matrix by randomised subspace iteration.
//!
//! ```text
//! Z = random numbers [k, n],  k = rank + a few
//! repeat:  Q = orth(Z A^T);  B = Q A                  (two products with A)
//!          stop when |B|_F has stopped growing;  Z = orth(B)
//! eigenvectors W of the small B B^T:  U = W Q,  s = sqrt(values),  V = W B / s
//! ```
//! A step costs `4 m n k` instead of the `O(m n min(m, n))` of a whole decomposition. Vectors are
//! rows throughout, so that every sum runs along memory. Halko, Martinsson and Tropp,
//! arXiv 0909.4061, with the growth of the captured energy in place of a fixed number of steps:
//! weights of language models have flat spectra, for which two power iterations are too few.

use super::gemm::{ROW_BLOCK, dot, gemm};
use super::jacobi::symmetric_eigen;
use super::orthonormal::orthonormalise;
use super::pack::{PackedB, Scratch};
use crate::error::Result;
use crate::kernels::Kernel;
use crate::par::Job;

const STEPS: usize = 40;
/// Relative growth of the captured energy at which iteration stops.
const SETTLED: f64 = 1e-6;
/// Up to here all eigenvectors are computed, exactly.
const SMALL: usize = 96;
/// Columns whose panel is packed at a time.
const COLUMNS: usize = 256;

/// `A ~ U^T diag(s) V` with orthonormal rows; beyond the rank of `A` rows and values are zero.
pub struct Svd {
    /// Left singular vectors, `[rank, m]`.
    pub left: Vec<f32>,
    /// Singular values, falling.
    pub values: Vec<f64>,
    /// Right singular vectors, `[rank, n]`.
    pub right: Vec<f32>,
}

/// The `rank` leading singular triples of `a [m, n]`; the same bits for the same `seed`.
pub fn truncated_svd(
    job: &Job,
    kernel: &Kernel,
    a: &[f32],
    (m, n): (usize, usize),
    rank: usize,
    seed: u64,
) -> Result<Svd> {
    let k = width(rank, m.min(n));
    let mut z = random_numbers(k * n, seed);
    let mut energy = 0.0;
    let (q, b) = loop_until_settled(|| {
        let mut q = times_transposed(job, kernel, a, (m, n), &z)?;
        orthonormalise(job, &mut q, m)?;
        let b = rows_times(job, kernel, &q, a, (m, n))?;
        let grown = dot(&b, &b);
        let settled = grown - energy <= SETTLED * grown;
        energy = grown;
        z.clone_from(&b);
        orthonormalise(job, &mut z, n)?;
        Ok((settled, (q, b)))
    })?;
    let small = symmetric_eigen(inner_products(job, &b, n)?, k);
    let values: Vec<f64> = small.values.iter().map(|v| v.max(0.0).sqrt()).collect();
    let largest = values.first().copied().unwrap_or(0.0);
    let usable = |i: usize| values[i] > 1e-7 * largest;
    let combine = |rows: &[f32], length, scaled: bool| {
        let weights: Vec<f32> = (0..rank * k)
            .map(|at| match usable(at / k) {
                true if scaled => (small.vectors[at] / values[at / k]) as f32,
                true => small.vectors[at] as f32,
                false => 0.0,
            })
            .collect();
        rows_times(job, kernel, &weights, rows, (k, length))
    };
    let (left, right) = (combine(&q, m, false)?, combine(&b, n, true)?);
    let values = (0..rank).map(|i| if usable(i) { values[i] } else { 0.0 }).collect();
    Ok(Svd { left, values, right })
}

/// The `rank` largest eigenvalues of the symmetric positive semi-definite `s [n, n]`, falling, and
/// their eigenvectors as rows `[rank, n]`.
pub fn top_eigenvectors(
    job: &Job,
    kernel: &Kernel,
    s: &[f32],
    n: usize,
    rank: usize,
    seed: u64,
) -> Result<(Vec<f64>, Vec<f32>)> {
    if n <= SMALL {
        let all = symmetric_eigen(s.iter().map(|v| f64::from(*v)).collect(), n);
        let vectors = all.vectors[..rank * n].iter().map(|v| *v as f32).collect();
        return Ok((all.values[..rank].to_vec(), vectors));
    }
    let k = width(rank, n);
    let mut z = random_numbers(k * n, seed);
    let mut energy = 0.0;
    let (q, b) = loop_until_settled(|| {
        orthonormalise(job, &mut z, n)?;
        let b = rows_times(job, kernel, &z, s, (n, n))?;
        let q = std::mem::replace(&mut z, b.clone());
        let grown: f64 = dot(&q, &b);
        let settled = grown - energy <= SETTLED * grown;
        energy = grown;
        Ok((settled, (q, b)))
    })?;
    let small = symmetric_eigen(cross_products(job, &q, &b, n)?, k);
    let weights: Vec<f32> = small.vectors[..rank * k].iter().map(|v| *v as f32).collect();
    let vectors = rows_times(job, kernel, &weights, &q, (k, n))?;
    Ok((small.values[..rank].to_vec(), vectors))
}

fn loop_until_settled<T>(mut step: impl FnMut() -> Result<(bool, T)>) -> Result<T> {
    let (mut settled, mut found) = step()?;
    for _ in 1..STEPS {
        if settled {
            break;
        }
        (settled, found) = step()?;
    }
    Ok(found)
}

/// Vectors that are iterated: some more than wanted, so that the last wanted ones converge too.
fn width(rank: usize, most: usize) -> usize {
    (rank + 8 + rank / 4).min(most)
}

/// `len` numbers in [-1, 1) from a counter, the same on every machine. (Signs will not do: a few short
/// rows of them are often parallel, and then span less than they should.)
fn random_numbers(len: usize, seed: u64) -> Vec<f32> {
    let number = |i: usize| {
        let mut x = seed.wrapping_add((i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(number).collect()
}

/// `left [k, m] * a [m, n]` as `[k, n]`; panels of `a` are packed a few columns at a time.
pub fn rows_times(
    job: &Job,
    kernel: &Kernel,
    left: &[f32],
    a: &[f32],
    (m, n): (usize, usize),
) -> Result<Vec<f32>> {
    let k = left.len() / m.max(1);
    let parts = job.map(n.div_ceil(COLUMNS), |part| {
        let (c0, w) = (part * COLUMNS, COLUMNS.min(n - part * COLUMNS));
        let packed = PackedB::shared(job, kernel, &a[c0..], (m, w), n)?;
        let mut product = vec![0.0f32; k * w];
        gemm(kernel, &mut Scratch::default(), (left, k, m), &packed, &mut product);
        Ok(product)
    })?;
    let mut out = vec![0.0f32; k * n];
    for (part, product) in parts.iter().enumerate() {
        let (c0, w) = (part * COLUMNS, COLUMNS.min(n - part * COLUMNS));
        for (row, values) in out.chunks_exact_mut(n).zip(product.chunks_exact(w)) {
            row[c0..c0 + w].copy_from_slice(values);
        }
    }
    Ok(out)
}

/// `z [k, n] * a^T` for `a [m, n]`, as `[k, m]`.
pub fn times_transposed(
    job: &Job,
    kernel: &Kernel,
    a: &[f32],
    (m, n): (usize, usize),
    z: &[f32],
) -> Result<Vec<f32>> {
    let k = z.len() / n.max(1);
    let packed = PackedB::shared(job, kernel, &transposed(z, n), (n, k), k)?;
    let mut tall = vec![0.0f32; m * k];
    job.map_blocks(&mut tall, ROW_BLOCK * k, |block, rows| {
        let left = (&a[block * ROW_BLOCK * n..], rows.len() / k, n);
        gemm(kernel, &mut Scratch::default(), left, &packed, rows);
        Ok(())
    })?;
    Ok(transposed(&tall, k))
}

/// `a [*, n]` as `[n, *]`.
pub fn transposed(a: &[f32], n: usize) -> Vec<f32> {
    let m = a.len() / n.max(1);
    let mut out = vec![0.0f32; a.len()];
    for (i, row) in a.chunks_exact(n.max(1)).enumerate() {
        row.iter().enumerate().for_each(|(j, v)| out[j * m + i] = *v);
    }
    out
}

/// `rows rows^T` in f64.
fn inner_products(job: &Job, rows: &[f32], n: usize) -> Result<Vec<f64>> {
    cross_products(job, rows, rows, n)
}

/// `(q b^T + b q^T) / 2` in f64, for a product that is symmetric up to rounding.
fn cross_products(job: &Job, q: &[f32], b: &[f32], n: usize) -> Result<Vec<f64>> {
    let k = q.len() / n;
    let rows = |i: usize| (&q[i * n..(i + 1) * n], &b[i * n..(i + 1) * n]);
    let lines = job.map(k, |i| {
        let (q_i, b_i) = rows(i);
        let entry = |j: usize| {
            let (q_j, b_j) = rows(j);
            0.5 * (dot(q_i, b_j) + dot(q_j, b_i))
        };
        Ok((0..k).map(entry).collect::<Vec<f64>>())
    })?;
    Ok(lines.concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::par::Pool;
    use std::sync::atomic::AtomicBool;

    #[test]
    fn a_matrix_of_low_rank_is_found_whole_by_any_number_of_threads() {
        let (m, n, rank, flag) = (130, 301, 5, AtomicBool::new(false));
        let (u, v) = (random_numbers(rank * m, 1), random_numbers(rank * n, 2));
        let mut a = vec![0.0f32; m * n];
        for (i, j) in (0..m * n).map(|at| (at / n, at % n)) {
            a[i * n + j] = (0..rank).map(|p| u[p * m + i] * v[p * n + j] / (p + 1) as f32).sum();
        }
        for kernel in Kernel::available() {
            let found = [1, 2, 5].map(|threads| {
                let pool = Pool::new(threads).unwrap();
                truncated_svd(&Job::new(&pool, &flag), &kernel, &a, (m, n), rank + 2, 7).unwrap()
            });
            assert!(found.iter().all(|f| f.left == found[0].left && f.right == found[0].right));
            let svd = &found[0];
            assert!(svd.values[rank - 1] > 1.0 && svd.values[rank..].iter().all(|v| *v == 0.0));
            for (i, j) in (0..m * n).step_by(11).map(|at| (at / n, at % n)) {
                let back: f64 = (0..rank)
                    .map(|p| {
                        let outer =
                            f64::from(svd.left[p * m + i]) * f64::from(svd.right[p * n + j]);
                        svd.values[p] * outer
                    })
                    .sum();
                assert!((back - f64::from(a[i * n + j])).abs() < 1e-4);
            }
        }
    }

    #[test]
    fn eigenvectors_of_a_diagonal_matrix_are_its_axes() {
        let (n, flag) = (150, AtomicBool::new(false));
        let mut s = vec![0.0f32; n * n];
        (0..n).for_each(|i| s[i * n + i] = 0.8f32.powi(i as i32));
        let pool = Pool::new(2).unwrap();
        let job = Job::new(&pool, &flag);
        for kernel in Kernel::available() {
            let (values, vectors) = top_eigenvectors(&job, &kernel, &s, n, 4, 3).unwrap();
            for (i, value) in values.iter().enumerate() {
                assert!((value - 0.8f64.powi(i as i32)).abs() < 1e-5);
                assert!((vectors[i * n + i].abs() - 1.0).abs() < 1e-3);
            }
        }
    }
}
