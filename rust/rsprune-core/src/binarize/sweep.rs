//! The sweep over blocks of columns that all methods share.
//!
//! With `H = R R^T` (R upper) and `E = T - V` the objective falls apart into blocks without loss:
//! ```text
//! tr(E H E^T) = sum_b || (E_b + F_b) R_bb ||^2,     F_b = (sum_{a<b} E_a R_ab) R_bb^-1
//! ```
//! *Exact* compensation therefore gives a block the target `T_b + F_b` and the metric
//! `R_bb R_bb^T`. *Published* compensation (BiLLM, ARB-LLM) is that of column-by-column solvers,
//! applied to blocks: with `U = R^-1`
//! ```text
//! T_later -= (E_b / diag(U_bb)) U_b,later,          metric H_bb
//! ```
//! which leaves out what the columns of a block would have told each other.

use crate::buffer::Buffer;
use crate::error::Result;
use crate::kernels::Kernel;
use crate::linalg::{PackedB, ROW_BLOCK, Scratch, dot, gemm, invert_upper};
use crate::par::Job;
use crate::solve::Factor;
use std::ops::Range;

/// How later columns make up for what a block has lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compensation {
    Exact,
    Published,
}

/// What a method does with one block.
pub(super) trait BlockSolver: Sync {
    /// Columns of a block.
    const WIDTH: usize;
    /// Whether it asks for [`Sweep::metric`]; as published that takes `n^3` operations.
    const READS_METRIC: bool = true;
    /// What all rows of a block share.
    type Shared: Sync;
    /// What a row's block leaves beside its values.
    type Found: Send;

    fn compensation(&self) -> Compensation;

    /// Looks at the targets of all rows of a block.
    fn prepare(&self, job: &Job, sweep: &Sweep, block: &Range<usize>) -> Result<Self::Shared>;

    /// Overwrites a row's target by its values, as they are stored.
    fn solve(&self, shared: &Self::Shared, row: usize, values: &mut [f32]) -> Self::Found;
}

pub(super) struct Sweep<'a> {
    pub kernel: Kernel,
    pub n: usize,
    compensation: Compensation,
    /// `R`, or `U` where compensation is as published.
    factor: &'a [f32],
    /// Diagonal blocks of the published metric, one behind the other: `U` does not tell them.
    metric: Vec<Vec<f32>>,
    width: usize,
    /// A row: `n` values (final left of the block, targets from there on), then `n` losses as the
    /// factor takes them.
    state: Buffer,
}

/// What a solver found in one block: what its rows share, and of every row.
pub(super) type Found<S> = (<S as BlockSolver>::Shared, Vec<<S as BlockSolver>::Found>);

/// Runs `solver` over all blocks: the values `[m, n]`, and what it found in every block.
///
/// Published compensation inverts the factor in place; exact compensation leaves it as it is.
pub(super) fn run<S: BlockSolver>(
    job: &Job,
    factor: &mut Factor,
    solver: &S,
) -> Result<(Buffer, Vec<Found<S>>)> {
    let n = factor.n;
    let mut sweep = Sweep::new::<S>(job, factor, solver.compensation())?;
    let mut found = Vec::new();
    for first in (0..n).step_by(S::WIDTH) {
        let block = first..(first + S::WIDTH).min(n);
        sweep.feed_back(job, &block)?;
        let shared = solver.prepare(job, &sweep, &block)?;
        let rows = sweep.solve(job, solver, &shared, &block)?;
        found.push((shared, rows));
    }
    let mut values = sweep.state;
    for row in 0..values.len() / (2 * n) {
        values.copy_within(2 * row * n..(2 * row + 1) * n, row * n);
    }
    values.truncate(values.len() / 2);
    Ok((values, found))
}

impl<'a> Sweep<'a> {
    fn new<S: BlockSolver>(
        job: &Job,
        factor: &'a mut Factor,
        compensation: Compensation,
    ) -> Result<Sweep<'a>> {
        let Factor { n, kernel, r, target } = factor;
        let (n, kernel, width) = (*n, *kernel, S::WIDTH);
        let published = compensation == Compensation::Published;
        let mut metrics = Vec::new();
        if published && S::READS_METRIC {
            for first in (0..n).step_by(width) {
                metrics.push(metric(job, r, n, first..(first + width).min(n), n)?);
            }
        }
        let mut state = job.zeros(2 * target.len())?;
        for (row, target) in state.chunks_exact_mut(2 * n).zip(target.chunks_exact(n)) {
            row[..n].copy_from_slice(target);
        }
        if published {
            invert_upper(job, &kernel, r, n)?;
        }
        Ok(Sweep { kernel, n, compensation, factor: r, metric: metrics, width, state })
    }

    pub fn rows(&self) -> usize {
        self.state.len() / (2 * self.n)
    }

    /// What a row's weights of the block have become by now.
    pub fn target(&self, row: usize, block: &Range<usize>) -> &[f32] {
        &self.state[2 * row * self.n..][block.clone()]
    }

    /// The block's metric `[width, width]`.
    pub fn metric(&self, job: &Job, block: &Range<usize>) -> Result<Vec<f32>> {
        match self.compensation {
            Compensation::Exact => metric(job, self.factor, self.n, block.clone(), block.end),
            Compensation::Published => Ok(self.metric[block.start / self.width].clone()),
        }
    }

    /// `R_jj`: its square is one over the diagonal of the remaining columns' `H^-1`.
    pub fn diagonal(&self, j: usize) -> f32 {
        let d = self.factor[j * self.n + j];
        if self.compensation == Compensation::Exact { d } else { 1.0 / d }
    }

    /// The factor's diagonal block, row-major.
    pub fn factor_block(&self, block: &Range<usize>) -> Vec<f32> {
        let rows = block.clone().flat_map(|i| &self.factor[i * self.n..][block.clone()]);
        rows.copied().collect()
    }

    /// Brings a block up to date with everything that was lost before it.
    fn feed_back(&mut self, job: &Job, block: &Range<usize>) -> Result<()> {
        if block.start == 0 {
            return Ok(());
        }
        let (n, w, kernel, exact) =
            (self.n, block.len(), self.kernel, self.compensation == Compensation::Exact);
        let own = self.factor_block(block);
        let packed =
            PackedB::shared(job, &kernel, &self.factor[block.start..], (block.start, w), n)?;
        job.map_blocks(&mut self.state, ROW_BLOCK * 2 * n, |_, state| {
            let rows = state.len() / (2 * n);
            let mut feedback = vec![0.0f32; rows * w];
            let losses = (&state[n..], rows, 2 * n);
            gemm(&kernel, &mut Scratch::default(), losses, &packed, &mut feedback);
            for (row, feedback) in state.chunks_exact_mut(2 * n).zip(feedback.chunks_exact_mut(w)) {
                if exact {
                    kernel.vectorised(|| solve_upper(&own, feedback));
                }
                let (values, losses) = row.split_at_mut(n);
                let places = values[block.clone()].iter_mut().zip(&mut losses[block.clone()]);
                for ((value, loss), feedback) in places.zip(&*feedback) {
                    // An exact loss is counted from the target without feedback.
                    (*value, *loss) = if exact {
                        (*value + feedback, -feedback)
                    } else {
                        (*value - feedback, 0.0)
                    };
                }
            }
            Ok(())
        })?;
        Ok(())
    }

    fn solve<S: BlockSolver>(
        &mut self,
        job: &Job,
        solver: &S,
        shared: &S::Shared,
        block: &Range<usize>,
    ) -> Result<Vec<S::Found>> {
        let (n, kernel) = (self.n, self.kernel);
        let weights: Vec<f32> = match self.compensation {
            Compensation::Exact => vec![1.0; block.len()],
            Compensation::Published => block.clone().map(|j| self.diagonal(j)).collect(),
        };
        let found = job.map_blocks(&mut self.state, ROW_BLOCK * 2 * n, |i, state| {
            let mut target = vec![0.0f32; block.len()];
            let rows = state.chunks_exact_mut(2 * n).enumerate();
            let solved = rows.map(|(k, row)| {
                let (values, losses) = row.split_at_mut(n);
                let (values, losses) = (&mut values[block.clone()], &mut losses[block.clone()]);
                target.copy_from_slice(values);
                let found =
                    kernel.vectorised(|| solver.solve(shared, i * ROW_BLOCK + k, &mut *values));
                let pairs = target.iter().zip(&*values).zip(&weights);
                losses.iter_mut().zip(pairs).for_each(|(l, ((t, v), w))| *l += (t - v) * w);
                found
            });
            Ok(solved.collect::<Vec<_>>())
        })?;
        Ok(found.into_iter().flatten().collect())
    }
}

/// The metric of a block: `R_bb R_bb^T`, or with `last = n` the published `H_bb`, the same with all
/// later columns of `R`.
fn metric(job: &Job, r: &[f32], n: usize, block: Range<usize>, last: usize) -> Result<Vec<f32>> {
    let (w, first) = (block.len(), block.start);
    let row = |i: usize| &r[(first + i) * n..][..last];
    // R is zero left of its diagonal.
    let rows = job.map(w, |i| {
        Ok((0..=i).map(|j| dot(&row(i)[first + i..], &row(j)[first + i..]) as f32).collect())
    })?;
    let mut out = vec![0.0f32; w * w];
    for (i, row) in rows.iter().enumerate() {
        let row: &Vec<f32> = row;
        for (j, value) in row.iter().enumerate() {
            (out[i * w + j], out[j * w + i]) = (*value, *value);
        }
    }
    Ok(out)
}

/// `z R = y` in place, for upper triangular `r`.
#[inline]
fn solve_upper(r: &[f32], y: &mut [f32]) {
    let w = y.len();
    for j in 0..w {
        let z = y[j] / r[j * w + j];
        y[j] = z;
        y[j + 1..].iter_mut().zip(&r[j * w + j + 1..(j + 1) * w]).for_each(|(y, r)| *y -= z * r);
    }
}
