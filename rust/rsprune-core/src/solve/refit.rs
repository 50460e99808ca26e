//! Refit: the kept weights solved again on their fixed mask.
//!
//! ```text
//! min_E  1/2 tr(E (G + damping I) E^T) + <E, B>,   E = V - W,   V = 0 outside of the mask
//! ```
//! by conjugate gradients for all rows of a block at once; in scaled variables this is the
//! diagonally preconditioned method. A step is one product with `G`. Damping draws towards `W`.

use super::GramQuadratic;
use crate::error::Result;
use crate::linalg::{ROW_BLOCK, Scratch, dot, gemm};
use crate::par::Job;

/// Squared residuals below this share of the first ones are rounding noise.
const TOLERANCE: f64 = 1e-10;

/// At most `steps` steps from `values [m, n]`, whose non-zeros are the mask; in place.
pub(super) fn refit(
    job: &Job,
    term: &GramQuadratic,
    values: &mut [f32],
    damping: f64,
    steps: usize,
) -> Result<()> {
    let len = ROW_BLOCK * term.n;
    job.map_blocks(values, len, |i, v| {
        let free: Vec<f32> = v.iter().map(|v| f32::from(u8::from(*v != 0.0))).collect();
        let mut residual = gradient(term, v, i * len, damping);
        residual.iter_mut().zip(&free).for_each(|(r, free)| *r *= -free);
        let system = System { term, shift: damping as f32, free: Some(&free) };
        system.solve(job, residual, v, steps)
    })?;
    Ok(())
}

/// The gradient `(V - W)(G + damping I) + B` of a block of rows that starts at flat index `first`.
pub(super) fn gradient(term: &GramQuadratic, v: &[f32], first: usize, damping: f64) -> Vec<f32> {
    let range = first..first + v.len();
    let e: Vec<f32> = v.iter().zip(&term.weight[range.clone()]).map(|(v, w)| v - w).collect();
    let mut gradient = product(term, &e, damping as f32);
    if let Some(b) = term.linear_rows(range) {
        gradient.iter_mut().zip(b).for_each(|(g, b)| *g += b);
    }
    gradient
}

/// `E (G + shift I)` for a block of rows.
pub(super) fn product(term: &GramQuadratic, e: &[f32], shift: f32) -> Vec<f32> {
    let mut out = vec![0.0f32; e.len()];
    let left = (e, e.len() / term.n, term.n);
    gemm(&term.kernel, &mut Scratch::default(), left, &term.packed, &mut out);
    out.iter_mut().zip(e).for_each(|(o, e)| *o += shift * e);
    out
}

/// Rows of `X (G + shift I) = ...`, restricted to where `free` is one.
pub(super) struct System<'a> {
    pub term: &'a GramQuadratic<'a>,
    pub shift: f32,
    pub free: Option<&'a [f32]>,
}

impl System<'_> {
    /// Conjugate gradients from `x [rows, n]` with its `residual` (zero where not free), in place.
    pub fn solve(
        &self,
        job: &Job,
        mut residual: Vec<f32>,
        x: &mut [f32],
        steps: usize,
    ) -> Result<()> {
        let (n, mut scratch) = (self.term.n, Scratch::default());
        let mut direction = residual.clone();
        let mut product = vec![0.0f32; x.len()];
        let mut squares: Vec<f64> = residual.chunks_exact(n).map(|r| dot(r, r)).collect();
        let goal: Vec<f64> = squares.iter().map(|s| s * TOLERANCE).collect();
        for _ in 0..steps {
            job.check()?;
            let left = (&direction[..], x.len() / n, n);
            gemm(&self.term.kernel, &mut scratch, left, &self.term.packed, &mut product);
            for k in (0..squares.len()).filter(|k| squares[*k] > goal[*k]).collect::<Vec<_>>() {
                let row = k * n..(k + 1) * n;
                squares[k] = self.step(
                    squares[k],
                    &mut x[row.clone()],
                    &mut residual[row.clone()],
                    &mut direction[row.clone()],
                    (&mut product[row.clone()], self.free.map(|f| &f[row])),
                );
            }
            if squares.iter().zip(&goal).all(|(s, goal)| s <= goal) {
                break;
            }
        }
        Ok(())
    }

    /// One step of one row; returns its new squared residual.
    fn step(
        &self,
        squares: f64,
        x: &mut [f32],
        r: &mut [f32],
        p: &mut [f32],
        (q, free): (&mut [f32], Option<&[f32]>),
    ) -> f64 {
        let kernel = &self.term.kernel;
        let curvature = kernel.vectorised(|| {
            q.iter_mut().zip(&*p).for_each(|(q, p)| *q += self.shift * p);
            if let Some(free) = free {
                q.iter_mut().zip(free).for_each(|(q, free)| *q *= free);
            }
            dot(p, q)
        });
        if curvature <= 0.0 {
            return 0.0; // flat to the last bit: nothing to gain
        }
        let alpha = (squares / curvature) as f32;
        kernel.vectorised(|| {
            x.iter_mut().zip(&*p).for_each(|(x, p)| *x += alpha * p);
            r.iter_mut().zip(&*q).for_each(|(r, q)| *r -= alpha * q);
            let next = dot(r, r);
            let beta = (next / squares) as f32;
            p.iter_mut().zip(&*r).for_each(|(p, r)| *p = r + beta * *p);
            next
        })
    }
}
