//! What every sweep over columns starts from: the factor of the damped Gram, and the weight to approach.

use super::datafit::{Terms, Weight};
use super::{Statistics, Task};
use crate::buffer::Buffer;
use crate::error::{Error, Result};
use crate::kernels::Kernel;
use crate::linalg::{reversed_cholesky, solve_rows};
use crate::par::Job;
use std::sync::Arc;

/// `H = G + damping * mean(diag G) I = R R^T` with `G` normalised to a mean diagonal of one.
pub(crate) struct Factor<'a> {
    /// The kernel for products.
    pub kernel: Kernel,
    /// Input channels.
    pub n: usize,
    /// `R [n, n]`, upper triangular; nothing else of its size is in memory.
    pub r: Buffer,
    /// `W [m, n]`; with corrected inputs `W - W P H^-1`, the unconstrained minimiser of the same
    /// objective (our reconstruction).
    pub target: Weight<'a>,
}

impl<'a> Factor<'a> {
    /// Of an operator as it is given.
    pub fn of(job: &Job, task: &Task<'a>, damping: f64) -> Result<Factor<'a>> {
        let terms = Terms::new(job, task.weight, task.calibration)?;
        Factor::new(job, &terms, task.calibration, damping)
    }

    /// Of a data term in its variables, with the sums that it was made of.
    pub fn new(
        job: &Job,
        terms: &Terms<'a>,
        stats: &Statistics,
        damping: f64,
    ) -> Result<Factor<'a>> {
        if !(damping >= 0.0 && damping.is_finite()) {
            return Err(Error::Option(format!("damping: must be at least 0, found {damping}")));
        }
        let (n, kernel, mut r) = (terms.n, terms.kernel, terms.gram(job, stats)?);
        (0..n).for_each(|i| r[i * n + i] += damping as f32); // the mean of diag(G) is one
        reversed_cholesky(job, &kernel, &mut r, n, damping)?;
        let mut target = terms.weight.clone();
        if let Some(linear) = &terms.linear {
            let mut shifted = job.copy(linear)?;
            solve_rows(job, &kernel, &mut shifted, &r, n)?;
            shifted.iter_mut().zip(&*target).for_each(|(s, w)| *s = w - *s);
            target = Weight::Own(Arc::new(shifted));
        }
        Ok(Factor { kernel, n, r, target })
    }
}
