//! Activations, as the kernels read them: tokens in groups, rows padded with zeros.
//!
//! Zeros behind the last column make every bit harmless that a kernel reads there.
#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // the scalar twin needs less of it

use super::row::BLOCK;
use std::ops::Range;

/// Tokens that one walk over the weight serves.
pub(super) const GROUP: usize = 4;

/// Columns, rounded up to what a kernel takes at once.
pub(super) fn padded(cols: usize) -> usize {
    cols.next_multiple_of(64)
}

/// The order of columns in which a kernel meets them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// As they are.
    Natural,
    /// Of 32 columns, the even ones before the odd ones.
    EvensFirst,
}

impl Order {
    /// Copies a row in this order; `to` is padded and zero.
    pub fn arrange(self, row: &[f32], to: &mut [f32]) {
        if self == Order::Natural {
            return to[..row.len()].copy_from_slice(row);
        }
        let (whole, rest) = row.as_chunks::<32>();
        let (to_whole, to_rest) = to.split_at_mut(32 * whole.len());
        for (from, to) in whole.iter().zip(to_whole.as_chunks_mut::<32>().0) {
            for j in 0..16 {
                (to[j], to[16 + j]) = (from[2 * j], from[2 * j + 1]);
            }
        }
        for (j, value) in rest.iter().enumerate() {
            to_rest[j % 2 * 16 + j / 2] = *value;
        }
    }
}

/// One to four tokens.
pub(super) struct Group<E> {
    /// `tokens` rows of `width` values.
    pub values: Vec<E>,
    /// Padded columns.
    pub width: usize,
    /// Rows: 1, 2 or 4, the last of which may be no token but zeros.
    pub tokens: usize,
    /// Sums of every 256 columns, `ceil(cols / 256)` a token.
    pub sums: Vec<f32>,
    /// What an activation of 1 stands for, one a token.
    pub units: Vec<f32>,
}

impl<E> Group<E> {
    /// The rows of `T` tokens.
    pub fn rows<const T: usize>(&self) -> [&[E]; T] {
        std::array::from_fn(|t| &self.values[t * self.width..][..self.width])
    }

    /// Sums of columns of scale `block`.
    #[inline(always)]
    pub fn sum(&self, token: usize, block: usize) -> f32 {
        self.sums[token * self.width.div_ceil(BLOCK) + block]
    }
}

impl Group<f32> {
    /// Some columns of the activations, as they are.
    pub fn exact(x: &[f32], cols: usize, columns: Range<usize>, order: Order) -> Group<f32> {
        let (tokens, width) = ((x.len() / cols).next_power_of_two(), padded(columns.len()));
        let mut values = vec![0.0; tokens * width];
        for (row, to) in x.chunks(cols).zip(values.chunks_mut(width)) {
            order.arrange(&row[columns.clone()], to);
        }
        let sums = values.chunks(width).flat_map(|row| row.chunks(BLOCK).map(sum)).collect();
        Group { values, width, tokens, sums, units: vec![1.0; tokens] }
    }
}

impl Group<i8> {
    /// Activations as multiples of a 127th of the token's largest, to the nearest.
    ///
    /// A token with a value that is not finite has the unit NaN, so its outputs are.
    pub fn rounded(x: &[f32], cols: usize) -> Group<i8> {
        let (tokens, width) = ((x.len() / cols).next_power_of_two(), padded(cols));
        let (mut values, mut units) = (vec![0; tokens * width], vec![0.0; tokens]);
        for (t, (row, to)) in x.chunks(cols).zip(values.chunks_mut(width)).enumerate() {
            if crate::float::first_non_finite(row).is_some() {
                units[t] = f32::NAN;
                continue;
            }
            let largest = f32::from_bits(row.iter().map(|v| v.abs().to_bits()).fold(0, u32::max));
            // Nothing but zeros, or numbers that no inverse of an f32 lifts to 1, are zeros.
            let per_unit = Some(127.0 / largest).filter(|v| v.is_finite()).unwrap_or(0.0);
            for (value, to) in row.iter().zip(to) {
                *to = nearest(value * per_unit);
            }
            units[t] = largest / 127.0;
        }
        let sum = |block: &[i8]| block.iter().map(|v| i32::from(*v)).sum::<i32>() as f32;
        let sums = values.chunks(width).flat_map(|row| row.chunks(BLOCK).map(sum)).collect();
        Group { values, width, tokens, sums, units }
    }
}

/// The sum in f64, over eight lanes so that it is not one long chain.
fn sum(values: &[f32]) -> f32 {
    let mut lanes = [0.0f64; 8];
    for eight in values.as_chunks::<8>().0 {
        for (lane, value) in lanes.iter_mut().zip(eight) {
            *lane += f64::from(*value);
        }
    }
    lanes.iter().sum::<f64>() as f32
}

/// The nearest integer of at most 127; ties to even. Beside this number an f32 has no fraction, and
/// ends in the integer's bits; no instruction of an old CPU does better.
#[inline(always)]
fn nearest(value: f32) -> i8 {
    (value + 12_582_912.0).to_bits() as i8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_integer_is_found_from_its_bits() {
        for i in -127 * 64..=127 * 64 {
            let value = i as f32 / 64.0;
            assert_eq!(f32::from(nearest(value)), value.round_ties_even());
        }
    }

    #[test]
    fn the_largest_activation_becomes_127_whatever_its_size() {
        for largest in [1e-3f32, 3e37, 127.0, 1e-30] {
            let group = Group::rounded(&[largest, -largest, largest / 2.0, 0.0], 4);
            assert_eq!(group.values[..4], [127, -127, 64, 0], "{largest}");
        }
        assert_eq!(Group::rounded(&[1e-40, 0.0], 2).values[..2], [0, 0]);
    }
}
