//! What may follow any method: a refit of the kept weights and a local search over the mask, each
//! kept only if the error on tokens that no solver saw falls (our own; see [`Problem::score`]).
//!
//! ```text
//! for damping in 0.01, 0.03, 0.1, 0.3:  candidate = refit of the start;  keep the best
//! candidate = refit of a local search from there;                    keep it if better
//! ```

use super::descent::local_search;
use super::problem::Problem;
use super::refit::refit;
use super::{Solution, Task};
use crate::buffer::Buffer;
use crate::error::{Error, Result};
use crate::par::Job;

/// Dampings that the held-out error chooses from.
const LADDER: [f64; 4] = [0.01, 0.03, 0.1, 0.3];

/// Which steps are tried, and how long.
#[derive(Clone, Copy, Debug)]
pub struct PolishOptions {
    /// Whether kept weights are solved again.
    pub refit: bool,
    /// Whether the mask may change.
    pub search: bool,
    /// Conjugate gradient steps of a refit.
    pub steps: usize,
    /// Sweeps of the local search.
    pub sweeps: usize,
}

impl Default for PolishOptions {
    fn default() -> PolishOptions {
        PolishOptions::of(20)
    }
}

impl PolishOptions {
    /// Both, with so many steps and a quarter as many sweeps; neither where that is none.
    pub fn of(steps: usize) -> PolishOptions {
        let some = steps > 0;
        PolishOptions { refit: some, search: some, steps, sweeps: steps.div_ceil(4) }
    }
}

/// A point in scaled variables with what it was judged by.
pub(super) struct Polished {
    pub values: Buffer,
    pub score: f64,
    pub damping: Option<f64>,
    pub search: Option<bool>,
}

/// Polishes `values [m, n]`, which are in the task's pattern, and measures the result.
pub fn polish(job: &Job, task: &Task, values: Buffer, options: &PolishOptions) -> Result<Solution> {
    if values.len() != task.weight.len() {
        return Err(Error::Shape {
            what: "values".into(),
            expected: format!("{} as the weight has", task.weight.len()),
            found: values.len().to_string(),
        });
    }
    if !task.pattern.holds(&values, task.cols()) {
        return Err(Error::Option(format!("values: expected the pattern {}", task.pattern)));
    }
    let problem = Problem::new(job, task)?;
    let mut start = job.copy(&values)?;
    problem.scale(&mut start);
    let polished = polish_point(job, &problem, start, options)?;
    if polished.damping.is_none() && polished.search != Some(true) {
        let mut solution = problem.certify_stored(job, values)?; // not a bit of it is touched
        solution.certificate.search = polished.search;
        return Ok(solution);
    }
    polished.certify(job, &problem)
}

/// The same in scaled variables.
pub(super) fn polish_point(
    job: &Job,
    problem: &Problem,
    start: Buffer,
    options: &PolishOptions,
) -> Result<Polished> {
    let score = problem.score(job, &start)?;
    let mut best = Polished { values: start, score, damping: None, search: None };
    if options.refit {
        best = climb_ladder(job, problem, best, options.steps)?;
    }
    if options.search {
        let damping = best.damping.unwrap_or(LADDER[0]);
        let mut values = job.copy(&best.values)?;
        let (term, pattern) = (&problem.term, problem.task.pattern);
        local_search(job, term, pattern, &mut values, damping, options.sweeps)?;
        if options.refit {
            refit(job, term, &mut values, damping, options.steps)?;
        }
        let score = problem.score(job, &values)?;
        best.search = Some(score < best.score);
        if score < best.score {
            (best.values, best.score) = (values, score);
        }
    }
    Ok(best)
}

/// The best refit of `start`, or `start` itself. A rung starts from the one below it, where it has
/// half the way to go, and the ladder ends where the score rises.
fn climb_ladder(job: &Job, problem: &Problem, start: Polished, steps: usize) -> Result<Polished> {
    let mut values = job.copy(&start.values)?;
    let (mut best, mut below) = (start, f64::INFINITY);
    for (rung, damping) in LADDER.into_iter().enumerate() {
        let steps = if rung == 0 { steps } else { steps.div_ceil(2) };
        refit(job, &problem.term, &mut values, damping, steps)?;
        let score = problem.score(job, &values)?;
        if score < best.score {
            let values = job.copy(&values)?;
            best = Polished { values, score, damping: Some(damping), search: None };
        }
        if score > below {
            break;
        }
        below = score;
    }
    Ok(best)
}

impl Polished {
    pub fn certify(self, job: &Job, problem: &Problem) -> Result<Solution> {
        let mut solution = problem.certify(job, self.values)?;
        solution.certificate.damping = self.damping;
        solution.certificate.search = self.search;
        Ok(solution)
    }
}
