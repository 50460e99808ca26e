//! AVX-512 with VBMI2 (Ice Lake, Zen 4 and later).
//!
//! Half types: `vpexpandw` puts 32 columns' kept values in place. A bf16 is the upper half of an
//! f32, so one shift makes the even columns and one mask the odd ones; the activations are put in
//! that order once, which is cheaper than widening two half registers. Signs: masks of sixteen
//! columns add and subtract activations; where all columns are kept, only those with a minus are
//! summed, and taken twice from the sum of all. Codes: `vpmultishiftqb` cuts 64 of them from their
//! stream, `vpermi2b` looks them up.
#![allow(unsafe_code)] // vector loads; every length is checked before its loop

use super::input::{Group, Order};
use super::row::{BLOCK, Signs, Table, Values, word};
use super::{Simd, avx512_rows};
use crate::float::Float;
use std::arch::x86_64::*;

/// A CPU with the features of this file.
#[derive(Clone, Copy)]
pub(super) struct Avx512(());

impl Avx512 {
    pub fn new() -> Option<Avx512> {
        let has_all = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vbmi")
            && is_x86_feature_detected!("avx512vbmi2")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx512vpopcntdq")
            && is_x86_feature_detected!("bmi2");
        has_all.then_some(Avx512(()))
    }
}

const BF16: u8 = 0;
const F16: u8 = 1;
const F32: u8 = 2;

impl Simd for Avx512 {
    fn order(self, float: Float) -> Order {
        if float == Float::Bf16 { Order::EvensFirst } else { Order::Natural }
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

    fn dot_values_of<const R: usize>(
        self,
        float: Float,
        rows: [Values; R],
        each: usize,
        x: &Group<f32>,
    ) -> Option<[f32; R]> {
        // SAFETY: as above.
        unsafe {
            match (float, each > 16) {
                (Float::Bf16, false) => avx512_rows::dot_values::<BF16, false, R>(rows, each, x),
                (Float::Bf16, true) => avx512_rows::dot_values::<BF16, true, R>(rows, each, x),
                (Float::F16, false) => avx512_rows::dot_values::<F16, false, R>(rows, each, x),
                (Float::F16, true) => avx512_rows::dot_values::<F16, true, R>(rows, each, x),
                (Float::F32, _) => None,
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

    fn masks(self, table: &Table, stream: &[u8], masks: &mut [u8]) {
        // SAFETY: as above.
        unsafe { read_masks(table, stream, masks) }
    }

    fn dot_signs<const T: usize>(self, row: Signs, x: &Group<f32>) -> [f32; T] {
        // SAFETY: as above.
        unsafe {
            match row.mask {
                Some(_) => dot_signs::<false, T>(row, x),
                None => dot_signs::<true, T>(row, x),
            }
        }
    }

    fn dot_signs_of<const R: usize>(self, rows: [Signs; R], x: &Group<f32>) -> [f32; R] {
        // SAFETY: as above.
        unsafe {
            match rows[0].mask {
                Some(_) => avx512_rows::dot_signs::<false, R>(rows, x),
                None => avx512_rows::dot_signs::<true, R>(rows, x),
            }
        }
    }

    fn dot_signs_int8_of<const R: usize>(self, rows: [Signs; R], x: &Group<i8>) -> [f32; R] {
        // SAFETY: as above.
        unsafe {
            match rows[0].mask {
                Some(_) => avx512_rows::dot_signs_int8::<false, R>(rows, x),
                None => avx512_rows::dot_signs_int8::<true, R>(rows, x),
            }
        }
    }

    fn expand_signs(self, row: Signs, out: &mut [f32]) {
        // SAFETY: as above.
        unsafe { expand_signs(row, out) }
    }

    fn dot_signs_int8<const T: usize>(self, row: Signs, x: &Group<i8>) -> [f32; T] {
        // SAFETY: as above.
        unsafe {
            match row.mask {
                Some(_) => dot_signs_int8::<false, T>(row, x),
                None => dot_signs_int8::<true, T>(row, x),
            }
        }
    }
}

/// Calls `take(column, low, high)` with the weights of every 32 columns, in this type's order; how
/// many values there were, `None` where the mask has more bits.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,bmi2,popcnt")]
fn walk<const KIND: u8>(row: Values, mut take: impl FnMut(usize, __m512, __m512)) -> Option<usize> {
    let size = if KIND == F32 { 4 } else { 2 };
    let mut used = 0;
    for i in 0..row.mask.len().div_ceil(4) {
        let bits = word32(row.mask, 4 * i);
        let next = used + bits.count_ones() as usize;
        if next * size > row.values.len() {
            return None;
        }
        // SAFETY: an expanding load reads as many values as bits are set: those before `next`.
        let (low, high) = unsafe {
            let at = row.values.as_ptr().add(used * size);
            if KIND == F32 {
                let low = bits as u16;
                let rest = at.add(4 * low.count_ones() as usize);
                (
                    _mm512_maskz_expandloadu_ps(low, at.cast()),
                    _mm512_maskz_expandloadu_ps((bits >> 16) as u16, rest.cast()),
                )
            } else {
                let halves = _mm512_maskz_expandloadu_epi16(bits, at.cast());
                widen::<KIND>(halves)
            }
        };
        take(32 * i, low, high);
        used = next;
    }
    Some(used)
}

/// Values of a half type in f32, in this type's order.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn widen<const KIND: u8>(halves: __m512i) -> (__m512, __m512) {
    if KIND == BF16 {
        let evens = _mm512_slli_epi32::<16>(halves);
        let odds = _mm512_and_si512(halves, _mm512_set1_epi32(0xffff_0000_u32 as i32));
        return (_mm512_castsi512_ps(evens), _mm512_castsi512_ps(odds));
    }
    (
        _mm512_cvtph_ps(_mm512_castsi512_si256(halves)),
        _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(halves)),
    )
}

/// Four bytes from `at` on; zeros behind the end.
#[inline(always)]
fn word32(bytes: &[u8], at: usize) -> u32 {
    match bytes.get(at..at + 4) {
        Some(whole) => u32::from_le_bytes(whole.try_into().expect("four bytes")),
        None => word(bytes, at) as u32,
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,bmi2,popcnt")]
fn dot_values<const KIND: u8, const T: usize>(
    row: Values,
    x: &Group<f32>,
) -> Option<(usize, [f32; T])> {
    let rows = x.rows::<T>();
    assert!((8 * row.mask.len()).next_multiple_of(32) <= x.width);
    let mut sums = [[_mm512_setzero_ps(); 2]; T];
    let used = walk::<KIND>(row, |column, low, high| {
        for t in 0..T {
            // SAFETY: `column + 32 <= width`, by the assertion above.
            let (x0, x1) = unsafe {
                let at = rows[t].as_ptr().add(column);
                (_mm512_loadu_ps(at), _mm512_loadu_ps(at.add(16)))
            };
            sums[t][0] = _mm512_fmadd_ps(low, x0, sums[t][0]);
            sums[t][1] = _mm512_fmadd_ps(high, x1, sums[t][1]);
        }
    })?;
    Some((used, sums.map(|[a, b]| _mm512_reduce_add_ps(_mm512_add_ps(a, b)))))
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,bmi2,popcnt")]
fn expand_values<const KIND: u8>(row: Values, out: &mut [f32]) -> Option<usize> {
    let covered = (8 * row.mask.len()).next_multiple_of(32);
    assert!(covered <= out.len());
    out[covered..].fill(0.0);
    walk::<KIND>(row, |column, low, high| {
        // SAFETY: `column + 32 <= out.len()`, by the assertion above.
        unsafe {
            let at = out.as_mut_ptr().add(column);
            _mm512_storeu_ps(at, low);
            _mm512_storeu_ps(at.add(16), high);
        }
    })
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn read_masks(table: &Table, stream: &[u8], masks: &mut [u8]) {
    let width = table.width;
    let item = _mm512_set1_epi8(((1u32 << width) - 1) as i8);
    // Eight items are `width` bytes: byte q * width + b of the stream goes to byte b of word q.
    let spread: [u8; 64] = std::array::from_fn(|i| (i / 8 * width + i % 8) as u8);
    let shifts: [u8; 64] = std::array::from_fn(|i| (i % 8 * width) as u8);
    let load = |bytes: &[u8]| {
        let len = bytes.len().min(64);
        let some = if len == 64 { !0 } else { (1u64 << len) - 1 };
        // SAFETY: only the bytes that are there are read.
        unsafe { _mm512_maskz_loadu_epi8(some, bytes.as_ptr().cast()) }
    };
    let (spread, shifts) = (load(&spread), load(&shifts));
    let (low, high) = (load(&table.masks[..64]), load(&table.masks[64..]));
    for (i, out) in masks.chunks_mut(64).enumerate() {
        let bytes = load(stream.get(8 * width * i..).unwrap_or(&[]));
        let words = _mm512_permutexvar_epi8(spread, bytes);
        let items = _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, words), item);
        let found = _mm512_permutex2var_epi8(low, items, high);
        let some = if out.len() == 64 { !0 } else { (1u64 << out.len()) - 1 };
        // SAFETY: only the bytes that are there are written.
        unsafe { _mm512_mask_storeu_epi8(out.as_mut_ptr().cast(), some, found) };
    }
}

/// The kept columns of a 64-column word, and those of them with a minus.
#[inline]
#[target_feature(enable = "bmi2")]
pub(super) fn keep_and_minus(row: &Signs, i: usize) -> (u64, u64) {
    let (keep, signs) = row.words(i);
    (keep, if row.mask.is_some() { _pdep_u64(signs, keep) } else { signs })
}

#[inline]
#[target_feature(enable = "avx512f")]
fn scale(row: &Signs, block: usize) -> __m512 {
    _mm512_cvtph_ps(_mm256_set1_epi16(row.scale(block) as i16))
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,bmi2")]
fn dot_signs<const DENSE: bool, const T: usize>(row: Signs, x: &Group<f32>) -> [f32; T] {
    let (rows, words) = (x.rows::<T>(), x.width / 64);
    let (mut totals, mut all) = ([_mm512_setzero_ps(); T], [0.0; T]);
    for block in 0..row.scales.len() / 2 {
        let mut sums = [[_mm512_setzero_ps(); 2]; T];
        for i in block * BLOCK / 64..words.min((block + 1) * BLOCK / 64) {
            let (keep, minus) = keep_and_minus(&row, i);
            let plus = keep & !minus;
            for h in 0..4 {
                let (plus, minus) = ((plus >> (16 * h)) as u16, (minus >> (16 * h)) as u16);
                for t in 0..T {
                    // SAFETY: `64 * i + 64 <= width`, the length of a row.
                    let x = unsafe { _mm512_loadu_ps(rows[t].as_ptr().add(64 * i + 16 * h)) };
                    let sum = &mut sums[t][h % 2];
                    if !DENSE {
                        *sum = _mm512_mask_add_ps(*sum, plus, *sum, x);
                    }
                    *sum = _mm512_mask_sub_ps(*sum, minus, *sum, x);
                }
            }
        }
        let scale = scale(&row, block);
        for t in 0..T {
            let sum = _mm512_add_ps(sums[t][0], sums[t][1]);
            totals[t] = _mm512_fmadd_ps(scale, sum, totals[t]);
            if DENSE {
                all[t] += _mm512_cvtss_f32(scale) * x.sum(t, block);
            }
        }
    }
    let twice = if DENSE { 2.0 } else { 1.0 };
    std::array::from_fn(|t| twice * _mm512_reduce_add_ps(totals[t]) + all[t])
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,bmi2")]
fn expand_signs(row: Signs, out: &mut [f32]) {
    let (plus, zero) = (scale(&row, 0), _mm512_setzero_ps());
    let minus = _mm512_sub_ps(zero, plus);
    for (i, out) in out.as_chunks_mut::<64>().0.iter_mut().enumerate() {
        let (keep, negative) = keep_and_minus(&row, i);
        for h in 0..4 {
            let weights = _mm512_mask_mov_ps(zero, (keep >> (16 * h)) as u16, plus);
            let weights = _mm512_mask_mov_ps(weights, (negative >> (16 * h)) as u16, minus);
            // SAFETY: `out` holds 64 values.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr().add(16 * h), weights) };
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,bmi2")]
fn dot_signs_int8<const DENSE: bool, const T: usize>(row: Signs, x: &Group<i8>) -> [f32; T] {
    let (rows, words) = (x.rows::<T>(), x.width / 64);
    let one = _mm512_set1_epi8(1);
    let (mut totals, mut all) = ([_mm512_setzero_ps(); T], [0.0; T]);
    for block in 0..row.scales.len() / 2 {
        let (mut added, mut taken) = ([_mm512_setzero_si512(); T], [_mm512_setzero_si512(); T]);
        for i in block * BLOCK / 64..words.min((block + 1) * BLOCK / 64) {
            let (keep, minus) = keep_and_minus(&row, i);
            let plus = _mm512_maskz_mov_epi8(keep & !minus, one);
            let minus = _mm512_maskz_mov_epi8(minus, one);
            for t in 0..T {
                // SAFETY: `64 * i + 64 <= width`, the length of a row.
                let x = unsafe { _mm512_loadu_si512(rows[t].as_ptr().add(64 * i).cast()) };
                if !DENSE {
                    added[t] = _mm512_dpbusd_epi32(added[t], plus, x);
                }
                taken[t] = _mm512_dpbusd_epi32(taken[t], minus, x);
            }
        }
        let scale = scale(&row, block);
        for t in 0..T {
            let sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(added[t], taken[t]));
            totals[t] = _mm512_fmadd_ps(scale, sum, totals[t]);
            if DENSE {
                all[t] += _mm512_cvtss_f32(scale) * x.sum(t, block);
            }
        }
    }
    let twice = if DENSE { 2.0 } else { 1.0 };
    std::array::from_fn(|t| x.units[t] * (twice * _mm512_reduce_add_ps(totals[t]) + all[t]))
}
