//! Few tokens: every row is walked once for up to four of them, and decoded in registers.

use super::input::{GROUP, Group, Order, padded};
use super::row::Signs;
use super::{Kind, Linear, Mode, Simd, too_few_values};
use crate::error::Result;
use crate::par::Job;

/// Rows that a worker takes at once: their masks stay in L1.
const ROWS: usize = 16;

/// The products of one row with a group; those beyond the group's tokens are 0.
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
    linear: &Linear,
    simd: S,
    job: &Job,
    parts: &[&[u8]],
    (x, mode): (&[f32], Mode),
    out: &mut [f32],
) -> Result<()> {
    let (float, cols) = (linear.dense.float, linear.dense.cols);
    let tokens = x.len() / cols;
    let groups = x.chunks(GROUP * cols);
    let per_block = ROWS * tokens;
    if let Kind::Values { starts } = &linear.kind {
        let order = simd.order(float);
        let groups: Vec<_> = groups.map(|x| Group::exact(x, cols, order)).collect();
        return job.share_blocks(out, per_block, |block, out| {
            each(&groups, out, tokens, |r, x| {
                let row = block * ROWS + r;
                let weights = linear.values(starts, parts, row);
                let dots = for_tokens!(x.tokens, T => {
                    simd.dot_values::<T>(float, weights, x).map(filled)
                });
                dots.ok_or_else(|| too_few_values(row))
            })
        });
    }
    match mode {
        Mode::Float32 => {
            let groups: Vec<_> = groups.map(|x| Group::exact(x, cols, Order::Natural)).collect();
            job.share_blocks(out, per_block, |block, out| {
                let rows = SignRows::new(linear, simd, parts, block * ROWS, out.len() / tokens);
                each(&groups, out, tokens, |r, x| {
                    Ok(for_tokens!(x.tokens, T => filled(simd.dot_signs::<T>(rows.get(r), x))))
                })
            })
        }
        Mode::Int8 => {
            let groups: Vec<_> = groups.map(|x| Group::rounded(x, cols)).collect();
            job.share_blocks(out, per_block, |block, out| {
                let rows = SignRows::new(linear, simd, parts, block * ROWS, out.len() / tokens);
                each(&groups, out, tokens, |r, x| {
                    Ok(for_tokens!(x.tokens, T => filled(simd.dot_signs_int8::<T>(rows.get(r), x))))
                })
            })
        }
    }
}

/// Rows of signs with their masks written out.
struct SignRows<'a> {
    linear: &'a Linear,
    parts: &'a [&'a [u8]],
    first: usize,
    masks: Vec<u8>,
}

impl<'a> SignRows<'a> {
    fn new<S: Simd>(
        linear: &'a Linear,
        simd: S,
        parts: &'a [&'a [u8]],
        first: usize,
        count: usize,
    ) -> SignRows<'a> {
        SignRows { linear, parts, first, masks: linear.masks(simd, parts, first..first + count) }
    }

    fn get(&self, row: usize) -> Signs<'_> {
        let width = padded(self.linear.dense.cols) / 8;
        let mask = self.masks.chunks(width).nth(row);
        self.linear.signs(self.parts, self.first + row, mask)
    }
}

/// Fills `out [rows of the block, tokens]`; groups outermost, so that one stays in L1.
fn each<E>(
    groups: &[Group<E>],
    out: &mut [f32],
    tokens: usize,
    dot: impl Fn(usize, &Group<E>) -> Result<Dots>,
) -> Result<()> {
    for (g, x) in groups.iter().enumerate() {
        for (row, out) in out.chunks_mut(tokens).enumerate() {
            let out = out.chunks_mut(GROUP).nth(g).expect("a group of this many");
            out.copy_from_slice(&dot(row, x)?[..out.len()]);
        }
    }
    Ok(())
}

fn filled<const T: usize>(dots: [f32; T]) -> Dots {
    let mut all = [0.0; GROUP];
    all[..T].copy_from_slice(&dots);
    all
}
