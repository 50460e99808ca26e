//! Which columns of an `n:m` group are kept, as one number a group.
//!
//! A group's mask is an m-bit number (bit `j` = column `j` of the group). Its code is its rank among
//! all m-bit numbers with exactly n bits set, in increasing order: `ceil(log2(C(m, n)))` bits, and
//! none where n = m.

use super::{at, bits};
use crate::error::Result;

/// Keeps exactly `keep` of every `of` columns; `of` is 4, 8 or 16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    /// Columns that are stored.
    pub keep: usize,
    /// The group's length.
    pub of: usize,
}

impl Groups {
    /// Bytes of a bit stream with `width` bits for every group of a row.
    pub fn row_bytes(self, cols: usize, width: usize) -> Option<usize> {
        bits::row_bytes(cols / self.of, width)
    }

    /// Columns of a row that are stored; `None` where that overflows.
    pub fn kept(self, cols: usize) -> Option<usize> {
        (cols / self.of).checked_mul(self.keep)
    }
}

/// The codes of groups of 4 or 8.
pub struct Codes {
    masks: Vec<u16>,
    ranks: [u16; 256],
    /// Bits of a code.
    pub width: usize,
}

impl Codes {
    /// The table of one pattern.
    pub fn new(groups: Groups) -> Codes {
        let masks: Vec<u16> =
            (0..1 << groups.of).filter(|m: &u16| m.count_ones() as usize == groups.keep).collect();
        let mut ranks = [0; 256];
        for (rank, mask) in masks.iter().enumerate() {
            ranks[usize::from(*mask)] = rank as u16;
        }
        let width = masks.len().next_power_of_two().trailing_zeros() as usize;
        Codes { masks, ranks, width }
    }

    /// The code of `mask`, which has as many bits as the pattern keeps.
    pub fn rank(&self, mask: u16) -> u16 {
        self.ranks[usize::from(mask)]
    }

    /// The mask of a code, unless it is none of the pattern's.
    pub fn mask(&self, code: u16) -> Option<u16> {
        self.masks.get(usize::from(code)).copied()
    }

    /// The masks of row `row`, group after group, from its bit stream.
    pub fn read_row(&self, row: usize, stream: &[u8], masks: &mut [u16]) -> Result<()> {
        let mut reader = bits::Reader::new(stream);
        for (group, mask) in masks.iter_mut().enumerate() {
            let code = reader.take(self.width);
            *mask = self.mask(code).ok_or_else(|| {
                let expected = format!("expected a code below {}", self.masks.len());
                at("positions", row, format!("group {group}: {expected}, found {code}"))
            })?;
        }
        spent("positions", row, &reader)
    }
}

/// Refuses a row with bits beyond its last item.
pub fn spent(part: &'static str, row: usize, reader: &bits::Reader) -> Result<()> {
    if reader.is_spent() {
        return Ok(());
    }
    Err(at(part, row, "expected zero bits after the last item, found ones"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_take_the_bits_of_the_specification() {
        let widths = [(2, 8, 5), (3, 8, 6), (3, 4, 2), (1, 4, 2), (4, 8, 7), (5, 8, 6), (6, 8, 5)];
        for (keep, of, width) in [&widths[..], &[(8, 8, 0), (4, 4, 0), (2, 4, 3)]].concat() {
            let codes = Codes::new(Groups { keep, of });
            assert_eq!(codes.width, width, "{keep}:{of}");
            for rank in 0..codes.masks.len() as u16 {
                let mask = codes.mask(rank).unwrap();
                assert_eq!((mask.count_ones() as usize, codes.rank(mask)), (keep, rank));
            }
            assert_eq!(codes.mask(codes.masks.len() as u16), None);
        }
        let pairs = Codes::new(Groups { keep: 2, of: 4 });
        assert_eq!(pairs.masks, [0b0011, 0b0101, 0b0110, 0b1001, 0b1010, 0b1100]);
    }
}
