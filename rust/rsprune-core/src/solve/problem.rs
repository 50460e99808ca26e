//! An operator in scaled variables, with the guard that judges candidates.
//!
//! Solvers see `W' = W R` and `G' = R^-1 G R^-1` (unit diagonal); see [`Terms::scaled`].
//! Candidates are compared by their error on the held-out tokens: with few tokens an exact
//! minimiser of the calibration error is known to do worse on text that it has not seen.

use super::datafit::{Terms, Weight, roots, scale};
use super::factor::Factor;
use super::sparsegpt::sparsegpt_point;
use super::{GramQuadratic, Solution, Task};
use crate::buffer::Buffer;
use crate::error::Result;
use crate::par::Job;
use std::sync::Arc;

/// A problem before its Gram is packed: for starts that need a factor of it.
pub(super) struct Unpacked<'a> {
    task: &'a Task<'a>,
    terms: Terms<'static>,
    roots: Vec<f32>,
}

impl<'a> Unpacked<'a> {
    pub fn new(job: &Job, task: &'a Task) -> Result<Unpacked<'a>> {
        let roots = roots(task.calibration);
        let mut scaled = job.copy(task.weight)?;
        scale(&mut scaled, &roots);
        let weight = Weight::Own(Arc::new(scaled));
        let terms = Terms::scaled(job, weight, task.calibration, &roots)?;
        Ok(Unpacked { task, terms, roots })
    }

    /// SparseGPT's point in scaled variables.
    pub fn sparsegpt_point(&self, job: &Job, damping: f64) -> Result<Buffer> {
        let factor = Factor::new(job, &self.terms, self.task.calibration, damping)?;
        sparsegpt_point(job, self.task.pattern, &factor)
    }

    pub fn pack(self, job: &Job) -> Result<Problem<'a>> {
        let Unpacked { task, terms, roots } = self;
        let weight = terms.weight.clone();
        let term = terms.solving(job, task.calibration)?;
        let measuring = |s| Terms::scaled(job, weight, s, &roots)?.measuring(job, s);
        let heldout = task.heldout.map(measuring).transpose()?;
        Ok(Problem { task, term, heldout, roots })
    }
}

pub(super) struct Problem<'a> {
    pub task: &'a Task<'a>,
    pub term: GramQuadratic<'static>,
    heldout: Option<GramQuadratic<'static>>,
    roots: Vec<f32>,
}

impl<'a> Problem<'a> {
    pub fn new(job: &Job, task: &'a Task) -> Result<Problem<'a>> {
        Unpacked::new(job, task)?.pack(job)
    }

    /// What candidates are compared by, at the point that would be stored: held-out error, or the
    /// calibration error where no token is held out.
    pub fn score(&self, job: &Job, values: &[f32]) -> Result<f64> {
        let term = self.heldout.as_ref().unwrap_or(&self.term);
        term.relative_error_of(job, values, |rows| {
            self.unscale(rows);
            rows.iter_mut().for_each(|v| *v = self.task.float.round(*v));
            scale(rows, &self.roots);
        })
    }

    /// From the variables of the solvers to the stored ones, in place.
    fn unscale(&self, values: &mut [f32]) {
        for row in values.chunks_exact_mut(self.roots.len()) {
            row.iter_mut().zip(&self.roots).for_each(|(v, r)| *v /= r);
        }
    }

    /// Keeps what the pattern allows, by `|v'| = |v| sqrt(G_jj)`.
    pub fn project(&self, values: &mut [f32]) {
        self.task.pattern.project(values, self.term.n, None);
    }

    /// `V R`: from the stored variables to those of the solvers, in place.
    pub fn scale(&self, values: &mut [f32]) {
        scale(values, &self.roots);
    }

    /// Rounds scaled `values` to the stored type and measures them there.
    pub fn certify(&self, job: &Job, mut values: Buffer) -> Result<Solution> {
        self.unscale(&mut values);
        self.task.store(&mut values);
        self.certify_stored(job, values)
    }

    /// Measures `values` that are what will be stored.
    pub fn certify_stored(&self, job: &Job, values: Buffer) -> Result<Solution> {
        let measure =
            |t: &GramQuadratic| t.relative_error_of(job, &values, |rows| scale(rows, &self.roots));
        let mut certificate = self.task.certificate(&values);
        certificate.error = measure(&self.term)?;
        certificate.heldout = self.heldout.as_ref().map(measure).transpose()?;
        Ok(Solution { values, certificate })
    }
}
