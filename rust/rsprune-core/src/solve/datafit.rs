//! The data term as a quadratic in `D = V - W`:
//!
//! ```text
//! J = 1/2 tr(D G D^T) + <D, B> + c,   B = W P,   c = 1/2 tr(W Q W^T),   grad J = D G + B
//! ```
//! All matrices are divided by the mean of `diag(G)`, so step sizes and penalties do not depend
//! on the number of tokens or on the scale of the activations. In the *scaled* form the variables
//! are `W R` with `R = diag(sqrt G_jj)` as well, so that `diag(G)` is one: plain gradient steps are
//! then preconditioned, and a weight's size is what it does to the output.

use super::Statistics;
use super::measure::ratio;
use super::statistics::Sum;
use crate::error::{Error, Result};
use crate::float::first_non_finite;
use crate::kernels::Kernel;
use crate::linalg::{PackedB, ROW_BLOCK, Scratch, dot, gemm, quadratic_form};
use crate::par::Job;
use std::borrow::Cow;
use std::ops::Range;

/// Channels count as at least this much of the mean one: scaling stays invertible where a channel
/// is dead, its weights are the first to go, and damping holds those of a nearly dead one.
const SMALLEST_ROOT: f64 = 1e-2;

/// One operator's data term, ready to be evaluated.
pub struct GramQuadratic<'a> {
    /// The kernel for products with `G`.
    pub kernel: Kernel,
    /// `W [m, n]`, in the variables of this term.
    pub weight: Cow<'a, [f32]>,
    /// Input channels.
    pub n: usize,
    /// `G [n, n]`, normalised to a mean diagonal of one (scaled: to a diagonal of ones). Empty in
    /// a term that only measures.
    pub gram: Vec<f32>,
    /// `G`, packed.
    pub packed: PackedB,
    /// `B = W P [m, n]`, absent where the inputs of both models agree.
    pub linear: Option<Vec<f32>>,
    /// `2 c`.
    constant: f64,
    /// `|| W X ||^2`, by which errors are divided.
    energy: f64,
}

impl<'a> GramQuadratic<'a> {
    /// The data term of `weight [m, n]` under the sums of its input.
    pub fn new(job: &Job, weight: &'a [f32], stats: &Statistics) -> Result<GramQuadratic<'a>> {
        let mut term = GramQuadratic::measuring(job, weight, stats)?;
        term.gram = normalised(job, stats)?;
        Ok(term)
    }

    /// The same for [`GramQuadratic::relative_error`] alone, in half the memory.
    pub fn measuring(
        job: &Job,
        weight: &'a [f32],
        stats: &Statistics,
    ) -> Result<GramQuadratic<'a>> {
        GramQuadratic::build(job, Cow::Borrowed(weight), stats, &unit(stats))
    }

    /// The same in the variables `weight * roots`; see [`roots`].
    pub fn scaled(
        job: &Job,
        weight: &[f32],
        stats: &Statistics,
        roots: &[f32],
    ) -> Result<GramQuadratic<'static>> {
        let mut term = GramQuadratic::scaled_measuring(job, weight, stats, roots)?;
        term.gram = stats.matrix(job, Sum::Gram, &inverse(stats, roots))?;
        Ok(term)
    }

    /// Scaled, for measuring alone.
    pub fn scaled_measuring(
        job: &Job,
        weight: &[f32],
        stats: &Statistics,
        roots: &[f32],
    ) -> Result<GramQuadratic<'static>> {
        let mut scaled = weight.to_vec();
        for row in scaled.chunks_exact_mut(roots.len().max(1)) {
            row.iter_mut().zip(roots).for_each(|(w, r)| *w *= r);
        }
        GramQuadratic::build(job, Cow::Owned(scaled), stats, &inverse(stats, roots))
    }

    fn build(
        job: &Job,
        weight: Cow<'a, [f32]>,
        stats: &Statistics,
        s: &[f64],
    ) -> Result<GramQuadratic<'a>> {
        let (kernel, n) = (Kernel::select()?, stats.width());
        if n == 0 || !weight.len().is_multiple_of(n) {
            return Err(Error::Shape {
                what: "weight".into(),
                expected: format!("rows of {n} columns"),
                found: format!("{} values", weight.len()),
            });
        }
        if let Some(index) = first_non_finite(&weight) {
            return Err(Error::NonFinite { what: "weight".into(), index });
        }
        let packed = stats.packed(job, &kernel, Sum::Gram, s)?;
        let (gram, linear, constant, energy) = (Vec::new(), None, 0.0, 0.0);
        let mut term = GramQuadratic { kernel, weight, n, gram, packed, linear, constant, energy };
        if stats.corrected() {
            let packed = |which| stats.packed(job, &kernel, which, s);
            let energy = term.form(job, &term.weight, &packed(Sum::Dense)?)?;
            let constant = term.form(job, &term.weight, &packed(Sum::Drift)?)?;
            let linear = term.product(job, &term.weight, &packed(Sum::Cross)?)?;
            (term.energy, term.constant, term.linear) = (energy, constant, Some(linear));
        } else {
            term.energy = term.form(job, &term.weight, &term.packed)?;
        }
        Ok(term)
    }

    /// Rows of the term's `linear` that lie in `range` of the flat matrix.
    pub fn linear_rows(&self, range: Range<usize>) -> Option<&[f32]> {
        self.linear.as_ref().map(|b| &b[range])
    }

    /// `tr(A M A^T)`, row blocks in parallel, folded in order.
    fn form(&self, job: &Job, a: &[f32], m: &PackedB) -> Result<f64> {
        let len = ROW_BLOCK * self.n;
        let parts = job.map(a.len().div_ceil(len), |i| {
            let rows = &a[i * len..((i + 1) * len).min(a.len())];
            let mut scratch = Scratch::default();
            Ok(quadratic_form(&self.kernel, &mut scratch, rows, rows.len() / self.n, m))
        })?;
        Ok(parts.iter().sum())
    }

    fn product(&self, job: &Job, a: &[f32], m: &PackedB) -> Result<Vec<f32>> {
        let mut out = vec![0.0f32; a.len()];
        let len = ROW_BLOCK * self.n;
        job.map_blocks(&mut out, len, |i, c| {
            let rows = c.len() / self.n;
            gemm(&self.kernel, &mut Scratch::default(), (&a[i * len..], rows, self.n), m, c);
            Ok(())
        })?;
        Ok(out)
    }

    /// `|| V X* - W X ||^2 / || W X ||^2`.
    pub fn relative_error(&self, job: &Job, v: &[f32]) -> Result<f64> {
        let error = self.difference(job, v, &self.weight, self.linear.as_deref())? + self.constant;
        ratio(error, self.energy)
    }

    /// `|| (A - B) X* ||^2 / || W X ||^2`.
    pub fn relative_distance(&self, job: &Job, a: &[f32], b: &[f32]) -> Result<f64> {
        ratio(self.difference(job, a, b, None)?, self.energy)
    }

    /// `tr(D G D^T) + 2 <D, linear>` with `D = A - B`, of which a block of rows exists at a time.
    fn difference(&self, job: &Job, a: &[f32], b: &[f32], linear: Option<&[f32]>) -> Result<f64> {
        let len = ROW_BLOCK * self.n;
        let parts = job.map(a.len().div_ceil(len), |i| {
            let range = i * len..((i + 1) * len).min(a.len());
            let pairs = a[range.clone()].iter().zip(&b[range.clone()]);
            let d: Vec<f32> = pairs.map(|(x, y)| x - y).collect();
            let cross = linear.map_or(0.0, |l| dot(&d, &l[range]));
            let (rows, mut scratch) = (d.len() / self.n, Scratch::default());
            Ok(quadratic_form(&self.kernel, &mut scratch, &d, rows, &self.packed) + 2.0 * cross)
        })?;
        Ok(parts.iter().sum())
    }
}

/// `G [n, n]`, normalised to a mean diagonal of one.
pub(super) fn normalised(job: &Job, stats: &Statistics) -> Result<Vec<f32>> {
    stats.matrix(job, Sum::Gram, &unit(stats))
}

fn unit(stats: &Statistics) -> Vec<f64> {
    vec![1.0 / mean_root(stats); stats.width()]
}

fn inverse(stats: &Statistics, roots: &[f32]) -> Vec<f64> {
    let mean = mean_root(stats);
    roots.iter().map(|r| 1.0 / (mean * f64::from(*r))).collect()
}

/// The root of the mean of `diag(G)`; one where nothing was ever seen.
fn mean_root(stats: &Statistics) -> f64 {
    let mean = stats.diagonal().iter().sum::<f64>() / stats.width().max(1) as f64;
    if mean > 0.0 { mean.sqrt() } else { 1.0 }
}

/// `sqrt(G_jj / mean) [n]`, bounded away from zero: what a unit of weight does to the output.
pub fn roots(stats: &Statistics) -> Vec<f32> {
    let mean = mean_root(stats);
    stats.diagonal().iter().map(|g| (g.sqrt() / mean).max(SMALLEST_ROOT) as f32).collect()
}
