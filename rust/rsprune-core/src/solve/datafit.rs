//! The data term as a quadratic in `D = V - W`:
//!
//! ```text
//! J = 1/2 tr(D G D^T) + <D, B> + c,   B = W P,   c = 1/2 tr(W Q W^T),   grad J = D G + B
//! ```
//! All matrices are divided by the mean of `diag(G)`, so step sizes and penalties do not depend
//! on the number of tokens or on the scale of the activations. In the *scaled* form the variables
//! are `W R` with `R = diag(sqrt G_jj)` as well, so that `diag(G)` is one: plain gradient steps are
//! then preconditioned, and a weight's size is what it does to the output.
//!
//! A term is made in two steps, as a factor of `G` and its packed form are each as large as `G`:
//! [`Terms`] first, from which SparseGPT's point is found, then the packed [`GramQuadratic`]. No more
//! than one such matrix is in memory at a time; what else is as large, or as large as the weight,
//! lies in the job's room.

use super::Statistics;
use super::measure::ratio;
use super::statistics::Sum;
use crate::buffer::{Buffer, Room};
use crate::error::{Error, Result};
use crate::float::first_non_finite;
use crate::kernels::Kernel;
use crate::linalg::{PackedB, ROW_BLOCK, Scratch, dot, gemm_columns};
use crate::par::Job;
use std::ops::{Deref, Range};
use std::sync::Arc;

/// Channels count as at least this much of the mean one: scaling stays invertible where a channel
/// is dead, its weights are the first to go, and damping holds those of a nearly dead one.
const SMALLEST_ROOT: f64 = 1e-2;

/// Columns of a packed matrix that all rows are multiplied with before the next ones: a matrix that
/// lies in a file is read once a product and not once a row block. Whole panels of it, a few less where
/// panels do not divide them.
const STRIP: usize = 1024;

/// A matrix of the weight's shape that several may look at.
#[derive(Clone)]
pub enum Weight<'a> {
    /// The caller's.
    Lent(&'a [f32]),
    /// In other variables.
    Own(Arc<Buffer>),
}

impl Deref for Weight<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match self {
            Weight::Lent(values) => values,
            Weight::Own(values) => values,
        }
    }
}

/// What of a data term is no larger than the weight.
pub struct Terms<'a> {
    /// The kernel for products with `G`.
    pub kernel: Kernel,
    /// `W [m, n]`, in the variables of this term.
    pub weight: Weight<'a>,
    /// Input channels.
    pub n: usize,
    /// `B = W P [m, n]`, absent where the inputs of both models agree.
    pub linear: Option<Buffer>,
    /// By which rows and columns of the sums are multiplied `[n]`.
    scale: Vec<f64>,
    /// `2 c`.
    constant: f64,
    /// `|| W X ||^2`, by which errors are divided; of uncorrected sums it needs `G`.
    energy: f64,
}

impl<'a> Terms<'a> {
    /// Those of `weight [m, n]` under the sums of its input.
    pub fn new(job: &Job, weight: &'a [f32], stats: &Statistics) -> Result<Terms<'a>> {
        let scale = vec![1.0 / mean_root(stats); stats.width()];
        Terms::build(job, Weight::Lent(weight), stats, scale)
    }

    /// The same where `weight` is in the variables `W * roots`; see [`roots`].
    pub fn scaled(
        job: &Job,
        weight: Weight<'a>,
        stats: &Statistics,
        roots: &[f32],
    ) -> Result<Terms<'a>> {
        Terms::build(job, weight, stats, inverse(stats, roots))
    }

    fn build(
        job: &Job,
        weight: Weight<'a>,
        stats: &Statistics,
        scale: Vec<f64>,
    ) -> Result<Terms<'a>> {
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
        let (linear, constant, energy) = (None, 0.0, 0.0);
        let mut terms = Terms { kernel, weight, n, linear, scale, constant, energy };
        if stats.corrected() {
            terms.energy = terms.form(job, &terms.packed(job, stats, Sum::Dense, job.room())?)?;
            terms.constant = terms.form(job, &terms.packed(job, stats, Sum::Drift, job.room())?)?;
            let cross = terms.packed(job, stats, Sum::Cross, job.room())?;
            let linear = multiply(job, &kernel, &terms.rows(), terms.weight.len(), &cross)?;
            terms.linear = Some(linear);
        }
        Ok(terms)
    }

    /// `G [n, n]`, normalised to a mean diagonal of one (scaled: to a diagonal of ones).
    pub fn gram(&self, job: &Job, stats: &Statistics) -> Result<Buffer> {
        stats.matrix(job, Sum::Gram, &self.scale)
    }

    /// The data term for solvers: its Gram in memory.
    pub fn solving(self, job: &Job, stats: &Statistics) -> Result<GramQuadratic<'a>> {
        self.with_gram(job, stats, Room::Memory)
    }

    /// The data term for judging points now and then: its Gram in the job's room.
    pub fn measuring(self, job: &Job, stats: &Statistics) -> Result<GramQuadratic<'a>> {
        self.with_gram(job, stats, job.room())
    }

    fn with_gram(mut self, job: &Job, stats: &Statistics, room: Room) -> Result<GramQuadratic<'a>> {
        let packed = self.packed(job, stats, Sum::Gram, room)?;
        if !stats.corrected() {
            self.energy = self.form(job, &packed)?;
        }
        Ok(GramQuadratic { terms: self, packed })
    }

    fn packed(&self, job: &Job, stats: &Statistics, which: Sum, room: Room) -> Result<PackedB> {
        stats.packed(job, &self.kernel, which, &self.scale, room)
    }

    /// Rows of the term's `linear` that lie in `range` of the flat matrix.
    pub fn linear_rows(&self, range: Range<usize>) -> Option<&[f32]> {
        self.linear.as_ref().map(|b| &b[range])
    }

    fn rows(&self) -> impl Fn(Range<usize>) -> Vec<f32> + Sync {
        |range| self.weight[range].to_vec()
    }

    /// `tr(W M W^T)`.
    fn form(&self, job: &Job, m: &PackedB) -> Result<f64> {
        form(job, &self.kernel, &self.rows(), (self.weight.len(), None), m)
    }
}

/// One operator's data term, ready to be evaluated.
pub struct GramQuadratic<'a> {
    terms: Terms<'a>,
    /// `G`, packed.
    pub packed: PackedB,
}

impl<'a> Deref for GramQuadratic<'a> {
    type Target = Terms<'a>;

    fn deref(&self) -> &Terms<'a> {
        &self.terms
    }
}

impl GramQuadratic<'_> {
    /// `|| V X* - W X ||^2 / || W X ||^2`.
    pub fn relative_error(&self, job: &Job, v: &[f32]) -> Result<f64> {
        self.relative_error_of(job, v, |_| ())
    }

    /// The same at what `change` makes of the rows of `v`, of which a block is made at a time.
    pub fn relative_error_of(
        &self,
        job: &Job,
        v: &[f32],
        change: impl Fn(&mut [f32]) + Sync,
    ) -> Result<f64> {
        let difference = |range: Range<usize>| {
            let mut d = v[range.clone()].to_vec();
            change(&mut d);
            d.iter_mut().zip(&self.weight[range]).for_each(|(v, w)| *v -= w);
            d
        };
        let linear = self.linear.as_deref();
        let error = form(job, &self.kernel, &difference, (v.len(), linear), &self.packed)?;
        ratio(error + self.constant, self.energy)
    }

    /// `|| (A - B) X* ||^2 / || W X ||^2`.
    pub fn relative_distance(&self, job: &Job, a: &[f32], b: &[f32]) -> Result<f64> {
        let difference = |range: Range<usize>| -> Vec<f32> {
            a[range.clone()].iter().zip(&b[range]).map(|(x, y)| x - y).collect()
        };
        ratio(form(job, &self.kernel, &difference, (a.len(), None), &self.packed)?, self.energy)
    }
}

/// `tr(D M D^T) + 2 <D, linear>` for `len` values of `D`, of which `rows` makes those of a range.
/// Row blocks in parallel, folded in order.
fn form(
    job: &Job,
    kernel: &Kernel,
    rows: &(impl Fn(Range<usize>) -> Vec<f32> + Sync),
    (len, linear): (usize, Option<&[f32]>),
    m: &PackedB,
) -> Result<f64> {
    let product = multiply(job, kernel, rows, len, m)?;
    let block = ROW_BLOCK * m.n;
    let parts = job.map(len.div_ceil(block), |i| {
        let range = i * block..((i + 1) * block).min(len);
        let d = rows(range.clone());
        let cross = linear.map_or(0.0, |l| dot(&d, &l[range.clone()]));
        Ok(dot(&d, &product[range]) + 2.0 * cross)
    })?;
    Ok(parts.iter().sum())
}

/// `D M` in the job's room, with `D` as in [`form`].
fn multiply(
    job: &Job,
    kernel: &Kernel,
    rows: &(impl Fn(Range<usize>) -> Vec<f32> + Sync),
    len: usize,
    m: &PackedB,
) -> Result<Buffer> {
    let (n, block) = (m.n, ROW_BLOCK * m.n);
    let mut product = job.zeros(len)?;
    let strip = STRIP - STRIP % kernel.nr;
    for first in (0..n).step_by(strip) {
        let columns = first..(first + strip).min(n);
        job.map_blocks(&mut product, block, |i, c| {
            let d = rows(i * block..i * block + c.len());
            let left = (&d[..], c.len() / n, n);
            gemm_columns(kernel, &mut Scratch::default(), left, m, columns.clone(), c);
            Ok(())
        })?;
    }
    Ok(product)
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

/// `W R`: from the stored variables to the scaled ones, in place.
pub(super) fn scale(values: &mut [f32], roots: &[f32]) {
    for row in values.chunks_exact_mut(roots.len().max(1)) {
        row.iter_mut().zip(roots).for_each(|(v, r)| *v *= r);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::par::Pool;
    use std::sync::atomic::AtomicBool;

    #[test]
    fn strips_end_with_a_panel_of_every_kernel() {
        let (rows, n) = (3, STRIP + 76);
        let value = |i: usize| ((i * 7919 + 13) % 1009) as f32 / 1009.0 - 0.5;
        let (d, m): (Vec<f32>, Vec<f32>) =
            ((0..rows * n).map(value).collect(), (0..n * n).map(value).collect());
        let (pool, cancel) = (Pool::new(1).unwrap(), AtomicBool::new(false));
        for kernel in Kernel::available() {
            let packed = PackedB::new(&kernel, &m, n, n, n);
            let some = |range: Range<usize>| d[range].to_vec();
            let job = Job::new(&pool, &cancel);
            let product = multiply(&job, &kernel, &some, d.len(), &packed).unwrap();
            for (i, j) in [(0, 0), (1, STRIP - 5), (1, STRIP), (2, n - 1)] {
                let terms = (0..n).map(|p| f64::from(d[i * n + p]) * f64::from(m[p * n + j]));
                let expected: f64 = terms.sum();
                let found = f64::from(product[i * n + j]);
                assert!((found - expected).abs() < 1e-3, "{}: {found} {expected}", kernel.name);
            }
        }
    }
}
