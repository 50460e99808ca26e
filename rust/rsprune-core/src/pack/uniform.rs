#![doc = include_str!("uniform.md")]

use super::{Dense, Element, Part, bits, check_finite, check_parts, half, spent, store};
use crate::error::{Error, Result};
use crate::float::Float;
use std::ops::Range;

/// Columns that share scale and zero.
pub const GROUP: usize = 128;

/// What a solver decided, before it is packed.
pub struct Decisions {
    /// Codes `[rows, cols]`, below `2^bits`.
    pub codes: Vec<u8>,
    /// Scales of a row's groups `[rows, groups]`, exact in F16.
    pub scales: Vec<f32>,
    /// The codes that stand for zero, of the same shape.
    pub zeros: Vec<u8>,
}

/// What a weight is, before it is rounded to its type.
pub fn value(code: u8, zero: u8, scale: f32) -> f32 {
    (f32::from(code) - f32::from(zero)) * scale
}

/// The parts of a weight.
pub fn layout(dense: &Dense, width: usize) -> Result<Vec<Part>> {
    if !matches!(width, 2 | 3 | 4 | 8) {
        let reason = format!("packed format uniform {width}: expected 2, 3, 4 or 8 bits");
        return Err(Error::Pattern(reason));
    }
    let shape = [Some(dense.rows), Some(dense.cols.div_ceil(GROUP))];
    let codes = [Some(dense.rows), bits::row_bytes(dense.cols, width)];
    Ok(vec![
        Part::new("codes", Element::Byte, &codes)?,
        Part::new("scales", Element::Float(Float::F16), &shape)?,
        Part::new("zeros", Element::Byte, &shape)?,
    ])
}

/// Packs what a solver decided: the bytes of every part of the layout.
pub fn pack(found: &Decisions, dense: &Dense, width: usize) -> Result<Vec<Vec<u8>>> {
    let layout = layout(dense, width)?;
    let mut codes = vec![0; layout[0].nbytes];
    let rows = codes.chunks_exact_mut(layout[0].shape[1]);
    for (row, items) in rows.zip(found.codes.chunks_exact(dense.cols)) {
        let mut writer = bits::Writer::new(row);
        items.iter().for_each(|code| writer.put(u16::from(*code), width));
    }
    let scales = found.scales.iter().flat_map(|s| Float::F16.to_bits(*s).to_le_bytes()).collect();
    Ok(vec![codes, scales, found.zeros.clone()])
}

/// Unpacks some rows into `out`, which holds just these rows.
///
/// # Errors
/// The parts are not what [`pack`] makes; other rows are not looked at.
pub fn unpack(
    parts: &[&[u8]],
    dense: &Dense,
    width: usize,
    rows: Range<usize>,
    out: &mut [u8],
) -> Result<()> {
    let layout = layout(dense, width)?;
    check_parts(parts, &layout)?;
    let (codes, scales, zeros) = (parts[0], parts[1], parts[2]);
    check_finite("scales", scales)?;
    let largest = ((1u16 << width) - 1) as u8;
    if let Some(zero) = zeros.iter().find(|zero| **zero > largest) {
        let reason = format!("expected codes up to {largest}, found {zero}");
        return Err(Error::Packed { part: "zeros", reason });
    }
    let (row_bytes, groups) = (layout[0].shape[1], layout[1].shape[1]);
    for (row, out) in rows.zip(out.chunks_exact_mut(dense.row_bytes())) {
        let mut reader = bits::Reader::new(&codes[row * row_bytes..(row + 1) * row_bytes]);
        for (j, out) in out.chunks_exact_mut(dense.float.size()).enumerate() {
            let group = row * groups + j / GROUP;
            let weight = value(reader.take(width) as u8, zeros[group], half(scales, group));
            store(dense.float, weight, out);
        }
        spent("codes", row, &reader)?;
    }
    Ok(())
}
