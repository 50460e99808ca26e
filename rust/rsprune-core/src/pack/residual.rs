#![doc = include_str!("residual.md")]

use super::{Dense, Groups, Part, check_parts, signs, store};
use crate::error::Result;
use crate::float::Float;
use std::ops::Range;

/// The first of the two: every column is kept.
pub const FIRST: Groups = Groups { keep: 8, of: 8 };

/// Signs and scales; there are no positions where every column is kept.
pub const FIRST_PARTS: usize = 2;

/// The parts of a weight: those of both planes.
pub fn layout(dense: &Dense, groups: Groups) -> Result<Vec<Part>> {
    let plane = plane_of(dense);
    let mut parts = signs::layout(&plane, FIRST)?;
    for part in signs::layout(&plane, groups)? {
        let name = match part.name {
            "positions" => "residual_positions",
            "signs" => "residual_signs",
            _ => "residual_scales",
        };
        parts.push(Part { name, ..part });
    }
    Ok(parts)
}

/// Packs two planes `[rows, cols]`, each of one magnitude a row and 256 columns.
///
/// # Errors
/// A plane that the format `signs` does not hold.
pub fn pack(planes: [&[f32]; 2], dense: &Dense, groups: Groups) -> Result<Vec<Vec<u8>>> {
    let mut parts = Vec::new();
    for (plane, groups) in planes.into_iter().zip([FIRST, groups]) {
        let bytes: Vec<u8> = plane.iter().flat_map(|v| v.to_le_bytes()).collect();
        parts.extend(signs::pack(&bytes, &plane_of(dense), groups)?);
    }
    Ok(parts)
}

/// What a weight is, from one of each plane, before it is rounded to its type.
pub fn value(first: f32, second: f32) -> f32 {
    first + second
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
    check_parts(parts, &layout(dense, groups)?)?;
    let (first, second) = parts.split_at(FIRST_PARTS);
    let mut planes = [vec![0; 4 * dense.cols], vec![0; 4 * dense.cols]];
    for (row, out) in rows.zip(out.chunks_exact_mut(dense.row_bytes())) {
        let [one, two] = &mut planes;
        signs::unpack(first, &plane_of(dense), FIRST, row..row + 1, one)?;
        signs::unpack(second, &plane_of(dense), groups, row..row + 1, two)?;
        let pairs = one.as_chunks::<4>().0.iter().zip(two.as_chunks::<4>().0);
        for ((one, two), out) in pairs.zip(out.chunks_exact_mut(dense.float.size())) {
            let sum = value(f32::from_le_bytes(*one), f32::from_le_bytes(*two));
            store(dense.float, sum, out);
        }
    }
    Ok(())
}

/// Refuses what [`unpack`] would.
///
/// # Errors
/// As of either plane.
pub fn validate(parts: &[&[u8]], dense: &Dense, groups: Groups) -> Result<()> {
    let (first, second) = parts.split_at(FIRST_PARTS);
    signs::validate(first, &plane_of(dense), FIRST)?;
    signs::validate(second, &plane_of(dense), groups)
}

/// A plane's numbers are exact in F16; only their sum is rounded to the weight's type.
fn plane_of(dense: &Dense) -> Dense {
    Dense { float: Float::F32, ..*dense }
}
