#![doc = include_str!("keep_of.md")]

use super::{Dense, Element, Groups, Part, at, bits, check_columns, spent};
use crate::error::Result;
use std::ops::Range;

pub fn layout(dense: &Dense, groups: Groups) -> Result<Vec<Part>> {
    check_columns(dense, groups)?;
    let rows = Some(dense.rows);
    let float = Element::Float(dense.float);
    Ok(vec![
        Part::new("values", float, &[rows, groups.kept(dense.cols)])?,
        Part::new("mask", Element::Byte, &[rows, Some(dense.cols.div_ceil(8))])?,
    ])
}

pub fn pack(weight: &[u8], dense: &Dense, groups: Groups) -> Result<Vec<Vec<u8>>> {
    match dense.float.size() {
        2 => pack_sized::<2>(weight, dense, groups),
        _ => pack_sized::<4>(weight, dense, groups),
    }
}

fn pack_sized<const SIZE: usize>(
    weight: &[u8],
    dense: &Dense,
    groups: Groups,
) -> Result<Vec<Vec<u8>>> {
    let parts = layout(dense, groups)?;
    let mut values = Vec::with_capacity(parts[0].nbytes);
    let mut mask = vec![0; parts[1].nbytes];
    let mask_rows = mask.chunks_exact_mut(dense.cols.div_ceil(8));
    for (row, (weight, mask)) in weight.chunks_exact(dense.row_bytes()).zip(mask_rows).enumerate() {
        let mut writer = bits::Writer::new(mask);
        let (columns, _) = weight.as_chunks::<SIZE>();
        for (group, columns) in columns.chunks_exact(groups.of).enumerate() {
            let stored = nonzero(columns);
            let count = stored.count_ones() as usize;
            if count > groups.keep {
                let expected = format!("expected at most {} non-zeros", groups.keep);
                let reason = format!("group {group}: {expected}, found {count}");
                return Err(at("weight", row, reason));
            }
            let stored = filled(stored, groups.keep);
            writer.put(stored, groups.of);
            for (j, value) in columns.iter().enumerate() {
                if stored >> j & 1 == 1 {
                    values.extend_from_slice(value);
                }
            }
        }
    }
    Ok(vec![values, mask])
}

/// Bit `j` says whether any bit of column `j` is set.
pub fn nonzero<const SIZE: usize>(columns: &[[u8; SIZE]]) -> u16 {
    let bit = |(j, value): (usize, &[u8; SIZE])| u16::from(*value != [0; SIZE]) << j;
    columns.iter().enumerate().map(bit).sum()
}

/// `mask` and the lowest free columns, `keep` in all.
fn filled(mut mask: u16, keep: usize) -> u16 {
    while (mask.count_ones() as usize) < keep {
        mask |= mask + 1;
    }
    mask
}

pub fn unpack(
    parts: &[&[u8]],
    dense: &Dense,
    groups: Groups,
    rows: Range<usize>,
    out: &mut [u8],
) -> Result<()> {
    match dense.float.size() {
        2 => unpack_sized::<2>(parts, dense, groups, rows, out),
        _ => unpack_sized::<4>(parts, dense, groups, rows, out),
    }
}

fn unpack_sized<const SIZE: usize>(
    parts: &[&[u8]],
    dense: &Dense,
    groups: Groups,
    rows: Range<usize>,
    out: &mut [u8],
) -> Result<()> {
    out.fill(0);
    let (values, _) = parts[0].as_chunks::<SIZE>();
    let kept = values.len() / dense.rows;
    let mask_bytes = dense.cols.div_ceil(8);
    for (row, out) in rows.zip(out.chunks_exact_mut(dense.row_bytes())) {
        let mut reader = bits::Reader::new(&parts[1][row * mask_bytes..][..mask_bytes]);
        let values = values[row * kept..][..kept].chunks_exact(groups.keep);
        let (columns, _) = out.as_chunks_mut::<SIZE>();
        for (group, (columns, values)) in
            columns.chunks_exact_mut(groups.of).zip(values).enumerate()
        {
            scatter(next_mask(&mut reader, groups, (row, group))?, values, columns);
        }
        spent("mask", row, &reader)?;
    }
    Ok(())
}

fn next_mask(reader: &mut bits::Reader, groups: Groups, place: (usize, usize)) -> Result<u16> {
    let (mask, (row, group)) = (reader.take(groups.of), place);
    let count = mask.count_ones() as usize;
    if count != groups.keep {
        let reason = format!("group {group}: expected {} bits, found {count}", groups.keep);
        return Err(at("mask", row, reason));
    }
    Ok(mask)
}

/// Refuses what `unpack` would.
pub fn validate(mask: &[u8], dense: &Dense, groups: Groups) -> Result<()> {
    // Bytes of whole groups, by table: a mask is read as fast as memory gives it.
    let low = (1u32 << groups.of.min(8)) - 1;
    let is_right = |bits: u32| bits.count_ones() as usize == groups.keep;
    let good: [bool; 256] = std::array::from_fn(|byte| {
        let byte = byte as u32;
        is_right(byte & low) && (groups.of == 8 || is_right(byte >> 4))
    });
    let by_table = groups.of <= 8 && dense.cols.is_multiple_of(8);
    for (row, mask) in mask.chunks_exact(dense.cols.div_ceil(8)).enumerate() {
        if by_table && mask.iter().all(|byte| good[usize::from(*byte)]) {
            continue;
        }
        let mut reader = bits::Reader::new(mask);
        for group in 0..dense.cols / groups.of {
            next_mask(&mut reader, groups, (row, group))?;
        }
        spent("mask", row, &reader)?;
    }
    Ok(())
}

/// Puts the values where the bits of `mask` are, in order.
pub fn scatter<const SIZE: usize>(
    mut mask: u16,
    values: &[[u8; SIZE]],
    columns: &mut [[u8; SIZE]],
) {
    for value in values {
        columns[mask.trailing_zeros() as usize] = *value;
        mask &= mask - 1;
    }
}
