//! The largest eigenvalue of a symmetric positive semi-definite matrix by power iteration.

use super::gemm::{ROW_BLOCK, dot};
use super::pack::PackedB;
use crate::error::Result;
use crate::par::Job;

const STEPS: usize = 60;
/// Power iteration approaches from below; the margin keeps `1/L` a safe gradient step.
const MARGIN: f64 = 1.02;

/// An upper estimate of `lambda_max(g)` for `g [n, n]`; deterministic start.
pub fn largest_eigenvalue(job: &Job, g: &PackedB) -> Result<f64> {
    let n = g.n;
    // A start with all frequencies in it: no eigenvector of a Gram is orthogonal to it in practice.
    let mut v: Vec<f32> = (0..n).map(|i| 1.0 + (i as f32 * 0.7).sin() * 0.5).collect();
    let mut norm = dot(&v, &v).sqrt();
    for _ in 0..STEPS {
        v.iter_mut().for_each(|x| *x = (f64::from(*x) / norm) as f32);
        let mut next = vec![0.0f32; n];
        job.map_blocks(&mut next, ROW_BLOCK, |block, out| {
            let first = block * ROW_BLOCK;
            let mut rows = vec![0.0f32; out.len() * n];
            g.read(first..first + out.len(), 0..n, &mut rows);
            out.iter_mut().zip(rows.chunks_exact(n)).for_each(|(x, row)| *x = dot(row, &v) as f32);
            Ok(())
        })?;
        v = next;
        norm = dot(&v, &v).sqrt();
        if norm == 0.0 {
            return Ok(0.0);
        }
    }
    Ok(norm * MARGIN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Kernel;
    use crate::par::Pool;
    use std::sync::atomic::AtomicBool;

    #[test]
    fn a_diagonal_matrix_shows_its_largest_entry() {
        let n = 37;
        let mut g = vec![0.0f32; n * n];
        (0..n).for_each(|i| g[i * n + i] = 1.0 + i as f32);
        let (pool, flag) = (Pool::new(2).unwrap(), AtomicBool::new(false));
        let job = Job::new(&pool, &flag);
        let largest = |g: &[f32]| {
            let packed = PackedB::new(&Kernel::select().unwrap(), g, n, n, n);
            largest_eigenvalue(&job, &packed).unwrap()
        };
        let found = largest(&g);
        assert!((37.0..37.0 * 1.03).contains(&found), "{found}");
        assert_eq!(largest(&vec![0.0; n * n]), 0.0);
    }
}
