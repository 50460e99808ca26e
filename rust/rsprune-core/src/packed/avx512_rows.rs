//! One token with AVX-512: several rows at once. Activations are loaded once for all of them, none
//! waits for its own sums, and bounds are checked once a block, not once a word: what such a loop
//! does beside its vectors is what it costs.
#![allow(unsafe_code)] // loads; every length is checked before its loop

use super::avx512::{keep_and_minus, scale};
use super::input::Group;
use super::row::{BLOCK, Signs};
use std::arch::x86_64::*;
use std::hint::black_box;

/// Words of 64 columns that share a scale.
const WORDS: usize = BLOCK / 64;

/// Of every word of a block the columns that are added, and those that are taken away.
type Words = [(u64, u64); WORDS];

/// The products of rows of signs where every column is kept: those with a minus are summed, and
/// taken twice from the sum of all.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,bmi2")]
pub(super) fn dot_signs<const R: usize>(rows: [Signs; R], group: &Group<f32>) -> [f32; R] {
    let [x] = group.rows::<1>();
    let (mut totals, mut all) = ([_mm512_setzero_ps(); R], [0.0; R]);
    for block in 0..rows[0].scales.len() / 2 {
        let mut words: [Words; R] = [[(0, 0); WORDS]; R];
        for r in 0..R {
            words[r] = block_words::<true>(&rows[r], block);
        }
        let mut taken = [_mm512_setzero_ps(); R];
        let x = &x[block * BLOCK..x.len().min((block + 1) * BLOCK)];
        for (w, x) in x.as_chunks::<64>().0.iter().enumerate() {
            for h in 0..4 {
                // SAFETY: `x` has 64 values.
                let x = unsafe { _mm512_loadu_ps(x.as_ptr().add(16 * h)) };
                for r in 0..R {
                    let minus = (words[r][w].1 >> (16 * h)) as u16;
                    taken[r] = _mm512_mask_add_ps(taken[r], minus, taken[r], x);
                }
            }
        }
        for r in 0..R {
            let scale = scale(&rows[r], block);
            totals[r] = _mm512_fmadd_ps(scale, taken[r], totals[r]);
            all[r] += _mm512_cvtss_f32(scale) * group.sum(0, block);
        }
    }
    let mut found = [0.0; R];
    for r in 0..R {
        found[r] = all[r] - 2.0 * _mm512_reduce_add_ps(totals[r]);
    }
    found
}

/// The same with activations in 8 bits.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,bmi2")]
pub(super) fn dot_signs_int8<const DENSE: bool, const R: usize>(
    rows: [Signs; R],
    group: &Group<i8>,
) -> [f32; R] {
    let [x] = group.rows::<1>();
    // Known, it would be loaded from memory under each mask, which is slower than a masked move.
    let one = black_box(_mm512_set1_epi8(1));
    let (mut totals, mut all) = ([_mm512_setzero_ps(); R], [0.0; R]);
    for block in 0..rows[0].scales.len() / 2 {
        let (mut added, mut taken) = ([_mm512_setzero_si512(); R], [_mm512_setzero_si512(); R]);
        let mut words: [Words; R] = [[(0, 0); WORDS]; R];
        for r in 0..R {
            words[r] = block_words::<DENSE>(&rows[r], block);
        }
        let x = &x[block * BLOCK..x.len().min((block + 1) * BLOCK)];
        for (w, x) in x.as_chunks::<64>().0.iter().enumerate() {
            // SAFETY: `x` has 64 values.
            let x = unsafe { _mm512_loadu_si512(x.as_ptr().cast()) };
            for r in 0..R {
                let (plus, minus) = words[r][w];
                if !DENSE {
                    let plus = _mm512_maskz_mov_epi8(plus, one);
                    added[r] = _mm512_dpbusd_epi32(added[r], plus, x);
                }
                let minus = _mm512_maskz_mov_epi8(minus, one);
                taken[r] = _mm512_dpbusd_epi32(taken[r], minus, x);
            }
        }
        for r in 0..R {
            let scale = scale(&rows[r], block);
            let sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(added[r], taken[r]));
            totals[r] = _mm512_fmadd_ps(scale, sum, totals[r]);
            if DENSE {
                all[r] += _mm512_cvtss_f32(scale) * group.sum(0, block);
            }
        }
    }
    let twice = if DENSE { 2.0 } else { 1.0 };
    std::array::from_fn(|r| group.units[0] * (twice * _mm512_reduce_add_ps(totals[r]) + all[r]))
}

/// A row's words of a block; what lies behind its end means nothing. Loops, as a closure would not
/// be compiled for the instructions of its caller.
#[inline]
#[target_feature(enable = "bmi2")]
fn block_words<const DENSE: bool>(row: &Signs, block: usize) -> Words {
    let (first, step) = (block * WORDS, row.step);
    let signs = row.signs.get(first * step..(first + WORDS - 1) * step + 8);
    let mask = row.mask.unwrap_or(&[]).get(8 * first..8 * (first + WORDS));
    let (Some(signs), true) = (signs, DENSE || mask.is_some()) else {
        return last_words(row, first);
    };
    let (mask, mut words) = (mask.unwrap_or(&[]), [(0, 0); WORDS]);
    for (w, word) in words.iter_mut().enumerate() {
        // SAFETY: both slices were cut to hold these words.
        unsafe {
            let signs = signs.as_ptr().add(w * step).cast::<u64>().read_unaligned();
            *word = if DENSE {
                (!signs, signs)
            } else {
                let keep = mask.as_ptr().add(8 * w).cast::<u64>().read_unaligned();
                let minus = _pdep_u64(signs, keep);
                (keep & !minus, minus)
            };
        }
    }
    words
}

#[cold]
#[inline(never)]
#[target_feature(enable = "bmi2")]
fn last_words(row: &Signs, first: usize) -> Words {
    let mut words = [(0, 0); WORDS];
    for (w, word) in words.iter_mut().enumerate() {
        let (keep, minus) = keep_and_minus(row, first + w);
        *word = (keep & !minus, minus);
    }
    words
}
