//! FISTAPruner (arXiv 2408.03728), faithful mode.
//!
//! ```text
//! best = warm start
//! repeat until `patience` rounds in a row bring no gain:
//!     V = 20 FISTA iterations from best on  J(V) + lambda |V|_1
//!     R = V rounded to the pattern by magnitude;   keep R if J(R) < J(best)
//!     lambda up if rounding causes more than a share xi of the error of R, else down
//! ```
//! Published: objective, step 1/L, 20 iterations, xi = 0.3, patience 3, restart from the best
//! rounded point, corrected inputs, warm start. Reconstructed, as the text leaves it open: the
//! shares are of squared norms; lambda is in units of `mean(diag G) * rms(W)`, starts at
//! [`FistaOptions::lambda`], moves by factors of two until it is bracketed and is then bisected
//! in the logarithm; only rounds with a bracket count against patience.
//!
//! Tried on 12 matrices of SmolLM2-135M at 2:4 (error against SparseGPT's, geometric mean): Wanda
//! start with factor 10 from 1e-5 1.07 (literal start of the paper), from 0.1 with shares of norms
//! 1.13; factor 2 from 0.01: norms 1.03, squares 1.00 (taken, 15 rounds); factor 1.5 0.98 (23
//! rounds). A SparseGPT start gives 0.93 whatever the bracket.

use super::datafit::Terms;
use super::factor::Factor;
use super::score::wanda_point;
use super::sparsegpt::sparsegpt_point;
use super::{GramQuadratic, Solution, Task};
use crate::buffer::Buffer;
use crate::error::{Error, Result};
use crate::linalg::{ROW_BLOCK, Scratch, dot, gemm, largest_eigenvalue};
use crate::par::Job;

/// Where the first round starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WarmStart {
    /// Published for Llama.
    Wanda,
    /// Published for OPT.
    SparseGpt,
}

/// The constants of the method; [`FistaOptions::default`] are the published ones.
#[derive(Clone, Copy, Debug)]
pub struct FistaOptions {
    /// FISTA iterations a round.
    pub iterations: usize,
    /// Largest share of the error that rounding may cause before lambda rises.
    pub xi: f64,
    /// Rounds without a gain after which it stops.
    pub patience: usize,
    /// A cap on rounds.
    pub max_rounds: usize,
    /// First lambda.
    pub lambda: f64,
    /// First point.
    pub warm_start: WarmStart,
    /// Relative damping of a SparseGPT warm start.
    pub damping: f64,
}

impl Default for FistaOptions {
    fn default() -> FistaOptions {
        FistaOptions {
            iterations: 20,
            xi: 0.3,
            patience: 3,
            max_rounds: 40,
            lambda: 0.01,
            warm_start: WarmStart::Wanda,
            damping: 0.01,
        }
    }
}

/// Solves one operator; see the module's header.
pub fn fista(job: &Job, task: &Task, options: &FistaOptions) -> Result<Solution> {
    check_lambda(options.lambda)?;
    let Rounds { values, lambda, rounds } = fista_point(job, task, options)?;
    let mut solution = task.certify(job, values)?;
    solution.certificate.lambda = Some(lambda);
    solution.certificate.rounds = rounds;
    solution.certificate.iterations = rounds * options.iterations;
    solution.certificate.converged = rounds < options.max_rounds;
    Ok(solution)
}

/// Refuses a first lambda that no search can start from.
pub(super) fn check_lambda(lambda: f64) -> Result<()> {
    if lambda > 0.0 && lambda.is_finite() {
        return Ok(());
    }
    Err(Error::Option(format!("lambda_start: must be positive, found {lambda}")))
}

/// The best rounded point of all rounds.
pub(super) struct Rounds {
    pub values: Buffer,
    /// That it was found with; zero for the warm start.
    pub lambda: f64,
    pub rounds: usize,
}

/// The method's point in the variables that are stored, not yet rounded to their type.
pub(super) fn fista_point(job: &Job, task: &Task, options: &FistaOptions) -> Result<Rounds> {
    let terms = Terms::new(job, task.weight, task.calibration)?;
    let mut best = match options.warm_start {
        WarmStart::Wanda => wanda_point(job, task)?,
        WarmStart::SparseGpt => {
            let factor = Factor::new(job, &terms, task.calibration, options.damping)?;
            sparsegpt_point(job, task.pattern, &factor)?
        }
    };
    let term = terms.solving(job, task.calibration)?;
    let mut best_error = term.relative_error(job, &best)?;
    let mut search = LambdaSearch::new(options.lambda);
    let (mut rounds, mut stale, mut best_lambda) = (0, 0, 0.0);
    let lipschitz = largest_eigenvalue(job, &term.packed)?;
    let scale = (dot(task.weight, task.weight) / task.weight.len().max(1) as f64).sqrt();
    while lipschitz > 0.0 && stale < options.patience && rounds < options.max_rounds {
        let prox = Prox { step: 1.0 / lipschitz, threshold: search.lambda * scale / lipschitz };
        let point = iterate(job, &term, &best, prox, options.iterations)?;
        let mut rounded = job.copy(&point)?;
        task.pattern.project(&mut rounded, task.cols(), None);
        let total = term.relative_error(job, &rounded)?;
        let rounding = term.relative_distance(job, &point, &rounded)?;
        rounds += 1;
        stale += usize::from(search.bracketed());
        if total < best_error {
            (best, best_error, best_lambda, stale) = (rounded, total, search.lambda, 0);
        }
        if !search.advance(rounding > options.xi * total) {
            break;
        }
    }
    Ok(Rounds { values: best, lambda: best_lambda, rounds })
}

#[derive(Clone, Copy)]
struct Prox {
    step: f64,
    threshold: f64,
}

/// `iterations` FISTA steps from `start [m, n]`; every row block runs all of them by itself.
fn iterate(
    job: &Job,
    term: &GramQuadratic,
    start: &[f32],
    prox: Prox,
    iterations: usize,
) -> Result<Buffer> {
    let mut point = job.copy(start)?;
    let len = ROW_BLOCK * term.n;
    job.map_blocks(&mut point, len, |i, v| {
        let range = i * len..i * len + v.len();
        let linear = term.linear_rows(range.clone());
        let w = &term.weight[range];
        let rows = v.len() / term.n;
        let mut scratch = Scratch::default();
        let mut y = v.to_vec();
        let mut d = vec![0.0f32; v.len()];
        let mut gradient = vec![0.0f32; v.len()];
        let mut t = 1.0f64;
        for _ in 0..iterations {
            job.check()?;
            term.kernel.vectorised(|| {
                d.iter_mut().zip(&y).zip(w).for_each(|((d, y), w)| *d = y - w);
            });
            gemm(&term.kernel, &mut scratch, (&d, rows, term.n), &term.packed, &mut gradient);
            let next = (1.0 + (1.0 + 4.0 * t * t).sqrt()) / 2.0;
            term.kernel.vectorised(|| {
                if let Some(b) = linear {
                    gradient.iter_mut().zip(b).for_each(|(g, b)| *g += b);
                }
                proximal_step(v, &mut y, &gradient, prox, ((t - 1.0) / next) as f32);
            });
            t = next;
        }
        Ok(())
    })?;
    Ok(point)
}

/// `v' = soft(y - step * gradient, threshold)`, `y' = v' + momentum (v' - v)`.
#[inline]
fn proximal_step(v: &mut [f32], y: &mut [f32], gradient: &[f32], prox: Prox, momentum: f32) {
    let (step, threshold) = (prox.step as f32, prox.threshold as f32);
    for ((v, y), g) in v.iter_mut().zip(y).zip(gradient) {
        let u = *y - step * g;
        let new = u - u.clamp(-threshold, threshold); // the soft threshold without a branch
        *y = new + momentum * (new - *v);
        *v = new;
    }
}

/// lambda: by factors of two until bracketed, then by bisection of the logarithm.
pub(super) struct LambdaSearch {
    pub lambda: f64,
    too_low: Option<f64>,
    too_high: Option<f64>,
}

impl LambdaSearch {
    const RANGE: std::ops::Range<f64> = 1e-6..1e6;
    const RESOLUTION: f64 = 1e-3;

    pub fn new(lambda: f64) -> LambdaSearch {
        LambdaSearch { lambda, too_low: None, too_high: None }
    }

    pub fn bracketed(&self) -> bool {
        self.too_low.is_some() && self.too_high.is_some()
    }

    /// Moves on; false when there is no lambda left to try.
    pub fn advance(&mut self, raise: bool) -> bool {
        if raise {
            self.too_low = Some(self.lambda);
        } else {
            self.too_high = Some(self.lambda);
        }
        self.lambda = match (self.too_low, self.too_high) {
            (Some(low), Some(high)) if high / low - 1.0 < Self::RESOLUTION => return false,
            (Some(low), Some(high)) => (low * high).sqrt(),
            (Some(low), None) => low * 2.0,
            (None, Some(high)) => high / 2.0,
            (None, None) => unreachable!("one side was just set"),
        };
        Self::RANGE.contains(&self.lambda)
    }
}
