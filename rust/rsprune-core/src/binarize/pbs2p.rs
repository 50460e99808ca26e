//! PBS2P (arXiv 2502.01705): stepwise pruning with binarization optimisation (SPBO).
//!
//! ```text
//! V = m o (alpha B + mu), B dense signs;   for k = 1 .. M - N:
//!     of every M-group goes the kept weight of least w^2 / [H^-1]_jj^2
//!     mu    = (w - alpha m o B)^T S m / (m^T S m)                 alternately, B fixed,
//!     alpha = (w - mu m)^T S (m o B) / ((m o B)^T S (m o B))      S = H_bb
//! ```
//! Published: these steps and closed forms, N of M = 8. Reconstructed (there is no public code, and
//! the text after the introduction could not be checked): blocks of 128 columns with BiLLM's salient
//! columns and magnitude groups, for each of which the closed forms are taken with the others fixed;
//! the score; compensation as in BiLLM. With B and the order fixed the path changes nothing: the
//! closed forms depend on the last mask alone. It is walked as published all the same.

use super::groups::{Coded, Division, binarized, decisions};
use super::sweep::{BlockSolver, Compensation, Sweep, run};
use super::{Packed, certify, dense_of, groups_of};
use crate::error::Result;
use crate::float::Float;
use crate::linalg::dot;
use crate::pack::Groups;
use crate::pack::binary::{self, BLOCK, KEPT, Levels, MINUS, SECOND};
use crate::par::Job;
use crate::solve::{Factor, Task};
use std::ops::Range;

/// Rounds of the closed forms after every step.
const ALTERNATIONS: usize = 8;
/// Vectors that a row's block is made of: mean and signs of every part, residual signs.
const TERMS: usize = 7;

/// Binarizes and prunes to the task's pattern; packed as `binary n:m`.
pub fn pbs2p(job: &Job, task: &Task, damping: f64) -> Result<Packed> {
    let (dense, groups) = (dense_of(task)?, groups_of(task.pattern)?);
    let layout = binary::layout(&dense, groups)?;
    let solver = Solver { float: task.float, groups };
    let (values, found) = run(job, &mut Factor::of(job, task, damping)?, &solver)?;
    let found: Vec<_> = found.into_iter().map(|(shared, rows)| (shared.division, rows)).collect();
    let (decisions, signs) = decisions(&found, dense.rows, dense.cols);
    let bytes = binary::pack(&decisions, &dense, groups)?;
    let format = format!("binary {}:{}", groups.keep, groups.of);
    let nominal = signs as f64 / values.len() as f64;
    certify(job, task, values, (format, layout, bytes), nominal)
}

struct Solver {
    float: Float,
    groups: Groups,
}

struct Shared {
    division: Division,
    /// `S [w, w]`.
    metric: Vec<f32>,
    /// `R_jj`.
    diagonal: Vec<f32>,
}

impl BlockSolver for Solver {
    const WIDTH: usize = BLOCK;
    type Shared = Shared;
    type Found = Coded;

    fn compensation(&self) -> Compensation {
        Compensation::Published
    }

    fn prepare(&self, job: &Job, sweep: &Sweep, block: &Range<usize>) -> Result<Shared> {
        Ok(Shared {
            division: Division::of(job, sweep, block)?,
            metric: sweep.metric(job, block)?,
            diagonal: block.clone().map(|j| sweep.diagonal(j)).collect(),
        })
    }

    #[inline]
    fn solve(&self, shared: &Shared, _: usize, values: &mut [f32]) -> Coded {
        let division = &shared.division;
        let mut coded = binarized(values, division);
        let mut terms = Terms::new(values, &coded, division, &shared.metric);
        terms.closed_forms(values);
        for _ in self.groups.keep..self.groups.of {
            for first in (0..values.len()).step_by(self.groups.of) {
                let score = |j: usize| (values[j] * shared.diagonal[j]).abs();
                let kept = (first..first + self.groups.of).filter(|j| coded.codes[*j] != 0);
                if let Some(j) = kept.min_by(|a, b| score(*a).total_cmp(&score(*b))) {
                    terms.add(j, -1.0);
                    coded.codes[j] = 0;
                }
            }
            terms.closed_forms(values);
        }
        coded.levels = terms.levels();
        coded.store(division, self.float, values);
        coded
    }
}

/// `V = sum_k theta_k phi_k`, and the products with `S` that the closed forms take.
struct Terms<'a> {
    metric: &'a [f32],
    width: usize,
    phi: [[f32; BLOCK]; TERMS],
    s_phi: [[f32; BLOCK]; TERMS],
    theta: [f32; TERMS],
    /// Entries of a column in `phi`, as they are while it is kept.
    column: [[f32; TERMS]; BLOCK],
}

impl<'a> Terms<'a> {
    #[inline]
    fn new(target: &[f32], coded: &Coded, division: &Division, metric: &'a [f32]) -> Terms<'a> {
        let (zeros, levels) = ([[0.0; BLOCK]; TERMS], &coded.levels);
        let mut terms = Terms {
            metric,
            width: target.len(),
            phi: zeros,
            s_phi: zeros,
            theta: std::array::from_fn(|k| match k {
                6 => levels.scales[3],
                _ if k % 2 == 0 => levels.means[k / 2],
                _ => levels.scales[k / 2],
            }),
            column: [[0.0; TERMS]; BLOCK],
        };
        let sign = |code: u8, bit: u8| if code & bit == 0 { 1.0 } else { -1.0 };
        for (j, t) in target.iter().enumerate() {
            let (part, code) = (division.part(j, *t), coded.codes[j]);
            terms.column[j][2 * part] = 1.0;
            terms.column[j][2 * part + 1] = sign(code, MINUS);
            terms.column[j][6] = if part == 2 { sign(code, SECOND) } else { 0.0 };
            terms.add(j, f32::from(code & KEPT));
        }
        terms
    }

    /// Puts column `j` in (1) or takes it out (-1).
    #[inline]
    fn add(&mut self, j: usize, times: f32) {
        let metric = &self.metric[j * self.width..(j + 1) * self.width];
        for k in 0..TERMS {
            let entry = times * self.column[j][k];
            if entry != 0.0 {
                self.phi[k][j] += entry;
                self.s_phi[k].iter_mut().zip(metric).for_each(|(s, g)| *s += entry * g);
            }
        }
    }

    /// The published closed forms, one number after another with the others fixed.
    #[inline]
    fn closed_forms(&mut self, target: &[f32]) {
        let mut left = [0.0f32; BLOCK];
        left[..target.len()].copy_from_slice(target);
        for k in 0..TERMS {
            left.iter_mut().zip(&self.phi[k]).for_each(|(l, p)| *l -= self.theta[k] * p);
        }
        let energy: [f64; TERMS] = std::array::from_fn(|k| dot(&self.phi[k], &self.s_phi[k]));
        for _ in 0..ALTERNATIONS {
            for (k, energy) in energy.iter().enumerate().filter(|(_, energy)| **energy > 0.0) {
                let step = (dot(&left, &self.s_phi[k]) / energy) as f32;
                self.theta[k] += step;
                left.iter_mut().zip(&self.phi[k]).for_each(|(l, p)| *l -= step * p);
            }
        }
    }

    fn levels(&self) -> Levels {
        let t = &self.theta;
        Levels { scales: [t[1], t[3], t[5], t[6]], means: [t[0], t[2], t[4]] }
    }
}
