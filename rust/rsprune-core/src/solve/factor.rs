//! What every sweep over columns starts from: the factor of the damped Gram, and the weight to approach.

use super::datafit::normalised;
use super::{GramQuadratic, Task};
use crate::error::{Error, Result};
use crate::kernels::Kernel;
use crate::linalg::{reversed_cholesky, solve_rows};
use crate::par::Job;
use std::borrow::Cow;

/// `H = G + damping * mean(diag G) I = R R^T` with `G` normalised to a mean diagonal of one.
pub(crate) struct Factor<'a> {
    /// The kernel for products.
    pub kernel: Kernel,
    /// Input channels.
    pub n: usize,
    /// `R [n, n]`, upper triangular.
    pub r: Vec<f32>,
    /// `W [m, n]`; with corrected inputs `W - W P H^-1`, the unconstrained minimiser of the same
    /// objective (our reconstruction).
    pub target: Cow<'a, [f32]>,
}

impl<'a> Factor<'a> {
    /// Of an operator as it is given.
    pub fn of(job: &Job, task: &Task<'a>, damping: f64) -> Result<Factor<'a>> {
        let linear = if task.calibration.corrected() {
            GramQuadratic::measuring(job, task.weight, task.calibration)?.linear
        } else {
            None
        };
        let gram = normalised(job, task.calibration)?;
        Factor::new(job, &Kernel::select()?, (task.weight, linear.as_deref()), gram, damping)
    }

    /// Of `weight` with the linear term `B`, if it has one, for the Gram `r`, which is factored in
    /// place.
    pub fn new(
        job: &Job,
        kernel: &Kernel,
        (weight, linear): (&'a [f32], Option<&[f32]>),
        mut r: Vec<f32>,
        damping: f64,
    ) -> Result<Factor<'a>> {
        if !(damping >= 0.0 && damping.is_finite()) {
            return Err(Error::Option(format!("damping: must be at least 0, found {damping}")));
        }
        let n = r.len().isqrt();
        (0..n).for_each(|i| r[i * n + i] += damping as f32); // the mean of diag(G) is one
        reversed_cholesky(job, kernel, &mut r, n, damping)?;
        let mut target = Cow::Borrowed(weight);
        if let Some(linear) = linear {
            let shift = solve_rows(job, linear, &r, n)?;
            target.to_mut().iter_mut().zip(&shift).for_each(|(w, s)| *w -= s);
        }
        Ok(Factor { kernel: *kernel, n, r, target })
    }
}
