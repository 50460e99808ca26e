//! The relative error of one point, straight from the sums.
//!
//! ```text
//! for each panel of columns p:   error += <D G_p, D_p> + 2 <W P_p, D_p> + <W Q_p, W_p>
//!                               energy += <W X X^T_p, W_p>
//! ```
//! with `D = V - W`. Of symmetric sums only what lies above a panel's end is used, all but its own
//! square twice: half the work of a product. Nothing of the size of the Gram is in memory beside the sums themselves, which
//! decides what fits where an input is 14,336 channels wide. Solvers that measure many points keep
//! a [`GramQuadratic`](super::GramQuadratic) instead.

use super::Statistics;
use super::statistics::Sum;
use crate::buffer::Room;
use crate::error::{Error, Result};
use crate::float::first_non_finite;
use crate::kernels::Kernel;
use crate::linalg::{PackedB, ROW_BLOCK, Scratch, dot, gemm, gemm_add};
use crate::par::Job;
use std::ops::Range;

/// Columns of the sums that are packed together.
const PANEL: usize = 256;

/// `|| V X* - W X ||^2 / || W X ||^2` for `weight` and `values [m, n]`.
pub(super) fn relative_error(
    job: &Job,
    weight: &[f32],
    values: &[f32],
    stats: &Statistics,
) -> Result<f64> {
    if let Some(index) = first_non_finite(weight) {
        return Err(Error::NonFinite { what: "weight".into(), index });
    }
    let pair = Pair { job, kernel: Kernel::select()?, weight, values, stats };
    let (mut error, mut energy) = (0.0, 0.0);
    for first in (0..stats.width()).step_by(PANEL) {
        let columns = first..(first + PANEL).min(stats.width());
        let [of_error, of_weight] = pair.forms(&columns, Sum::Gram)?;
        error += of_error;
        if stats.corrected() {
            error += 2.0 * pair.cross(&columns)? + pair.forms(&columns, Sum::Drift)?[1];
            energy += pair.forms(&columns, Sum::Dense)?[1];
        } else {
            energy += of_weight;
        }
    }
    ratio(error, energy)
}

/// A squared error over the energy that it is relative to.
pub(super) fn ratio(error: f64, energy: f64) -> Result<f64> {
    if !error.is_finite() || !energy.is_finite() {
        return Err(Error::NonFinite { what: "squared output error".into(), index: 0 });
    }
    // Rounding may leave a tiny negative square; an operator without input has no error.
    Ok(if energy > 0.0 { error.max(0.0) / energy } else { 0.0 })
}

struct Pair<'a> {
    job: &'a Job<'a>,
    kernel: Kernel,
    weight: &'a [f32],
    values: &'a [f32],
    stats: &'a Statistics,
}

impl Pair<'_> {
    /// The columns' part of `tr(D M D^T)` and of `tr(W M W^T)`.
    fn forms(&self, columns: &Range<usize>, which: Sum) -> Result<[f64; 2]> {
        let packed = self.panel(columns.end, columns, which)?;
        let parts = self.rows(|weight, values| {
            let d = difference(values, weight);
            let form = |a: &[f32]| self.form(a, &packed, columns);
            if which == Sum::Gram { [form(&d), form(weight)] } else { [0.0, form(weight)] }
        })?;
        Ok([parts.iter().map(|p| p[0]).sum(), parts.iter().map(|p| p[1]).sum()])
    }

    /// The columns' part of `<W P, D>`.
    fn cross(&self, columns: &Range<usize>) -> Result<f64> {
        let packed = self.panel(self.stats.width(), columns, Sum::Cross)?;
        let parts = self.rows(|weight, values| {
            self.product(weight, &packed, &difference(values, weight), columns)
        })?;
        Ok(parts.iter().sum())
    }

    /// The first `rows` rows of the columns.
    fn panel(&self, rows: usize, columns: &Range<usize>, which: Sum) -> Result<PackedB> {
        let unit = vec![1.0; self.stats.width()];
        let part = (Room::Memory, rows, columns.clone());
        self.stats.packed_part(self.job, &self.kernel, which, &unit, part)
    }

    /// The columns' part of `tr(A M A^T)` for a block of rows and a symmetric `M`.
    fn form(&self, a: &[f32], m: &PackedB, columns: &Range<usize>) -> f64 {
        let (n, scratch) = (self.stats.width(), &mut Scratch::default());
        let (rows, first) = (a.len() / n, columns.start);
        let mut c = vec![0.0; rows * columns.len()];
        gemm_add(&self.kernel, scratch, (a, rows, n), m, 0..first, &mut c);
        c.iter_mut().for_each(|c| *c *= 2.0);
        gemm_add(&self.kernel, scratch, (&a[first..], rows, n), m, first..columns.end, &mut c);
        self.dots(&c, a, columns)
    }

    /// `<A M_p, B_p>` for blocks of rows `a` and `b`.
    fn product(&self, a: &[f32], m: &PackedB, b: &[f32], columns: &Range<usize>) -> f64 {
        let n = self.stats.width();
        let rows = a.len() / n;
        let mut c = vec![0.0; rows * columns.len()];
        gemm(&self.kernel, &mut Scratch::default(), (a, rows, n), m, &mut c);
        self.dots(&c, b, columns)
    }

    /// `<C, B_p>`.
    fn dots(&self, c: &[f32], b: &[f32], columns: &Range<usize>) -> f64 {
        let rows = c.chunks_exact(columns.len()).zip(b.chunks_exact(self.stats.width()));
        rows.map(|(c, b)| dot(c, &b[columns.clone()])).sum()
    }

    /// `f(weight, values)` over blocks of rows; the results stand in order.
    fn rows<T: Send>(&self, f: impl Fn(&[f32], &[f32]) -> T + Sync) -> Result<Vec<T>> {
        let len = ROW_BLOCK * self.stats.width();
        self.job.map(self.weight.len().div_ceil(len), |i| {
            let range = i * len..((i + 1) * len).min(self.weight.len());
            Ok(f(&self.weight[range.clone()], &self.values[range]))
        })
    }
}

fn difference(a: &[f32], b: &[f32]) -> Vec<f32> {
    a.iter().zip(b).map(|(x, y)| x - y).collect()
}
