//! One row of a packed weight, as the kernels read it.
//!
//! All formats come down to two streams: a mask with one bit a column, and something for every kept
//! column in order, a value or a sign. Masks that are stored as codes are written out first.

use crate::float::Float;
use crate::pack::{Codes, Groups};

/// Columns that share a scale.
pub(super) const BLOCK: usize = crate::pack::SCALE_COLUMNS;

/// Kept columns and their values.
#[derive(Clone, Copy)]
pub(super) struct Values<'a> {
    /// One bit a column.
    pub mask: &'a [u8],
    /// Little-endian numbers, from the first kept column on; may go on behind the last.
    pub values: &'a [u8],
}

/// Kept columns, their signs and their scales.
#[derive(Clone, Copy)]
pub(super) struct Signs<'a> {
    /// One bit a column; `None` where every column is kept.
    pub mask: Option<&'a [u8]>,
    /// One bit a kept column, set for minus; may go on behind the last.
    pub signs: &'a [u8],
    /// Bytes of `signs` for 64 columns.
    pub step: usize,
    /// f16, one for 256 columns.
    pub scales: &'a [u8],
}

impl<'a> Values<'a> {
    /// `width` columns from `start` on, before which there were `used` values.
    pub fn from(self, start: usize, width: usize, used: usize, float: Float) -> Values<'a> {
        let end = self.mask.len().min((start + width) / 8);
        Values { mask: &self.mask[start / 8..end], values: &self.values[used * float.size()..] }
    }
}

impl<'a> Signs<'a> {
    /// `width` columns, from those of scale `block` on.
    pub fn from(self, block: usize, width: usize) -> Signs<'a> {
        let start = block * BLOCK / 8;
        let scales = 2 * block..self.scales.len().min(2 * (block + width.div_ceil(BLOCK)));
        Signs {
            mask: self.mask.map(|mask| &mask[start..mask.len().min(start + width / 8)]),
            signs: self.signs.get(block * BLOCK / 64 * self.step..).unwrap_or(&[]),
            scales: &self.scales[scales],
            ..self
        }
    }

    /// Which of the 64 columns from `64 * i` are kept, and which of all 64 have a minus if kept.
    #[inline(always)]
    pub fn words(&self, i: usize) -> (u64, u64) {
        let keep = self.mask.map_or(!0, |mask| word(mask, 8 * i));
        (keep, word(self.signs, i * self.step))
    }

    /// The bits of a scale.
    #[inline(always)]
    pub fn scale(&self, block: usize) -> u16 {
        u16::from_le_bytes([self.scales[2 * block], self.scales[2 * block + 1]])
    }
}

/// Eight bytes from `at` on; zeros behind the end.
#[inline(always)]
pub(super) fn word(bytes: &[u8], at: usize) -> u64 {
    match bytes.get(at..at + 8) {
        Some(whole) => u64::from_le_bytes(whole.try_into().expect("eight bytes")),
        None => last_word(bytes, at),
    }
}

#[cold]
fn last_word(bytes: &[u8], at: usize) -> u64 {
    let rest = bytes.get(at..).unwrap_or(&[]);
    let mut word = [0; 8];
    let len = rest.len().min(8);
    word[..len].copy_from_slice(&rest[..len]);
    u64::from_le_bytes(word)
}

/// The masks of eight columns by their code: two codes at once where groups have four columns.
pub(super) struct Table {
    /// Bits of an item, 7 at most.
    pub width: usize,
    /// Masks; none has bits for a code that does not exist.
    pub masks: [u8; 128],
}

impl Table {
    /// `None` for a pattern that keeps all columns.
    pub fn new(groups: Groups) -> Option<Table> {
        let codes = Codes::new(groups);
        let mask = |code: usize| codes.mask(code as u16).unwrap_or(0) as u8;
        let mut masks = [0; 128];
        let per_item = 8 / groups.of;
        let width = codes.width * per_item;
        for (item, entry) in masks.iter_mut().enumerate().take(1 << width) {
            *entry = match per_item {
                1 => mask(item),
                _ => mask(item & ((1 << codes.width) - 1)) | mask(item >> codes.width) << 4,
            };
        }
        (width > 0).then_some(Table { width, masks })
    }

    /// Writes the masks of the items of `stream` from bit 0 on.
    pub fn read(&self, stream: &[u8], masks: &mut [u8]) {
        let item = (1 << self.width) - 1;
        for (i, eight) in masks.chunks_mut(8).enumerate() {
            let word = word(stream, i * self.width);
            for (j, mask) in eight.iter_mut().enumerate() {
                *mask = self.masks[(word >> (j * self.width)) as usize & item];
            }
        }
    }
}
