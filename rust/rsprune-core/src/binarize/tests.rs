//! What is evaluated is what is stored: parts unpack to the values, bit for bit.

use super::{Packed, arb, billm, exact_residual, gptq, pbs2p};
use crate::Result;
use crate::buffer::Room;
use crate::float::Float;
use crate::kernels::Kernel;
use crate::pack::{Dense, Groups, binary, residual, row_column, uniform};
use crate::par::{Job, Pool};
use crate::pattern::Pattern;
use crate::solve::{Statistics, Task};
use std::sync::atomic::AtomicBool;

const COLS: usize = 136;
const ROWS: usize = 101;

fn noise(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed | 1;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next() + next() * next()).collect()
}

/// Runs `solve` on a random operator of every type, and `unpack` on what it returns.
fn check(
    pattern: Pattern,
    solve: impl Fn(&Job, &Task) -> Result<Packed>,
    unpack: impl Fn(&[&[u8]], &Dense, &mut [u8]) -> Result<()>,
) {
    let (pool, flag) = (Pool::new(2).unwrap(), AtomicBool::new(false));
    let (job, kernel) = (Job::new(&pool, &flag), Kernel::select().unwrap());
    let mut calibration = Statistics::new(COLS, false, Room::Memory).unwrap();
    calibration.add(&job, &kernel, &noise(300 * COLS, 7), None).unwrap();
    for float in [Float::F32, Float::Bf16, Float::F16] {
        let weight: Vec<f32> =
            noise(ROWS * COLS, 3).iter().map(|v| float.round(0.02 * v)).collect();
        let task =
            Task { weight: &weight, float, pattern, calibration: &calibration, heldout: None };
        let Packed { solution, parts, .. } = solve(&job, &task).unwrap();
        let dense = Dense::new(float, ROWS, COLS).unwrap();
        let slices: Vec<&[u8]> = parts.iter().map(|(_, bytes)| bytes.as_slice()).collect();
        let mut out = vec![0; dense.nbytes()];
        unpack(&slices, &dense, &mut out).unwrap();
        let size = float.size();
        for (value, bytes) in solution.values.iter().zip(out.chunks_exact(size)) {
            let found = match float {
                Float::F32 => f32::from_le_bytes(bytes.try_into().unwrap()),
                _ => float.from_bits(u16::from_le_bytes(bytes.try_into().unwrap())),
            };
            assert_eq!(value.to_bits(), found.to_bits());
        }
        assert!(solution.values.iter().any(|v| *v != 0.0));
        let nbytes: usize = parts.iter().map(|(_, bytes)| bytes.len()).sum();
        let bits = solution.certificate.bits.unwrap();
        assert!((bits.exact - 8.0 * nbytes as f64 / (ROWS * COLS) as f64).abs() < 1e-9);
    }
}

#[test]
fn binary_parts_are_the_values() {
    for keep in [1, 4, 6, 8] {
        let groups = Groups { keep, of: 8 };
        check(
            Pattern::KeepOf { keep, of: 8 },
            |job, task| pbs2p(job, task, 0.01),
            |parts, dense, out| binary::unpack(parts, dense, groups, 0..ROWS, out),
        );
    }
    let groups = Groups { keep: 8, of: 8 };
    check(
        Pattern::KeepOf { keep: 8, of: 8 },
        |job, task| billm(job, task, 0.01),
        |parts, dense, out| binary::unpack(parts, dense, groups, 0..ROWS, out),
    );
}

#[test]
fn both_planes_are_the_values() {
    for (keep, of) in [(1, 8), (2, 8), (3, 4), (8, 8)] {
        let groups = Groups { keep, of };
        check(
            Pattern::KeepOf { keep, of },
            |job, task| exact_residual(job, task, 0.01),
            |parts, dense, out| residual::unpack(parts, dense, groups, 0..ROWS, out),
        );
    }
}

#[test]
fn other_parts_are_the_values() {
    let whole = Pattern::KeepOf { keep: 8, of: 8 };
    check(
        whole,
        |job, task| arb(job, task, 0.01),
        |parts, dense, out| row_column::unpack(parts, dense, 0..ROWS, out),
    );
    for bits in [2, 3, 4] {
        check(
            whole,
            |job, task| gptq(job, task, 0.01, bits),
            |parts, dense, out| uniform::unpack(parts, dense, bits, 0..ROWS, out),
        );
    }
}
