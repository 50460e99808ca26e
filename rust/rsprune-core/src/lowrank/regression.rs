//! Linear maps fitted to outputs, from sums over tokens.
//!
//! ```text
//! min over D (of rank r)   || T - D X ||_F^2 + l || D diag(G)^1/2 ||_F^2,     G = X X^T,  C = T X^T
//! B = C (G + l diag(G))^-1,   U = r leading eigenvectors of B C^T,   D = U^T U B
//! ```
//! `X [inputs]` and `T [outputs]` are one column a token. The penalty is in the scaled variables in which
//! every input channel has energy one: residual streams have channels a thousand times as strong
//! as the rest. Whoever wants `D` near a given map `D_0` fits `T - D_0 X`.
//! Reduced-rank regression is exact: `B C^T` is the covariance of what the full fit explains, penalty
//! included (Izenman 1975, "Reduced-rank regression for the multivariate linear model").

use crate::buffer::Room;
use crate::error::{Error, Result};
use crate::float::first_non_finite;
use crate::kernels::Kernel;
use crate::linalg::{
    GramSum, PackedB, ROW_BLOCK, Scratch, dot, gemm, reversed_cholesky, rows_times, solve_rows,
    times_transposed, top_eigenvectors, transposed,
};
use crate::par::Job;

/// Columns of the Gram that are packed together.
const PANEL: usize = 256;
/// Of the iteration that finds eigenvectors; any number would do.
const SEED: u64 = 0;

/// Sums over tokens of inputs and targets; without targets, of inputs alone.
pub struct Regression {
    inputs: usize,
    outputs: usize,
    gram: GramSum,
    /// `X T^T [inputs, outputs]`.
    cross: Vec<f32>,
    energy: f64,
    tokens: u64,
}

/// `D = output^T input` with `output [rank, outputs]` of orthonormal rows, or `D = input` itself.
pub struct Map {
    /// None where `input [outputs, inputs]` is the whole map.
    pub output: Option<Vec<f32>>,
    /// `[rank, inputs]`
    pub input: Vec<f32>,
}

/// A map with what is known of it.
pub struct Fit {
    /// The map.
    pub map: Map,
    /// The penalty that did best.
    pub damping: f64,
    /// `|| T - D X ||^2` over the tokens that were fitted, and of `D = 0`.
    pub loss: [f64; 2],
    /// The same over held-out tokens, where there are any.
    pub heldout: Option<[f64; 2]>,
}

impl Regression {
    /// Sums of nothing.
    pub fn new(inputs: usize, outputs: usize) -> Result<Regression> {
        let gram = GramSum::new(inputs, true, Room::Memory)?;
        let cross = vec![0.0; inputs * outputs];
        Ok(Regression { inputs, outputs, gram, cross, energy: 0.0, tokens: 0 })
    }

    /// Width of inputs and of targets.
    pub fn widths(&self) -> (usize, usize) {
        (self.inputs, self.outputs)
    }

    /// Tokens summed so far.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Adds `x [tokens, inputs]` and `targets [tokens, outputs]`.
    pub fn add(&mut self, job: &Job, kernel: &Kernel, x: &[f32], targets: &[f32]) -> Result<()> {
        let tokens = x.len() / self.inputs;
        if targets.len() != tokens * self.outputs {
            return Err(Error::Shape {
                what: "targets".into(),
                expected: format!("{tokens} x {}", self.outputs),
                found: format!("{} values", targets.len()),
            });
        }
        for (what, values) in [("inputs", x), ("targets", targets)] {
            if let Some(index) = first_non_finite(values) {
                return Err(Error::NonFinite { what: what.into(), index });
            }
        }
        let packed = PackedB::shared(job, kernel, x, (tokens, self.inputs), self.inputs)?;
        self.gram.add(job, kernel, x, &packed)?;
        let packed = PackedB::shared(job, kernel, targets, (tokens, self.outputs), self.outputs)?;
        self.gram.add_cross(job, kernel, x, &packed, &mut self.cross)?;
        self.energy += dot(targets, targets);
        self.tokens += tokens as u64;
        Ok(())
    }

    /// The map of the module's header.
    pub fn solve(
        &self,
        job: &Job,
        kernel: &Kernel,
        rank: Option<usize>,
        damping: f64,
    ) -> Result<Map> {
        let (n, m) = (self.inputs, self.outputs);
        let units = self.units();
        let mut h: Vec<f32> = vec![0.0; n * n];
        job.map_blocks(&mut h, n, |i, row| {
            let scaled = |j: usize| self.gram.at(i, j) * units[i] * units[j];
            row.iter_mut().enumerate().for_each(|(j, v)| *v = scaled(j) as f32);
            row[i] = (1.0 + damping) as f32; // dead channels too: they have no cross sums
            Ok(())
        })?;
        reversed_cholesky(job, kernel, &mut h, n, damping)?;
        let mut cross = transposed(&self.cross, m);
        scale_columns(&mut cross, &units);
        let mut whole = cross.clone();
        solve_rows(job, kernel, &mut whole, &h, n)?;
        drop(h);
        let Some(rank) = rank else {
            scale_columns(&mut whole, &units);
            return Ok(Map { output: None, input: whole });
        };
        let explained = symmetric(&times_transposed(job, kernel, &cross, (m, n), &whole)?, m);
        let (_, output) = top_eigenvectors(job, kernel, &explained, m, rank, SEED)?;
        let mut input = rows_times(job, kernel, &output, &whole, (m, n))?;
        scale_columns(&mut input, &units);
        Ok(Map { output: Some(output), input })
    }

    /// `min over V of rank r  || (W - V) X ||_F`: the factors of a weight `w [rows, inputs]` itself.
    ///
    /// `U` are leading eigenvectors of `W G W^T`, `V = U^T U W`.
    pub fn factors(&self, job: &Job, kernel: &Kernel, w: &[f32], rank: usize) -> Result<Map> {
        let (n, m) = (self.inputs, w.len() / self.inputs);
        let weighted = self.times_gram(job, kernel, w)?;
        let covariance = symmetric(&times_transposed(job, kernel, w, (m, n), &weighted)?, m);
        let (_, output) = top_eigenvectors(job, kernel, &covariance, m, rank, SEED)?;
        let input = rows_times(job, kernel, &output, w, (m, n))?;
        Ok(Map { output: Some(output), input })
    }

    /// `|| T - D X ||_F^2`
    pub fn loss(&self, job: &Job, kernel: &Kernel, map: &Map) -> Result<f64> {
        let (n, m) = (self.inputs, self.outputs);
        let rows = map.input.len() / n;
        let cross = transposed(&self.cross, m);
        let explained = match &map.output {
            Some(output) => rows_times(job, kernel, output, &cross, (m, n))?,
            None => cross,
        };
        debug_assert_eq!(explained.len(), rows * n);
        let weighted = self.times_gram(job, kernel, &map.input)?;
        Ok(self.energy - 2.0 * dot(&explained, &map.input) + dot(&weighted, &map.input))
    }

    /// `rows [k, inputs] * G`
    fn times_gram(&self, job: &Job, kernel: &Kernel, rows: &[f32]) -> Result<Vec<f32>> {
        let n = self.inputs;
        let mut out = vec![0.0f32; rows.len()];
        let width = PackedB::panel_width(kernel);
        for c0 in (0..n).step_by(PANEL) {
            let w = PANEL.min(n - c0);
            let packed =
                PackedB::filled(job, kernel, Room::Memory, (n, w), |range, columns, tile| {
                    for (row, i) in tile.chunks_exact_mut(width).zip(range) {
                        let entries = row.iter_mut().zip(columns.clone());
                        entries.for_each(|(v, j)| *v = self.gram.at(i, c0 + j) as f32);
                    }
                })?;
            job.map_blocks(&mut out, ROW_BLOCK * n, |block, lines| {
                let count = lines.len() / n;
                let mut product = vec![0.0f32; count * w];
                let left = (&rows[block * ROW_BLOCK * n..], count, n);
                gemm(kernel, &mut Scratch::default(), left, &packed, &mut product);
                for (line, values) in lines.chunks_exact_mut(n).zip(product.chunks_exact(w)) {
                    line[c0..c0 + w].copy_from_slice(values);
                }
                Ok(())
            })?;
        }
        Ok(out)
    }

    /// `diag(G)^-1/2`; zero for channels that carried nothing.
    fn units(&self) -> Vec<f64> {
        let invert = |d: f64| if d > 0.0 { 1.0 / d.sqrt() } else { 0.0 };
        self.gram.diagonal().into_iter().map(invert).collect()
    }
}

/// The best map over several penalties, by the loss on held-out tokens where there are any.
pub fn fit(
    job: &Job,
    kernel: &Kernel,
    calibration: &Regression,
    heldout: Option<&Regression>,
    rank: Option<usize>,
    dampings: &[f64],
) -> Result<Fit> {
    let mut best: Option<(f64, Fit)> = None;
    for damping in dampings {
        let map = calibration.solve(job, kernel, rank, *damping)?;
        let loss = [calibration.loss(job, kernel, &map)?, calibration.energy];
        let held = match heldout {
            Some(sums) => Some([sums.loss(job, kernel, &map)?, sums.energy]),
            None => None,
        };
        let judged = held.unwrap_or(loss)[0];
        if best.as_ref().is_none_or(|(least, _)| judged < *least) {
            best = Some((judged, Fit { map, damping: *damping, loss, heldout: held }));
        }
    }
    best.map(|(_, fit)| fit)
        .ok_or_else(|| Error::Option("dampings: expected one, found none".into()))
}

fn scale_columns(rows: &mut [f32], units: &[f64]) {
    for row in rows.chunks_exact_mut(units.len()) {
        row.iter_mut().zip(units).for_each(|(v, u)| *v = (f64::from(*v) * u) as f32);
    }
}

/// The symmetric part of what is symmetric up to rounding.
fn symmetric(s: &[f32], n: usize) -> Vec<f32> {
    (0..n * n).map(|at| 0.5 * (s[at] + s[at % n * n + at / n])).collect()
}
