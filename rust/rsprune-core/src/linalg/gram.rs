//! `X^T Y` summed over batches of tokens, in f32.
//!
//! ```text
//! for each block of rows of the sum:                                 (in parallel)
//!     for each chunk of tokens: pack columns of X; for each panel of Y: tiles into a block
//!     sum += block                                                   (once a batch)
//! ```
//! A symmetric sum holds its blocks of rows up to their diagonal only: half the work of a product
//! and half its memory, which decides what fits where an input is 14,336 channels wide. Sums of f64
//! would double that again to remove an error that a batch in f32 has anyway.

use super::gemm::{K_CHUNK, add_chunk};
use super::pack::{PackedB, Scratch};
use crate::buffer::{Buffer, Room};
use crate::error::{Error, Result};
use crate::kernels::Kernel;
use crate::par::Job;

/// Rows of the sum that one worker owns at a time.
const BLOCK: usize = 112;

/// A running sum `S [n, n] += X^T Y` over batches `X, Y [tokens, n]`.
pub struct GramSum {
    n: usize,
    symmetric: bool,
    /// Blocks of rows, one after another.
    sum: Buffer,
    /// Where every row begins.
    starts: Vec<usize>,
}

impl GramSum {
    /// An empty sum in `room`; `symmetric` promises that every batch has `Y = X`.
    pub fn new(n: usize, symmetric: bool, room: Room) -> Result<GramSum> {
        let sum = Buffer::memory(0);
        let mut made = GramSum { n, symmetric, sum, starts: Vec::with_capacity(n) };
        let mut end = 0;
        for row in 0..n {
            made.starts.push(end);
            end += made.columns(row / BLOCK);
        }
        made.sum = room.zeros(end)?;
        Ok(made)
    }

    /// Columns that the rows of a block have.
    fn columns(&self, block: usize) -> usize {
        if self.symmetric { ((block + 1) * BLOCK).min(self.n) } else { self.n }
    }

    /// Adds one batch: `left` is `X`, `right` is `Y` packed, both with the same tokens.
    pub fn add(&mut self, job: &Job, kernel: &Kernel, left: &[f32], right: &PackedB) -> Result<()> {
        let (n, tokens) = (self.n, right.k);
        if left.len() != tokens * n || right.n != n {
            return Err(Error::Shape {
                what: "activations".into(),
                expected: format!("{tokens} x {n}"),
                found: format!("{} values against {} columns", left.len(), right.n),
            });
        }
        let blocks = 0..n.div_ceil(BLOCK);
        let end = |b: usize| self.starts.get((b + 1) * BLOCK).copied().unwrap_or(self.sum.len());
        let ends: Vec<usize> = blocks.clone().map(end).collect();
        let columns: Vec<usize> = blocks.map(|b| self.columns(b)).collect();
        job.map_parts(&mut self.sum, &ends, |block, sum| {
            let (first, columns) = (block * BLOCK, columns[block]);
            let height = sum.len() / columns;
            let (mr, nr) = (kernel.mr, kernel.nr);
            let below = |i: usize, j: usize| !self.symmetric || j * nr < first + (i + 1) * mr;
            let rows = (first, height);
            let product = block_product(kernel, (left, n), right, rows, columns, below);
            kernel.vectorised(|| sum.iter_mut().zip(&product).for_each(|(s, p)| *s += p));
            Ok(())
        })?;
        Ok(())
    }

    /// Adds `X^T Y` to `cross [n, right.n]`: `X` as in [`GramSum::add`], `Y` of any width.
    pub fn add_cross(
        &self,
        job: &Job,
        kernel: &Kernel,
        left: &[f32],
        right: &PackedB,
        cross: &mut [f32],
    ) -> Result<()> {
        let columns = right.n;
        job.map_blocks(cross, BLOCK * columns, |block, sum| {
            let rows = (block * BLOCK, sum.len() / columns);
            let product = block_product(kernel, (left, self.n), right, rows, columns, |_, _| true);
            kernel.vectorised(|| sum.iter_mut().zip(&product).for_each(|(s, p)| *s += p));
            Ok(())
        })?;
        Ok(())
    }

    /// Entry `(i, j)`.
    #[inline]
    pub fn at(&self, i: usize, j: usize) -> f64 {
        let (i, j) = if self.symmetric && j > i { (j, i) } else { (i, j) };
        f64::from(self.sum[self.starts[i] + j])
    }

    /// The sum as a full `n x n` matrix.
    pub fn value(&self) -> Vec<f64> {
        (0..self.n * self.n).map(|k| self.at(k / self.n, k % self.n)).collect()
    }

    /// The diagonal of the sum.
    pub fn diagonal(&self) -> Vec<f64> {
        (0..self.n).map(|i| self.at(i, i)).collect()
    }
}

/// Rows `first..first + height` of `X^T Y`, their first `columns` columns; rows of `X` lie `n` apart.
/// Tiles that are not `wanted` stay zero.
pub(super) fn block_product(
    kernel: &Kernel,
    (left, n): (&[f32], usize),
    right: &PackedB,
    (first, height): (usize, usize),
    columns: usize,
    wanted: impl Fn(usize, usize) -> bool,
) -> Vec<f32> {
    let tokens = right.k;
    let mut scratch = Scratch::default();
    let mut product = vec![0.0f32; height * columns];
    for t0 in (0..tokens).step_by(K_CHUNK) {
        let t1 = (t0 + K_CHUNK).min(tokens);
        let rows = (first, first + height);
        let packed = scratch.pack_columns(kernel.mr, &left[t0 * n..], t1 - t0, rows, n);
        let panels = 0..columns.div_ceil(kernel.nr);
        let whole = (height, columns);
        add_chunk(kernel, packed, (right, t0..t1), panels, &mut product, whole, &wanted);
    }
    product
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
            n in 1usize..260, tokens in 1usize..40, symmetric: bool, seed: u32,
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
                    let mut sum = GramSum::new(n, symmetric, Room::Memory).unwrap();
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

    #[test]
    fn sums_in_a_file_are_sums_in_memory() {
        let folder = std::env::temp_dir();
        let (n, tokens, flag) = (130, 9, AtomicBool::new(false));
        let x: Vec<f32> = (0..tokens * n).map(|i| (i % 17) as f32 - 8.0).collect();
        let (kernel, pool) = (Kernel::select().unwrap(), Pool::new(2).unwrap());
        let packed = PackedB::new(&kernel, &x, tokens, n, n);
        for symmetric in [true, false] {
            let rooms = [Room::Memory, Room::Folder(&folder)];
            let mut sums = rooms.map(|room| GramSum::new(n, symmetric, room).unwrap());
            for sum in &mut sums {
                sum.add(&Job::new(&pool, &flag), &kernel, &x, &packed).unwrap();
            }
            assert_eq!(sums[0].value(), sums[1].value());
        }
    }
}
