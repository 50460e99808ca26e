#![doc = include_str!("row_column.md")]

use super::binary::BLOCK;
use super::{Dense, Element, Part, bits, check_finite, check_parts, half, spent, store};
use crate::error::Result;
use crate::float::Float;
use std::ops::Range;

/// What a solver decided, before it is packed; all numbers are exact in F16.
pub struct Decisions {
    /// Whether a weight is negative `[rows, cols]`.
    pub minus: Vec<bool>,
    /// Scales of rows, a block of columns each `[rows, blocks]`.
    pub scales: Vec<f32>,
    /// Scales of columns `[cols]`.
    pub columns: Vec<f32>,
}

/// What a weight is, before it is rounded to its type.
pub fn value(minus: bool, scale: f32, column: f32) -> f32 {
    let size = scale * column;
    if minus { -size } else { size }
}

/// The parts of a weight.
pub fn layout(dense: &Dense) -> Result<Vec<Part>> {
    let (rows, half) = (Some(dense.rows), Element::Float(Float::F16));
    Ok(vec![
        Part::new("signs", Element::Byte, &[rows, bits::row_bytes(dense.cols, 1)])?,
        Part::new("scales", half, &[rows, Some(dense.cols.div_ceil(BLOCK))])?,
        Part::new("columns", half, &[Some(dense.cols)])?,
    ])
}

/// Packs what a solver decided: the bytes of every part of the layout.
pub fn pack(found: &Decisions, dense: &Dense) -> Result<Vec<Vec<u8>>> {
    let mut signs = vec![0; layout(dense)?[0].nbytes];
    let rows = signs.chunks_exact_mut(dense.cols.div_ceil(8));
    for (row, minus) in rows.zip(found.minus.chunks_exact(dense.cols)) {
        let mut writer = bits::Writer::new(row);
        minus.iter().for_each(|minus| writer.put(u16::from(*minus), 1));
    }
    let halves = |values: &[f32]| -> Vec<u8> {
        values.iter().flat_map(|v| Float::F16.to_bits(*v).to_le_bytes()).collect()
    };
    Ok(vec![signs, halves(&found.scales), halves(&found.columns)])
}

/// Unpacks some rows into `out`, which holds just these rows.
///
/// # Errors
/// The parts are not what [`pack`] makes; other rows are not looked at.
pub fn unpack(parts: &[&[u8]], dense: &Dense, rows: Range<usize>, out: &mut [u8]) -> Result<()> {
    check_parts(parts, &layout(dense)?)?;
    let (signs, scales, columns) = (parts[0], parts[1], parts[2]);
    check_finite("scales", scales)?;
    check_finite("columns", columns)?;
    let (width, blocks) = (dense.cols.div_ceil(8), dense.cols.div_ceil(BLOCK));
    for (row, out) in rows.zip(out.chunks_exact_mut(dense.row_bytes())) {
        let mut reader = bits::Reader::new(&signs[row * width..(row + 1) * width]);
        for (j, out) in out.chunks_exact_mut(dense.float.size()).enumerate() {
            let scale = half(scales, row * blocks + j / BLOCK);
            store(dense.float, value(reader.take(1) == 1, scale, half(columns, j)), out);
        }
        spent("signs", row, &reader)?;
    }
    Ok(())
}
