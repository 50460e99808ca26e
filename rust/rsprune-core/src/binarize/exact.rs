//! PBS2P's objective with exact compensation and decisions that are taken again (`pbs2p-exact`).
//!
//! ```text
//! min || (T - alpha c) R_bb ||^2 over alpha and c in {-1, 0, 1}^w, n of every m entries not zero
//!     T = W_b + F_b,  G = R_bb R_bb^T         exact compensation, see `sweep`
//!     c = sign(T), alpha = <cG, T> / cGc^T    dense
//!     M - N times: of every group goes the kept j of least change
//!                  2 alpha c_j ((T - alpha c) G)_j + alpha^2 G_jj;   alpha again
//!     once:        of every group the best of all its codes, the others fixed;   alpha again
//! ```
//! No mean, no second group: a sign a kept weight, its place, and one scale a row and 256 columns,
//! rounded so that it is exact in F16 and in the weight's type. Ours; the stepwise idea and the
//! objective are PBS2P's (arXiv 2502.01705).

use super::codes::CodeTable;
use super::sweep::{BlockSolver, Compensation, Sweep, run};
use super::{dense_of, groups_of};
use crate::error::Result;
use crate::float::Float;
use crate::linalg::dot;
use crate::pack::{Codes, Groups};
use crate::par::Job;
use crate::pattern::{Pattern, for_smallest};
use crate::solve::{Bits, Factor, Solution, Task};
use std::ops::Range;

/// Of what both half types hold.
pub(super) const LARGEST: f32 = 65280.0;

/// Columns of a row that share a scale.
pub const SCALE_COLUMNS: usize = 256;

/// How far the method goes; every stage includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Signs and places once and for all, compensation as published.
    Static,
    /// Exact compensation and metric.
    Compensated,
    /// Places by the exact change, one after another.
    Greedy,
    /// The best code of every group.
    Search,
}

/// Binarizes with the codes of the task's pattern (`2:8`, `8:8`, ...).
pub fn exact(job: &Job, task: &Task, damping: f64, stage: Stage) -> Result<Solution> {
    exact_from(job, task, &mut Factor::of(job, task, damping)?, stage)
}

/// The same with a factor at hand, which is left as it is unless compensation is as published.
pub(super) fn exact_from(
    job: &Job,
    task: &Task,
    factor: &mut Factor,
    stage: Stage,
) -> Result<Solution> {
    let (dense, groups) = (dense_of(task)?, groups_of(task.pattern)?);
    Pattern::KeepOf { keep: groups.keep, of: groups.of }.check("weight", dense.cols)?;
    let table = (stage == Stage::Search).then(|| CodeTable::new(groups));
    let solver = Solver { stage, groups, float: task.float, table };
    let (values, _) = run(job, factor, &solver)?;
    let mut solution = task.certify(job, values)?;
    let nominal = groups.keep as f64 / groups.of as f64;
    solution.certificate.bits = Some(Bits { exact: signs_bits(dense.cols, groups), nominal });
    Ok(solution)
}

/// Bits a weight of rows of `cols` as the format `signs n:m` stores them.
pub fn signs_bits(cols: usize, groups: Groups) -> f64 {
    let positions = (cols / groups.of * Codes::new(groups).width).div_ceil(8);
    let signs = (cols / groups.of * groups.keep).div_ceil(8);
    let scales = 2 * cols.div_ceil(SCALE_COLUMNS);
    8.0 * (positions + signs + scales) as f64 / cols.max(1) as f64
}

struct Solver {
    stage: Stage,
    groups: Groups,
    float: Float,
    table: Option<CodeTable>,
}

pub(super) struct Shared {
    pub width: usize,
    pub g: Vec<f32>,
    /// `R_jj`.
    diagonal: Vec<f32>,
    /// Of every group the energies of all codes.
    energies: Vec<Vec<f32>>,
}

impl BlockSolver for Solver {
    const WIDTH: usize = SCALE_COLUMNS;
    type Shared = Shared;
    type Found = ();

    fn compensation(&self) -> Compensation {
        if self.stage == Stage::Static { Compensation::Published } else { Compensation::Exact }
    }

    fn prepare(&self, job: &Job, sweep: &Sweep, block: &Range<usize>) -> Result<Shared> {
        Shared::new(job, sweep, block, self.table.as_ref())
    }

    #[inline]
    fn solve(&self, shared: &Shared, _: usize, values: &mut [f32]) {
        let mut row = Row::new(shared, values, self.groups);
        if self.stage < Stage::Greedy {
            row.keep_by_score(self.groups, values);
        } else {
            (self.groups.keep..self.groups.of).for_each(|_| row.drop_one(self.groups));
        }
        if let Some(table) = &self.table {
            row.search(table);
        }
        let alpha = scale(row.alpha, self.float);
        // Of a scale of zero no sign is left.
        let value = |c: f32| if c * alpha == 0.0 { 0.0 } else { c * alpha };
        values.iter_mut().zip(&row.c).for_each(|(v, c)| *v = value(*c));
    }
}

impl Shared {
    pub fn new(
        job: &Job,
        sweep: &Sweep,
        block: &Range<usize>,
        table: Option<&CodeTable>,
    ) -> Result<Shared> {
        let (g, width) = (sweep.metric(job, block)?, block.len());
        let energies = match table {
            Some(table) => {
                let of = table.of;
                job.map(width / of, |k| Ok(table.energies(&g, width, k * of..(k + 1) * of)))?
            }
            None => Vec::new(),
        };
        let diagonal = block.clone().map(|j| sweep.diagonal(j)).collect();
        Ok(Shared { width, g, diagonal, energies })
    }
}

/// `alpha` in F16 and then in the weight's type, so that it is exact in both.
fn scale(alpha: f32, float: Float) -> f32 {
    float.round(Float::F16.round(alpha.clamp(0.0, LARGEST)))
}

/// One row's block.
pub(super) struct Row<'a> {
    shared: &'a Shared,
    /// `T G`.
    pull: [f32; SCALE_COLUMNS],
    /// `c`.
    pub c: [f32; SCALE_COLUMNS],
    /// `c G`.
    push: [f32; SCALE_COLUMNS],
    alpha: f32,
}

impl<'a> Row<'a> {
    /// Dense signs.
    #[inline]
    pub fn new(shared: &'a Shared, target: &[f32], groups: Groups) -> Row<'a> {
        let zeros = [0.0; SCALE_COLUMNS];
        let mut row = Row { shared, pull: zeros, c: zeros, push: zeros, alpha: 0.0 };
        for (j, t) in target.iter().enumerate() {
            let metric = row.metric(j);
            add(&mut row.pull, *t, metric);
            row.change(j, if *t < 0.0 { -1.0 } else { 1.0 });
        }
        debug_assert!(shared.width.is_multiple_of(groups.of));
        row.refit();
        row
    }

    fn metric(&self, j: usize) -> &'a [f32] {
        &self.shared.g[j * self.shared.width..][..self.shared.width]
    }

    #[inline]
    fn change(&mut self, j: usize, to: f32) {
        let by = to - self.c[j];
        if by != 0.0 {
            let metric = self.metric(j);
            add(&mut self.push, by, metric);
            self.c[j] = to;
        }
    }

    /// The best scale of the present code; where it is below zero that of the opposite code.
    #[inline]
    fn refit(&mut self) {
        let w = self.shared.width;
        let (pull, energy) =
            (dot(&self.pull[..w], &self.c[..w]), dot(&self.push[..w], &self.c[..w]));
        self.alpha = if energy > 0.0 { (pull / energy) as f32 } else { 0.0 };
        if self.alpha < 0.0 {
            self.alpha = -self.alpha;
            self.c.iter_mut().chain(&mut self.push).for_each(|v| *v = -*v);
        }
    }

    /// Keeps in every group what is largest by `(w R_jj)^2`, the published second-order score.
    fn keep_by_score(&mut self, groups: Groups, target: &[f32]) {
        for first in (0..self.shared.width).step_by(groups.of) {
            let score = |j: usize| (target[j] * self.shared.diagonal[j]).abs();
            let scores: Vec<f32> = (first..first + groups.of).map(score).collect();
            for_smallest(&scores, groups.of - groups.keep, |j| self.change(first + j, 0.0));
        }
        self.refit();
    }

    /// Drops of every group the weight whose loss changes the objective least.
    #[inline]
    pub fn drop_one(&mut self, groups: Groups) {
        let (w, alpha) = (self.shared.width, self.alpha);
        for first in (0..w).step_by(groups.of) {
            let mut least = (f32::INFINITY, first);
            for j in first..first + groups.of {
                let slope = self.pull[j] - alpha * self.push[j];
                let change = 2.0 * self.c[j] * slope + alpha * self.shared.g[j * w + j];
                if self.c[j] != 0.0 && change < least.0 {
                    least = (change, j);
                }
            }
            self.change(least.1, 0.0);
        }
        self.refit();
    }

    /// Gives every group, one after another, the best of all its codes.
    #[inline]
    pub fn search(&mut self, table: &CodeTable) {
        let (w, of, alpha) = (self.shared.width, table.of, self.alpha);
        if alpha <= 0.0 {
            return; // a target of zeros
        }
        for (group, energies) in self.shared.energies.iter().enumerate() {
            let first = group * of;
            let mut pull = [0.0f32; 8];
            for (j, pull) in (first..first + of).zip(&mut pull) {
                let metric = &self.shared.g[j * w + first..][..of];
                let own: f32 = metric.iter().zip(&self.c[first..]).map(|(g, c)| g * c).sum();
                *pull = self.pull[j] - alpha * (self.push[j] - own);
            }
            let best = table.best(alpha, energies, &pull[..of]);
            (0..of).for_each(|j| self.change(first + j, table.entry(best, j)));
        }
        self.refit();
    }
}

/// `y += a x`.
#[inline]
fn add(y: &mut [f32; SCALE_COLUMNS], a: f32, x: &[f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += a * x);
}
