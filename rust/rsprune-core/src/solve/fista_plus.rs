//! FISTA, made to work (our own; `fista.rs` is the published method).
//!
//! ```text
//! best = polished SparseGPT point                               scaled variables throughout
//! repeat until `patience` rounds in a row bring no gain:
//!     V = FISTA iterations from best on  J(V) + lambda |V|_1,   momentum restarted row by row
//!     R = V rounded to the pattern, then refitted;              keep R if it scores better
//!     lambda up if rounding causes more than a share xi of the error, else down
//! best = polished best, or the polished point of the published method where that is better
//! ```
//! What differs from the published method and why: scaled variables, as 1/L moves only the top
//! directions otherwise; the momentum restarts where it points uphill; rounded points are judged
//! after their refit, by held-out error; lambda starts where the published search ends up and is
//! bracketed by factors of two.

use super::fista::{FistaOptions, LambdaSearch, check_lambda, fista_point};
use super::polish::{PolishOptions, Polished, polish_point};
use super::problem::{Problem, Unpacked};
use super::refit::refit;
use super::{GramQuadratic, Solution, Task};
use crate::buffer::Buffer;
use crate::error::Result;
use crate::linalg::{ROW_BLOCK, Scratch, dot, gemm, largest_eigenvalue};
use crate::par::Job;

/// The constants of the method.
#[derive(Clone, Copy, Debug)]
pub struct FistaPlusOptions {
    /// FISTA iterations a round.
    pub iterations: usize,
    /// Largest share of the error that rounding may cause before lambda rises.
    pub xi: f64,
    /// Rounds without a gain after which it stops.
    pub patience: usize,
    /// A cap on rounds.
    pub max_rounds: usize,
    /// First lambda, in units of the scaled weights' rms.
    pub lambda: f64,
    /// Added to the scaled Gram's unit diagonal.
    pub damping: f64,
    /// Conjugate gradient steps on the mask of every round.
    pub refit_steps: usize,
    /// Of the best point.
    pub polish: PolishOptions,
    /// The published method, run as well so that the result is never worse than its.
    pub floor: Option<FistaOptions>,
}

impl Default for FistaPlusOptions {
    fn default() -> FistaPlusOptions {
        FistaPlusOptions {
            iterations: 20,
            xi: 0.3,
            patience: 3,
            max_rounds: 12,
            lambda: 0.05,
            damping: 0.01,
            refit_steps: 8,
            polish: PolishOptions::default(),
            floor: Some(FistaOptions::default()),
        }
    }
}

/// Solves one operator; see the module's header.
pub fn fista_plus(job: &Job, task: &Task, options: &FistaPlusOptions) -> Result<Solution> {
    check_lambda(options.lambda)?;
    let (starts, problem) = Starts::find(job, task, options)?;
    let (course, polished) = fista_plus_point(job, &problem, starts, options)?;
    let mut solution = polished.certify(job, &problem)?;
    solution.certificate.lambda = Some(course.lambda);
    solution.certificate.rounds = course.rounds;
    solution.certificate.iterations = course.rounds * options.iterations;
    solution.certificate.converged = course.rounds < options.max_rounds;
    Ok(solution)
}

/// Points that need matrices of the Gram's size for themselves: found before the problem has its.
pub(super) struct Starts {
    /// SparseGPT's, in scaled variables.
    pub sparsegpt: Buffer,
    /// The published method's, in stored variables.
    published: Option<Buffer>,
}

impl Starts {
    pub fn find<'a>(
        job: &Job,
        task: &'a Task,
        options: &FistaPlusOptions,
    ) -> Result<(Starts, Problem<'a>)> {
        let published = |floor| Ok(fista_point(job, task, &floor)?.values);
        let published = options.floor.map(published).transpose()?;
        let problem = Unpacked::new(job, task)?;
        let sparsegpt = problem.sparsegpt_point(job, options.damping)?;
        Ok((Starts { sparsegpt, published }, problem.pack(job)?))
    }
}

/// The method in scaled variables: where its rounds ended, and the polished best point.
pub(super) fn fista_plus_point(
    job: &Job,
    problem: &Problem,
    starts: Starts,
    options: &FistaPlusOptions,
) -> Result<(Course, Polished)> {
    let (values, course) = run_rounds(job, problem, starts.sparsegpt, options)?;
    let polish = |values| polish_point(job, problem, values, &options.polish);
    let mut best = polish(values)?;
    if let Some(mut published) = starts.published {
        problem.scale(&mut published);
        let polished = polish(published)?;
        if polished.score < best.score {
            best = polished;
        }
    }
    Ok((course, best))
}

/// What led to the best point of all rounds.
pub(super) struct Course {
    pub lambda: f64,
    pub rounds: usize,
}

/// The best refitted point of all rounds, in scaled variables.
fn run_rounds(
    job: &Job,
    problem: &Problem,
    start: Buffer,
    options: &FistaPlusOptions,
) -> Result<(Buffer, Course)> {
    let term = &problem.term;
    let mut best_score = problem.score(job, &start)?;
    let mut refitted = job.copy(&start)?;
    refit(job, term, &mut refitted, options.damping, options.refit_steps)?;
    let refitted_score = problem.score(job, &refitted)?;
    let (mut best, mut course) = (start, Course { lambda: 0.0, rounds: 0 });
    if refitted_score < best_score {
        (best, best_score) = (refitted, refitted_score);
    }
    let mut search = LambdaSearch::new(options.lambda);
    let lipschitz = largest_eigenvalue(job, &term.packed)?;
    let rms = (dot(&term.weight, &term.weight) / term.weight.len().max(1) as f64).sqrt();
    let mut stale = 0;
    while lipschitz > 0.0 && stale < options.patience && course.rounds < options.max_rounds {
        let step = Step { length: 1.0 / lipschitz, threshold: search.lambda * rms / lipschitz };
        let point = iterate(job, term, &best, step, options.iterations)?;
        let mut rounded = job.copy(&point)?;
        problem.project(&mut rounded);
        let rounding = term.relative_distance(job, &point, &rounded)?;
        let total = term.relative_error(job, &rounded)?;
        refit(job, term, &mut rounded, options.damping, options.refit_steps)?;
        let score = problem.score(job, &rounded)?;
        course.rounds += 1;
        stale += 1;
        if score < best_score {
            (best, best_score, stale) = (rounded, score, 0);
            course.lambda = search.lambda;
        }
        if !search.advance(rounding > options.xi * total) {
            break;
        }
    }
    Ok((best, course))
}

#[derive(Clone, Copy)]
struct Step {
    length: f64,
    threshold: f64,
}

/// `iterations` steps from `start [m, n]`; every row block runs all of them by itself.
fn iterate(
    job: &Job,
    term: &GramQuadratic,
    start: &[f32],
    step: Step,
    iterations: usize,
) -> Result<Buffer> {
    let mut point = job.copy(start)?;
    let (n, len) = (term.n, ROW_BLOCK * term.n);
    job.map_blocks(&mut point, len, |i, v| {
        let range = i * len..i * len + v.len();
        let (w, linear) = (&term.weight[range.clone()], term.linear_rows(range));
        let mut scratch = Scratch::default();
        let mut ahead: Vec<f32> = v.iter().zip(w).map(|(v, w)| v - w).collect();
        let mut gradient = vec![0.0f32; v.len()];
        let mut momentum = vec![1.0f64; v.len() / n];
        for _ in 0..iterations {
            job.check()?;
            let left = (&ahead[..], v.len() / n, n);
            gemm(&term.kernel, &mut scratch, left, &term.packed, &mut gradient);
            if let Some(b) = linear {
                gradient.iter_mut().zip(b).for_each(|(g, b)| *g += b);
            }
            for (k, t) in momentum.iter_mut().enumerate() {
                let row = k * n..(k + 1) * n;
                let weight = (&mut v[row.clone()], &w[row.clone()]);
                let ahead = &mut ahead[row.clone()];
                *t = term.kernel.vectorised(|| step_row(weight, ahead, &gradient[row], step, *t));
            }
        }
        Ok(())
    })?;
    Ok(point)
}

/// One step of one row; `ahead` is the extrapolated point less `w`. Returns the momentum's `t`,
/// back at one where the step went against the direction of travel.
#[inline]
fn step_row(
    (v, w): (&mut [f32], &[f32]),
    ahead: &mut [f32],
    gradient: &[f32],
    step: Step,
    t: f64,
) -> f64 {
    let (length, threshold) = (step.length as f32, step.threshold as f32);
    let next = (1.0 + (1.0 + 4.0 * t * t).sqrt()) / 2.0;
    let momentum = ((t - 1.0) / next) as f32;
    let mut uphill = [0.0f32; 16]; // lanes, as a single sum could not be vectorised
    for (((v, w), a), g) in
        v.chunks_mut(16).zip(w.chunks(16)).zip(ahead.chunks_mut(16)).zip(gradient.chunks(16))
    {
        for (i, (((v, w), a), g)) in v.iter_mut().zip(w).zip(a).zip(g).enumerate() {
            let y = *a + w;
            let u = y - length * g;
            let new = u - u.clamp(-threshold, threshold); // the soft threshold without a branch
            let travel = new - *v;
            uphill[i] += (y - new) * travel;
            *a = new + momentum * travel - w;
            *v = new;
        }
    }
    if uphill.iter().sum::<f32>() <= 0.0 {
        return next;
    }
    ahead.iter_mut().zip(&*v).zip(w).for_each(|((a, v), w)| *a = v - w);
    1.0
}
