#![doc = include_str!("binary.md")]

use super::{Codes, bits, spent};
use super::{Dense, Element, Groups, Part, check_columns, check_finite, check_parts, half, store};
use crate::error::{Error, Result};
use crate::float::Float;
use std::ops::Range;

/// Columns that share their levels.
pub const BLOCK: usize = 128;
/// Scales of a row's block: of the two magnitude groups, of salient columns, of their residual.
pub const SCALES: usize = 4;
/// Means of a row's block: of the two magnitude groups, and of salient columns.
pub const MEANS: usize = 3;

/// A weight that is stored.
pub const KEPT: u8 = 1;
/// Its sign is minus.
pub const MINUS: u8 = 2;
/// It is of the second magnitude group; in a salient column: the residual's sign is minus.
pub const SECOND: u8 = 4;

/// What a solver decided, before it is packed.
pub struct Decisions {
    /// [`KEPT`], [`MINUS`] and [`SECOND`] of every weight `[rows, cols]`.
    pub codes: Vec<u8>,
    /// Whether a column is salient `[cols]`.
    pub salient: Vec<bool>,
    /// Levels of every block of a row `[rows, blocks]`.
    pub levels: Vec<Levels>,
}

/// The numbers that a block's codes stand for, all exact in F16.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Levels {
    /// See [`SCALES`].
    pub scales: [f32; SCALES],
    /// See [`MEANS`].
    pub means: [f32; MEANS],
}

impl Levels {
    /// What a weight is, before it is rounded to its type.
    pub fn value(&self, code: u8, salient: bool) -> f32 {
        let signed = |bit: u8, scale: f32| if code & bit == 0 { scale } else { -scale };
        let (scales, means) = (&self.scales, &self.means);
        if code & KEPT == 0 {
            0.0
        } else if salient {
            means[2] + signed(MINUS, scales[2]) + signed(SECOND, scales[3])
        } else {
            let group = usize::from(code & SECOND != 0);
            means[group] + signed(MINUS, scales[group])
        }
    }
}

/// The parts of a weight.
pub fn layout(dense: &Dense, groups: Groups) -> Result<Vec<Part>> {
    check_columns(dense, groups)?;
    let blocks = dense.cols.div_ceil(BLOCK);
    let (rows, half) = (Some(dense.rows), Element::Float(Float::F16));
    let row = |items: Option<usize>| items.and_then(|n| bits::row_bytes(n, 1));
    let mut parts = Vec::new();
    if groups.keep < groups.of {
        let bytes = groups.row_bytes(dense.cols, Codes::new(groups).width);
        parts.push(Part::new("positions", Element::Byte, &[rows, bytes])?);
    }
    let kept = row(groups.kept(dense.cols));
    parts.push(Part::new("signs", Element::Byte, &[rows, kept])?);
    parts.push(Part::new("second", Element::Byte, &[rows, kept])?);
    parts.push(Part::new("salient", Element::Byte, &[Some(blocks), Some(BLOCK / 8)])?);
    parts.push(Part::new("scales", half, &[rows, Some(blocks), Some(SCALES)])?);
    parts.push(Part::new("means", half, &[rows, Some(blocks), Some(MEANS)])?);
    Ok(parts)
}

/// Packs what a solver decided: the bytes of every part of the layout.
pub fn pack(found: &Decisions, dense: &Dense, groups: Groups) -> Result<Vec<Vec<u8>>> {
    let layout = layout(dense, groups)?;
    let mut parts: Vec<Vec<u8>> = layout.iter().map(|part| vec![0; part.nbytes]).collect();
    if groups.keep < groups.of {
        pack_positions(found, dense, groups, &mut parts[0]);
    }
    let first = parts.len() - 5;
    for (part, bit) in [(first, MINUS), (first + 1, SECOND)] {
        let row_bytes = layout[part].shape[1];
        let rows = parts[part].chunks_exact_mut(row_bytes.max(1));
        for (row, codes) in rows.zip(found.codes.chunks_exact(dense.cols)) {
            let mut writer = bits::Writer::new(row);
            let kept = codes.iter().filter(|code| **code & KEPT != 0);
            kept.for_each(|code| writer.put(u16::from(code & bit != 0), 1));
        }
    }
    for (column, _) in found.salient.iter().enumerate().filter(|(_, salient)| **salient) {
        parts[first + 2][column / 8] |= 1 << (column % 8);
    }
    let halves = |values: &[f32]| -> Vec<u8> {
        values.iter().flat_map(|v| Float::F16.to_bits(*v).to_le_bytes()).collect()
    };
    parts[first + 3] = found.levels.iter().flat_map(|l| halves(&l.scales)).collect();
    parts[first + 4] = found.levels.iter().flat_map(|l| halves(&l.means)).collect();
    Ok(parts)
}

fn pack_positions(found: &Decisions, dense: &Dense, groups: Groups, out: &mut [u8]) {
    let table = Codes::new(groups);
    let row_bytes = out.len() / dense.rows;
    for (row, codes) in out.chunks_exact_mut(row_bytes).zip(found.codes.chunks_exact(dense.cols)) {
        let mut writer = bits::Writer::new(row);
        for group in codes.chunks_exact(groups.of) {
            let bit = |(j, code): (usize, &u8)| u16::from(code & KEPT) << j;
            let mask = group.iter().enumerate().map(bit).fold(0, |mask, bit| mask | bit);
            writer.put(table.rank(mask), table.width);
        }
    }
}

/// Unpacks some rows into `out`, which holds just these rows.
///
/// # Errors
/// The parts are not what [`pack`] makes; other rows are not looked at.
pub fn unpack(
    parts: &[&[u8]],
    dense: &Dense,
    groups: Groups,
    rows: Range<usize>,
    out: &mut [u8],
) -> Result<()> {
    let layout = layout(dense, groups)?;
    check_parts(parts, &layout)?;
    let first = parts.len() - 5;
    let (signs, second) = (parts[first], parts[first + 1]);
    let (salient, scales, means) = (parts[first + 2], parts[first + 3], parts[first + 4]);
    check_salient(salient, dense.cols)?;
    check_finite("scales", scales)?;
    check_finite("means", means)?;
    let (table, row_bytes) = (Codes::new(groups), layout[first].shape[1]);
    let mut masks = vec![u16::MAX; dense.cols / groups.of];
    for (row, out) in rows.zip(out.chunks_exact_mut(dense.row_bytes())) {
        if first == 1 {
            let width = layout[0].shape[1];
            table.read_row(row, &parts[0][row * width..(row + 1) * width], &mut masks)?;
        }
        let stream = |part: &'static str, bytes: &[u8]| -> Result<Vec<bool>> {
            let mut reader = bits::Reader::new(&bytes[row * row_bytes..(row + 1) * row_bytes]);
            let kept = groups.keep * masks.len();
            let found = (0..kept).map(|_| reader.take(1) == 1).collect();
            spent(part, row, &reader)?;
            Ok(found)
        };
        let decided = stream("signs", signs)?.into_iter().zip(stream("second", second)?);
        let levels = |block| levels(scales, means, row * dense.cols.div_ceil(BLOCK) + block);
        unpack_row(&masks, groups.of, decided, salient, levels, (dense.float, out));
    }
    Ok(())
}

fn unpack_row(
    masks: &[u16],
    of: usize,
    mut decided: impl Iterator<Item = (bool, bool)>,
    salient: &[u8],
    levels: impl Fn(usize) -> Levels,
    (float, out): (Float, &mut [u8]),
) {
    let mut block = levels(0);
    for (column, out) in out.chunks_exact_mut(float.size()).enumerate() {
        if column.is_multiple_of(BLOCK) {
            block = levels(column / BLOCK);
        }
        let kept = masks[column / of] >> (column % of) & 1 == 1;
        let code = match kept.then(|| decided.next()).flatten() {
            Some((minus, second)) => KEPT + u8::from(minus) * MINUS + u8::from(second) * SECOND,
            None => 0,
        };
        store(float, block.value(code, salient[column / 8] >> (column % 8) & 1 == 1), out);
    }
}

fn levels(scales: &[u8], means: &[u8], block: usize) -> Levels {
    Levels {
        scales: std::array::from_fn(|k| half(scales, block * SCALES + k)),
        means: std::array::from_fn(|k| half(means, block * MEANS + k)),
    }
}

fn check_salient(salient: &[u8], cols: usize) -> Result<()> {
    let mut reader = bits::Reader::new(salient);
    (0..cols).for_each(|_| {
        reader.take(1);
    });
    if reader.is_spent() {
        return Ok(());
    }
    let reason = format!("expected zero bits from column {cols} on, found ones");
    Err(Error::Packed { part: "salient", reason })
}
