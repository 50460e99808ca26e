//! Streams of small numbers in bytes.
//!
//! Item `i` of width `w` takes the bits `i*w .. (i+1)*w` of its row, bit `b` of a row being bit
//! `b % 8` of byte `b / 8`. Rows end at a byte boundary; bits that no item uses are zero.

/// Bytes of a row of `items` numbers of `width` bits each; `None` where that overflows.
pub fn row_bytes(items: usize, width: usize) -> Option<usize> {
    Some(items.checked_mul(width)?.div_ceil(8))
}

/// Fills a row that is zero.
pub struct Writer<'a> {
    row: &'a mut [u8],
    at: usize,
}

impl<'a> Writer<'a> {
    /// Starts at the first bit of `row`.
    pub fn new(row: &'a mut [u8]) -> Writer<'a> {
        Writer { row, at: 0 }
    }

    /// Appends the lowest `width <= 16` bits of `value`, which has no others.
    pub fn put(&mut self, value: u16, width: usize) {
        let (byte, shift) = (self.at / 8, self.at % 8);
        let word = (u32::from(value) << shift).to_le_bytes();
        for (i, bits) in word.iter().enumerate().take((shift + width).div_ceil(8)) {
            self.row[byte + i] |= bits;
        }
        self.at += width;
    }
}

/// Reads a row.
pub struct Reader<'a> {
    row: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    /// Starts at the first bit of `row`.
    pub fn new(row: &'a [u8]) -> Reader<'a> {
        Reader { row, at: 0 }
    }

    /// The next `width <= 16` bits; zeros beyond the row's end.
    pub fn take(&mut self, width: usize) -> u16 {
        let (byte, shift) = (self.at / 8, self.at % 8);
        let at = |i: usize| u32::from(self.row.get(byte + i).copied().unwrap_or(0));
        let word = at(0) | at(1) << 8 | at(2) << 16;
        self.at += width;
        ((word >> shift) & ((1 << width) - 1)) as u16
    }

    /// Goes on behind the next `count` bits.
    pub fn skip(&mut self, count: usize) {
        self.at += count;
    }

    /// Whether nothing but zero bits is left.
    pub fn is_spent(&self) -> bool {
        let (byte, shift) = (self.at / 8, self.at % 8);
        let rest = self.row.get(byte..).unwrap_or(&[]);
        rest.split_first().is_none_or(|(first, more)| {
            first.checked_shr(shift as u32) == Some(0) && more.iter().all(|b| *b == 0)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bits_stand_where_the_specification_draws_them() {
        let mut row = [0u8; 2];
        let mut writer = Writer::new(&mut row);
        for value in [0b10011, 0b01010, 0b11111] {
            writer.put(value, 5);
        }
        assert_eq!(row, [0b0101_0011, 0b0111_1101]);
    }

    proptest! {
        #[test]
        fn what_is_put_is_taken(width in 1usize..=16, items in prop::collection::vec(any::<u16>(), 0..40)) {
            let items: Vec<u16> = items.iter().map(|v| v >> (16 - width)).collect();
            let mut row = vec![0u8; row_bytes(items.len(), width).unwrap()];
            let mut writer = Writer::new(&mut row);
            items.iter().for_each(|v| writer.put(*v, width));
            // The slow twin: bit after bit.
            for (i, value) in items.iter().enumerate() {
                for b in 0..width {
                    let at = i * width + b;
                    prop_assert_eq!(u16::from(row[at / 8] >> (at % 8) & 1), value >> b & 1);
                }
            }
            let mut reader = Reader::new(&row);
            for value in &items {
                prop_assert_eq!(reader.take(width), *value);
            }
            prop_assert!(reader.is_spent());
        }
    }

    #[test]
    fn a_set_bit_beyond_the_items_is_seen() {
        let row = [0b0010_0000u8, 0];
        let mut reader = Reader::new(&row);
        reader.take(5);
        assert!(!reader.is_spent());
        reader.take(1);
        assert!(reader.is_spent());
        assert_eq!(row_bytes(usize::MAX, 2), None);
    }
}
