//! What a method is given, and what it must answer for.

use super::Statistics;
use super::measure::relative_error;
use crate::buffer::Buffer;
use crate::error::Result;
use crate::float::Float;
use crate::par::Job;
use crate::pattern::Pattern;

/// One operator to prune.
pub struct Task<'a> {
    /// `W [m, n]`, as stored, in f32.
    pub weight: &'a [f32],
    /// The type in which the result is stored.
    pub float: Float,
    /// What may stay.
    pub pattern: Pattern,
    /// Sums over the calibration tokens.
    pub calibration: &'a Statistics,
    /// Sums over tokens that no solver sees.
    pub heldout: Option<&'a Statistics>,
}

/// Figures at the very point that is stored.
#[derive(Clone, Debug, Default)]
pub struct Certificate {
    /// `||V X* - W X||^2 / ||W X||^2` on the calibration tokens.
    pub error: f64,
    /// The same on the held-out tokens.
    pub heldout: Option<f64>,
    /// Fraction of zeros.
    pub sparsity: f64,
    /// Calibration tokens behind `error`.
    pub tokens: u64,
    /// Input channels that never carried a value.
    pub dead_channels: usize,
    /// The l1 weight of the returned point, where the method has one.
    pub lambda: Option<f64>,
    /// Outer rounds.
    pub rounds: usize,
    /// Inner iterations, all rounds together.
    pub iterations: usize,
    /// Whether the method stopped by its own rule and not by a cap.
    pub converged: bool,
    /// Relative damping of the refit that was kept.
    pub damping: Option<f64>,
    /// Whether local search was tried, and whether its point was kept.
    pub search: Option<bool>,
    /// The candidates of a method that chooses among methods, with what each was judged by.
    pub candidates: Vec<(&'static str, f64)>,
    /// Bits a weight of a binarizing method, everything counted, and as its paper counts.
    pub bits: Option<Bits>,
}

/// What a weight takes when it is packed.
#[derive(Clone, Copy, Debug)]
pub struct Bits {
    /// Bits in the file over weights.
    pub exact: f64,
    /// What papers count: signs alone, or a code's width.
    pub nominal: f64,
}

/// A pruned operator.
pub struct Solution {
    /// `V [m, n]`, rounded to the stored type.
    pub values: Buffer,
    /// Its figures.
    pub certificate: Certificate,
}

impl Task<'_> {
    /// Input channels.
    pub fn cols(&self) -> usize {
        self.calibration.width()
    }

    /// Rounds `values` to the stored type and measures them there.
    pub(crate) fn certify(&self, job: &Job, mut values: Buffer) -> Result<Solution> {
        self.store(&mut values);
        let measure = |stats| relative_error(job, self.weight, &values, stats);
        let error = measure(self.calibration)?;
        let heldout = self.heldout.map(measure).transpose()?;
        let certificate = Certificate { error, heldout, ..self.certificate(&values) };
        Ok(Solution { values, certificate })
    }

    /// Rounds to the stored type.
    pub(super) fn store(&self, values: &mut [f32]) {
        values.iter_mut().for_each(|v| *v = self.float.round(*v));
        assert!(self.pattern.holds(values, self.cols()), "a solver left its pattern");
    }

    /// What is known of `values` without their errors.
    pub(super) fn certificate(&self, values: &[f32]) -> Certificate {
        let zeros = values.iter().filter(|v| **v == 0.0).count();
        Certificate {
            sparsity: zeros as f64 / values.len().max(1) as f64,
            tokens: self.calibration.tokens(),
            dead_channels: self.calibration.dead_channels(),
            converged: true,
            ..Certificate::default()
        }
    }
}
