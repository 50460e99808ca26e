//! Many tokens: a panel of rows is decoded to f32, 256 columns at a time, for the dense product.

use super::input::{Order, padded};
use super::row::BLOCK;
use super::{Kind, Plane, Simd, too_few_values, transpose};
use crate::error::Result;
use crate::linalg::{PackedB, ROW_BLOCK, Scratch, gemm_add};
use crate::par::Job;
use std::ops::Range;

/// Tokens that are packed at once: as much as stays in L2 beside a panel of 256 columns.
pub(super) const TOKENS: usize = 1024;

/// Overwrites `out [rows, tokens]`.
pub(super) fn apply<S: Simd>(
    plane: &Plane,
    simd: S,
    job: &Job,
    parts: &[&[u8]],
    x: &[f32],
    out: &mut [f32],
) -> Result<()> {
    let cols = plane.dense.cols;
    let tokens = x.len() / cols;
    out.fill(0.0);
    for first in (0..tokens).step_by(TOKENS) {
        let some = first..tokens.min(first + TOKENS);
        let columns = columns(plane, simd, &x[some.start * cols..some.end * cols]);
        job.share_blocks(out, ROW_BLOCK * tokens, |block, out| {
            let first_row = block * ROW_BLOCK;
            let rows = first_row..first_row + out.len() / tokens;
            if some.len() == tokens {
                return panel(plane, simd, parts, rows, &columns, out);
            }
            let mut part = vec![0.0; rows.len() * some.len()];
            panel(plane, simd, parts, rows, &columns, &mut part)?;
            for (part, out) in part.chunks(some.len()).zip(out.chunks_mut(tokens)) {
                out[some.clone()].copy_from_slice(part);
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// `x^T [padded columns, tokens]`, columns in the order in which weights are decoded.
fn columns<S: Simd>(plane: &Plane, simd: S, x: &[f32]) -> PackedB {
    let cols = plane.dense.cols;
    let (width, tokens) = (padded(cols), x.len() / cols);
    let order = match plane.kind {
        Kind::Values { .. } => simd.order(plane.dense.float),
        Kind::Signs { .. } => Order::Natural,
    };
    let mut rows = vec![0.0; tokens * width];
    for (x, row) in x.chunks(cols).zip(rows.chunks_mut(width)) {
        order.arrange(x, row);
    }
    let mut columns = vec![0.0; width * tokens];
    transpose(&rows, width, &mut columns);
    PackedB::new(&plane.kernel, &columns, width, tokens, tokens)
}

/// Adds the products of some rows to `out [rows, tokens]`.
fn panel<S: Simd>(
    plane: &Plane,
    simd: S,
    parts: &[&[u8]],
    rows: Range<usize>,
    x: &PackedB,
    out: &mut [f32],
) -> Result<()> {
    let masks = plane.masks(simd, parts, rows.clone());
    let mut used = vec![0; rows.len()];
    let mut tile = vec![0.0; rows.len() * BLOCK];
    let mut scratch = Scratch::default();
    for block in 0..x.k.div_ceil(BLOCK) {
        let columns = block * BLOCK..x.k.min((block + 1) * BLOCK);
        for (r, weights) in tile.chunks_mut(BLOCK).enumerate() {
            let (row, weights) = (rows.start + r, &mut weights[..columns.len()]);
            match &plane.kind {
                Kind::Values { starts, .. } => {
                    let all = plane.values(starts, parts, row);
                    let float = plane.dense.float;
                    let part = all.from(columns.start, columns.len(), used[r], float);
                    let more = simd.expand_values(float, part, weights);
                    used[r] += more.ok_or_else(|| too_few_values(row))?;
                }
                Kind::Signs { .. } => {
                    let mask = masks.chunks(x.k / 8).nth(r);
                    simd.expand_signs(
                        plane.signs(parts, row, mask).from(block, columns.len()),
                        weights,
                    );
                }
            }
        }
        let weights = (&tile[..], rows.len(), BLOCK);
        gemm_add(&plane.kernel, &mut scratch, weights, x, columns, out);
    }
    Ok(())
}
