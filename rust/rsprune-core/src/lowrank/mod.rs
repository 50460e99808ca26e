//! Maps of low rank: fitted to outputs from sums over tokens, and compared between layers.

mod pairs;
mod regression;

pub use pairs::pair_distance;
pub use regression::{Fit, Map, Regression, fit};
