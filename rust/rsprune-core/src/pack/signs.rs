#![doc = include_str!("signs.md")]

use super::{Codes, Dense, Element, Groups, Part, at, bits, check_columns, keep_of, spent};
use crate::error::Result;
use crate::float::Float;
use std::ops::Range;

/// Columns that share a scale; a multiple of every group length.
pub const SCALE_COLUMNS: usize = 256;

/// A value, or why there is none.
type Checked<T> = std::result::Result<T, String>;

pub fn layout(dense: &Dense, groups: Groups) -> Result<Vec<Part>> {
    check_columns(dense, groups)?;
    let rows = Some(dense.rows);
    let width = Codes::new(groups).width;
    let signs = groups.row_bytes(dense.cols, groups.keep);
    let scales = Some(dense.cols.div_ceil(SCALE_COLUMNS));
    let mut parts = vec![
        Part::new("signs", Element::Byte, &[rows, signs])?,
        Part::new("scales", Element::Float(Float::F16), &[rows, scales])?,
    ];
    if width > 0 {
        let positions = [rows, groups.row_bytes(dense.cols, width)];
        parts.insert(0, Part::new("positions", Element::Byte, &positions)?);
    }
    Ok(parts)
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
    let layout = layout(dense, groups)?;
    let mut parts: Vec<Vec<u8>> = layout.iter().map(|part| vec![0; part.nbytes]).collect();
    let codes = Codes::new(groups);
    for (row, weight) in weight.chunks_exact(dense.row_bytes()).enumerate() {
        let mut rows = layout.iter().zip(&mut parts).map(|(layout, part)| {
            let length = layout.nbytes / dense.rows;
            &mut part[row * length..][..length]
        });
        let positions = if codes.width > 0 { rows.next().unwrap_or_default() } else { &mut [] };
        let mut positions = bits::Writer::new(positions);
        let mut signs = bits::Writer::new(rows.next().unwrap_or_default());
        let scales = rows.next().unwrap_or_default().as_chunks_mut::<2>().0;
        let blocks = weight.as_chunks::<SIZE>().0.chunks(SCALE_COLUMNS);
        for (block, (columns, scale)) in blocks.zip(scales).enumerate() {
            let place = |reason| at("weight", row, format!("block {block}: {reason}"));
            let found = scale_of(columns, dense.float).map_err(place)?;
            *scale = found.to_le_bytes();
            for columns in columns.chunks_exact(groups.of) {
                let (mask, minus) = masks(columns, groups.keep, found == 0).map_err(place)?;
                positions.put(codes.rank(mask), codes.width);
                signs.put(minus, groups.keep);
            }
        }
    }
    Ok(parts)
}

/// The one magnitude of a block, as the bits of an F16.
fn scale_of<const SIZE: usize>(columns: &[[u8; SIZE]], float: Float) -> Checked<u16> {
    let numbers = columns.iter().filter(|bytes| **bytes != [0; SIZE]).map(|b| decode(b, float));
    let mut magnitudes = numbers.map(f32::abs);
    let Some(scale) = magnitudes.next() else { return Ok(0) };
    if let Some(other) = magnitudes.find(|other| *other != scale) {
        return Err(format!("expected one magnitude, found {scale} and {other}"));
    }
    if scale == 0.0 || !scale.is_finite() || Float::F16.round(scale) != scale {
        return Err(format!("expected a magnitude that F16 holds and not -0, found {scale}"));
    }
    Ok(Float::F16.to_bits(scale))
}

/// Columns that a group keeps, and the signs of these in order (1 is minus).
fn masks<const SIZE: usize>(
    columns: &[[u8; SIZE]],
    keep: usize,
    empty: bool,
) -> Checked<(u16, u16)> {
    if empty {
        return Ok(((1u16 << keep) - 1, 0));
    }
    let mask = keep_of::nonzero(columns);
    if mask.count_ones() as usize != keep {
        return Err(format!("expected {keep} non-zeros a group, found {}", mask.count_ones()));
    }
    let kept = columns.iter().filter(|bytes| **bytes != [0; SIZE]);
    let minus = kept.enumerate().map(|(i, bytes)| u16::from(bytes[SIZE - 1] >> 7) << i).sum();
    Ok((mask, minus))
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
    let codes = Codes::new(groups);
    let all = (1u16 << groups.keep) - 1; // what a group keeps where there are no positions
    let mut masks = vec![all; dense.cols / groups.of];
    let row_of = |part: &'_ [u8], row: usize| {
        let length = part.len() / dense.rows;
        row * length..(row + 1) * length
    };
    let (signs, scales) = (parts[parts.len() - 2], parts[parts.len() - 1]);
    for (row, out) in rows.zip(out.chunks_exact_mut(dense.row_bytes())) {
        if codes.width > 0 {
            let stream = &parts[0][row_of(parts[0], row)];
            codes.read_row(row, stream, &mut masks)?;
        }
        let mut signs = bits::Reader::new(&signs[row_of(signs, row)]);
        let scales = scales[row_of(scales, row)].as_chunks::<2>().0;
        let blocks = out.as_chunks_mut::<SIZE>().0.chunks_mut(SCALE_COLUMNS);
        let masks = masks.chunks(SCALE_COLUMNS / groups.of);
        for ((columns, masks), scale) in blocks.zip(masks).zip(scales) {
            let scale = read_scale(*scale, dense.float).map_err(|e| at("scales", row, e))?;
            let signed = [encode::<SIZE>(scale, dense.float), encode(-scale, dense.float)];
            for (columns, mask) in columns.chunks_exact_mut(groups.of).zip(masks) {
                let minus = signs.take(groups.keep);
                if scale > 0.0 {
                    sign(*mask, minus, &signed, columns);
                }
            }
        }
        spent("signs", row, &signs)?;
    }
    Ok(())
}

/// Refuses what `unpack` would.
pub fn validate(parts: &[&[u8]], dense: &Dense, groups: Groups) -> Result<()> {
    let codes = Codes::new(groups);
    let mut masks = vec![0; dense.cols / groups.of];
    let [.., signs, scales] = parts else { unreachable!("the layout has both") };
    let widths = [parts[0], signs, scales].map(|part| part.len() / dense.rows);
    for row in 0..dense.rows {
        let [stream, signs, scales] =
            [(parts[0], widths[0]), (signs, widths[1]), (scales, widths[2])]
                .map(|(part, width)| &part[row * width..][..width]);
        if codes.width > 0 {
            codes.read_row(row, stream, &mut masks)?;
        }
        for scale in scales.as_chunks::<2>().0 {
            read_scale(*scale, dense.float).map_err(|e| at("scales", row, e))?;
        }
        let mut reader = bits::Reader::new(signs);
        reader.skip(masks.len() * groups.keep);
        spent("signs", row, &reader)?;
    }
    Ok(())
}

/// Puts the scale with its signs where the bits of `mask` are.
fn sign<const SIZE: usize>(
    mut mask: u16,
    mut minus: u16,
    signed: &[[u8; SIZE]; 2],
    columns: &mut [[u8; SIZE]],
) {
    while mask != 0 {
        columns[mask.trailing_zeros() as usize] = signed[usize::from(minus & 1)];
        mask &= mask - 1;
        minus >>= 1;
    }
}

/// A stored scale, which the weight's type must hold as it is.
fn read_scale(bytes: [u8; 2], float: Float) -> Checked<f32> {
    let scale = Float::F16.from_bits(u16::from_le_bytes(bytes));
    if scale.is_finite() && !scale.is_sign_negative() && float.round(scale) == scale {
        return Ok(scale);
    }
    Err(format!("expected a finite number >= 0 that {} holds, found {scale}", float.name()))
}

fn decode<const SIZE: usize>(bytes: &[u8; SIZE], float: Float) -> f32 {
    match float {
        Float::F32 => f32::from_le_bytes(std::array::from_fn(|i| bytes[i])),
        _ => float.from_bits(u16::from_le_bytes([bytes[0], bytes[1]])),
    }
}

fn encode<const SIZE: usize>(value: f32, float: Float) -> [u8; SIZE] {
    match float {
        Float::F32 => std::array::from_fn(|i| value.to_le_bytes()[i]),
        _ => std::array::from_fn(|i| float.to_bits(value).to_le_bytes()[i]),
    }
}
