//! The largest eigenvalue of a symmetric positive semi-definite matrix by power iteration.

use super::gemm::dot;

const STEPS: usize = 60;
/// Power iteration approaches from below; the margin keeps `1/L` a safe gradient step.
const MARGIN: f64 = 1.02;

/// An upper estimate of `lambda_max(g)` for `g [n, n]`; deterministic start, serial.
pub fn largest_eigenvalue(g: &[f32], n: usize) -> f64 {
    // A start with all frequencies in it: no eigenvector of a Gram is orthogonal to it in practice.
    let mut v: Vec<f32> = (0..n).map(|i| 1.0 + (i as f32 * 0.7).sin() * 0.5).collect();
    let mut norm = dot(&v, &v).sqrt();
    for _ in 0..STEPS {
        v.iter_mut().for_each(|x| *x = (f64::from(*x) / norm) as f32);
        v = (0..n).map(|i| dot(&g[i * n..(i + 1) * n], &v) as f32).collect();
        norm = dot(&v, &v).sqrt();
        if norm == 0.0 {
            return 0.0;
        }
    }
    norm * MARGIN
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_diagonal_matrix_shows_its_largest_entry() {
        let n = 37;
        let mut g = vec![0.0f32; n * n];
        (0..n).for_each(|i| g[i * n + i] = 1.0 + i as f32);
        let found = largest_eigenvalue(&g, n);
        assert!((37.0..37.0 * 1.03).contains(&found), "{found}");
        assert_eq!(largest_eigenvalue(&vec![0.0; n * n], n), 0.0);
    }
}
