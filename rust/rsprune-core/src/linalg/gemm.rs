//! `C = A B` for one block of rows, serial, against a packed `B`.
//!
//! ```text
//! for k-chunk: pack A; for each nr panel of B: for each mr panel of A: tile
//! ```
//! A panel of A stays in L1, the packed block of A and a panel of B in L2. Every element is
//! summed over k in one order, whatever its place in a tile, so row blocks change no bit.

use super::pack::{PackedB, Scratch};
use crate::kernels::{ASKED_A_STEP, Kernel};
use std::ops::Range;

/// Rows that one worker carries through all its iterations: 7 tiles of the widest kernel, so that
/// its state stays in L2 and a key projection of 192 rows still feeds two workers.
pub const ROW_BLOCK: usize = 98;

/// Columns of A that are packed at a time. With 768 a panel of A (14 x 768 floats) stays in L1 and one of
/// B comes from L2; 256, with B's panel in L1, was slower by 5 to 15 % of the peak, as C was read and
/// written three times as often.
pub(super) const K_CHUNK: usize = 768;

/// Overwrites `c [rows, b.n]` with `a [rows, b.k] * b`; rows of `a` lie `a_stride` apart.
pub fn gemm(
    kernel: &Kernel,
    scratch: &mut Scratch,
    a: (&[f32], usize, usize),
    b: &PackedB,
    c: &mut [f32],
) {
    let len = a.1 * b.n;
    assert!(c.len() >= len, "C holds {} of {len} values", c.len());
    c[..len].fill(0.0);
    gemm_add(kernel, scratch, a, b, 0..b.k, c);
}

/// Overwrites `c[:, columns]` by the same columns of `a * b`; they begin with a panel of `b`, and end
/// with one or with `b`.
pub fn gemm_columns(
    kernel: &Kernel,
    scratch: &mut Scratch,
    a: (&[f32], usize, usize),
    b: &PackedB,
    columns: Range<usize>,
    c: &mut [f32],
) {
    let whole = |edge: usize| edge.is_multiple_of(kernel.nr) || edge == b.n;
    assert!(whole(columns.start) && whole(columns.end), "{columns:?} cut a panel");
    for row in c.chunks_exact_mut(b.n).take(a.1) {
        row[columns.clone()].fill(0.0);
    }
    let panels = columns.start / kernel.nr..columns.end.div_ceil(kernel.nr);
    add_panels(kernel, scratch, a, b, (0..b.k, panels), c);
}

/// Adds `a [rows, range] * b[range, :]` to `c [rows, b.n]`; rows of `a` lie `a_stride` apart.
pub fn gemm_add(
    kernel: &Kernel,
    scratch: &mut Scratch,
    a: (&[f32], usize, usize),
    b: &PackedB,
    range: Range<usize>,
    c: &mut [f32],
) {
    add_panels(kernel, scratch, a, b, (range, 0..b.n.div_ceil(kernel.nr)), c);
}

/// The same for some column panels of `b`.
fn add_panels(
    kernel: &Kernel,
    scratch: &mut Scratch,
    (a, rows, a_stride): (&[f32], usize, usize),
    b: &PackedB,
    (range, panels): (Range<usize>, Range<usize>),
    c: &mut [f32],
) {
    for k0 in range.clone().step_by(K_CHUNK) {
        let k1 = (k0 + K_CHUNK).min(range.end);
        let columns = (k0 - range.start, k1 - range.start);
        let packed = scratch.pack_rows(kernel, a, rows, columns, a_stride);
        add_chunk(kernel, packed, (b, k0..k1), panels.clone(), c, (rows, b.n), |_, _| true);
    }
}

/// Adds the tiles `(i, j)` that are `wanted` of one k-chunk to `c [rows, n]`.
pub(super) fn add_chunk(
    kernel: &Kernel,
    packed: &[f32],
    (b, chunk): (&PackedB, Range<usize>),
    panels: Range<usize>,
    c: &mut [f32],
    (rows, n): (usize, usize),
    wanted: impl Fn(usize, usize) -> bool,
) {
    let k = chunk.len();
    for j in panels.clone() {
        let panel = b.panel(j, chunk.start, chunk.end);
        // The next panel comes from afar: every tile of this one asks for its share of it.
        let next = if j + 1 < panels.end { b.panel(j + 1, chunk.start, chunk.end) } else { &[] };
        let mut coming = next.chunks(ASKED_A_STEP * k);
        for (i, a) in packed.chunks_exact(kernel.mr * k).enumerate() {
            if wanted(i, j) {
                let ask = coming.next().unwrap_or(&[]);
                add_tile(kernel, k, (a, panel), c, (rows, n), (i, j), ask);
            }
        }
    }
}

/// Adds one tile to `c`; a tile that overhangs the edge goes through a buffer of its own.
fn add_tile(
    kernel: &Kernel,
    k: usize,
    (a, b): (&[f32], &[f32]),
    c: &mut [f32],
    (rows, n): (usize, usize),
    (i, j): (usize, usize),
    next: &[f32],
) {
    let (r0, c0) = (i * kernel.mr, j * kernel.nr);
    let (height, width) = (kernel.mr.min(rows - r0), kernel.nr.min(n - c0));
    if height == kernel.mr && width == kernel.nr {
        return kernel.tile(k, (a, b), &mut c[r0 * n + c0..], n, next);
    }
    let mut edge = [0.0f32; 512];
    kernel.tile(k, (a, b), &mut edge, kernel.nr, next);
    for r in 0..height {
        let row = &mut c[(r0 + r) * n + c0..][..width];
        for (out, v) in row.iter_mut().zip(&edge[r * kernel.nr..]) {
            *out += v;
        }
    }
}

/// `sum_i a_i b_i`, accumulated in f64 over eight fixed lanes.
#[inline]
pub fn dot(a: &[f32], b: &[f32]) -> f64 {
    let mut lanes = [0.0f64; 8];
    let (pairs_a, pairs_b) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest = pairs_a.remainder().iter().zip(pairs_b.remainder());
    let tail: f64 = rest.map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
    for (x, y) in pairs_a.zip(pairs_b) {
        for l in 0..8 {
            lanes[l] += f64::from(x[l]) * f64::from(y[l]);
        }
    }
    lanes.iter().sum::<f64>() + tail
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn noise(len: usize, seed: u64) -> Vec<f32> {
        let mut state = seed | 1;
        (0..len)
            .map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
            })
            .collect()
    }

    fn naive(a: &[f32], b: &[f32], m: usize, k: usize, n: usize) -> Vec<f64> {
        let at = |i: usize| {
            (0..k).map(|p| f64::from(a[i / n * k + p]) * f64::from(b[p * n + i % n])).sum()
        };
        (0..m * n).map(at).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn gemm_is_the_triple_loop(m in 1usize..45, k in 1usize..300, n in 1usize..70, zero: bool, seed: u64) {
            let mut a = noise(m * k, seed);
            if zero { a[..m * k / 2].fill(0.0); }
            let b = noise(k * n, seed ^ 99);
            let expected = naive(&a, &b, m, k, n);
            for kernel in Kernel::available() {
                let packed = PackedB::new(&kernel, &b, k, n, n);
                let mut c = vec![f32::NAN; m * n];
                gemm(&kernel, &mut Scratch::default(), (&a, m, k), &packed, &mut c);
                for (x, y) in c.iter().zip(&expected) {
                    prop_assert!((f64::from(*x) - y).abs() < 1e-3, "{}", kernel.name);
                }
            }
        }

        #[test]
        fn strips_of_columns_are_the_whole(m in 1usize..30, k in 1usize..300, n in 1usize..200, seed: u64) {
            let (a, b) = (noise(m * k, seed), noise(k * n, seed ^ 7));
            for kernel in Kernel::available() {
                let packed = PackedB::new(&kernel, &b, k, n, n);
                let mut scratch = Scratch::default();
                let (mut whole, mut strips) = (vec![0.0; m * n], vec![f32::NAN; m * n]);
                gemm(&kernel, &mut scratch, (&a, m, k), &packed, &mut whole);
                for first in (0..n).step_by(2 * kernel.nr) {
                    let columns = first..(first + 2 * kernel.nr).min(n);
                    gemm_columns(&kernel, &mut scratch, (&a, m, k), &packed, columns, &mut strips);
                }
                prop_assert_eq!(&whole, &strips);
            }
        }

        #[test]
        fn the_place_of_a_row_changes_no_bit(m in 2usize..60, k in 1usize..400, n in 1usize..70, seed: u64) {
            let (a, b) = (noise(m * k, seed), noise(k * n, seed ^ 5));
            for kernel in Kernel::available() {
                let packed = PackedB::new(&kernel, &b, k, n, n);
                let mut scratch = Scratch::default();
                let (mut whole, mut last) = (vec![0.0; m * n], vec![0.0; n]);
                gemm(&kernel, &mut scratch, (&a, m, k), &packed, &mut whole);
                gemm(&kernel, &mut scratch, (&a[(m - 1) * k..], 1, k), &packed, &mut last);
                prop_assert_eq!(&whole[(m - 1) * n..], &last[..]);
            }
        }
    }
}
