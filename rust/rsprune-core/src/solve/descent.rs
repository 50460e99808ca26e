//! Local search over masks: exact minimisation over a few weights at a time, the rest fixed.
//!
//! Keep-of patterns, group descent. With `H = G + damping I` and the gradient `g` at `V`:
//! ```text
//! for each group c of `of` columns, all rows:
//!     h   = v_c H_cc - g_c                                    H v_c = h at the free minimum
//!     S   = argmax over the C(of, keep) patterns of  h_S (H_SS)^-1 h_S^T
//!     v_c = (H_SS)^-1 h_S on S, zero elsewhere;               g += (change of v_c) H_c:
//! ```
//! The small inverses are shared by all rows. Inside of a block of columns `g` is kept up to date
//! group by group, between blocks by one product: a sweep costs one product with `H`.
//!
//! Ratios and groups with too many patterns, pair swaps: of the cheapest kept weights and the most
//! wanted removed ones of a unit (a row, or a group) the pair whose exchange lowers `J` most, as
//! long as there is one. Every step is exact, so `J` never rises.

use super::GramQuadratic;
use super::refit::gradient;
use crate::error::Result;
use crate::linalg::{ROW_BLOCK, Scratch, gemm_add};
use crate::par::Job;
use crate::pattern::Pattern;

const BLOCK: usize = 128;
/// Groups with more patterns than 4:8 has are searched by swaps.
const MOST_PATTERNS: usize = 70;
/// Candidates on each side of a swap.
const CANDIDATES: usize = 8;
/// A swap that changes `J` by less than this share of what it gains may be rounding.
const NOISE: f32 = 1e-5;

/// At most `sweeps` sweeps from `values [m, n]`, which are in the pattern; in place.
pub(super) fn local_search(
    job: &Job,
    term: &GramQuadratic,
    pattern: Pattern,
    values: &mut [f32],
    damping: f64,
    sweeps: usize,
) -> Result<()> {
    let (n, len) = (term.n, ROW_BLOCK * term.n);
    let groups = match pattern {
        Pattern::KeepOf { keep, of } => Groups::new(term, keep, of, damping as f32),
        Pattern::Ratio { .. } => None,
    };
    let unit = match pattern {
        Pattern::KeepOf { of, .. } => of,
        Pattern::Ratio { .. } => n,
    };
    job.map_blocks(values, len, |i, v| {
        let mut g = gradient(term, v, i * len, damping);
        for _ in 0..sweeps {
            job.check()?;
            let changed = match &groups {
                Some(groups) => groups.sweep(term, v, &mut g),
                None => swap_sweep(term, v, &mut g, unit, damping as f32),
            };
            if !changed {
                break;
            }
        }
        Ok(())
    })?;
    Ok(())
}

/// The patterns of a group and, for every group of columns, the inverses that go with them.
struct Groups {
    of: usize,
    damping: f32,
    /// Positions that stay, pattern after pattern, `keep` each.
    patterns: Vec<Vec<usize>>,
    /// `(H_SS)^-1 [keep, keep]`, pattern after pattern, group after group.
    inverses: Vec<f32>,
}

impl Groups {
    /// None where there are too many patterns.
    fn new(term: &GramQuadratic, keep: usize, of: usize, damping: f32) -> Option<Groups> {
        let patterns: Vec<Vec<usize>> = (0..1usize << of)
            .filter(|bits| bits.count_ones() as usize == keep)
            .map(|bits| (0..of).filter(|p| bits >> p & 1 == 1).collect())
            .collect();
        if patterns.len() > MOST_PATTERNS {
            return None;
        }
        let mut inverses = Vec::with_capacity(term.n / of * patterns.len() * keep * keep);
        for c in (0..term.n).step_by(of) {
            for pattern in &patterns {
                inverses.extend(small_inverse(term, c, pattern, damping));
            }
        }
        Some(Groups { of, damping, patterns, inverses })
    }

    /// One sweep over all groups of a block of rows; whether any weight changed.
    fn sweep(&self, term: &GramQuadratic, v: &mut [f32], g: &mut [f32]) -> bool {
        let (n, rows) = (term.n, v.len() / term.n);
        let mut changed = false;
        let mut change = vec![0.0f32; rows * BLOCK];
        let mut square = vec![0.0f32; BLOCK * BLOCK];
        let mut scratch = Scratch::default();
        for b0 in (0..n).step_by(BLOCK) {
            let w = BLOCK.min(n - b0);
            let (change, square) = (&mut change[..rows * w], &mut square[..w * w]);
            term.packed.read(b0..b0 + w, b0..b0 + w, square);
            for (k, change) in change.chunks_exact_mut(w).enumerate() {
                let row = k * n..(k + 1) * n;
                let (v, g) = (&mut v[row.clone()], &g[row]);
                changed |= term.kernel.vectorised(|| self.sweep_row(square, v, g, b0, change));
            }
            gemm_add(&term.kernel, &mut scratch, (change, rows, w), &term.packed, b0..b0 + w, g);
            for (g, change) in g.chunks_exact_mut(n).zip(change.chunks_exact(w)) {
                g[b0..b0 + w].iter_mut().zip(change).for_each(|(g, d)| *g += self.damping * d);
            }
        }
        changed
    }

    /// The groups of one row between `b0` and `b0 + change.len()`, of which `square` are the rows
    /// and columns of `G`; `change` is what was added.
    #[inline]
    fn sweep_row(
        &self,
        square: &[f32],
        v: &mut [f32],
        g: &[f32],
        b0: usize,
        change: &mut [f32],
    ) -> bool {
        let w = change.len();
        let mut local = [0.0f32; BLOCK];
        local[..w].copy_from_slice(&g[b0..b0 + w]);
        let mut changed = false;
        for c in (0..w).step_by(self.of) {
            let old = &mut v[b0 + c..b0 + c + self.of];
            let new = self.minimise((square, w), (b0, c), old, &local[c..c + self.of]);
            for (j, (old, new)) in old.iter_mut().zip(new).enumerate() {
                let d = new - *old;
                change[c + j] = d;
                if d != 0.0 {
                    let h = &square[(c + j) * w..][..w];
                    local[c..w].iter_mut().zip(&h[c..]).for_each(|(g, h)| *g += d * h);
                    local[c + j] += self.damping * d;
                    changed |= (*old == 0.0) != (new == 0.0);
                    *old = new;
                }
            }
        }
        changed
    }

    /// The exact minimiser over one group of one row.
    #[inline]
    fn minimise(
        &self,
        (square, w): (&[f32], usize),
        (b0, c): (usize, usize),
        v: &[f32],
        g: &[f32],
    ) -> [f32; 16] {
        let mut h = [0.0f32; 16];
        for j in 0..self.of {
            let row = &square[(c + j) * w + c..][..self.of];
            let dot: f32 = row.iter().zip(v).map(|(h, v)| h * v).sum();
            h[j] = dot + self.damping * v[j] - g[j];
        }
        let keep = self.patterns[0].len();
        let each = self.patterns.len() * keep * keep;
        let inverses = &self.inverses[(b0 + c) / self.of * each..][..each];
        let (mut best, mut gain) = (0, f32::NEG_INFINITY);
        for (p, (pattern, inverse)) in
            self.patterns.iter().zip(inverses.chunks_exact(keep * keep)).enumerate()
        {
            let mut value = 0.0;
            for (row, a) in inverse.chunks_exact(keep).zip(pattern) {
                value += h[*a] * row.iter().zip(pattern).map(|(i, b)| i * h[*b]).sum::<f32>();
            }
            if value > gain {
                (best, gain) = (p, value);
            }
        }
        let mut out = [0.0f32; 16];
        let inverse = &inverses[best * keep * keep..][..keep * keep];
        let pattern = &self.patterns[best];
        for (row, a) in inverse.chunks_exact(keep).zip(pattern) {
            out[*a] = row.iter().zip(pattern).map(|(i, b)| i * h[*b]).sum();
        }
        out
    }
}

/// `(H_SS)^-1` of the columns `c + pattern`, in f64 by Gauss-Jordan.
fn small_inverse(term: &GramQuadratic, c: usize, pattern: &[usize], damping: f32) -> Vec<f32> {
    let k = pattern.len();
    let mut a = vec![0.0f64; k * k];
    for (i, p) in pattern.iter().enumerate() {
        for (j, q) in pattern.iter().enumerate() {
            a[i * k + j] = f64::from(term.packed.at(c + p, c + q));
        }
        a[i * k + i] += f64::from(damping).max(1e-6); // twin channels have no inverse
    }
    for p in 0..k {
        let mut row: Vec<f64> = a[p * k..(p + 1) * k].to_vec();
        let pivot = std::mem::replace(&mut row[p], 1.0);
        row.iter_mut().for_each(|v| *v /= pivot);
        for (i, other) in a.chunks_exact_mut(k).enumerate() {
            if i == p {
                other.copy_from_slice(&row);
            } else {
                let factor = std::mem::take(&mut other[p]);
                other.iter_mut().zip(&row).for_each(|(x, r)| *x -= factor * r);
            }
        }
    }
    a.iter().map(|v| *v as f32).collect()
}

/// Swaps in every unit of every row until none helps; whether there was one.
fn swap_sweep(
    term: &GramQuadratic,
    v: &mut [f32],
    g: &mut [f32],
    unit: usize,
    damping: f32,
) -> bool {
    let mut changed = false;
    let diagonal: Vec<f32> = (0..term.n).map(|i| term.packed.at(i, i)).collect();
    for (v, g) in v.chunks_exact_mut(term.n).zip(g.chunks_exact_mut(term.n)) {
        for first in (0..term.n).step_by(unit) {
            for _ in 0..unit / 4 {
                let unit = first..first + unit;
                let Some(swap) = best_swap((term, &diagonal), v, g, unit, damping) else { break };
                swap.apply(term, v, g, damping);
                changed = true;
            }
        }
    }
    changed
}

/// `v_out` becomes zero and `v_in` becomes `value`.
struct Swap {
    out: usize,
    into: usize,
    value: f32,
}

impl Swap {
    fn apply(&self, term: &GramQuadratic, v: &mut [f32], g: &mut [f32], damping: f32) {
        for (at, new) in [(self.out, 0.0), (self.into, self.value)] {
            let d = new - v[at];
            term.packed.along_row(at, |first, h| {
                g[first..].iter_mut().zip(h).for_each(|(g, h)| *g += d * h);
            });
            g[at] += damping * d;
            v[at] = new;
        }
    }
}

/// The exchange that lowers `J` most among the likeliest candidates of a unit, if any does.
///
/// Taking out `i` costs `H_ii v_i^2 / 2 - g_i v_i` and moves `g_j` by `-H_ij v_i`; putting in `j`
/// then gains `g_j^2 / (2 H_jj)`.
fn best_swap(
    (term, diagonal): (&GramQuadratic, &[f32]),
    v: &[f32],
    g: &[f32],
    unit: std::ops::Range<usize>,
    damping: f32,
) -> Option<Swap> {
    let own = |i: usize| diagonal[i] + damping.max(1e-6);
    let cost = |i: usize| v[i] * (0.5 * own(i) * v[i] - g[i]);
    let gain = |j: usize, g: f32| 0.5 * g * g / own(j);
    let (mut outs, mut ins) = (Smallest::default(), Smallest::default());
    for i in unit {
        if v[i] == 0.0 {
            ins.offer(-gain(i, g[i]), i);
        } else {
            outs.offer(cost(i), i);
        }
    }
    let (mut best, mut least) = (None, 0.0f32);
    for &(cost, out) in outs.items() {
        for &(_, into) in ins.items() {
            let moved = g[into] - term.packed.at(out, into) * v[out];
            let gained = gain(into, moved);
            let change = cost - gained;
            if change < least && change < -NOISE * gained {
                least = change;
                best = Some(Swap { out, into, value: -moved / own(into) });
            }
        }
    }
    best
}

/// The few smallest of what is offered, in order.
#[derive(Default)]
struct Smallest {
    held: [(f32, usize); CANDIDATES],
    count: usize,
}

impl Smallest {
    fn offer(&mut self, key: f32, index: usize) {
        if self.count == CANDIDATES && key >= self.held[CANDIDATES - 1].0 {
            return;
        }
        let mut at = self.count.min(CANDIDATES - 1);
        self.count = (self.count + 1).min(CANDIDATES);
        while at > 0 && self.held[at - 1].0 > key {
            self.held[at] = self.held[at - 1];
            at -= 1;
        }
        self.held[at] = (key, index);
    }

    fn items(&self) -> &[(f32, usize)] {
        &self.held[..self.count]
    }
}
