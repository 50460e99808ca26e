//! AVX-512 (14 x 32) and AVX2 (6 x 16) tiles.
//!
//! The tile is as large as the register file allows: 28 of 32 zmm (12 of 16 ymm) accumulators,
//! two registers for a row of B, one for a broadcast of A. Both run at about 80 % of the FMA
//! peak on packed panels that lie in L2.
#![allow(unsafe_code)] // vector intrinsics on raw panels; `Kernel::tile` checks all lengths

use super::scalar::panel;
use super::{Features, Kernel};
use std::arch::x86_64::*;

pub(super) fn available() -> Vec<Kernel> {
    let mut kernels = Vec::new();
    if is_x86_feature_detected!("avx512f") {
        let features = Features::Avx512;
        let (tile, panel) = (tile_avx512, panel_avx512);
        kernels.push(Kernel { name: "avx512", mr: 14, nr: 32, tile, panel, features });
    }
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        let features = Features::Avx2;
        let (tile, panel) = (tile_avx2, panel::<6>);
        kernels.push(Kernel { name: "avx2", mr: 6, nr: 16, tile, panel, features });
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

/// 14 rows at a time, in squares of 16 x 16 whose last two rows are zeros.
#[target_feature(enable = "avx512f")]
unsafe fn panel_avx512(k: usize, rows: *const f32, stride: usize, out: *mut f32) {
    for p in (0..k).step_by(16) {
        let width = 16.min(k - p);
        let some = ((1u32 << width) - 1) as u16;
        let mut square = [_mm512_setzero_ps(); 16];
        // SAFETY: the caller keeps the contract of `PanelFn`; masked lanes are not touched.
        unsafe {
            for (r, row) in square.iter_mut().take(14).enumerate() {
                *row = _mm512_maskz_loadu_ps(some, rows.add(r * stride + p));
            }
            for (i, column) in transpose(square).into_iter().enumerate().take(width) {
                _mm512_mask_storeu_ps(out.add((p + i) * 14), 0x3fff, column);
            }
        }
    }
}

/// The transpose of a 16 x 16 matrix.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(rows: [__m512; 16]) -> [__m512; 16] {
    let mut pairs = rows;
    for i in (0..16).step_by(2) {
        pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    }
    // fours[4 q + j], lane group g: column 4 g + j of rows 4 q to 4 q + 3.
    let mut fours = pairs;
    for q in (0..16).step_by(4) {
        fours[q] = _mm512_shuffle_ps::<0x44>(pairs[q], pairs[q + 2]);
        fours[q + 1] = _mm512_shuffle_ps::<0xee>(pairs[q], pairs[q + 2]);
        fours[q + 2] = _mm512_shuffle_ps::<0x44>(pairs[q + 1], pairs[q + 3]);
        fours[q + 3] = _mm512_shuffle_ps::<0xee>(pairs[q + 1], pairs[q + 3]);
    }
    let mut columns = fours;
    for j in 0..4 {
        let [a, b, c, d] = [fours[j], fours[4 + j], fours[8 + j], fours[12 + j]];
        let (even_ab, odd_ab) =
            (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
        let (even_cd, odd_cd) =
            (_mm512_shuffle_f32x4::<0x88>(c, d), _mm512_shuffle_f32x4::<0xdd>(c, d));
        columns[j] = _mm512_shuffle_f32x4::<0x88>(even_ab, even_cd);
        columns[4 + j] = _mm512_shuffle_f32x4::<0x88>(odd_ab, odd_cd);
        columns[8 + j] = _mm512_shuffle_f32x4::<0xdd>(even_ab, even_cd);
        columns[12 + j] = _mm512_shuffle_f32x4::<0xdd>(odd_ab, odd_cd);
    }
    columns
}

macro_rules! tile {
    ($name:ident, $features:literal, $mr:literal, $lanes:literal, $zero:ident, $load:ident,
     $store:ident, $set:ident, $fma:ident, $add:ident) => {
        #[target_feature(enable = $features)]
        unsafe fn $name(
            k: usize,
            a: *const f32,
            b: *const f32,
            c: *mut f32,
            stride: usize,
            next: *const f32,
        ) {
            // SAFETY: the caller keeps the contract of `TileFn`.
            unsafe {
                // C is wanted only after the loop: ask for it before.
                for r in 0..$mr {
                    _mm_prefetch::<_MM_HINT_T0>(c.add(r * stride).cast());
                    _mm_prefetch::<_MM_HINT_T0>(c.add(r * stride + 2 * $lanes - 1).cast());
                }
                let mut sum = [[$zero(); 2]; $mr];
                for p in 0..k {
                    if p % 4 == 0 {
                        _mm_prefetch::<_MM_HINT_T1>(next.wrapping_add(p * 4).cast());
                    }
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
