//! The obvious loops: the oracle of the other paths, and what runs on any CPU.

use super::Simd;
use super::input::{Group, Order};
use super::row::{BLOCK, Signs, Values};
use crate::float::Float;

/// Any CPU.
#[derive(Clone, Copy)]
pub(super) struct Scalar;

impl Simd for Scalar {
    fn order(self, _: Float) -> Order {
        Order::Natural
    }

    fn dot_values<const T: usize>(
        self,
        float: Float,
        row: Values,
        x: &Group<f32>,
    ) -> Option<(usize, [f32; T])> {
        let (x, mut sum) = (x.rows::<T>(), [0.0; T]);
        let used = kept(float, row, |column, value| {
            for t in 0..T {
                sum[t] += value * x[t][column];
            }
        })?;
        Some((used, sum))
    }

    fn expand_values(self, float: Float, row: Values, out: &mut [f32]) -> Option<usize> {
        out.fill(0.0);
        kept(float, row, |column, value| out[column] = value)
    }

    fn dot_signs<const T: usize>(self, row: Signs, x: &Group<f32>) -> [f32; T] {
        let (x, mut total) = (x.rows::<T>(), [0.0; T]);
        for block in 0..row.scales.len() / 2 {
            let mut sum = [0.0; T];
            signed(row.from(block, BLOCK), |column, is_minus| {
                for t in 0..T {
                    let value = x[t].get(block * BLOCK + column).copied().unwrap_or(0.0);
                    sum[t] += if is_minus { -value } else { value };
                }
            });
            (0..T).for_each(|t| total[t] += scale(row, block) * sum[t]);
        }
        total
    }

    fn expand_signs(self, row: Signs, out: &mut [f32]) {
        out.fill(0.0);
        let scale = scale(row, 0);
        signed(row, |column, is_minus| {
            if let Some(out) = out.get_mut(column) {
                *out = if is_minus { -scale } else { scale };
            }
        });
    }

    fn dot_signs_int8<const T: usize>(self, row: Signs, x: &Group<i8>) -> [f32; T] {
        let (rows, mut total) = (x.rows::<T>(), [0.0; T]);
        for block in 0..row.scales.len() / 2 {
            let mut sum = [0i32; T];
            signed(row.from(block, BLOCK), |column, is_minus| {
                for t in 0..T {
                    let value = rows[t].get(block * BLOCK + column).copied().unwrap_or(0);
                    sum[t] += if is_minus { -i32::from(value) } else { i32::from(value) };
                }
            });
            (0..T).for_each(|t| total[t] += scale(row, block) * sum[t] as f32);
        }
        std::array::from_fn(|t| total[t] * x.units[t])
    }
}

fn scale(row: Signs, block: usize) -> f32 {
    half::f16::from_bits(row.scale(block)).to_f32()
}

/// Calls `take(column, value)` for all kept columns; the number of values, unless they run out.
fn kept(float: Float, row: Values, mut take: impl FnMut(usize, f32)) -> Option<usize> {
    let mut values = row.values.chunks_exact(float.size());
    let mut used = 0;
    for (i, mask) in row.mask.iter().enumerate() {
        for j in (0..8).filter(|j| mask >> j & 1 == 1) {
            let value = values.next()?;
            used += 1;
            take(
                8 * i + j,
                match float {
                    Float::F32 => f32::from_le_bytes(value.try_into().expect("four bytes")),
                    _ => float.from_bits(u16::from_le_bytes([value[0], value[1]])),
                },
            );
        }
    }
    Some(used)
}

/// Calls `take(column, is_minus)` for all kept columns of a block; some may lie behind its end.
fn signed(block: Signs, mut take: impl FnMut(usize, bool)) {
    for i in 0..BLOCK / 64 {
        let (keep, mut signs) = block.words(i);
        for j in (0..64).filter(|j| keep >> j & 1 == 1) {
            take(64 * i + j, signs & 1 == 1);
            signs >>= 1;
        }
    }
}
