//! An operator in scaled variables, with the guard that judges candidates.
//!
//! Solvers see `W' = W R` and `G' = R^-1 G R^-1` (unit diagonal); see [`GramQuadratic::scaled`].
//! Candidates are compared by their error on the held-out tokens: with few tokens an exact
//! minimiser of the calibration error is known to do worse on text that it has not seen.

use super::datafit::roots;
use super::{GramQuadratic, Solution, Task};
use crate::error::Result;
use crate::par::Job;

pub(super) struct Problem<'a> {
    pub task: &'a Task<'a>,
    pub term: GramQuadratic<'static>,
    heldout: Option<GramQuadratic<'static>>,
    roots: Vec<f32>,
}

impl<'a> Problem<'a> {
    pub fn new(job: &Job, task: &'a Task) -> Result<Problem<'a>> {
        let roots = roots(task.calibration);
        let term = GramQuadratic::scaled(job, task.weight, task.calibration, &roots)?;
        let measuring = |s| GramQuadratic::scaled_measuring(job, task.weight, s, &roots);
        let heldout = task.heldout.map(measuring).transpose()?;
        Ok(Problem { task, term, heldout, roots })
    }

    /// What candidates are compared by, at the point that would be stored: held-out error, or the
    /// calibration error where no token is held out.
    pub fn score(&self, job: &Job, values: &[f32]) -> Result<f64> {
        let stored = self.scale(self.stored(values.to_vec()));
        self.heldout.as_ref().unwrap_or(&self.term).relative_error(job, &stored)
    }

    /// From scaled variables to the values that are stored.
    fn stored(&self, mut values: Vec<f32>) -> Vec<f32> {
        for row in values.chunks_exact_mut(self.roots.len()) {
            row.iter_mut().zip(&self.roots).for_each(|(v, r)| *v /= r);
        }
        self.task.store(&mut values);
        values
    }

    /// Keeps what the pattern allows, by `|v'| = |v| sqrt(G_jj)`.
    pub fn project(&self, values: &mut [f32]) {
        self.task.pattern.project(values, self.term.n, None);
    }

    /// `V R`: from the stored variables to those of the solvers.
    pub fn scale(&self, mut values: Vec<f32>) -> Vec<f32> {
        for row in values.chunks_exact_mut(self.roots.len()) {
            row.iter_mut().zip(&self.roots).for_each(|(v, r)| *v *= r);
        }
        values
    }

    /// Rounds scaled `values` to the stored type and measures them there.
    pub fn certify(&self, job: &Job, values: Vec<f32>) -> Result<Solution> {
        self.certify_stored(job, self.stored(values))
    }

    /// Measures `values` that are what will be stored.
    pub fn certify_stored(&self, job: &Job, values: Vec<f32>) -> Result<Solution> {
        let scaled = self.scale(values.clone());
        let mut certificate = self.task.certificate(&values);
        certificate.error = self.term.relative_error(job, &scaled)?;
        let heldout = self.heldout.as_ref().map(|t| t.relative_error(job, &scaled));
        certificate.heldout = heldout.transpose()?;
        Ok(Solution { values, certificate })
    }
}
