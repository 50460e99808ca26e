//! ARB-LLM's row-column form (arXiv 2410.03129): `W ~ alpha_r alpha_c^T o B`, `B = sign(W)`.
//!
//! ```text
//! alternately, a block of 128 columns at a time:
//!     alpha_r = |W| alpha_c / (alpha_c^T alpha_c)      alpha_c = |W|^T alpha_r / (alpha_r^T alpha_r)
//! ```
//! Published: the form, the alternation, errors passed on to later columns as in BiLLM. Left out:
//! the column-group bitmaps, which BiLLM's groups stand for (see `billm`).

use super::sweep::{BlockSolver, Compensation, Sweep, run};
use super::{Packed, certify, dense_of};
use crate::error::Result;
use crate::float::Float;
use crate::linalg::ROW_BLOCK;
use crate::pack::binary::BLOCK;
use crate::pack::row_column::{self, Decisions};
use crate::par::Job;
use crate::solve::{Factor, Task};
use std::ops::Range;

/// Rounds of the alternation (published: 15).
const ROUNDS: usize = 15;

/// Binarizes; packed as `row-column`.
pub fn arb(job: &Job, task: &Task, damping: f64) -> Result<Packed> {
    let dense = dense_of(task)?;
    let (values, found) =
        run(job, &mut Factor::of(job, task, damping)?, &Solver { float: task.float })?;
    let rows = 0..dense.rows;
    let decisions = Decisions {
        minus: rows
            .clone()
            .flat_map(|r| found.iter().flat_map(move |(_, f)| f[r].clone()))
            .collect(),
        scales: rows.flat_map(|r| found.iter().map(move |(s, _)| s.rows[r])).collect(),
        columns: found.iter().flat_map(|(s, _)| s.columns.clone()).collect(),
    };
    let bytes = row_column::pack(&decisions, &dense)?;
    let format = ("row-column".into(), row_column::layout(&dense)?, bytes);
    certify(job, task, values, format, 1.0)
}

struct Solver {
    float: Float,
}

struct Shared {
    rows: Vec<f32>,
    columns: Vec<f32>,
}

impl BlockSolver for Solver {
    const WIDTH: usize = BLOCK;
    const READS_METRIC: bool = false;
    type Shared = Shared;
    type Found = Vec<bool>;

    fn compensation(&self) -> Compensation {
        Compensation::Published
    }

    fn prepare(&self, job: &Job, sweep: &Sweep, block: &Range<usize>) -> Result<Shared> {
        let mut columns = vec![1.0; block.len()];
        for _ in 0..ROUNDS {
            let rows = of_rows(sweep, block, &columns);
            columns = of_columns(job, sweep, block, &rows)?;
        }
        columns.iter_mut().for_each(|c| *c = half(*c));
        let rows = of_rows(sweep, block, &columns).into_iter().map(half).collect();
        Ok(Shared { rows, columns })
    }

    #[inline]
    fn solve(&self, shared: &Shared, row: usize, values: &mut [f32]) -> Vec<bool> {
        let minus: Vec<bool> = values.iter().map(|v| *v < 0.0).collect();
        for ((value, minus), column) in values.iter_mut().zip(&minus).zip(&shared.columns) {
            let stored = self.float.round(row_column::value(*minus, shared.rows[row], *column));
            *value = if stored == 0.0 { 0.0 } else { stored };
        }
        minus
    }
}

fn half(value: f32) -> f32 {
    Float::F16.round(value.min(65504.0))
}

fn of_rows(sweep: &Sweep, block: &Range<usize>, columns: &[f32]) -> Vec<f32> {
    let energy: f32 = columns.iter().map(|c| c * c).sum();
    let row = |row: usize| -> f32 {
        let sizes = sweep.target(row, block).iter().map(|t| t.abs());
        sizes.zip(columns).map(|(t, c)| t * c).sum::<f32>() / energy
    };
    (0..sweep.rows()).map(|r| if energy > 0.0 { row(r) } else { 0.0 }).collect()
}

/// Divided by their mean, which the rows' scales take on: F16 then holds both.
fn of_columns(job: &Job, sweep: &Sweep, block: &Range<usize>, rows: &[f32]) -> Result<Vec<f32>> {
    let parts = job.map(sweep.rows().div_ceil(ROW_BLOCK), |i| {
        let mut sums = vec![0.0f32; block.len()];
        for (row, scale) in rows.iter().enumerate().skip(i * ROW_BLOCK).take(ROW_BLOCK) {
            let target = sweep.target(row, block);
            sums.iter_mut().zip(target).for_each(|(s, t)| *s += t.abs() * scale);
        }
        Ok(sums)
    })?;
    let sum = |j: usize| parts.iter().map(|sums| f64::from(sums[j])).sum::<f64>();
    let sums: Vec<f64> = (0..block.len()).map(sum).collect();
    let mean = sums.iter().sum::<f64>() / sums.len() as f64;
    Ok(sums.iter().map(|s| if mean > 0.0 { (s / mean) as f32 } else { 1.0 }).collect())
}
