//! The sums over calibration tokens that a layer problem needs.
//!
//! With `d = x* - x`, the drift of an input between the compressed and the dense model:
//! ```text
//! G = sum x* x*^T      P = sum d x*^T      Q = sum d d^T
//! ```
//! Written with the drift instead of with `x` itself, the objective has no cancellation:
//! small errors stay accurate however large the activations are.

use crate::buffer::{Buffer, Room};
use crate::error::{Error, Result};
use crate::float::first_non_finite;
use crate::kernels::Kernel;
use crate::linalg::{GramSum, PackedB};
use crate::par::Job;
use std::ops::Range;

/// Running sums of one group of operators that share their input of `n` channels.
pub struct Statistics {
    n: usize,
    tokens: u64,
    gram: GramSum,
    drift: Option<Drift>,
}

/// Which matrix of the sums.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Sum {
    /// `G`.
    Gram,
    /// `P`.
    Cross,
    /// `Q`.
    Drift,
    /// `sum x x^T = G - P - P^T + Q`, from `x = x* - d`.
    Dense,
}

struct Drift {
    cross: GramSum,
    gram: GramSum,
}

impl Statistics {
    /// Empty sums in `room`; `corrected` says that the compressed and the dense inputs differ.
    pub fn new(n: usize, corrected: bool, room: Room) -> Result<Statistics> {
        let sum = |symmetric| GramSum::new(n, symmetric, room);
        let drift = |()| Ok(Drift { cross: sum(false)?, gram: sum(true)? });
        let drift = corrected.then_some(()).map(drift).transpose()?;
        Ok(Statistics { n, tokens: 0, gram: sum(true)?, drift })
    }

    /// Adds one batch of inputs `x [tokens, n]`; `dense`, of the same shape, are the inputs in
    /// the dense model and are given exactly when the sums are corrected.
    pub fn add(
        &mut self,
        job: &Job,
        kernel: &Kernel,
        x: &[f32],
        dense: Option<&[f32]>,
    ) -> Result<()> {
        let tokens = self.check(x, dense)?;
        let packed = PackedB::shared(job, kernel, x, (tokens, self.n), self.n)?;
        self.gram.add(job, kernel, x, &packed)?;
        if let (Some(drift), Some(dense)) = (&mut self.drift, dense) {
            let d: Vec<f32> = x.iter().zip(dense).map(|(a, b)| a - b).collect();
            drift.cross.add(job, kernel, &d, &packed)?;
            drop(packed);
            let packed = PackedB::shared(job, kernel, &d, (tokens, self.n), self.n)?;
            drift.gram.add(job, kernel, &d, &packed)?;
        }
        self.tokens += tokens as u64;
        // Finite activations may still have squares that overflow.
        match self.gram.diagonal().iter().position(|g| !g.is_finite()) {
            Some(index) => Err(Error::NonFinite { what: "squared activations".into(), index }),
            None => Ok(()),
        }
    }

    fn check(&self, x: &[f32], dense: Option<&[f32]>) -> Result<usize> {
        if self.n == 0
            || !x.len().is_multiple_of(self.n)
            || dense.is_some_and(|d| d.len() != x.len())
        {
            return Err(Error::Shape {
                what: "activations".into(),
                expected: format!("tokens x {} twice", self.n),
                found: format!("{} and {:?} values", x.len(), dense.map(<[f32]>::len)),
            });
        }
        if dense.is_some() != self.drift.is_some() {
            return Err(Error::Option("dense inputs go with corrected statistics only".into()));
        }
        for (what, values) in [("activations", Some(x)), ("dense activations", dense)] {
            if let Some(index) = values.and_then(first_non_finite) {
                return Err(Error::NonFinite { what: what.into(), index });
            }
        }
        Ok(x.len() / self.n)
    }

    /// Input channels.
    pub fn width(&self) -> usize {
        self.n
    }

    /// Tokens added so far.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Whether the dense inputs are kept apart.
    pub fn corrected(&self) -> bool {
        self.drift.is_some()
    }

    /// Channels that never carried a value.
    pub fn dead_channels(&self) -> usize {
        self.gram.diagonal().iter().filter(|g| **g == 0.0).count()
    }

    /// `diag(G)`.
    pub fn diagonal(&self) -> Vec<f64> {
        self.gram.diagonal()
    }

    /// `diag(s) M diag(s)` in f32 for one of the matrices `M [n, n]` and `s [n]`, in memory. Square
    /// tiles, as a symmetric sum is read along columns above its diagonal.
    pub(super) fn matrix(&self, job: &Job, which: Sum, s: &[f64]) -> Result<Buffer> {
        const TILE: usize = 64;
        let n = self.n;
        let mut out = Buffer::memory(n * n);
        job.map_blocks(&mut out, TILE * n, |block, rows| {
            for j0 in (0..n).step_by(TILE) {
                for (r, row) in rows.chunks_exact_mut(n).enumerate() {
                    let last = (j0 + TILE).min(n);
                    let i = block * TILE + r;
                    for (j, out) in (j0..last).zip(&mut row[j0..last]) {
                        *out = (self.entry(which, i, j) * (s[i] * s[j])) as f32;
                    }
                }
            }
            Ok(())
        })?;
        Ok(out)
    }

    /// The same matrix in `room`, packed for products, without ever being in memory as it is.
    pub(super) fn packed(
        &self,
        job: &Job,
        kernel: &Kernel,
        which: Sum,
        s: &[f64],
        room: Room,
    ) -> Result<PackedB> {
        self.packed_part(job, kernel, which, s, (room, self.n, 0..self.n))
    }

    /// Some of its columns, as many of their rows as asked for.
    pub(super) fn packed_part(
        &self,
        job: &Job,
        kernel: &Kernel,
        which: Sum,
        s: &[f64],
        (room, rows, columns): (Room, usize, Range<usize>),
    ) -> Result<PackedB> {
        let (width, shape) = (PackedB::panel_width(kernel), (rows, columns.len()));
        PackedB::filled(job, kernel, room, shape, |rows, panel, tile| {
            for (j, c) in panel.map(|j| columns.start + j).enumerate() {
                for (i, r) in rows.clone().enumerate() {
                    tile[i * width + j] = (self.entry(which, r, c) * (s[r] * s[c])) as f32;
                }
            }
        })
    }

    fn entry(&self, which: Sum, i: usize, j: usize) -> f64 {
        match (which, &self.drift) {
            (Sum::Gram, _) | (Sum::Dense, None) => self.gram.at(i, j),
            (Sum::Cross, Some(d)) => d.cross.at(i, j),
            (Sum::Drift, Some(d)) => d.gram.at(i, j),
            (Sum::Dense, Some(d)) => {
                self.gram.at(i, j) - d.cross.at(i, j) - d.cross.at(j, i) + d.gram.at(i, j)
            }
            (Sum::Cross | Sum::Drift, None) => 0.0,
        }
    }

    /// `G [n, n]`.
    pub fn gram(&self) -> Vec<f64> {
        self.gram.value()
    }

    /// `P [n, n]`, if corrected.
    pub fn cross(&self) -> Option<Vec<f64>> {
        self.drift.as_ref().map(|d| d.cross.value())
    }

    /// `Q [n, n]`, if corrected.
    pub fn drift(&self) -> Option<Vec<f64>> {
        self.drift.as_ref().map(|d| d.gram.value())
    }
}
