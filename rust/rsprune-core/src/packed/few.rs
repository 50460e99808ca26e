//! Few tokens: every row is walked once for up to four of them, and decoded in registers.
//!
//! With a single token four rows are walked at once, of signs and of values that are as many in every 32 columns.
//!
//! The walk goes by columns of which the activations stay in L1 (32 KiB: 2,048 columns of four
//! tokens), all rows of a worker's share before the next columns. Read from L2, the activations of
//! four tokens cost more than the weight.

use super::input::{GROUP, Group, Order, padded};
use super::row::{BLOCK, Signs, Values};
use super::{Kind, Mode, Plane, Simd, too_few_values};
use crate::error::Result;
use crate::float::Float;
use crate::par::Job;
use std::array;

/// Rows that a worker takes at once: their masks stay in L1.
const ROWS: usize = 16;

/// Activations of a group that are met by all rows before the next.
const NEAR: usize = 8192;

/// Rows that are walked at once with a single token.
const TOGETHER: usize = 4;

/// The products of one row with a group, or of several with a single token; the rest is 0.
type Dots = [f32; GROUP];

/// Evaluates `$body` for the number of tokens of a group, as the constant `$t`.
macro_rules! for_tokens {
    ($tokens:expr, $t:ident => $body:expr) => {
        match $tokens {
            1 => {
                const $t: usize = 1;
                $body
            }
            2 => {
                const $t: usize = 2;
                $body
            }
            _ => {
                const $t: usize = GROUP;
                $body
            }
        }
    };
}

/// Overwrites `out [rows, tokens]`.
pub(super) fn apply<S: Simd>(
    plane: &Plane,
    simd: S,
    job: &Job,
    parts: &[&[u8]],
    (x, mode): (&[f32], Mode),
    out: &mut [f32],
) -> Result<()> {
    let (float, cols) = (plane.dense.float, plane.dense.cols);
    let tokens = x.len() / cols;
    let groups = x.chunks(GROUP * cols);
    let per_block = ROWS * tokens;
    if let Kind::Values { starts, each: same } = &plane.kind {
        let groups: Vec<_> = groups.map(|x| pieces(x, cols, simd.order(float))).collect();
        let together = if same.is_some() { TOGETHER } else { 1 };
        return job.share_blocks(out, per_block, |block, out| {
            let mut used = [0; ROWS];
            each(&groups, out, tokens, together, |r, count, start, x| {
                let first = block * ROWS + r;
                let row = |i: usize, used: usize| {
                    plane.values(starts, parts, first + i).from(start, x.width, used, float)
                };
                if let (Some(same), TOGETHER) = (*same, count) {
                    let rows = array::from_fn(|i| row(i, start / 32 * same));
                    return rows_of_values(simd, float, (first, rows), same, x);
                }
                used[r] = if start == 0 { 0 } else { used[r] };
                let (more, dots) = row_of_values(simd, float, (first, row(0, used[r])), x)?;
                used[r] += more;
                Ok(dots)
            })
        });
    }
    match mode {
        Mode::Float32 => {
            let groups: Vec<_> = groups.map(|x| pieces(x, cols, Order::Natural)).collect();
            job.share_blocks(out, per_block, |block, out| {
                let rows = SignRows::new(plane, simd, parts, block * ROWS, out.len() / tokens);
                each(&groups, out, tokens, TOGETHER, |r, count, start, x| {
                    let row = |i: usize| rows.get(r + i).from(start / BLOCK, x.width);
                    if count == TOGETHER {
                        let rows: [Signs; TOGETHER] = array::from_fn(row);
                        return Ok(filled(simd.dot_signs_of(rows, x)));
                    }
                    Ok(for_tokens!(x.tokens, T => filled(simd.dot_signs::<T>(row(0), x))))
                })
            })
        }
        Mode::Int8 => {
            let groups: Vec<_> = groups.map(|x| vec![(0, Group::rounded(x, cols))]).collect();
            job.share_blocks(out, per_block, |block, out| {
                let rows = SignRows::new(plane, simd, parts, block * ROWS, out.len() / tokens);
                each(&groups, out, tokens, TOGETHER, |r, count, _, x| {
                    if count == TOGETHER {
                        let rows: [Signs; TOGETHER] = array::from_fn(|i| rows.get(r + i));
                        return Ok(filled(simd.dot_signs_int8_of(rows, x)));
                    }
                    let row = rows.get(r);
                    Ok(for_tokens!(x.tokens, T => filled(simd.dot_signs_int8::<T>(row, x))))
                })
            })
        }
    }
}

/// Several rows, the first of which is `first`, with a single token.
fn rows_of_values<S: Simd>(
    simd: S,
    float: Float,
    (first, rows): (usize, [Values; TOGETHER]),
    same: usize,
    x: &Group<f32>,
) -> Result<Dots> {
    if let Some(dots) = simd.dot_values_of(float, rows, same, x) {
        return Ok(dots);
    }
    let mut dots = Dots::default();
    for (i, row) in rows.into_iter().enumerate() {
        dots[i] = row_of_values(simd, float, (first + i, row), x)?.1[0];
    }
    Ok(dots)
}

/// How many values a row had, and its products with the tokens of a group.
fn row_of_values<S: Simd>(
    simd: S,
    float: Float,
    (index, row): (usize, Values),
    x: &Group<f32>,
) -> Result<(usize, Dots)> {
    let found = for_tokens!(x.tokens, T => {
        simd.dot_values::<T>(float, row, x).map(|(n, dots)| (n, filled(dots)))
    });
    found.ok_or_else(|| too_few_values(index))
}

/// Rows of signs with their masks written out.
struct SignRows<'a> {
    plane: &'a Plane,
    parts: &'a [&'a [u8]],
    first: usize,
    masks: Vec<u8>,
}

impl<'a> SignRows<'a> {
    fn new<S: Simd>(
        plane: &'a Plane,
        simd: S,
        parts: &'a [&'a [u8]],
        first: usize,
        count: usize,
    ) -> SignRows<'a> {
        SignRows { plane, parts, first, masks: plane.masks(simd, parts, first..first + count) }
    }

    fn get(&self, row: usize) -> Signs<'_> {
        let width = padded(self.plane.dense.cols) / 8;
        let mask = self.masks.chunks(width).nth(row);
        self.plane.signs(self.parts, self.first + row, mask)
    }
}

/// A group in pieces that stay in L1, each with its first column.
fn pieces(x: &[f32], cols: usize, order: Order) -> Vec<(usize, Group<f32>)> {
    let width = NEAR / (x.len() / cols).next_power_of_two();
    let starts = (0..cols).step_by(width);
    let piece = |start| Group::exact(x, cols, start..cols.min(start + width), order);
    starts.map(|start| (start, piece(start))).collect()
}

/// Overwrites `out [rows of the block, tokens]` with the sums of `dot(row, rows, first column,
/// piece)`: the products of `together` rows where there is a single token, else of one row.
fn each<E>(
    groups: &[Vec<(usize, Group<E>)>],
    out: &mut [f32],
    tokens: usize,
    together: usize,
    mut dot: impl FnMut(usize, usize, usize, &Group<E>) -> Result<Dots>,
) -> Result<()> {
    out.fill(0.0);
    for (g, pieces) in groups.iter().enumerate() {
        for (start, x) in pieces {
            if tokens == 1 {
                let mut row = 0;
                while row < out.len() {
                    let count = if out.len() - row >= together { together } else { 1 };
                    let dots = dot(row, count, *start, x)?;
                    out[row..row + count].iter_mut().zip(dots).for_each(|(sum, dot)| *sum += dot);
                    row += count;
                }
                continue;
            }
            for (row, out) in out.chunks_mut(tokens).enumerate() {
                let out = &mut out[g * GROUP..tokens.min((g + 1) * GROUP)];
                let dots = dot(row, 1, *start, x)?;
                out.iter_mut().zip(dots).for_each(|(sum, dot)| *sum += dot);
            }
        }
    }
    Ok(())
}

fn filled<const T: usize>(dots: [f32; T]) -> Dots {
    let mut all = [0.0; GROUP];
    all[..T].copy_from_slice(&dots);
    all
}
