//! ADMM with a growing penalty (ALPS, arXiv 2406.07831).
//!
//! ```text
//! min_{V, Z} J(V)  subject to  V = Z,  Z in the pattern;   scaled variables, H = G + damping I
//! repeat:  V = argmin J + <U, V> + rho/2 |V - Z|^2 = W + (rho (Z - W) - U - B)(H + rho I)^-1
//!          Z = P(V + U / rho)
//!          U = U + rho (V - Z)
//! every 3 iterations: stop if the support has not changed, else rho *= 1.3 / 1.2 / 1.1 for a
//!          change of >= 10 % / >= 0.5 % / less of the kept weights
//! ```
//! Published: all of that, rho = 0.1 at the start, damping 0.01, and a refit on the support at the
//! end. Ours: the slow schedule (rho 0.03, growth 1.1 / 1.07 / 1.05), linear term `B` for
//! corrected inputs.
//!
//! After the projection `U = rho (V + U/rho - Z)`: zero where a weight is kept. Rows need one
//! product with an inverse that all of them share. An eigendecomposition would serve every rho at
//! two products a step; the inverses of a whole schedule cost less than one eigendecomposition
//! by its count of operations at every shape in use, so there is no such path. From `largest_inverse` on,
//! conjugate gradients with `H + rho I` take the inverse's place, and memory is that of `G`.

use super::problem::Problem;
use super::refit::{System, product, refit};
use super::{GramQuadratic, Solution, Task};
use crate::buffer::Buffer;
use crate::error::{Error, Result};
use crate::linalg::{PackedB, ROW_BLOCK, Scratch, gemm, invert};
use crate::par::Job;
use crate::pattern::{Pattern, Scope};

const STEPS_A_RHO: usize = 3;
/// Conjugate gradient steps that replace one product with the inverse. At n = 512, 2:4, slow
/// schedule, the error was 0.00347 with 5 steps, 0.00333 with 10, 0.00328 with 20, and 0.00325 with
/// the inverse.
const INNER_STEPS: usize = 20;

/// The penalty's schedule and the length of the refit.
#[derive(Clone, Copy, Debug)]
pub struct AdmmOptions {
    /// Added to the scaled Gram's unit diagonal.
    pub damping: f64,
    /// First penalty.
    pub rho: f64,
    /// Growth where the support changed by at least 10 %, at least 0.5 %, less.
    pub growth: [f64; 3],
    /// A cap on iterations.
    pub max_iterations: usize,
    /// Conjugate gradient steps on the final support.
    pub refit_steps: usize,
    /// Wider operators do without an inverse.
    pub largest_inverse: usize,
}

impl AdmmOptions {
    /// As published.
    pub fn published() -> AdmmOptions {
        let growth = [1.3, 1.2, 1.1];
        AdmmOptions {
            damping: 0.01,
            rho: 0.1,
            growth,
            max_iterations: 300,
            refit_steps: 20,
            largest_inverse: 8192,
        }
    }

    /// Slower: about twice the iterations.
    pub fn slow() -> AdmmOptions {
        AdmmOptions { rho: 0.03, growth: [1.1, 1.07, 1.05], ..AdmmOptions::published() }
    }
}

/// Solves one operator; see the module's header.
pub fn admm(job: &Job, task: &Task, options: &AdmmOptions) -> Result<Solution> {
    if !(options.damping >= 0.0 && options.damping.is_finite()) {
        let found = options.damping;
        return Err(Error::Option(format!("damping: must be at least 0, found {found}")));
    }
    let problem = Problem::new(job, task)?;
    let Split { mut values, iterations, converged } =
        admm_point(job, task.pattern, &problem.term, options)?;
    refit(job, &problem.term, &mut values, options.damping, options.refit_steps)?;
    let mut solution = problem.certify(job, values)?;
    solution.certificate.iterations = iterations;
    solution.certificate.converged = converged;
    Ok(solution)
}

/// Where the splitting ended.
pub(super) struct Split {
    /// The projected point `Z` in scaled variables, before a refit.
    pub values: Buffer,
    pub iterations: usize,
    /// Whether the support came to rest.
    pub converged: bool,
}

pub(super) fn admm_point(
    job: &Job,
    pattern: Pattern,
    term: &GramQuadratic,
    options: &AdmmOptions,
) -> Result<Split> {
    let mut state = State::new(job, term)?;
    let mut rho = options.rho;
    let (mut iterations, mut converged) = (0, false);
    while !converged && iterations < options.max_iterations {
        let solve = Resolvent::new(job, term, options, rho)?;
        let before = state.support();
        for _ in 0..STEPS_A_RHO {
            state.step(job, pattern, &solve, rho)?;
        }
        iterations += STEPS_A_RHO;
        let changed = state.changed(&before);
        converged = changed == 0.0;
        rho *= match changed {
            c if c >= 0.1 => options.growth[0],
            c if c >= 0.005 => options.growth[1],
            _ => options.growth[2],
        };
    }
    Ok(Split { values: state.z(job)?, iterations, converged })
}

/// `Z` and `U` of every row block side by side, so that one worker owns both.
struct State<'a> {
    term: &'a GramQuadratic<'a>,
    blocks: Buffer,
}

impl<'a> State<'a> {
    /// `Z = W`, `U = 0`.
    fn new(job: &Job, term: &'a GramQuadratic<'a>) -> Result<State<'a>> {
        let mut state = State { term, blocks: job.zeros(2 * term.weight.len())? };
        let len = state.block_len();
        for (block, w) in state.blocks.chunks_mut(len).zip(term.weight.chunks(len / 2)) {
            block[..w.len()].copy_from_slice(w);
        }
        Ok(state)
    }

    fn block_len(&self) -> usize {
        2 * ROW_BLOCK * self.term.n
    }

    /// `Z` of every row block, or `U` where `second`.
    fn halves(&self, second: bool) -> impl Iterator<Item = &[f32]> {
        self.blocks.chunks(self.block_len()).map(move |block| {
            let (z, u) = block.split_at(block.len() / 2);
            if second { u } else { z }
        })
    }

    fn gathered(&self, job: &Job, second: bool) -> Result<Buffer> {
        let mut all = job.zeros(self.blocks.len() / 2)?;
        let parts = all.chunks_mut(self.block_len() / 2).zip(self.halves(second));
        parts.for_each(|(out, half)| out.copy_from_slice(half));
        Ok(all)
    }

    fn z(&self, job: &Job) -> Result<Buffer> {
        self.gathered(job, false)
    }

    /// Which weights are kept, a bit each; every row block begins a word.
    fn support(&self) -> Vec<u64> {
        let words = self.halves(false).flat_map(|z| z.chunks(64));
        words
            .map(|z| z.iter().enumerate().fold(0, |w, (i, z)| w | u64::from(*z != 0.0) << i))
            .collect()
    }

    /// How many weights came into or left the support, as a share of those that are kept.
    fn changed(&self, before: &[u64]) -> f64 {
        let now = self.support();
        let kept: u64 = now.iter().map(|w| u64::from(w.count_ones())).sum();
        let moved: u64 = now.iter().zip(before).map(|(a, b)| u64::from((a ^ b).count_ones())).sum();
        moved as f64 / kept.max(1) as f64
    }

    /// One iteration at `rho`. A pattern that counts over the matrix is projected in between.
    fn step(&mut self, job: &Job, pattern: Pattern, solve: &Resolvent, rho: f64) -> Result<()> {
        let (term, len) = (self.term, self.block_len());
        let whole = matches!(pattern, Pattern::Ratio { scope: Scope::Matrix, .. });
        job.map_blocks(&mut self.blocks, len, |i, block| {
            job.check()?;
            let (z, u) = block.split_at_mut(block.len() / 2);
            minimise(job, term, solve, (z, u), (i * len / 2, rho as f32))?;
            if !whole {
                z.copy_from_slice(u);
                term.kernel.vectorised(|| pattern.project(z, term.n, None));
                update_dual(term, z, u, rho as f32);
            }
            Ok(())
        })?;
        if whole {
            self.project_whole(job, pattern, rho as f32)?;
        }
        Ok(())
    }

    fn project_whole(&mut self, job: &Job, pattern: Pattern, rho: f32) -> Result<()> {
        let len = self.block_len();
        let mut all = self.gathered(job, true)?;
        pattern.project(&mut all, self.term.n, None);
        job.map_blocks(&mut self.blocks, len, |i, block| {
            let (z, u) = block.split_at_mut(block.len() / 2);
            z.copy_from_slice(&all[i * len / 2..][..z.len()]);
            update_dual(self.term, z, u, rho);
            Ok(())
        })?;
        Ok(())
    }
}

/// Replaces `u` by `V + U / rho` for the rows that start at flat index `first`.
fn minimise(
    job: &Job,
    term: &GramQuadratic,
    solve: &Resolvent,
    (z, u): (&[f32], &mut [f32]),
    (first, rho): (usize, f32),
) -> Result<()> {
    let range = first..first + z.len();
    let w = &term.weight[range.clone()];
    let (start, right) = term.kernel.vectorised(|| {
        let start: Vec<f32> = z.iter().zip(w).map(|(z, w)| z - w).collect();
        let mut right: Vec<f32> = start.iter().zip(&*u).map(|(e, u)| rho * e - u).collect();
        if let Some(b) = term.linear_rows(range) {
            right.iter_mut().zip(b).for_each(|(r, b)| *r -= b);
        }
        (start, right)
    });
    let e = solve.rows(job, term, right, start)?;
    let inverse = 1.0 / rho;
    term.kernel.vectorised(|| {
        for ((u, e), w) in u.iter_mut().zip(&e).zip(w) {
            *u = w + e + inverse * *u;
        }
    });
    Ok(())
}

/// From `u = V + U / rho` and its projection `z` to the new dual variable.
fn update_dual(term: &GramQuadratic, z: &[f32], u: &mut [f32], rho: f32) {
    term.kernel.vectorised(|| u.iter_mut().zip(z).for_each(|(u, z)| *u = rho * (*u - z)));
}

/// How rows are multiplied by `(H + rho I)^-1`.
enum Resolvent {
    Inverse(PackedB),
    Iterative { shift: f32 },
}

impl Resolvent {
    fn new(job: &Job, term: &GramQuadratic, options: &AdmmOptions, rho: f64) -> Result<Resolvent> {
        let n = term.n;
        let shift = (options.damping + rho) as f32;
        if n > options.largest_inverse {
            return Ok(Resolvent::Iterative { shift });
        }
        let mut h = Buffer::memory(n * n);
        job.map_blocks(&mut h, ROW_BLOCK * n, |i, rows| {
            let first = i * ROW_BLOCK;
            term.packed.read(first..first + rows.len() / n, 0..n, rows);
            Ok(())
        })?;
        (0..n).for_each(|i| h[i * n + i] += shift);
        invert(job, &term.kernel, &mut h, n)?;
        Ok(Resolvent::Inverse(PackedB::shared(job, &term.kernel, &h, (n, n), n)?))
    }

    /// `right (H + rho I)^-1`; the iteration begins at `start`, from where it need not go far.
    fn rows(
        &self,
        job: &Job,
        term: &GramQuadratic,
        right: Vec<f32>,
        start: Vec<f32>,
    ) -> Result<Vec<f32>> {
        let mut out = start;
        match self {
            Resolvent::Inverse(inverse) => {
                let left = (&right[..], right.len() / term.n, term.n);
                gemm(&term.kernel, &mut Scratch::default(), left, inverse, &mut out);
            }
            Resolvent::Iterative { shift } => {
                let mut residual = right;
                let ahead = product(term, &out, *shift);
                residual.iter_mut().zip(&ahead).for_each(|(r, a)| *r -= a);
                let system = System { term, shift: *shift, free: None };
                system.solve(job, residual, &mut out, INNER_STEPS)?;
            }
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::Room;
    use crate::float::Float;
    use crate::kernels::Kernel;
    use crate::par::Pool;
    use crate::solve::Statistics;
    use std::sync::atomic::AtomicBool;

    #[test]
    fn wide_operators_reach_the_same_error_without_an_inverse() {
        let (n, tokens, rows) = (96, 400, 24);
        let noise = |i: usize| ((i * 7919 + i / 13 * 31 + 7) % 1009) as f32 / 1009.0 - 0.5;
        let x: Vec<f32> = (0..tokens * n).map(|i| noise(i) + 0.5 * noise(i / n)).collect();
        let weight: Vec<f32> = (0..rows * n).map(|i| noise(i * 3 + 1)).collect();
        let (pool, flag) = (Pool::new(2).unwrap(), AtomicBool::new(false));
        let job = Job::new(&pool, &flag);
        let mut calibration = Statistics::new(n, false, Room::Memory).unwrap();
        calibration.add(&job, &Kernel::select().unwrap(), &x, None).unwrap();
        let (float, pattern) = (Float::F32, Pattern::KeepOf { keep: 2, of: 4 });
        let task =
            Task { weight: &weight, float, pattern, calibration: &calibration, heldout: None };
        let error = |largest_inverse| {
            let options = AdmmOptions { largest_inverse, ..AdmmOptions::published() };
            admm(&job, &task, &options).unwrap().certificate.error
        };
        let (with, without) = (error(n), error(n - 1));
        assert!(with > 0.0 && (without / with - 1.0).abs() < 0.02, "{with} {without}");
    }
}
