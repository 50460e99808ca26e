//! The only place that releases the GIL.
//!
//! A long call runs on a thread of its own while this one asks Python for signals ten times a
//! second, so Ctrl-C is answered at the next block of work. The worker pool is kept per process
//! and thread count: a child of `fork` finds none of its parent's threads and starts its own.

use crate::errors::to_py;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use rsprune_core::Result;
use rsprune_core::kernels::Kernel;
use rsprune_core::par::{Job, Pool};
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

type CachedPool = Option<((u32, usize), Arc<Pool>)>;
static POOL: Mutex<CachedPool> = Mutex::new(None);

fn pool(threads: usize) -> Result<Arc<Pool>> {
    let key = (std::process::id(), threads);
    let mut cached = POOL.lock().unwrap_or_else(|e| e.into_inner());
    match &*cached {
        Some((held, pool)) if *held == key => Ok(pool.clone()),
        other => {
            // After a fork the old pool's threads do not exist: dropping it would wait for them.
            if other.as_ref().is_some_and(|((pid, _), _)| *pid != key.0) {
                std::mem::forget(cached.take());
            }
            let pool = Arc::new(Pool::new(threads)?);
            *cached = Some((key, pool.clone()));
            Ok(pool)
        }
    }
}

/// Runs a short call (file work) without the GIL.
pub fn detach<T: Send>(py: Python<'_>, call: impl FnOnce() -> Result<T> + Send) -> PyResult<T> {
    // The caller gets an error either way and uses nothing that a panic left halfway.
    match py.detach(|| catch_unwind(AssertUnwindSafe(call))) {
        Ok(result) => result.map_err(to_py),
        Err(panic) => Err(PyRuntimeError::new_err(panic_message(&*panic))),
    }
}

/// Runs a call of at most some seconds on `threads` workers, this thread among them, without the
/// GIL. There is no thread that asks for signals: Ctrl-C is answered when the call is over.
pub fn short<T: Send>(
    py: Python<'_>,
    threads: Option<usize>,
    call: impl FnOnce(&Job) -> Result<T> + Send,
) -> PyResult<T> {
    let pool = pool(threads.unwrap_or_else(default_threads)).map_err(to_py)?;
    detach(py, || call(&Job::new(&pool, &AtomicBool::new(false))))
}

/// Runs a long call on `threads` workers without the GIL; Ctrl-C cancels it.
pub fn run<T: Send>(
    py: Python<'_>,
    threads: Option<usize>,
    call: impl FnOnce(Job) -> Result<T> + Send,
) -> PyResult<T> {
    let threads = threads.unwrap_or_else(default_threads);
    let pool = pool(threads).map_err(to_py)?;
    let cancel = AtomicBool::new(false);
    let mut signal = None;
    let outcome = py.detach(|| {
        std::thread::scope(|scope| {
            let (done, wait) = channel();
            let worker = scope.spawn(|| {
                let result = call(Job::new(&pool, &cancel));
                drop(done);
                result
            });
            // The channel carries nothing; it closes when the worker ends, even by a panic.
            let wait: std::sync::mpsc::Receiver<()> = wait;
            while wait.recv_timeout(Duration::from_millis(100)) == Err(RecvTimeoutError::Timeout) {
                if let Err(error) = Python::attach(|py| py.check_signals()) {
                    signal = Some(error);
                    cancel.store(true, Ordering::Relaxed);
                }
            }
            worker.join()
        })
    });
    match (signal, outcome) {
        (Some(error), _) => Err(error),
        (None, Ok(result)) => result.map_err(to_py),
        (None, Err(panic)) => Err(PyRuntimeError::new_err(panic_message(&*panic))),
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("unknown");
    format!("internal error in rsprune (please report it): {text}")
}

/// Worker threads where none are asked for: `RSPRUNE_NUM_THREADS`, else what the affinity mask and
/// the cgroup quota leave to this process.
#[pyfunction]
pub fn default_threads() -> usize {
    let asked = std::env::var("RSPRUNE_NUM_THREADS").ok().and_then(|v| v.parse().ok());
    let available = || std::thread::available_parallelism().map_or(1, usize::from);
    asked.filter(|n| *n > 0).unwrap_or_else(available)
}

/// The matrix kernel that this process uses: "avx512", "avx2", "neon" or "scalar".
#[pyfunction]
pub fn kernel_name() -> PyResult<&'static str> {
    Ok(Kernel::select().map_err(to_py)?.name)
}
