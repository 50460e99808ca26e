//! GPTQ (arXiv 2210.17323): evenly spaced levels, column by column with error feedback.
//!
//! ```text
//! for every 128 columns of a row:   scale = (max - min) / (2^b - 1), zero = -min / scale   (0 in between)
//!     for each column j:            t_j = w_j + (sum_{a<j} D_a R_aj) / R_jj
//!                                   v_j = (clamp(round(t_j / scale) + zero) - zero) scale;  D_j = w_j - v_j
//! ```
//! The published update without any inverse, as in [`sparsegpt`](crate::solve::sparsegpt); asymmetric levels, columns in
//! their own order. Here the anchor of the binarizing methods.

use super::sweep::{BlockSolver, Compensation, Sweep, run};
use super::{Packed, certify, dense_of};
use crate::error::Result;
use crate::float::Float;
use crate::pack::uniform::{self, Decisions, GROUP};
use crate::par::Job;
use crate::solve::{Factor, Task};
use std::ops::Range;

/// Rounds to `bits` = 2, 3, 4 or 8 bits; packed as `uniform b`.
pub fn gptq(job: &Job, task: &Task, damping: f64, bits: usize) -> Result<Packed> {
    let dense = dense_of(task)?;
    let layout = uniform::layout(&dense, bits)?;
    let solver = Solver { float: task.float, largest: ((1u16 << bits) - 1) as f32 };
    let (values, found) = run(job, &mut Factor::of(job, task, damping)?, &solver)?;
    let each = |row: usize| found.iter().map(move |(_, rows)| &rows[row]);
    let rows = 0..dense.rows;
    let decisions = Decisions {
        codes: rows.clone().flat_map(|r| each(r).flat_map(|f| f.codes.clone())).collect(),
        scales: rows.clone().flat_map(|r| each(r).map(|f| f.scale)).collect(),
        zeros: rows.flat_map(|r| each(r).map(|f| f.zero)).collect(),
    };
    let bytes = uniform::pack(&decisions, &dense, bits)?;
    certify(job, task, values, (format!("uniform {bits}"), layout, bytes), bits as f64)
}

struct Solver {
    float: Float,
    largest: f32,
}

struct Rounded {
    codes: Vec<u8>,
    scale: f32,
    zero: u8,
}

impl BlockSolver for Solver {
    const WIDTH: usize = GROUP;
    const READS_METRIC: bool = false;
    /// `R_bb`.
    type Shared = Vec<f32>;
    type Found = Rounded;

    fn compensation(&self) -> Compensation {
        Compensation::Exact
    }

    fn prepare(&self, _: &Job, sweep: &Sweep, block: &Range<usize>) -> Result<Vec<f32>> {
        Ok(sweep.factor_block(block))
    }

    #[inline]
    fn solve(&self, r: &Vec<f32>, _: usize, values: &mut [f32]) -> Rounded {
        let (scale, zero) = self.levels(values);
        let (w, mut codes) = (values.len(), vec![zero; values.len()]);
        let mut pending = [0.0f32; GROUP]; // sum of D_a R_aj over this block's a < j
        for j in 0..w {
            let target = values[j];
            if scale > 0.0 {
                let now = target + pending[j] / r[j * w + j];
                codes[j] = ((now / scale).round() + f32::from(zero)).clamp(0.0, self.largest) as u8;
            }
            let stored = self.float.round(uniform::value(codes[j], zero, scale));
            values[j] = if stored == 0.0 { 0.0 } else { stored };
            let lost = target - values[j];
            let later = &mut pending[j + 1..w];
            later.iter_mut().zip(&r[j * w + j + 1..]).for_each(|(p, r)| *p += lost * r);
        }
        Rounded { codes, scale, zero }
    }
}

impl Solver {
    /// Scale, exact in F16, and the code of zero.
    #[inline]
    fn levels(&self, target: &[f32]) -> (f32, u8) {
        let low = target.iter().fold(0.0f32, |low, t| low.min(*t));
        let high = target.iter().fold(0.0f32, |high, t| high.max(*t));
        let scale = Float::F16.round(((high - low) / self.largest).min(65504.0));
        let zero = if scale > 0.0 { (-low / scale).round().clamp(0.0, self.largest) } else { 0.0 };
        (scale, zero as u8)
    }
}
