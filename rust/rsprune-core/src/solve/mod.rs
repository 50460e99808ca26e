//! The layer problem that every layer-wise method shares, and the methods.
//!
//! ```text
//! J(V) = 1/2 || V X* - W X ||^2      subject to a sparsity pattern
//! ```
//! `W [m, n]` dense weight, `X [n, T]` its inputs in the dense model, `X*` its inputs in the
//! compressed model. A method needs sums over tokens only ([`Statistics`]), never activations,
//! and returns its point with a [`Certificate`] measured at the point that is stored.

mod admm;
mod best;
mod certificate;
mod datafit;
mod descent;
mod factor;
mod fista;
mod fista_plus;
mod measure;
mod permute;
mod polish;
mod problem;
mod refit;
mod score;
mod sparsegpt;
mod statistics;

pub use admm::{AdmmOptions, admm};
pub use best::best;
pub use certificate::{Bits, Certificate, Solution, Task};
pub use datafit::GramQuadratic;
pub(crate) use factor::Factor;
pub use fista::{FistaOptions, WarmStart, fista};
pub use fista_plus::{FistaPlusOptions, fista_plus};
pub use permute::{Channels, group_channels};
pub use polish::{PolishOptions, polish};
pub use score::{magnitude, wanda};
pub use sparsegpt::sparsegpt;
pub use statistics::Statistics;
