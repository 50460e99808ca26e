//! Methods that choose a mask by a score and leave the kept weights as they are.

use super::{Solution, Statistics, Task};
use crate::buffer::Buffer;
use crate::error::Result;
use crate::par::Job;

/// Keeps the largest `|w|`.
pub fn magnitude(job: &Job, task: &Task) -> Result<Solution> {
    let mut values = job.copy(task.weight)?;
    task.pattern.project(&mut values, task.cols(), None);
    task.certify(job, values)
}

/// Wanda (arXiv 2306.11695): keeps the largest `|w| sqrt(G_jj)`.
pub fn wanda(job: &Job, task: &Task) -> Result<Solution> {
    task.certify(job, wanda_point(job, task)?)
}

/// Wanda's point, not yet rounded: also the warm start of other methods.
pub(super) fn wanda_point(job: &Job, task: &Task) -> Result<Buffer> {
    let mut values = job.copy(task.weight)?;
    let norms = input_norms(task.calibration);
    task.pattern.project(&mut values, task.cols(), Some(&norms));
    Ok(values)
}

fn input_norms(stats: &Statistics) -> Vec<f32> {
    let tokens = stats.tokens().max(1) as f64;
    stats.diagonal().iter().map(|g| (g / tokens).sqrt() as f32).collect()
}
