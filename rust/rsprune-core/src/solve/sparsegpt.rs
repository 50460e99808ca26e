//! SparseGPT (arXiv 2301.00774): prune column by column, let later columns make up for it.
//!
//! With `H = G + damping * mean(diag G) I = R R^T` (R upper) and `D = W - V` the loop is
//! ```text
//! for each column j:  t_j = w_j + (sum_{a<j} D_a R_aj) / R_jj     what w_j has become by now
//!                     score = (t_j R_jj)^2;   v_j = t_j or 0;     D_j = w_j - v_j
//! ```
//! the published update without any inverse (`U = R^-1`, `[H^-1]_jj` of the remaining columns is
//! `1 / R_jj^2`). Masks are chosen as published: of every group when its first column is reached
//! (keep-of), of every 128 columns when the block is reached (ratios; over all rows, or per row).
//! A ratio's blocks take what is due up to their end, so that the whole has it exactly: rounded one
//! by one, 33 % of 576 columns left a zero too few.

use super::factor::Factor;
use super::{Solution, Task};
use crate::buffer::Buffer;
use crate::error::Result;
use crate::kernels::Kernel;
use crate::linalg::{PackedB, ROW_BLOCK, Scratch, gemm};
use crate::par::Job;
use crate::pattern::{Pattern, Scope, for_smallest};

const BLOCK: usize = 128;

/// SparseGPT with relative `damping` (published: 0.01).
pub fn sparsegpt(job: &Job, task: &Task, damping: f64) -> Result<Solution> {
    let values = sparsegpt_point(job, task.pattern, &Factor::of(job, task, damping)?)?;
    task.certify(job, values)
}

/// SparseGPT's point, not yet rounded: also the warm start of other methods.
pub(super) fn sparsegpt_point(job: &Job, pattern: Pattern, factor: &Factor) -> Result<Buffer> {
    let Factor { kernel, n, r, target } = factor;
    let mut sweep = Sweep { n: *n, kernel, r, target, values: job.copy(target)? };
    for block in (0..*n).step_by(BLOCK) {
        let end = (block + BLOCK).min(*n);
        sweep.feed_back(job, block, end)?;
        sweep.prune_block(job, pattern, block, end)?;
    }
    Ok(sweep.values)
}

struct Sweep<'a> {
    n: usize,
    kernel: &'a Kernel,
    r: &'a [f32],
    target: &'a [f32],
    /// Final left of the current block; in it, the weights as they have become by now.
    values: Buffer,
}

impl Sweep<'_> {
    /// Brings columns `b0..b1` up to date with everything that was pruned before them.
    fn feed_back(&mut self, job: &Job, b0: usize, b1: usize) -> Result<()> {
        if b0 == 0 {
            return Ok(());
        }
        let (n, r, target, w) = (self.n, self.r, self.target, b1 - b0);
        let kernel = self.kernel;
        let packed = PackedB::shared(job, kernel, &r[b0..], (b0, w), n)?;
        job.map_blocks(&mut self.values, ROW_BLOCK * n, |i, values| {
            let rows = values.len() / n;
            let target = &target[i * ROW_BLOCK * n..];
            let mut lost = vec![0.0f32; rows * b0];
            for row in 0..rows {
                for j in 0..b0 {
                    lost[row * b0 + j] = target[row * n + j] - values[row * n + j];
                }
            }
            let mut feedback = vec![0.0f32; rows * w];
            let left = (&lost[..], rows, b0);
            gemm(kernel, &mut Scratch::default(), left, &packed, &mut feedback);
            for row in 0..rows {
                for j in 0..w {
                    values[row * n + b0 + j] += feedback[row * w + j] / r[(b0 + j) * n + b0 + j];
                }
            }
            Ok(())
        })?;
        Ok(())
    }

    fn prune_block(&mut self, job: &Job, pattern: Pattern, b0: usize, b1: usize) -> Result<()> {
        let (n, kernel, r, target) = (self.n, self.kernel, self.r, self.target);
        let shared = match pattern {
            Pattern::Ratio { sparsity, scope: Scope::Matrix } => {
                Some(self.block_mask(job, sparsity, b0, b1)?)
            }
            _ => None,
        };
        job.map_blocks(&mut self.values, ROW_BLOCK * n, |i, values| {
            for (k, row) in values.chunks_exact_mut(n).enumerate() {
                let at = i * ROW_BLOCK + k;
                let mask = shared.as_ref().map(|m| &m[at * (b1 - b0)..(at + 1) * (b1 - b0)]);
                let target = &target[at * n..(at + 1) * n];
                kernel.vectorised(|| prune_row(row, target, r, (b0, b1), pattern, mask));
            }
            Ok(())
        })?;
        Ok(())
    }

    /// Which weights of the block go (true), chosen over all rows together.
    fn block_mask(&self, job: &Job, sparsity: f64, b0: usize, b1: usize) -> Result<Vec<bool>> {
        let (n, w) = (self.n, b1 - b0);
        let mut scores = vec![0.0f32; self.values.len() / n * w];
        job.map_blocks(&mut scores, ROW_BLOCK * w, |i, scores| {
            for (k, scores) in scores.chunks_exact_mut(w).enumerate() {
                let at = (i * ROW_BLOCK + k) * n;
                let (row, target) = (&self.values[at..at + n], &self.target[at..at + n]);
                unit_scores(row, target, self.r, (b0, b0), &[0.0; BLOCK], scores);
            }
            Ok(())
        })?;
        let mut mask = vec![false; scores.len()];
        let rows = scores.len() / w;
        let zeros = Pattern::zeros_between(sparsity, rows * b0, rows * b1);
        for_smallest(&scores, zeros, |i| mask[i] = true);
        Ok(mask)
    }
}

/// Scores of the columns `first..first + scores.len()` of block `b0`, all as they stand when
/// `first` is reached.
///
/// A column's value then includes what the columns before it pass on while nothing of the unit is
/// pruned yet; in terms of `R` those pass on the change that they underwent themselves.
#[inline]
fn unit_scores(
    row: &[f32],
    target: &[f32],
    r: &[f32],
    (b0, first): (usize, usize),
    pending: &[f32; BLOCK],
    scores: &mut [f32],
) {
    let (n, last) = (row.len(), first + scores.len());
    let mut sums = *pending;
    for (c, score) in (first..last).zip(scores) {
        let now = row[c] + sums[c - b0] / r[c * n + c];
        *score = (now * r[c * n + c]).abs();
        let moved = target[c] - now;
        let later = &mut sums[c + 1 - b0..last - b0];
        later.iter_mut().zip(&r[c * n + c + 1..]).for_each(|(s, r)| *s += moved * r);
    }
}

/// Prunes one block of one row, feeding each loss to the later columns of the block.
#[inline]
fn prune_row(
    row: &mut [f32],
    target: &[f32],
    r: &[f32],
    (b0, b1): (usize, usize),
    pattern: Pattern,
    shared: Option<&[bool]>,
) {
    let n = row.len();
    let diagonal = |j: usize| r[j * n + j];
    let mut goes = [false; BLOCK];
    let mut pending = [0.0f32; BLOCK]; // sum of D_a R_aj over this block's a < j
    let unit = match pattern {
        Pattern::KeepOf { of, .. } => of,
        Pattern::Ratio { .. } => b1 - b0,
    };
    if let Some(mask) = shared {
        goes[..mask.len()].copy_from_slice(mask);
    }
    for j in b0..b1 {
        if shared.is_none() && (j - b0).is_multiple_of(unit) {
            let mut scores = [0.0f32; BLOCK];
            unit_scores(row, target, r, (b0, j), &pending, &mut scores[..unit]);
            let zeros = match pattern {
                Pattern::KeepOf { keep, of } => of - keep,
                Pattern::Ratio { sparsity, .. } => Pattern::zeros_between(sparsity, b0, b1),
            };
            for_smallest(&scores[..unit], zeros, |i| goes[j - b0 + i] = true);
        }
        row[j] = if goes[j - b0] { 0.0 } else { row[j] + pending[j - b0] / diagonal(j) };
        let lost = target[j] - row[j];
        if lost != 0.0 {
            let r_row = &r[j * n + j + 1..j * n + b1];
            let later = &mut pending[j + 1 - b0..b1 - b0];
            later.iter_mut().zip(r_row).for_each(|(p, r)| *p += lost * r);
        }
    }
}
