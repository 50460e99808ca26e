//! BiLLM (arXiv 2402.04291): every weight a sign, those of salient columns two.
//!
//! Published: salient columns with a residual sign, two magnitude groups of the others, blocks of
//! 128 columns, errors passed on to later columns. Reconstructed: see `groups`; means of parts, as
//! in PBS2P's form (the paper's text has scales alone).

use super::groups::{Coded, Division, binarized, decisions};
use super::sweep::{BlockSolver, Compensation, Sweep, run};
use super::{Packed, certify, dense_of};
use crate::error::Result;
use crate::float::Float;
use crate::pack::Groups;
use crate::pack::binary::{self, BLOCK};
use crate::par::Job;
use crate::solve::{Factor, Task};
use std::ops::Range;

/// Binarizes; packed as `binary 8:8`.
pub fn billm(job: &Job, task: &Task, damping: f64) -> Result<Packed> {
    let groups = Groups { keep: 8, of: 8 };
    let dense = dense_of(task)?;
    let layout = binary::layout(&dense, groups)?;
    let (values, found) =
        run(job, &mut Factor::of(job, task, damping)?, &Solver { float: task.float })?;
    let (decisions, signs) = decisions(&found, dense.rows, dense.cols);
    let bytes = binary::pack(&decisions, &dense, groups)?;
    let nominal = signs as f64 / values.len() as f64;
    certify(job, task, values, ("binary 8:8".into(), layout, bytes), nominal)
}

struct Solver {
    float: Float,
}

impl BlockSolver for Solver {
    const WIDTH: usize = BLOCK;
    const READS_METRIC: bool = false;
    type Shared = Division;
    type Found = Coded;

    fn compensation(&self) -> Compensation {
        Compensation::Published
    }

    fn prepare(&self, job: &Job, sweep: &Sweep, block: &Range<usize>) -> Result<Division> {
        Division::of(job, sweep, block)
    }

    #[inline]
    fn solve(&self, division: &Division, _: usize, values: &mut [f32]) -> Coded {
        let mut coded = binarized(values, division);
        coded.store(division, self.float, values);
        coded
    }
}
