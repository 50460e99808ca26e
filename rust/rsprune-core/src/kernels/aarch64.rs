//! NEON: an 8 x 12 tile.
//!
//! 24 of 32 registers are accumulators, three hold a row of B, two a column of A whose lanes
//! are multiplied one by one.
#![allow(unsafe_code)] // vector intrinsics on raw panels; `Kernel::tile` checks all lengths

use super::scalar::panel;
use super::{Features, Kernel};
use std::arch::aarch64::*;
use std::arch::is_aarch64_feature_detected;

const MR: usize = 8;
const NR: usize = 12;

pub(super) fn available() -> Option<Kernel> {
    // Loops beside the tile are compiled for NEON as they are: it belongs to every aarch64 target.
    let features = Features::Baseline;
    let kernel = Kernel { name: "neon", mr: MR, nr: NR, tile, panel: panel::<MR>, features };
    is_aarch64_feature_detected!("neon").then_some(kernel)
}

/// Asks for a cache line; any address will do.
#[inline]
fn ask(address: *const f32) {
    // SAFETY: a prefetch reads nothing that a program could see and never faults.
    unsafe {
        std::arch::asm!(
            "prfm pldl2keep, [{0}]", in(reg) address, options(nostack, preserves_flags, readonly)
        );
    }
}

unsafe fn tile(
    k: usize,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
    stride: usize,
    next: *const f32,
) {
    // SAFETY: the caller keeps the contract of `TileFn`.
    unsafe {
        let mut sum = [[vdupq_n_f32(0.0); 3]; MR];
        for p in 0..k {
            if p % 4 == 0 {
                ask(next.wrapping_add(p * 4));
            }
            let row = b.add(p * NR);
            let row = [vld1q_f32(row), vld1q_f32(row.add(4)), vld1q_f32(row.add(8))];
            for half in [0, 4] {
                let x = vld1q_f32(a.add(p * MR + half));
                for (j, y) in row.into_iter().enumerate() {
                    sum[half][j] = vfmaq_laneq_f32::<0>(sum[half][j], y, x);
                    sum[half + 1][j] = vfmaq_laneq_f32::<1>(sum[half + 1][j], y, x);
                    sum[half + 2][j] = vfmaq_laneq_f32::<2>(sum[half + 2][j], y, x);
                    sum[half + 3][j] = vfmaq_laneq_f32::<3>(sum[half + 3][j], y, x);
                }
            }
        }
        for (r, row) in sum.into_iter().enumerate() {
            for (j, value) in row.into_iter().enumerate() {
                let at = c.add(r * stride + j * 4);
                vst1q_f32(at, vaddq_f32(vld1q_f32(at), value));
            }
        }
    }
}
