//! The data term as a quadratic in `D = V - W`:
//!
//! ```text
//! J = 1/2 tr(D G D^T) + <D, B> + c,   B = W P,   c = 1/2 tr(W Q W^T),   grad J = D G + B
//! ```
//! All matrices are divided by the mean of `diag(G)`, so step sizes and penalties do not depend
//! on the number of tokens or on the scale of the activations.

use super::Statistics;
use super::statistics::Sum;
use crate::error::{Error, Result};
use crate::float::first_non_finite;
use crate::kernels::Kernel;
use crate::linalg::{PackedB, ROW_BLOCK, Scratch, dot, gemm, quadratic_form};
use crate::par::Job;

/// One operator's data term, ready to be evaluated.
pub struct GramQuadratic<'a> {
    /// The kernel for products with `G`.
    pub kernel: Kernel,
    /// `W [m, n]`.
    pub weight: &'a [f32],
    /// Input channels.
    pub n: usize,
    /// `G [n, n]`, normalised to a mean diagonal of one.
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
        let (kernel, n) = (Kernel::select()?, stats.width());
        if n == 0 || !weight.len().is_multiple_of(n) {
            return Err(Error::Shape {
                what: "weight".into(),
                expected: format!("rows of {n} columns"),
                found: format!("{} values", weight.len()),
            });
        }
        if let Some(index) = first_non_finite(weight) {
            return Err(Error::NonFinite { what: "weight".into(), index });
        }
        let unit = stats.diagonal().iter().sum::<f64>() / n as f64;
        let scale = if unit > 0.0 { 1.0 / unit } else { 1.0 };
        let gram = stats.matrix(job, Sum::Gram, scale)?;
        let packed = PackedB::new(&kernel, &gram, n, n, n);
        let mut term = GramQuadratic {
            kernel,
            weight,
            n,
            gram,
            packed,
            linear: None,
            constant: 0.0,
            energy: 0.0,
        };
        if stats.corrected() {
            let packed = |which| Ok(term.pack(&stats.matrix(job, which, scale)?));
            let energy = term.form(job, weight, &packed(Sum::Dense)?)?;
            let constant = term.form(job, weight, &packed(Sum::Drift)?)?;
            let linear = term.product(job, weight, &packed(Sum::Cross)?)?;
            (term.energy, term.constant, term.linear) = (energy, constant, Some(linear));
        } else {
            term.energy = term.form(job, weight, &term.packed)?;
        }
        Ok(term)
    }

    fn pack(&self, matrix: &[f32]) -> PackedB {
        PackedB::new(&self.kernel, matrix, self.n, self.n, self.n)
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
        let d: Vec<f32> = v.iter().zip(self.weight).map(|(a, b)| a - b).collect();
        let cross = self.linear.as_ref().map_or(0.0, |b| dot(&d, b));
        let error = self.form(job, &d, &self.packed)? + 2.0 * cross + self.constant;
        self.relative(error)
    }

    /// `|| (A - B) X* ||^2 / || W X ||^2`.
    pub fn relative_distance(&self, job: &Job, a: &[f32], b: &[f32]) -> Result<f64> {
        let d: Vec<f32> = a.iter().zip(b).map(|(x, y)| x - y).collect();
        self.relative(self.form(job, &d, &self.packed)?)
    }

    fn relative(&self, error: f64) -> Result<f64> {
        if !error.is_finite() || !self.energy.is_finite() {
            return Err(Error::NonFinite { what: "squared output error".into(), index: 0 });
        }
        // Rounding may leave a tiny negative square; an operator without input has no error.
        Ok(if self.energy > 0.0 { error.max(0.0) / self.energy } else { 0.0 })
    }
}
