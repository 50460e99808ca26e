//! Activations, as the kernels read them: tokens in groups, rows padded with zeros.
//!
//! Zeros behind the last column make every bit harmless that a kernel reads there.

use super::row::BLOCK;

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
        for (from, to) in row.chunks(32).zip(to.chunks_mut(32)) {
            for (j, value) in from.iter().enumerate() {
                to[j % 2 * 16 + j / 2] = *value;
            }
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
    /// Activations as they are.
    pub fn exact(x: &[f32], cols: usize, order: Order) -> Group<f32> {
        let (tokens, width) = ((x.len() / cols).next_power_of_two(), padded(cols));
        let mut values = vec![0.0; tokens * width];
        for (row, to) in x.chunks(cols).zip(values.chunks_mut(width)) {
            order.arrange(row, to);
        }
        let sum = |block: &[f32]| block.iter().map(|v| f64::from(*v)).sum::<f64>() as f32;
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
            let is_finite = crate::float::first_non_finite(row).is_none();
            let largest = row.iter().fold(0.0f32, |most, v| most.max(v.abs()));
            let unit = if is_finite { largest / 127.0 } else { f32::NAN };
            let per_unit = if unit > 0.0 { 127.0 / largest } else { 0.0 };
            for (value, to) in row.iter().zip(to) {
                *to = (value * per_unit).round_ties_even() as i8;
            }
            units[t] = unit;
        }
        let sum = |block: &[i8]| block.iter().map(|v| i32::from(*v)).sum::<i32>() as f32;
        let sums = values.chunks(width).flat_map(|row| row.chunks(BLOCK).map(sum)).collect();
        Group { values, width, tokens, sums, units }
    }
}
