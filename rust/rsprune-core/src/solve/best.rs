//! The best of several methods for every operator (our own).
//!
//! ```text
//! candidates: ADMM, slow schedule; SparseGPT; FISTA-plus
//! each polished; the one with the lowest held-out error is returned
//! ```
//! The budget is counted in products with the Gram, not in seconds: a result must not depend on how
//! busy the machine was.

use super::admm::{AdmmOptions, admm_point};
use super::fista_plus::{FistaPlusOptions, Starts, fista_plus_point};
use super::polish::{PolishOptions, Polished, polish_point};
use super::problem::Unpacked;
use super::{Solution, Task};
use crate::error::Result;
use crate::par::Job;

/// Products with the Gram that a candidate takes: the polish of each about 75; ADMM 120 iterations
/// with about 40 inverses, SparseGPT one, FISTA-plus 12 rounds and the published method's 15.
const ADMM: usize = 250;
const SPARSEGPT: usize = 76;
const FISTA_PLUS: usize = 790;

/// Solves one operator with every method that fits into `budget` products with its Gram; the
/// first one (ADMM) always runs.
pub fn best(job: &Job, task: &Task, budget: usize) -> Result<Solution> {
    let options = FistaPlusOptions::default();
    let (mut sparsegpt, mut starts) = (None, None);
    let problem = if budget >= ADMM + SPARSEGPT + FISTA_PLUS {
        let (found, problem) = Starts::find(job, task, &options)?;
        sparsegpt = Some(job.copy(&found.sparsegpt)?);
        starts = Some(found);
        problem
    } else {
        let problem = Unpacked::new(job, task)?;
        if budget >= ADMM + SPARSEGPT {
            sparsegpt = Some(problem.sparsegpt_point(job, options.damping)?);
        }
        problem.pack(job)?
    };
    let polish = |values| polish_point(job, &problem, values, &PolishOptions::default());
    let split = admm_point(job, task.pattern, &problem.term, &AdmmOptions::slow())?;
    let mut winner = polish(split.values)?;
    let mut candidates = vec![("admm", winner.score)];
    let mut consider = |name, found: Polished, winner: &mut Polished| {
        candidates.push((name, found.score));
        if found.score < winner.score {
            *winner = found;
        }
    };
    if let Some(values) = sparsegpt {
        consider("sparsegpt", polish(values)?, &mut winner);
    }
    if let Some(starts) = starts {
        let (_, polished) = fista_plus_point(job, &problem, starts, &options)?;
        consider("fista-plus", polished, &mut winner);
    }
    let mut solution = winner.certify(job, &problem)?;
    solution.certificate.candidates = candidates;
    solution.certificate.iterations = split.iterations;
    solution.certificate.converged = split.converged;
    Ok(solution)
}
