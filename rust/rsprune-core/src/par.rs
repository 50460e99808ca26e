//! Threads, and the only file that names rayon.
//!
//! Work is cut into blocks whose size never depends on the number of threads, and results come
//! back in block order, so every sum is folded in one order: same bits for any thread count.

use crate::buffer::{Buffer, Room};
use crate::error::{Error, Result};
use rayon::prelude::*;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// Worker threads of our own, apart from rayon's global pool (which hangs after `fork`).
pub struct Pool(rayon::ThreadPool);

impl Pool {
    /// A pool of `threads` workers (at least one).
    pub fn new(threads: usize) -> Result<Pool> {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads.max(1))
            .thread_name(|i| format!("rsprune-{i}"))
            .build()
            .map(Pool)
            .map_err(|e| Error::Option(format!("cannot start {threads} threads: {e}")))
    }
}

/// One call's right to use a pool, the flag that stops it, and where its large arrays lie.
pub struct Job<'a> {
    pool: &'a Pool,
    cancel: &'a AtomicBool,
    room: Room<'a>,
}

/// How often a worker comes for more, about: of more blocks than that several go out at a time, as asking
/// takes as long as a small one does, and neighbours are read on from where the last ended.
const SHARES: usize = 16;

impl<'a> Job<'a> {
    /// A job on `pool` that ends with [`Error::Cancelled`] soon after `cancel` is set.
    pub fn new(pool: &'a Pool, cancel: &'a AtomicBool) -> Job<'a> {
        Job { pool, cancel, room: Room::Memory }
    }

    /// The same with arrays in `room` that need not be in memory.
    pub fn spilling(self, room: Room<'a>) -> Job<'a> {
        Job { room, ..self }
    }

    /// Room for arrays of the size of a weight, and for matrices that are used seldom.
    pub fn room(&self) -> Room<'a> {
        self.room
    }

    /// `len` zeros in that room.
    pub fn zeros(&self, len: usize) -> Result<Buffer> {
        self.room.zeros(len)
    }

    /// A copy of `values` in that room.
    pub fn copy(&self, values: &[f32]) -> Result<Buffer> {
        self.room.copy(values)
    }

    /// `Err(Cancelled)` once the caller asked to stop. Loops call this about every 10 ms of work.
    pub fn check(&self) -> Result<()> {
        if self.cancel.load(Ordering::Relaxed) {
            return Err(Error::Cancelled);
        }
        Ok(())
    }

    /// Runs `f(block_index, block)` over consecutive blocks of `len` elements of `data`, in
    /// parallel; the results stand in block order.
    pub fn map_blocks<E: Send, T: Send>(
        &self,
        data: &mut [E],
        len: usize,
        f: impl Fn(usize, &mut [E]) -> Result<T> + Sync,
    ) -> Result<Vec<T>> {
        self.pool.0.install(|| {
            data.par_chunks_mut(len.max(1))
                .enumerate()
                .map(|(i, block)| {
                    self.check()?;
                    f(i, block)
                })
                .collect()
        })
    }

    /// The same for work that is short beside the time in which a sleeping worker wakes: this thread
    /// takes blocks as the others do, and a pool of one worker is left alone.
    pub fn share_blocks<E: Send>(
        &self,
        data: &mut [E],
        len: usize,
        f: impl Fn(usize, &mut [E]) -> Result<()> + Sync,
    ) -> Result<()> {
        let len = len.max(1);
        let workers = self.pool.0.current_num_threads().min(data.len().div_ceil(len));
        let at_once = (data.len() / len / (workers.max(1) * SHARES)).max(1);
        let blocks = Mutex::new(data.chunks_mut(len * at_once).enumerate());
        let work = || {
            loop {
                let next = blocks.lock().unwrap_or_else(|e| e.into_inner()).next();
                let Some((i, some)) = next else { return Ok(()) };
                for (j, block) in some.chunks_mut(len).enumerate() {
                    self.check()?;
                    f(i * at_once + j, block)?;
                }
            }
        };
        if workers < 2 {
            return work();
        }
        let failed = Mutex::new(Ok(()));
        self.pool.0.in_place_scope(|scope| {
            for _ in 1..workers {
                scope.spawn(|_| {
                    if let Err(error) = work() {
                        *failed.lock().unwrap_or_else(|e| e.into_inner()) = Err(error);
                    }
                });
            }
            work()
        })?;
        failed.into_inner().unwrap_or_else(|e| e.into_inner())
    }

    /// The same over parts of `data` of any lengths, part `i` ending at `ends[i]`.
    pub fn map_parts<E: Send, T: Send>(
        &self,
        data: &mut [E],
        ends: &[usize],
        f: impl Fn(usize, &mut [E]) -> Result<T> + Sync,
    ) -> Result<Vec<T>> {
        let mut parts = Vec::with_capacity(ends.len());
        let (mut rest, mut start) = (data, 0);
        for end in ends {
            let (part, after) = rest.split_at_mut(end - start);
            parts.push(part);
            (rest, start) = (after, *end);
        }
        self.pool.0.install(|| {
            let numbered = parts.into_par_iter().enumerate();
            numbered
                .map(|(i, part)| {
                    self.check()?;
                    f(i, part)
                })
                .collect()
        })
    }

    /// Runs `f(i)` for `i` in `0..count` in parallel; the results stand in order.
    pub fn map<T: Send>(
        &self,
        count: usize,
        f: impl Fn(usize) -> Result<T> + Sync,
    ) -> Result<Vec<T>> {
        self.pool.0.install(|| {
            (0..count)
                .into_par_iter()
                .map(|i| {
                    self.check()?;
                    f(i)
                })
                .collect()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_blocks_are_all_done_and_an_error_of_any_worker_is_the_result() {
        let cancel = AtomicBool::new(false);
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads).unwrap();
            let job = Job::new(&pool, &cancel);
            let mut data = vec![0; 1003];
            let fill = |i: usize, block: &mut [usize]| {
                block.fill(i + 1);
                Ok(())
            };
            job.share_blocks(&mut data, 10, fill).unwrap();
            assert!(data.iter().enumerate().all(|(at, value)| *value == at / 10 + 1));
            for bad in [0, 57, 100] {
                let fail = |i: usize, _: &mut [usize]| match i == bad {
                    true => Err(Error::Option(format!("block {i}"))),
                    false => Ok(()),
                };
                let error = job.share_blocks(&mut data, 10, fail).unwrap_err();
                assert_eq!(error.to_string(), format!("block {bad}"));
            }
            job.share_blocks(&mut data[..0], 10, fill).unwrap();
        }
    }
}
