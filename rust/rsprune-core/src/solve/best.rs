//! The best of several methods for every operator (our own).
//!
//! ```text
//! candidates: SparseGPT; ADMM, slow schedule; FISTA-plus from the better of the two
//! each polished; the one with the lowest held-out error is returned
//! ```
//! The budget is counted in products with the Gram, not in seconds: a result must not depend on how
//! busy the machine was.

use super::admm::{AdmmOptions, admm_point};
use super::fista_plus::{FistaPlusOptions, fista_plus_point};
use super::polish::{PolishOptions, Polished, polish_point};
use super::problem::Problem;
use super::sparsegpt::sparsegpt_point;
use super::{Solution, Task};
use crate::error::Result;
use crate::par::Job;

/// Products with the Gram that a candidate takes: SparseGPT one, its polish 85; ADMM about 160 with
/// its inverses, its polish the same; FISTA-plus 28 a round.
const COST: [usize; 3] = [86, 245, 425];

/// Solves one operator with every method that fits into `budget` products with its Gram; the
/// first one (ADMM) always runs.
pub fn best(job: &Job, task: &Task, budget: usize) -> Result<Solution> {
    let problem = Problem::new(job, task)?;
    let polish = |values| polish_point(job, &problem, values, &PolishOptions::default());
    let (values, iterations) = admm_point(job, task.pattern, &problem.term, &AdmmOptions::slow())?;
    let mut winner = polish(values)?;
    let mut candidates = vec![("admm", winner.score)];
    let mut consider = |name, found: Polished, winner: &mut Polished| {
        candidates.push((name, found.score));
        if found.score < winner.score {
            *winner = found;
        }
    };
    if budget >= COST[0] + COST[1] {
        let values = sparsegpt_point(job, task.pattern, &problem.term, 0.01)?;
        consider("sparsegpt", polish(values)?, &mut winner);
    }
    if budget >= COST.iter().sum() {
        let options = FistaPlusOptions::default();
        let found = fista_plus_point(job, &problem, winner.values.clone(), &options)?;
        consider("fista-plus", polish(found.values)?, &mut winner);
    }
    let mut solution = winner.certify(job, &problem)?;
    solution.certificate.candidates = candidates;
    solution.certificate.iterations = iterations;
    Ok(solution)
}
