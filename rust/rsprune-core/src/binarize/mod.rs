//! Methods that leave a bit or a few of a weight: block after block of columns, errors made up for.
//!
//! ```text
//! for each block b of columns:   T_b = what the weights have become by now (see `sweep`)
//!                                V_b = what the method makes of T_b, every row by itself
//! ```
//! All methods share one Cholesky factor and one sweep. [`exact`] compensates exactly and chooses
//! codes by exact changes of the objective; the others are published methods, as far as they are
//! known, on the same path.

mod arb;
mod billm;
mod codes;
mod exact;
mod gptq;
mod groups;
mod pbs2p;
mod residual;
mod sweep;

pub use arb::arb;
pub use billm::billm;
pub use exact::{SCALE_COLUMNS, Stage, exact, signs_bits};
pub use gptq::gptq;
pub use pbs2p::pbs2p;
pub use residual::exact_residual;

use crate::buffer::Buffer;
use crate::error::{Error, Result};
use crate::pack::{Dense, Groups, Part, true_bits};
use crate::par::Job;
use crate::pattern::Pattern;
use crate::solve::{Bits, Certificate, Factor, Solution, Task};

/// A solution with its packed form, where it cannot be worked out from the values alone.
pub struct Packed {
    /// Values and certificate.
    pub solution: Solution,
    /// The format's name.
    pub format: String,
    /// Its parts, with their bytes.
    pub parts: Vec<(Part, Vec<u8>)>,
}

/// One code of `pbs2p-exact`: of the first plane of signs, and of the second where there is one.
pub type Code = (Pattern, Option<Pattern>);

/// What `pbs2p-exact` makes of a task with every one of `codes`, all from one factor.
pub fn losses(job: &Job, task: &Task, damping: f64, codes: &[Code]) -> Result<Vec<Certificate>> {
    let mut factor = Factor::of(job, task, damping)?;
    let mut certificate = |&(first, second): &Code| match second {
        None => {
            let task = Task { pattern: first, ..*task };
            Ok(exact::exact_from(job, &task, &mut factor, Stage::Search)?.certificate)
        }
        Some(pattern) => {
            let task = Task { pattern, ..*task };
            Ok(residual::residual_from(job, &task, &mut factor)?.solution.certificate)
        }
    };
    codes.iter().map(&mut certificate).collect()
}

/// The weight of a task, as formats take it.
fn dense_of(task: &Task) -> Result<Dense> {
    Dense::new(task.float, task.weight.len() / task.cols().max(1), task.cols())
}

/// Certifies `values`, which the parts unpack to.
fn certify(
    job: &Job,
    task: &Task,
    values: Buffer,
    (format, layout, bytes): (String, Vec<Part>, Vec<Vec<u8>>),
    nominal: f64,
) -> Result<Packed> {
    let exact = true_bits(&layout, &dense_of(task)?);
    let mut solution = task.certify(job, values)?;
    solution.certificate.bits = Some(Bits { exact, nominal });
    Ok(Packed { solution, format, parts: layout.into_iter().zip(bytes).collect() })
}

/// Groups of 4 or 8 as the pattern says; of a ratio (nothing is pruned) whole groups of 8.
pub fn groups_of(pattern: Pattern) -> Result<Groups> {
    match pattern {
        Pattern::KeepOf { keep, of } if of <= 8 => Ok(Groups { keep, of }),
        Pattern::KeepOf { .. } => {
            Err(Error::Pattern(format!("pattern {pattern}: codes are of groups of 4 or 8")))
        }
        Pattern::Ratio { .. } => Ok(Groups { keep: 8, of: 8 }),
    }
}

#[cfg(test)]
mod tests;
