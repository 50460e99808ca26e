#![doc = include_str!("bitmap.md")]

use super::{Dense, Element, Part, at, keep_of};
use crate::error::{Error, Result};
use std::ops::Range;

/// The format with its number of stored values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Weights that are stored.
    pub values: usize,
}

impl Bitmap {
    /// The format of a weight: counts what is not zero.
    pub fn of(weight: &[u8], dense: &Dense) -> Result<Bitmap> {
        super::length("weight", weight.len(), dense.nbytes())?;
        let is_stored = |value: &&[u8]| value.iter().any(|byte| *byte != 0);
        Ok(Bitmap { values: weight.chunks_exact(dense.float.size()).filter(is_stored).count() })
    }

    pub(super) fn layout(&self, dense: &Dense) -> Result<Vec<Part>> {
        let most = dense.rows * dense.cols;
        if self.values > most {
            let reason = format!("expected at most {most} for this shape, found {}", self.values);
            return Err(Error::Packed { part: "values", reason });
        }
        let mask = [Some(dense.rows), Some(dense.cols.div_ceil(8))];
        Ok(vec![
            Part::new("values", Element::Float(dense.float), &[Some(self.values)])?,
            Part::new("mask", Element::Byte, &mask)?,
        ])
    }

    pub(super) fn pack(&self, weight: &[u8], dense: &Dense) -> Result<Vec<Vec<u8>>> {
        let found = Bitmap::of(weight, dense)?.values;
        if found != self.values {
            let reason = format!("expected {} non-zeros, found {found}", self.values);
            return Err(Error::Packed { part: "weight", reason });
        }
        match dense.float.size() {
            2 => self.pack_sized::<2>(weight, dense),
            _ => self.pack_sized::<4>(weight, dense),
        }
    }

    fn pack_sized<const SIZE: usize>(&self, weight: &[u8], dense: &Dense) -> Result<Vec<Vec<u8>>> {
        let mut values = Vec::with_capacity(self.values * SIZE);
        let mut mask = Vec::with_capacity(dense.rows * dense.cols.div_ceil(8));
        for row in weight.chunks_exact(dense.row_bytes()) {
            for columns in row.as_chunks::<SIZE>().0.chunks(8) {
                mask.push(keep_of::nonzero(columns) as u8);
                let stored = columns.iter().filter(|value| **value != [0; SIZE]);
                values.extend(stored.flatten());
            }
        }
        Ok(vec![values, mask])
    }

    pub(super) fn unpack(
        &self,
        parts: &[&[u8]],
        dense: &Dense,
        rows: Range<usize>,
        out: &mut [u8],
    ) -> Result<()> {
        let first = self.row_starts(parts[1], dense)?[rows.start];
        let mask_bytes = dense.cols.div_ceil(8);
        let mask = &parts[1][rows.start * mask_bytes..rows.end * mask_bytes];
        match dense.float.size() {
            2 => scatter_rows::<2>(parts[0], first, mask, dense, out),
            _ => scatter_rows::<4>(parts[0], first, mask, dense, out),
        }
        Ok(())
    }

    /// The number of values above every row, and of all: each row's place depends on those above it.
    ///
    /// # Errors
    /// Another number of bits than values, or a bit after the last column.
    pub fn row_starts(&self, mask: &[u8], dense: &Dense) -> Result<Vec<usize>> {
        let spare = dense.cols.next_multiple_of(8) - dense.cols;
        let mut starts = vec![0];
        for (row, mask) in mask.chunks_exact(dense.cols.div_ceil(8)).enumerate() {
            if mask.last().is_some_and(|last| (last.leading_zeros() as usize) < spare) {
                let reason = "expected zero bits after the last column, found ones";
                return Err(at("mask", row, reason));
            }
            let kept: usize = mask.iter().map(|byte| byte.count_ones() as usize).sum();
            starts.push(starts[row] + kept);
        }
        let found = starts[dense.rows];
        if found != self.values {
            let reason = format!("expected {} bits, found {found}", self.values);
            return Err(Error::Packed { part: "mask", reason });
        }
        Ok(starts)
    }
}

/// Fills rows from a mask that was counted.
fn scatter_rows<const SIZE: usize>(
    values: &[u8],
    first: usize,
    mask: &[u8],
    dense: &Dense,
    out: &mut [u8],
) {
    out.fill(0);
    let mut values = &values.as_chunks::<SIZE>().0[first..];
    let mask_rows = mask.chunks_exact(dense.cols.div_ceil(8));
    for (mask, out) in mask_rows.zip(out.chunks_exact_mut(dense.row_bytes())) {
        for (byte, columns) in mask.iter().zip(out.as_chunks_mut::<SIZE>().0.chunks_mut(8)) {
            let (now, rest) = values.split_at(byte.count_ones() as usize);
            keep_of::scatter(u16::from(*byte), now, columns);
            values = rest;
        }
    }
}
