//! `X^T Y` summed over batches of tokens: f32 inside of a batch, f64 across batches.
//!
//! ```text
//! for each block of rows of the sum:                                 (in parallel)
//!     for each chunk of tokens: pack columns of X; for each panel of Y: tiles into a f32 block
//!     sum += block                                                   (f64, once a batch)
//! ```

use super::gemm::{K_CHUNK, add_tile};
use super::pack::{PackedB, Scratch};
use crate::error::{Error, Result};
use crate::kernels::Kernel;
use crate::par::Job;

/// Rows of the sum that one worker owns at a time.
const BLOCK: usize = 112;

/// A running sum `S [n, n] += X^T Y` over batches `X, Y [tokens, n]`.
///
/// With `Y = X` only the lower triangle is computed (a SYRK); [`GramSum::value`] mirrors it.
pub struct GramSum {
    n: usize,
    symmetric: bool,
    sum: Vec<f64>,
}

impl GramSum {
    /// An empty sum; `symmetric` promises that every batch has `Y = X`.
    pub fn new(n: usize, symmetric: bool) -> GramSum {
        GramSum { n, symmetric, sum: vec![0.0; n * n] }
    }

    /// Adds one batch: `left` is `X`, `right` is `Y` packed, both with the same tokens.
    pub fn add(&mut self, job: &Job, kernel: &Kernel, left: &[f32], right: &PackedB) -> Result<()> {
        let (n, tokens, symmetric) = (self.n, right.k, self.symmetric);
        if left.len() != tokens * n || right.n != n {
            return Err(Error::Shape {
                what: "activations".into(),
                expected: format!("{tokens} x {n}"),
                found: format!("{} values against {} columns", left.len(), right.n),
            });
        }
        job.map_blocks(&mut self.sum, BLOCK * n, |block, sum| {
            let (first, height) = (block * BLOCK, sum.len() / n);
            let columns = if symmetric { first + height } else { n };
            let mut scratch = Scratch::default();
            let mut product = vec![0.0f32; height * n];
            for t0 in (0..tokens).step_by(K_CHUNK) {
                let t1 = (t0 + K_CHUNK).min(tokens);
                let rows = (first, first + height);
                let packed = scratch.pack_columns(kernel.mr, &left[t0 * n..], t1 - t0, rows, n);
                for j in 0..columns.div_ceil(kernel.nr) {
                    let panel = right.panel(j, t0, t1);
                    for (i, a) in packed.chunks_exact(kernel.mr * (t1 - t0)).enumerate() {
                        add_tile(kernel, t1 - t0, a, panel, &mut product, (height, n), (i, j));
                    }
                }
            }
            kernel.vectorised(|| {
                for (sum, product) in sum.chunks_exact_mut(n).zip(product.chunks_exact(n)) {
                    let (sum, product) = (&mut sum[..columns], &product[..columns]);
                    sum.iter_mut().zip(product).for_each(|(s, p)| *s += f64::from(*p));
                }
            });
            Ok(())
        })?;
        Ok(())
    }

    /// Entry `(i, j)`; of a symmetric sum the lower triangle counts (blocks overhang the diagonal).
    pub fn at(&self, i: usize, j: usize) -> f64 {
        let (i, j) = if self.symmetric && j > i { (j, i) } else { (i, j) };
        self.sum[i * self.n + j]
    }

    /// The sum as a full `n x n` matrix.
    pub fn value(&self) -> Vec<f64> {
        (0..self.n * self.n).map(|k| self.at(k / self.n, k % self.n)).collect()
    }

    /// The diagonal of the sum.
    pub fn diagonal(&self) -> Vec<f64> {
        (0..self.n).map(|i| self.sum[i * self.n + i]).collect()
    }
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
        fn sums_are_the_triple_loop_for_any_thread_count(
            n in 1usize..130, tokens in 1usize..40, symmetric: bool, seed: u32,
        ) {
            let value = |i: usize| ((i as u32).wrapping_mul(seed | 1) >> 16) as f32 / 65536.0 - 0.5;
            let x: Vec<f32> = (0..tokens * n).map(value).collect();
            let y: Vec<f32> = if symmetric { x.clone() } else { x.iter().map(|v| v * v).collect() };
            let flag = AtomicBool::new(false);
            for kernel in Kernel::available() {
                let packed = PackedB::new(&kernel, &y, tokens, n, n);
                let mut found = Vec::new();
                for threads in [1, 2, 5] {
                    let pool = Pool::new(threads).unwrap();
                    let mut sum = GramSum::new(n, symmetric);
                    for _ in 0..2 {
                        sum.add(&Job::new(&pool, &flag), &kernel, &x, &packed).unwrap();
                    }
                    found.push(sum.value());
                }
                prop_assert_eq!(&found[0], &found[1]);
                prop_assert_eq!(&found[0], &found[2]);
                for i in 0..n {
                    for j in 0..n {
                        let dot: f64 = (0..tokens)
                            .map(|t| f64::from(x[t * n + i]) * f64::from(y[t * n + j]))
                            .sum();
                        prop_assert!((found[0][i * n + j] - 2.0 * dot).abs() < 1e-4);
                    }
                }
            }
        }
    }
}
