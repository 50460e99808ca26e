//! AVX-512 (14 x 32) and AVX2 (6 x 16) tiles.
//!
//! The tile is as large as the register file allows: 28 of 32 zmm (12 of 16 ymm) accumulators,
//! two registers for a row of B, one for a broadcast of A. Both run at about 80 % of the FMA
//! peak on packed panels that lie in L2.
#![allow(unsafe_code)] // vector intrinsics on raw panels; `Kernel::tile` checks all lengths

use super::{Features, Kernel};
use std::arch::x86_64::*;

pub(super) fn available() -> Vec<Kernel> {
    let mut kernels = Vec::new();
    if is_x86_feature_detected!("avx512f") {
        let features = Features::Avx512;
        kernels.push(Kernel { name: "avx512", mr: 14, nr: 32, tile: tile_avx512, features });
    }
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        let features = Features::Avx2;
        kernels.push(Kernel { name: "avx2", mr: 6, nr: 16, tile: tile_avx2, features });
    }
    kernels
}

/// Runs `pass`, inlined and compiled for AVX-512.
///
/// # Safety
/// The CPU has the feature.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn with_avx512<T>(pass: impl FnOnce() -> T) -> T {
    pass()
}

/// Runs `pass`, inlined and compiled for AVX2.
///
/// # Safety
/// The CPU has the features.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn with_avx2<T>(pass: impl FnOnce() -> T) -> T {
    pass()
}

macro_rules! tile {
    ($name:ident, $features:literal, $mr:literal, $lanes:literal, $zero:ident, $load:ident,
     $store:ident, $set:ident, $fma:ident, $add:ident) => {
        #[target_feature(enable = $features)]
        unsafe fn $name(k: usize, a: *const f32, b: *const f32, c: *mut f32, stride: usize) {
            // SAFETY: the caller keeps the contract of `TileFn`.
            unsafe {
                // C is wanted only after the loop: ask for it before.
                for r in 0..$mr {
                    _mm_prefetch::<_MM_HINT_T0>(c.add(r * stride).cast());
                    _mm_prefetch::<_MM_HINT_T0>(c.add(r * stride + 2 * $lanes - 1).cast());
                }
                let mut sum = [[$zero(); 2]; $mr];
                for p in 0..k {
                    let b0 = $load(b.add(p * 2 * $lanes));
                    let b1 = $load(b.add(p * 2 * $lanes + $lanes));
                    for r in 0..$mr {
                        let x = $set(*a.add(p * $mr + r));
                        sum[r][0] = $fma(x, b0, sum[r][0]);
                        sum[r][1] = $fma(x, b1, sum[r][1]);
                    }
                }
                for r in 0..$mr {
                    for h in 0..2 {
                        let at = c.add(r * stride + h * $lanes);
                        $store(at, $add($load(at), sum[r][h]));
                    }
                }
            }
        }
    };
}

tile!(
    tile_avx512,
    "avx512f",
    14,
    16,
    _mm512_setzero_ps,
    _mm512_loadu_ps,
    _mm512_storeu_ps,
    _mm512_set1_ps,
    _mm512_fmadd_ps,
    _mm512_add_ps
);
tile!(
    tile_avx2,
    "avx2,fma",
    6,
    8,
    _mm256_setzero_ps,
    _mm256_loadu_ps,
    _mm256_storeu_ps,
    _mm256_set1_ps,
    _mm256_fmadd_ps,
    _mm256_add_ps
);
