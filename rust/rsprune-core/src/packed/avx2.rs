//! AVX2 with FMA, F16C and BMI2 (Haswell, Zen and later).
//!
//! There is no expanding load: a table gives, for the mask of eight columns, the shuffle that puts
//! their values in place.
#![allow(unsafe_code)] // vector loads; every length is checked before its loop

use super::Simd;
use super::input::{Group, Order};
use super::row::{BLOCK, Signs, Values};
use crate::float::Float;
use std::arch::x86_64::*;

/// A CPU with the features of this file.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

impl Avx2 {
    pub fn new() -> Option<Avx2> {
        let has_all = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("bmi2");
        has_all.then_some(Avx2(()))
    }
}

const BF16: u8 = 0;
const F16: u8 = 1;
const F32: u8 = 2;

/// For every mask, where the value of each column is, in elements; `NONE` for zeros.
const PLACES: [[u8; 8]; 256] = {
    let mut places = [[NONE; 8]; 256];
    let mut mask = 0;
    while mask < 256 {
        let (mut column, mut next) = (0, 0);
        while column < 8 {
            if mask >> column & 1 == 1 {
                places[mask][column] = next;
                next += 1;
            }
            column += 1;
        }
        mask += 1;
    }
    places
};
const NONE: u8 = 0x80;

/// The same in bytes of half types.
static HALVES: [[u8; 16]; 256] = {
    let mut halves = [[NONE; 16]; 256];
    let mut i = 0;
    while i < 256 * 8 {
        let place = PLACES[i / 8][i % 8];
        if place != NONE {
            halves[i / 8][2 * (i % 8)] = 2 * place;
            halves[i / 8][2 * (i % 8) + 1] = 2 * place + 1;
        }
        i += 1;
    }
    halves
};
static SINGLES: [[u8; 8]; 256] = PLACES;

impl Simd for Avx2 {
    fn order(self, _: Float) -> Order {
        Order::Natural
    }

    fn dot_values<const T: usize>(
        self,
        float: Float,
        row: Values,
        x: &Group<f32>,
    ) -> Option<(usize, [f32; T])> {
        // SAFETY: `self` is proof of the features.
        unsafe {
            match float {
                Float::Bf16 => dot_values::<BF16, T>(row, x),
                Float::F16 => dot_values::<F16, T>(row, x),
                Float::F32 => dot_values::<F32, T>(row, x),
            }
        }
    }

    fn expand_values(self, float: Float, row: Values, out: &mut [f32]) -> Option<usize> {
        // SAFETY: as above.
        unsafe {
            match float {
                Float::Bf16 => expand_values::<BF16>(row, out),
                Float::F16 => expand_values::<F16>(row, out),
                Float::F32 => expand_values::<F32>(row, out),
            }
        }
    }

    fn dot_signs<const T: usize>(self, row: Signs, x: &Group<f32>) -> [f32; T] {
        // SAFETY: as above.
        unsafe { dot_signs(row, x) }
    }

    fn expand_signs(self, row: Signs, out: &mut [f32]) {
        // SAFETY: as above.
        unsafe { expand_signs(row, out) }
    }

    fn dot_signs_int8<const T: usize>(self, row: Signs, x: &Group<i8>) -> [f32; T] {
        // SAFETY: as above.
        unsafe { dot_signs_int8(row, x) }
    }
}

/// The first `N` bytes, zeros behind the end.
#[inline(always)]
fn first<const N: usize>(bytes: &[u8]) -> [u8; N] {
    match bytes.first_chunk::<N>() {
        Some(whole) => *whole,
        None => std::array::from_fn(|i| bytes.get(i).copied().unwrap_or(0)),
    }
}

/// The weights of eight columns from the values that `bytes` starts with.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn eight<const KIND: u8>(mask: u8, bytes: &[u8]) -> __m256 {
    let mask = usize::from(mask);
    // SAFETY: loads of whole arrays.
    unsafe {
        if KIND == F32 {
            let values = first::<32>(bytes);
            let places = _mm256_cvtepi8_epi32(_mm_loadl_epi64(SINGLES[mask].as_ptr().cast()));
            let values = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values.as_ptr().cast()), places);
            // A place of none is negative: its sign, spread over the lane, clears it.
            return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32::<31>(places)), values);
        }
        let values = first::<16>(bytes);
        let places = _mm_loadu_si128(HALVES[mask].as_ptr().cast());
        let halves = _mm_shuffle_epi8(_mm_loadu_si128(values.as_ptr().cast()), places);
        if KIND == F16 {
            return _mm256_cvtph_ps(halves);
        }
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)))
    }
}

/// Calls `take(column, weights)` for every eight columns; how many values there were, `None` where
/// the mask has more bits.
#[inline]
#[target_feature(enable = "avx2,f16c,popcnt")]
fn walk<const KIND: u8>(row: Values, mut take: impl FnMut(usize, __m256)) -> Option<usize> {
    let size = if KIND == F32 { 4 } else { 2 };
    let mut used = 0;
    for (i, mask) in row.mask.iter().enumerate() {
        let next = used + mask.count_ones() as usize;
        if next * size > row.values.len() {
            return None;
        }
        take(8 * i, eight::<KIND>(*mask, &row.values[used * size..]));
        used = next;
    }
    Some(used)
}

#[target_feature(enable = "avx2,fma,f16c,popcnt")]
fn dot_values<const KIND: u8, const T: usize>(
    row: Values,
    x: &Group<f32>,
) -> Option<(usize, [f32; T])> {
    let rows = x.rows::<T>();
    assert!(8 * row.mask.len() <= x.width);
    let mut sums = [_mm256_setzero_ps(); T];
    let used = walk::<KIND>(row, |column, weights| {
        for t in 0..T {
            // SAFETY: `column + 8 <= width`, by the assertion above.
            let x = unsafe { _mm256_loadu_ps(rows[t].as_ptr().add(column)) };
            sums[t] = _mm256_fmadd_ps(weights, x, sums[t]);
        }
    })?;
    Some((used, sums.map(|sum| total(sum))))
}

#[target_feature(enable = "avx2,f16c,popcnt")]
fn expand_values<const KIND: u8>(row: Values, out: &mut [f32]) -> Option<usize> {
    let covered = 8 * row.mask.len();
    assert!(covered <= out.len());
    out[covered..].fill(0.0);
    walk::<KIND>(row, |column, weights| {
        // SAFETY: `column + 8 <= out.len()`, by the assertion above.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(column), weights) }
    })
}

/// The sum of eight lanes, halves first.
#[inline]
#[target_feature(enable = "avx2")]
fn total(v: __m256) -> f32 {
    let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
}

/// The kept columns of a 64-column word, and those of them with a minus.
#[inline]
#[target_feature(enable = "bmi2")]
fn keep_and_minus(row: &Signs, i: usize) -> (u64, u64) {
    let (keep, signs) = row.words(i);
    (keep, if row.mask.is_some() { _pdep_u64(signs, keep) } else { signs })
}

fn scale(row: &Signs, block: usize) -> f32 {
    half::f16::from_bits(row.scale(block)).to_f32()
}

/// All bits of lane `i` where bit `i` of the lowest byte is set.
#[inline]
#[target_feature(enable = "avx2")]
fn lanes(bits: u64) -> __m256 {
    let each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    let bits = _mm256_and_si256(_mm256_set1_epi32(bits as i32), each);
    _mm256_castsi256_ps(_mm256_cmpeq_epi32(bits, each))
}

#[target_feature(enable = "avx2,fma,bmi2")]
fn dot_signs<const T: usize>(row: Signs, x: &Group<f32>) -> [f32; T] {
    let (rows, words) = (x.rows::<T>(), x.width / 64);
    let mut totals = [_mm256_setzero_ps(); T];
    for block in 0..row.scales.len() / 2 {
        let mut sums = [_mm256_setzero_ps(); T];
        for i in block * BLOCK / 64..words.min((block + 1) * BLOCK / 64) {
            let (keep, minus) = keep_and_minus(&row, i);
            for h in 0..8 {
                let plus = lanes((keep & !minus) >> (8 * h));
                let minus = lanes(minus >> (8 * h));
                for t in 0..T {
                    // SAFETY: `64 * i + 64 <= width`, the length of a row.
                    let x = unsafe { _mm256_loadu_ps(rows[t].as_ptr().add(64 * i + 8 * h)) };
                    let change = _mm256_sub_ps(_mm256_and_ps(plus, x), _mm256_and_ps(minus, x));
                    sums[t] = _mm256_add_ps(sums[t], change);
                }
            }
        }
        let scale = _mm256_set1_ps(scale(&row, block));
        for t in 0..T {
            totals[t] = _mm256_fmadd_ps(scale, sums[t], totals[t]);
        }
    }
    totals.map(|sum| total(sum))
}

#[target_feature(enable = "avx2,bmi2")]
fn expand_signs(row: Signs, out: &mut [f32]) {
    let scale = scale(&row, 0);
    let (plus, minus) = (_mm256_set1_ps(scale), _mm256_set1_ps(0.0 - scale));
    for (i, out) in out.as_chunks_mut::<64>().0.iter_mut().enumerate() {
        let (keep, negative) = keep_and_minus(&row, i);
        for (h, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let kept = _mm256_and_ps(lanes(keep >> (8 * h)), plus);
            let weights = _mm256_blendv_ps(kept, minus, lanes(negative >> (8 * h)));
            // SAFETY: `out` holds eight values.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), weights) };
        }
    }
}

/// All bits of byte `i` where bit `i` is set.
#[inline]
#[target_feature(enable = "avx2")]
fn bytes(bits: u32) -> __m256i {
    let each = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
    let from = [0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303];
    let from = _mm256_setr_epi64x(from[0], from[1], from[2], from[3]);
    let spread = _mm256_shuffle_epi8(_mm256_set1_epi32(bits as i32), from);
    _mm256_cmpeq_epi8(_mm256_and_si256(spread, each), each)
}

#[target_feature(enable = "avx2,fma,bmi2")]
fn dot_signs_int8<const T: usize>(row: Signs, x: &Group<i8>) -> [f32; T] {
    let (rows, words) = (x.rows::<T>(), x.width / 64);
    let (one, ones) = (_mm256_set1_epi8(1), _mm256_set1_epi16(1));
    let mut totals = [_mm256_setzero_ps(); T];
    for block in 0..row.scales.len() / 2 {
        let mut sums = [_mm256_setzero_si256(); T];
        for i in block * BLOCK / 64..words.min((block + 1) * BLOCK / 64) {
            let (keep, minus) = keep_and_minus(&row, i);
            for h in 0..2 {
                let kept = _mm256_and_si256(bytes((keep >> (32 * h)) as u32), one);
                let weights = _mm256_or_si256(kept, bytes((minus >> (32 * h)) as u32));
                for t in 0..T {
                    // SAFETY: `64 * i + 64 <= width`, the length of a row.
                    let x =
                        unsafe { _mm256_loadu_si256(rows[t].as_ptr().add(64 * i + 32 * h).cast()) };
                    let pairs = _mm256_maddubs_epi16(one, _mm256_sign_epi8(x, weights));
                    sums[t] = _mm256_add_epi32(sums[t], _mm256_madd_epi16(pairs, ones));
                }
            }
        }
        let scale = _mm256_set1_ps(scale(&row, block));
        for t in 0..T {
            totals[t] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(sums[t]), totals[t]);
        }
    }
    std::array::from_fn(|t| x.units[t] * total(totals[t]))
}
