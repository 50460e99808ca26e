//! Two planes of signs for budgets above one plane's 1.44 bits (`pbs2p-exact`).
//!
//! ```text
//! min || (T - alpha c - beta d) R_bb ||^2,    c in {-1, 1}^w,  d in {-1, 0, 1}^w with n of every m
//!     c for T, d for T - alpha c, then c for T - beta d, d for T - alpha c     each as in `exact`
//!     alpha and beta together, by their two normal equations, after every step
//! ```
//! Of the steps the one with the least objective counts. Ours; BiLLM gives a second sign to whole
//! salient columns (arXiv 2402.04291), here every group gives it to the weights that gain most.

use super::codes::CodeTable;
use super::exact::{LARGEST, Row, SCALE_COLUMNS, Shared};
use super::sweep::{BlockSolver, Compensation, Found, Sweep, run};
use super::{Packed, certify, dense_of, groups_of};
use crate::error::Result;
use crate::float::Float;
use crate::linalg::dot;
use crate::pack::residual::{self, FIRST};
use crate::pack::{Dense, Groups};
use crate::par::Job;
use crate::pattern::Pattern;
use crate::solve::{Factor, Task};
use std::ops::Range;

/// How often both planes are chosen.
const ROUNDS: usize = 2;

/// Binarizes with dense signs and, on top of them, the codes of the task's pattern.
pub fn exact_residual(job: &Job, task: &Task, damping: f64) -> Result<Packed> {
    residual_from(job, task, &mut Factor::of(job, task, damping)?)
}

/// The same with a factor at hand, which is left as it is.
pub(super) fn residual_from(job: &Job, task: &Task, factor: &mut Factor) -> Result<Packed> {
    let (dense, groups) = (dense_of(task)?, groups_of(task.pattern)?);
    let whole = Pattern::KeepOf { keep: FIRST.keep, of: FIRST.of };
    whole.check("weight", dense.cols)?;
    let tables = [FIRST, groups].map(CodeTable::new);
    let solver = Solver { groups, float: task.float, tables };
    let (values, found) = run(job, factor, &solver)?;
    let format = format!("residual {}:{}", groups.keep, groups.of);
    let packed = (format, residual::layout(&dense, groups)?, parts(&found, &dense, groups)?);
    let nominal = 1.0 + groups.keep as f64 / groups.of as f64;
    let task = Task { pattern: whole, ..*task }; // no weight is pruned
    certify(job, &task, values, packed, nominal)
}

struct Solver {
    groups: Groups,
    float: Float,
    tables: [CodeTable; 2],
}

/// Both planes of a row's block.
#[derive(Clone)]
struct Planes {
    codes: [[i8; SCALE_COLUMNS]; 2],
    scales: [f32; 2],
}

impl BlockSolver for Solver {
    const WIDTH: usize = SCALE_COLUMNS;
    type Shared = [Shared; 2];
    type Found = Planes;

    fn compensation(&self) -> Compensation {
        Compensation::Exact
    }

    fn prepare(&self, job: &Job, sweep: &Sweep, block: &Range<usize>) -> Result<[Shared; 2]> {
        let [first, second] = &self.tables;
        Ok([
            Shared::new(job, sweep, block, Some(first))?,
            Shared::new(job, sweep, block, Some(second))?,
        ])
    }

    #[inline]
    fn solve(&self, shared: &[Shared; 2], _: usize, values: &mut [f32]) -> Planes {
        let found = self.planes(shared, values);
        for (j, value) in values.iter_mut().enumerate() {
            let stored = self.float.round(residual::value(found.at(0, j), found.at(1, j)));
            *value = if stored == 0.0 { 0.0 } else { stored };
        }
        found
    }
}

impl Solver {
    #[inline]
    fn planes(&self, shared: &[Shared; 2], target: &[f32]) -> Planes {
        let mut best = (f64::INFINITY, Planes::empty());
        let mut now = Planes::empty();
        for step in 0..2 * ROUNDS {
            let plane = step % 2;
            let left: Vec<f32> =
                target.iter().enumerate().map(|(j, t)| t - now.at(1 - plane, j)).collect();
            let row = self.plane(&shared[plane], &left, plane);
            now.codes[plane] = row.c.map(|c| c as i8);
            let loss = now.refit(&shared[0], target);
            if loss < best.0 {
                best = (loss, now.clone());
            }
        }
        best.1
    }

    /// One plane for what the other leaves.
    #[inline]
    fn plane<'a>(&self, shared: &'a Shared, target: &[f32], plane: usize) -> Row<'a> {
        let groups = if plane == 0 { FIRST } else { self.groups };
        let mut row = Row::new(shared, target, groups);
        (groups.keep..groups.of).for_each(|_| row.drop_one(groups));
        row.search(&self.tables[plane]);
        row
    }
}

impl Planes {
    fn empty() -> Planes {
        Planes { codes: [[0; SCALE_COLUMNS]; 2], scales: [0.0; 2] }
    }

    #[inline]
    fn at(&self, plane: usize, j: usize) -> f32 {
        f32::from(self.codes[plane][j]) * self.scales[plane]
    }

    /// Both scales anew, as they are stored; what is left of the objective beside a constant.
    #[inline]
    fn refit(&mut self, shared: &Shared, target: &[f32]) -> f64 {
        let w = shared.width;
        let codes = self.codes.map(|plane| plane.map(f32::from));
        let times_g = |x: &[f32]| -> Vec<f32> {
            (0..w).map(|j| dot(&shared.g[j * w..(j + 1) * w], x) as f32).collect()
        };
        let (pull, push) = (times_g(target), codes.map(|c| times_g(&c[..w])));
        let [b0, b1] = codes.map(|c| dot(&pull, &c[..w]));
        let energy = |i: usize, k: usize| dot(&push[i], &codes[k][..w]);
        let (e00, e01, e11) = (energy(0, 0), energy(0, 1), energy(1, 1));
        let determinant = e00 * e11 - e01 * e01;
        let (mut alpha, mut beta) = if determinant > 1e-9 * e00 * e11 {
            ((b0 * e11 - b1 * e01) / determinant, (b1 * e00 - b0 * e01) / determinant)
        } else {
            (if e00 > 0.0 { b0 / e00 } else { 0.0 }, 0.0)
        };
        // A scale has no sign: where it would, the other one is best alone.
        if beta < 0.0 {
            (alpha, beta) = (b0 / e00, 0.0);
        }
        if alpha < 0.0 {
            (alpha, beta) = (0.0, if e11 > 0.0 { (b1 / e11).max(0.0) } else { 0.0 });
        }
        let stored = |v: f64| Float::F16.round((v as f32).clamp(0.0, LARGEST));
        self.scales = [stored(alpha), stored(beta)];
        let [alpha, beta] = self.scales.map(f64::from);
        alpha * (alpha * e00 - 2.0 * b0) + beta * (beta * e11 - 2.0 * b1) + 2.0 * alpha * beta * e01
    }
}

/// The bytes of both planes, a row after the other.
fn parts(found: &[Found<Solver>], dense: &Dense, groups: Groups) -> Result<Vec<Vec<u8>>> {
    let row_of = Dense { rows: 1, ..*dense };
    let mut all: Vec<Vec<u8>> = residual::layout(dense, groups)?.iter().map(|_| vec![]).collect();
    for row in 0..dense.rows {
        let plane = |plane: usize| -> Vec<f32> {
            let blocks = found.iter().enumerate();
            let values = blocks.flat_map(|(block, (_, rows))| {
                let width = SCALE_COLUMNS.min(dense.cols - block * SCALE_COLUMNS);
                (0..width).map(move |j| rows[row].at(plane, j))
            });
            values.map(|v| if v == 0.0 { 0.0 } else { v }).collect()
        };
        let packed = residual::pack([&plane(0), &plane(1)], &row_of, groups)?;
        all.iter_mut().zip(packed).for_each(|(part, row)| part.extend(row));
    }
    Ok(all)
}
