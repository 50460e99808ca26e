//! All eigenvalues and eigenvectors of a small symmetric matrix, by cyclic Jacobi rotations in f64.
//!
//! ```text
//! until the off-diagonal part is gone:   for p < q:  rotate rows and columns p, q so that A_pq = 0
//! ```
//! Slow beyond a few hundred rows, but accurate to the last digits, without shifts or deflation.

const SWEEPS: usize = 40;

/// `A = sum_i values[i] v_i v_i^T`, largest value first.
pub struct Eigen {
    /// Eigenvalues, falling.
    pub values: Vec<f64>,
    /// Row `i` is the eigenvector of `values[i]`, of length one.
    pub vectors: Vec<f64>,
}

/// Decomposes `a [n, n]`, of which both triangles are read and taken for equal.
pub fn symmetric_eigen(mut a: Vec<f64>, n: usize) -> Eigen {
    let mut v = vec![0.0; n * n];
    (0..n).for_each(|i| v[i * n + i] = 1.0);
    let total: f64 = a.iter().map(|x| x * x).sum();
    for _ in 0..SWEEPS {
        if off_diagonal(&a, n) <= total * 1e-30 {
            break;
        }
        for p in 0..n {
            for q in p + 1..n {
                if let Some(rotation) = rotation(a[p * n + p], a[q * n + q], a[p * n + q]) {
                    rotate_columns(&mut a, n, (p, q), rotation);
                    rotate_rows(&mut a, n, (p, q), rotation);
                    rotate_rows(&mut v, n, (p, q), rotation);
                }
            }
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|i, j| a[j * n + j].total_cmp(&a[i * n + i]));
    let values = order.iter().map(|i| a[i * n + i]).collect();
    let vectors = order.iter().flat_map(|i| v[i * n..(i + 1) * n].iter().copied()).collect();
    Eigen { values, vectors }
}

/// Cosine and sine of the rotation that makes the entry `pq` of a 2 x 2 matrix zero.
fn rotation(pp: f64, qq: f64, pq: f64) -> Option<(f64, f64)> {
    if pq.abs() <= f64::EPSILON * 1e-3 * (pp.abs() * qq.abs()).sqrt() {
        return None;
    }
    let theta = (qq - pp) / (2.0 * pq);
    let t = theta.signum() / (theta.abs() + theta.hypot(1.0));
    let c = 1.0 / t.hypot(1.0);
    Some((c, t * c))
}

fn rotate_rows(a: &mut [f64], n: usize, (p, q): (usize, usize), (c, s): (f64, f64)) {
    let (head, tail) = a.split_at_mut(q * n);
    for (x, y) in head[p * n..(p + 1) * n].iter_mut().zip(&mut tail[..n]) {
        (*x, *y) = (c * *x - s * *y, s * *x + c * *y);
    }
}

fn rotate_columns(a: &mut [f64], n: usize, (p, q): (usize, usize), (c, s): (f64, f64)) {
    for row in a.chunks_exact_mut(n) {
        (row[p], row[q]) = (c * row[p] - s * row[q], s * row[p] + c * row[q]);
    }
}

fn off_diagonal(a: &[f64], n: usize) -> f64 {
    let rows = a.chunks_exact(n.max(1)).enumerate();
    rows.map(|(i, row)| row[..i].iter().map(|x| x * x).sum::<f64>()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn the_decomposition_multiplies_back(n in 1usize..40, rank in 1usize..40, seed: u32) {
            let value = |i: usize| f64::from((i as u32 + 1).wrapping_mul(seed | 1) >> 16) / 65536.0 - 0.5;
            let mut a = vec![0.0; n * n];
            for (i, j) in (0..n * n).map(|k| (k / n, k % n)) {
                a[i * n + j] = (0..rank).map(|p| value(i * rank + p) * value(j * rank + p)).sum();
            }
            let found = symmetric_eigen(a.clone(), n);
            prop_assert!(found.values.is_sorted_by(|x, y| x >= y));
            for (i, j) in (0..n * n).map(|k| (k / n, k % n)) {
                let (mut back, mut unit) = (0.0, 0.0);
                for k in 0..n {
                    let v = &found.vectors[k * n..(k + 1) * n];
                    back += found.values[k] * v[i] * v[j];
                    unit += found.vectors[i * n + k] * found.vectors[j * n + k];
                }
                prop_assert!((back - a[i * n + j]).abs() < 1e-10);
                prop_assert!((unit - f64::from(u8::from(i == j))).abs() < 1e-12);
            }
        }
    }
}
