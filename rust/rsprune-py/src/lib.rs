//! `rsprune._core`: exports only. Each module translates, detaches, calls the core, translates back.

mod binarize;
mod buffers;
mod enter;
mod errors;
mod gradient;
mod lowrank;
mod pack;
mod packed;
mod shard;
mod solve;
mod statistics;

use pyo3::prelude::*;

#[pymodule]
fn _core(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    m.add_function(wrap_pyfunction!(enter::default_threads, m)?)?;
    m.add_function(wrap_pyfunction!(enter::kernel_name, m)?)?;
    statistics::register(m)?;
    solve::register(m)?;
    lowrank::register(m)?;
    gradient::register(m)?;
    pack::register(m)?;
    packed::register(m)?;
    binarize::register(m)?;
    shard::register(m)
}
