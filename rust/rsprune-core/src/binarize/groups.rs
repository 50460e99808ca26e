//! Salient columns and two magnitude groups, as BiLLM (arXiv 2402.04291) divides a block.
//!
//! ```text
//! salient    the columns of largest sum over rows of w^2 / [H^-1]_jj^2, as many as lower the error most
//! ordinary   two groups of weights, |w| at most or above a split that lowers the error most
//! ```
//! The candidates for both numbers, and that a split is shared by all rows, are reconstructed.

use super::sweep::Sweep;
use crate::error::Result;
use crate::float::Float;
use crate::linalg::ROW_BLOCK;
use crate::pack::binary::{BLOCK, Decisions, KEPT, Levels, MINUS, SECOND};
use crate::par::Job;
use std::ops::Range;

const SALIENT: [usize; 7] = [0, 1, 2, 4, 8, 16, 32];
const SPLITS: [f32; 9] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9];

/// How a block is divided.
#[derive(Clone)]
pub(super) struct Division {
    pub salient: [bool; BLOCK],
    split: f32,
}

/// A row's block: codes of its columns and what they stand for.
pub(super) struct Coded {
    pub codes: [u8; BLOCK],
    pub levels: Levels,
}

impl Division {
    /// The division of a block by what its weights have become by now.
    pub fn of(job: &Job, sweep: &Sweep, block: &Range<usize>) -> Result<Division> {
        let order = by_score(job, sweep, block)?;
        let largest = by_row(job, sweep, block, |target| f64::from(peak(target)))?;
        let largest = largest.iter().copied().fold(0.0, f64::max) as f32;
        let mut best = (f64::INFINITY, Division { salient: [false; BLOCK], split: largest });
        let mut try_out = |division: Division| -> Result<Division> {
            let parts = by_row(job, sweep, block, |target| {
                f64::from(squared(target, &binarized(target, &division), &division))
            })?;
            let error = parts.iter().sum::<f64>();
            if error < best.0 {
                best = (error, division);
            }
            Ok(best.1.clone())
        };
        let mut found = try_out(Division { salient: [false; BLOCK], split: largest })?;
        for count in SALIENT.into_iter().filter(|count| *count < block.len()) {
            let mut salient = [false; BLOCK];
            order[..count].iter().for_each(|j| salient[*j] = true);
            found = try_out(Division { salient, split: largest })?;
        }
        let salient = found.salient;
        for share in SPLITS {
            found = try_out(Division { salient, split: share * largest })?;
        }
        Ok(found)
    }

    /// The magnitude group of an ordinary weight.
    pub fn group(&self, weight: f32) -> usize {
        usize::from(weight.abs() > self.split)
    }

    /// Which levels a weight has: 0 and 1 are the groups, 2 is salient.
    pub fn part(&self, j: usize, weight: f32) -> usize {
        if self.salient[j] { 2 } else { self.group(weight) }
    }
}

/// Of every part its mean, the mean deviation from it, and signs; of salient columns once more of
/// what is left.
#[inline]
pub(super) fn binarized(target: &[f32], division: &Division) -> Coded {
    let mut codes = [KEPT; BLOCK];
    let (mut sums, mut counts) = ([0.0f32; 3], [0.0f32; 3]);
    for (j, t) in target.iter().enumerate() {
        let part = division.part(j, *t);
        sums[part] += t;
        counts[part] += 1.0;
    }
    let average = |sum: f32, count: f32| if count > 0.0 { sum / count } else { 0.0 };
    let means: [f32; 3] = std::array::from_fn(|p| average(sums[p], counts[p]));
    let mut deviations = [0.0f32; 3];
    for (j, t) in target.iter().enumerate() {
        let part = division.part(j, *t);
        deviations[part] += (t - means[part]).abs();
        codes[j] |= if *t < means[part] { MINUS } else { 0 };
        codes[j] |= if part == 1 { SECOND } else { 0 };
    }
    let scale = |p: usize| average(deviations[p], counts[p]);
    let mut levels = Levels { scales: [scale(0), scale(1), scale(2), 0.0], means };
    let mut left = 0.0;
    for (j, t) in target.iter().enumerate().filter(|(j, _)| division.salient[*j]) {
        let residual = t - levels.value(codes[j], true);
        left += residual.abs();
        codes[j] |= if residual < 0.0 { SECOND } else { 0 };
    }
    levels.scales[3] = average(left, counts[2]);
    Coded { codes, levels }
}

impl Coded {
    /// Rounds the levels to F16, and gives the values in the weight's type.
    #[inline]
    pub fn store(&mut self, division: &Division, float: Float, values: &mut [f32]) {
        const LARGEST: f32 = 65504.0;
        let round = |v: &mut f32| *v = Float::F16.round(v.clamp(-LARGEST, LARGEST));
        self.levels.scales.iter_mut().for_each(round);
        self.levels.means.iter_mut().for_each(round);
        for (j, value) in values.iter_mut().enumerate() {
            let stored = float.round(self.levels.value(self.codes[j], division.salient[j]));
            *value = if stored == 0.0 { 0.0 } else { stored };
        }
    }
}

/// All blocks together, as the format takes them, and how many signs they hold.
pub(super) fn decisions(
    found: &[(Division, Vec<Coded>)],
    rows: usize,
    cols: usize,
) -> (Decisions, usize) {
    let blocks = found.len();
    let (mut codes, mut levels, mut salient) =
        (Vec::with_capacity(rows * cols), Vec::with_capacity(rows * blocks), Vec::new());
    for row in 0..rows {
        for (block, (_, coded)) in found.iter().enumerate() {
            codes.extend(&coded[row].codes[..BLOCK.min(cols - block * BLOCK)]);
            levels.push(coded[row].levels);
        }
    }
    for (block, (division, _)) in found.iter().enumerate() {
        salient.extend(&division.salient[..BLOCK.min(cols - block * BLOCK)]);
    }
    let signs =
        |(i, code): (usize, &u8)| usize::from(code & KEPT) << usize::from(salient[i % cols]);
    let signs = codes.iter().enumerate().map(signs).sum();
    (Decisions { codes, salient, levels }, signs)
}

/// The block's columns, largest sum over rows of `(w R_jj)^2` first.
fn by_score(job: &Job, sweep: &Sweep, block: &Range<usize>) -> Result<Vec<usize>> {
    let parts = job.map(sweep.rows().div_ceil(ROW_BLOCK), |i| {
        let mut sums = [0.0f64; BLOCK];
        for row in i * ROW_BLOCK..((i + 1) * ROW_BLOCK).min(sweep.rows()) {
            let squares = sweep.target(row, block).iter().map(|t| f64::from(t * t));
            sums.iter_mut().zip(squares).for_each(|(sum, square)| *sum += square);
        }
        Ok(sums)
    })?;
    let score = |j: usize| {
        let diagonal = f64::from(sweep.diagonal(block.start + j));
        parts.iter().map(|sums| sums[j]).sum::<f64>() * diagonal * diagonal
    };
    let scores: Vec<f64> = (0..block.len()).map(score).collect();
    let mut order: Vec<usize> = (0..block.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    Ok(order)
}

/// `f` of every row, in order.
fn by_row(
    job: &Job,
    sweep: &Sweep,
    block: &Range<usize>,
    f: impl Fn(&[f32]) -> f64 + Sync,
) -> Result<Vec<f64>> {
    job.map(sweep.rows(), |row| Ok(sweep.kernel.vectorised(|| f(sweep.target(row, block)))))
}

#[inline]
fn peak(target: &[f32]) -> f32 {
    target.iter().fold(0.0, |largest, t| t.abs().max(largest))
}

#[inline]
fn squared(target: &[f32], coded: &Coded, division: &Division) -> f32 {
    let places = target.iter().zip(coded.codes).zip(division.salient);
    places.map(|((t, code), salient)| (t - coded.levels.value(code, salient)).powi(2)).sum()
}
