//! Sizes of a weight gradient `G = D^T A` that is never in memory as a whole.
//!
//! `A [T, n]` are the inputs of a linear, `D [T, m]` the gradients of its outputs. Two views of a
//! text that are stacked, one of them with the other sign, make `G` the difference of their
//! gradients.
//! ```text
//! for each block of rows of G:                                       (in parallel)
//!     G_block = (D^T A)_block
//!     l1 += sum |G_block|;  squares += sum G_block^2;  taylor += sum |w o G_block|
//! ```
//! The sum of squares alone has a second form that makes no entry of `G`, cheaper where there are
//! fewer tokens than channels: `sum G^2 = sum_st (d_s . d_t)(a_s . a_t)`.

use super::gemm::{ROW_BLOCK, dot, gemm};
use super::gram::block_product;
use super::pack::{PackedB, Scratch};
use crate::buffer::Room;
use crate::error::{Error, Result};
use crate::kernels::Kernel;
use crate::par::Job;

/// What is summed up of a gradient `G` of the weight `w`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GradientSizes {
    /// `sum |G|`.
    pub l1: f64,
    /// `sum G^2`.
    pub squares: f64,
    /// `sum |w o G|`.
    pub taylor: f64,
}

impl GradientSizes {
    fn plus(self, other: GradientSizes) -> GradientSizes {
        GradientSizes {
            l1: self.l1 + other.l1,
            squares: self.squares + other.squares,
            taylor: self.taylor + other.taylor,
        }
    }
}

/// All three sizes of `D^T A`; `weight(row, values)` fills in a row of `w [m, n]`.
pub fn gradient_sizes(
    job: &Job,
    kernel: &Kernel,
    (deltas, m): (&[f32], usize),
    (inputs, n): (&[f32], usize),
    weight: impl Fn(usize, &mut [f32]) + Sync,
) -> Result<GradientSizes> {
    let tokens = tokens_of((deltas, m), (inputs, n))?;
    let packed = PackedB::shared(job, kernel, inputs, (tokens, n), n)?;
    let blocks = job.map(m.div_ceil(ROW_BLOCK), |block| {
        let first = block * ROW_BLOCK;
        let height = ROW_BLOCK.min(m - first);
        let rows = block_product(kernel, (deltas, m), &packed, (first, height), n, |_, _| true);
        let mut values = vec![0.0f32; n];
        let mut sizes = GradientSizes::default();
        for (r, gradient) in rows.chunks_exact(n).enumerate() {
            weight(first + r, &mut values);
            sizes = sizes.plus(kernel.vectorised(|| row_sizes(gradient, &values)));
        }
        Ok(sizes)
    })?;
    Ok(blocks.into_iter().fold(GradientSizes::default(), GradientSizes::plus))
}

/// `sum (D^T A)^2`, by whichever form is cheaper.
pub fn gradient_squares(
    job: &Job,
    kernel: &Kernel,
    (deltas, m): (&[f32], usize),
    (inputs, n): (&[f32], usize),
) -> Result<f64> {
    let tokens = tokens_of((deltas, m), (inputs, n))?;
    if tokens * (m + n) >= m * n {
        let nothing = |_: usize, values: &mut [f32]| values.fill(0.0);
        return Ok(gradient_sizes(job, kernel, (deltas, m), (inputs, n), nothing)?.squares);
    }
    let packed_deltas = transposed(job, kernel, deltas, m, tokens)?;
    let packed_inputs = transposed(job, kernel, inputs, n, tokens)?;
    let blocks = job.map(tokens.div_ceil(ROW_BLOCK), |block| {
        let (first, last) = (block * ROW_BLOCK, ((block + 1) * ROW_BLOCK).min(tokens));
        let mut scratch = Scratch::default();
        let mut product = |values: &[f32], width: usize, packed: &PackedB| {
            let mut gram = vec![0.0f32; (last - first) * tokens];
            let rows = &values[first * width..last * width];
            gemm(kernel, &mut scratch, (rows, last - first, width), packed, &mut gram);
            gram
        };
        let of_deltas = product(deltas, m, &packed_deltas);
        Ok(dot(&of_deltas, &product(inputs, n, &packed_inputs)))
    })?;
    Ok(blocks.into_iter().sum())
}

/// The number of rows that both matrices have.
fn tokens_of((deltas, m): (&[f32], usize), (inputs, n): (&[f32], usize)) -> Result<usize> {
    let tokens = deltas.len().checked_div(m).unwrap_or(0);
    if m == 0 || n == 0 || deltas.len() != tokens * m || inputs.len() != tokens * n {
        return Err(Error::Shape {
            what: "inputs of a linear".into(),
            expected: format!("{tokens} tokens, as its output gradients have"),
            found: format!("{} values of {n} channels", inputs.len()),
        });
    }
    Ok(tokens)
}

/// `X^T [n, tokens]`, packed.
fn transposed(job: &Job, kernel: &Kernel, x: &[f32], n: usize, tokens: usize) -> Result<PackedB> {
    let width = PackedB::panel_width(kernel);
    PackedB::filled(job, kernel, Room::Memory, (n, tokens), |rows, columns, tile| {
        for (row, values) in rows.zip(tile.chunks_exact_mut(width)) {
            for (column, value) in columns.clone().zip(values) {
                *value = x[column * n + row];
            }
        }
    })
}

/// Sums over one row: in f32 over sixteen lanes, and in f64 over the lanes.
#[inline]
fn row_sizes(gradient: &[f32], weight: &[f32]) -> GradientSizes {
    const LANES: usize = 16;
    let (mut l1, mut squares, mut taylor) = ([0.0f32; LANES], [0.0f32; LANES], [0.0f32; LANES]);
    let mut add = |gradient: &[f32], weight: &[f32]| {
        for (lane, (g, w)) in gradient.iter().zip(weight).enumerate() {
            l1[lane] += g.abs();
            squares[lane] += g * g;
            taylor[lane] += (w * g).abs();
        }
    };
    let (whole, of_weight) = (gradient.chunks_exact(LANES), weight.chunks_exact(LANES));
    let rest = (whole.remainder(), of_weight.remainder());
    whole.zip(of_weight).for_each(|(g, w)| add(g, w));
    add(rest.0, rest.1);
    let total = |lanes: [f32; LANES]| lanes.iter().map(|v| f64::from(*v)).sum();
    GradientSizes { l1: total(l1), squares: total(squares), taylor: total(taylor) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::par::Pool;
    use proptest::prelude::*;
    use std::sync::atomic::AtomicBool;

    fn noise(len: usize, seed: u32) -> Vec<f32> {
        let value = |i: u32| (i.wrapping_mul(2654435761) ^ seed).wrapping_mul(seed | 1) >> 16;
        (0..len as u32).map(|i| value(i) as f32 / 32768.0 - 1.0).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn sizes_are_those_of_the_whole_gradient_for_any_thread_count(
            tokens in 0usize..60, m in 1usize..220, n in 1usize..90, seed: u32,
        ) {
            let (d, a) = (noise(tokens * m, seed), noise(tokens * n, seed ^ 77));
            let w = noise(m * n, seed ^ 9);
            let mut expected = GradientSizes::default();
            for i in 0..m {
                for j in 0..n {
                    let product = |t: usize| f64::from(d[t * m + i]) * f64::from(a[t * n + j]);
                    let g: f64 = (0..tokens).map(product).sum();
                    let taylor = (g * f64::from(w[i * n + j])).abs();
                    expected = expected.plus(GradientSizes { l1: g.abs(), squares: g * g, taylor });
                }
            }
            let flag = AtomicBool::new(false);
            let near = |x: f64, y: f64| (x - y).abs() <= 1e-4 * (1.0 + y.abs());
            for kernel in Kernel::available() {
                let mut found = Vec::new();
                for threads in [1, 2, 5] {
                    let pool = Pool::new(threads).unwrap();
                    let job = Job::new(&pool, &flag);
                    let row = |r: usize, out: &mut [f32]| out.copy_from_slice(&w[r * n..][..n]);
                    let sizes = gradient_sizes(&job, &kernel, (&d, m), (&a, n), row).unwrap();
                    let squares = gradient_squares(&job, &kernel, (&d, m), (&a, n)).unwrap();
                    found.push((sizes, squares));
                }
                prop_assert!(found[0] == found[1] && found[0] == found[2]);
                let (sizes, squares) = found[0];
                prop_assert!(near(sizes.l1, expected.l1), "{} {sizes:?}", kernel.name);
                prop_assert!(near(sizes.squares, expected.squares), "{} {sizes:?}", kernel.name);
                prop_assert!(near(sizes.taylor, expected.taylor), "{} {sizes:?}", kernel.name);
                prop_assert!(near(squares, expected.squares), "{} {squares}", kernel.name);
            }
        }
    }

    #[test]
    fn other_numbers_of_tokens_are_refused() {
        let (pool, flag) = (Pool::new(1).unwrap(), AtomicBool::new(false));
        let job = Job::new(&pool, &flag);
        let kernel = Kernel::select().unwrap();
        let found = gradient_squares(&job, &kernel, (&[0.0; 6], 2), (&[0.0; 8], 4));
        assert!(found.unwrap_err().to_string().contains("3 tokens"));
    }
}
