//! One token with AVX-512: several rows at once. Activations are loaded once for all of them, none
//! waits for its own sums, and bounds are checked once a block, not once a word: what such a loop
//! does beside its vectors is what it costs. Masks are made where they are used: an array of them was
//! kept as mask registers on the stack, which doubled the moves.
#![allow(unsafe_code)] // loads; every length is checked before its loop

use super::avx512::{keep_and_minus, widen};
use super::input::Group;
use super::row::{BLOCK, Signs, Values};
use std::arch::x86_64::*;
use std::hint::black_box;

/// Words of 64 columns that share a scale.
const WORDS: usize = BLOCK / 64;

/// Blocks whose scales are read at once.
const SCALES: usize = 16;

/// The products of rows of signs with activations of one type: kept ones are summed, and those with a
/// minus taken twice from that. A macro, as closures are not compiled for their caller's instructions.
macro_rules! dot_signs {
    ($name:ident, $features:literal, $number:ty, $sums:ident) => {
        #[target_feature(enable = $features)]
        pub(super) fn $name<const DENSE: bool, const R: usize>(
            rows: [Signs; R],
            group: &Group<$number>,
        ) -> [f32; R] {
            let [x] = group.rows::<1>();
            let mut totals = [_mm512_setzero_ps(); R];
            let blocks = rows[0].scales.len() / 2;
            for first in (0..blocks).step_by(SCALES) {
                let scales = scales::<DENSE, R>(&rows, first, &group.sums, &mut totals);
                for block in first..blocks.min(first + SCALES) {
                    let x = &x[block * BLOCK..x.len().min((block + 1) * BLOCK)];
                    let sums = match are_whole::<DENSE, R>(&rows, block) {
                        true => $sums::<DENSE, true, R>(&rows, block, x),
                        false => $sums::<DENSE, false, R>(&rows, block, x),
                    };
                    for r in 0..R {
                        let scale = _mm512_set1_ps(scales[r][block - first]);
                        totals[r] = _mm512_fmadd_ps(scale, sums[r], totals[r]);
                    }
                }
            }
            let mut found = [0.0; R];
            for r in 0..R {
                found[r] = group.units[0] * _mm512_reduce_add_ps(totals[r]);
            }
            found
        }
    };
}

dot_signs!(dot_signs, "avx512f,avx512bw,avx512vl,bmi2", f32, sums);
dot_signs!(dot_signs_int8, "avx512f,avx512bw,avx512vl,avx512vnni,bmi2", i8, sums_int8);

/// The scales of 16 blocks. Where all columns are kept, adds what all activations give to `totals`, and the
/// scales are those of what is taken from it.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn scales<const DENSE: bool, const R: usize>(
    rows: &[Signs; R],
    first: usize,
    sums: &[f32],
    totals: &mut [__m512; R],
) -> [[f32; SCALES]; R] {
    let mut scales = [[0.0; SCALES]; R];
    let sums = sums.get(first..).unwrap_or(&[]);
    let some = lanes(sums.len());
    // SAFETY: masked lanes are not read.
    let sums = unsafe { _mm512_maskz_loadu_ps(some, sums.as_ptr()) };
    for r in 0..R {
        let bytes = &rows[r].scales[2 * first..];
        let some = lanes(bytes.len() / 2);
        // SAFETY: as above.
        let halves = unsafe { _mm256_maskz_loadu_epi16(some, bytes.as_ptr().cast()) };
        let mut scale = _mm512_cvtph_ps(halves);
        if DENSE {
            totals[r] = _mm512_fmadd_ps(scale, sums, totals[r]);
            scale = _mm512_mul_ps(scale, _mm512_set1_ps(-2.0));
        }
        // SAFETY: there is room for 16.
        unsafe { _mm512_storeu_ps(scales[r].as_mut_ptr(), scale) };
    }
    scales
}

/// A bit for each of `count` lanes, 16 at most.
fn lanes(count: usize) -> u16 {
    if count >= SCALES { !0 } else { (1 << count) - 1 }
}

/// Of one block; where all columns are kept, of those with a minus alone.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,bmi2")]
fn sums<const DENSE: bool, const WHOLE: bool, const R: usize>(
    rows: &[Signs; R],
    block: usize,
    x: &[f32],
) -> [__m512; R] {
    let (mut added, mut taken) = ([_mm512_setzero_ps(); R], [_mm512_setzero_ps(); R]);
    for (w, x) in x.as_chunks::<64>().0.iter().enumerate() {
        let mut words = [(0, 0); R];
        for r in 0..R {
            words[r] = word::<DENSE, WHOLE>(&rows[r], block * WORDS + w);
        }
        for h in 0..4 {
            // SAFETY: `x` has 64 values.
            let x = unsafe { _mm512_loadu_ps(x.as_ptr().add(16 * h)) };
            for r in 0..R {
                let (keep, minus) =
                    ((words[r].0 >> (16 * h)) as u16, (words[r].1 >> (16 * h)) as u16);
                if !DENSE {
                    added[r] = _mm512_mask_add_ps(added[r], keep, added[r], x);
                }
                taken[r] = _mm512_mask_add_ps(taken[r], minus, taken[r], x);
            }
        }
    }
    if DENSE {
        return taken;
    }
    let twice = _mm512_set1_ps(-2.0);
    for r in 0..R {
        added[r] = _mm512_fmadd_ps(twice, taken[r], added[r]);
    }
    added
}

/// The same with activations in 8 bits; whole numbers until the last step.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,bmi2")]
fn sums_int8<const DENSE: bool, const WHOLE: bool, const R: usize>(
    rows: &[Signs; R],
    block: usize,
    x: &[i8],
) -> [__m512; R] {
    // Known, it would be loaded from memory under each mask, which is slower than a masked move.
    let one = black_box(_mm512_set1_epi8(1));
    let (mut added, mut taken) = ([_mm512_setzero_si512(); R], [_mm512_setzero_si512(); R]);
    for (w, x) in x.as_chunks::<64>().0.iter().enumerate() {
        // SAFETY: `x` has 64 values.
        let x = unsafe { _mm512_loadu_si512(x.as_ptr().cast()) };
        for r in 0..R {
            let (keep, minus) = word::<DENSE, WHOLE>(&rows[r], block * WORDS + w);
            if !DENSE {
                added[r] = _mm512_dpbusd_epi32(added[r], _mm512_maskz_mov_epi8(keep, one), x);
            }
            taken[r] = _mm512_dpbusd_epi32(taken[r], _mm512_maskz_mov_epi8(minus, one), x);
        }
    }
    let mut found = [_mm512_setzero_ps(); R];
    for r in 0..R {
        let sum = match DENSE {
            true => taken[r],
            false => _mm512_sub_epi32(added[r], _mm512_slli_epi32::<1>(taken[r])),
        };
        found[r] = _mm512_cvtepi32_ps(sum);
    }
    found
}

/// Whether all rows have all bytes of a block, so that `word` need not ask.
#[inline]
fn are_whole<const DENSE: bool, const R: usize>(rows: &[Signs; R], block: usize) -> bool {
    let (first, last) = (block * WORDS, (block + 1) * WORDS);
    rows.iter().all(|row| {
        let has_mask = row.mask.is_some_and(|mask| mask.len() >= 8 * last);
        row.signs.len() >= (first + WORDS - 1) * row.step + 8 && (DENSE || has_mask)
    })
}

/// The kept columns of word `i`, and those of them with a minus.
#[inline]
#[target_feature(enable = "bmi2")]
fn word<const DENSE: bool, const WHOLE: bool>(row: &Signs, i: usize) -> (u64, u64) {
    if !WHOLE {
        return keep_and_minus(row, i);
    }
    let mask = row.mask.unwrap_or(&[]);
    // SAFETY: `are_whole` saw that both have these bytes.
    unsafe {
        let signs = row.signs.as_ptr().add(i * row.step).cast::<u64>().read_unaligned();
        if DENSE {
            return (!0, signs);
        }
        let keep = mask.as_ptr().add(8 * i).cast::<u64>().read_unaligned();
        (keep, _pdep_u64(signs, keep))
    }
}

/// The products of rows of half types with as many values, `each`, in every 32 columns: where the next ones
/// start does not depend on the mask before, so rows go side by side. `None` where a mask has another number of
/// bits in all, or where there are no bytes to read beyond a row's last value.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,avx512vpopcntdq")]
pub(super) fn dot_values<const KIND: u8, const WIDE: bool, const R: usize>(
    rows: [Values; R],
    each: usize,
    x: &Group<f32>,
) -> Option<[f32; R]> {
    let [x] = x.rows::<1>();
    let words = rows[0].mask.len() / 4;
    let ahead = if WIDE { 32 } else { 16 };
    let (mut low, mut high) = ([_mm512_setzero_ps(); R], [_mm512_setzero_ps(); R]);
    if words == 0 || x.len() < 32 * words {
        return None;
    }
    for row in &rows {
        let has_bytes = row.values.len() >= 2 * ((words - 1) * each + ahead);
        if !has_bytes || row.mask.len() != 4 * words || ones(row.mask) != words * each {
            return None;
        }
    }
    for word in 0..words {
        // SAFETY: the bytes of every row and of the activations are there, as was seen above.
        unsafe {
            let at = x.as_ptr().add(32 * word);
            let (x0, x1) = (_mm512_loadu_ps(at), _mm512_loadu_ps(at.add(16)));
            for r in 0..R {
                let mask = rows[r].mask.as_ptr().add(4 * word).cast::<u32>().read_unaligned();
                let values = rows[r].values.as_ptr().add(2 * word * each);
                let some = match WIDE {
                    true => _mm512_loadu_si512(values.cast()),
                    false => _mm512_castsi256_si512(_mm256_loadu_si256(values.cast())),
                };
                let (w0, w1) = widen::<KIND>(_mm512_maskz_expand_epi16(mask, some));
                low[r] = _mm512_fmadd_ps(w0, x0, low[r]);
                high[r] = _mm512_fmadd_ps(w1, x1, high[r]);
            }
        }
    }
    let mut found = [0.0; R];
    for r in 0..R {
        found[r] = _mm512_reduce_add_ps(_mm512_add_ps(low[r], high[r]));
    }
    Some(found)
}

/// Bits that are set. Counted beside the weights, 32 at a time, they cost a sixth of the product.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vpopcntdq")]
fn ones(mask: &[u8]) -> usize {
    let mut sum = _mm512_setzero_si512();
    for bytes in mask.chunks(64) {
        let some = if bytes.len() == 64 { !0 } else { (1 << bytes.len()) - 1 };
        // SAFETY: masked bytes are not read.
        let bytes = unsafe { _mm512_maskz_loadu_epi8(some, bytes.as_ptr().cast()) };
        sum = _mm512_add_epi64(sum, _mm512_popcnt_epi64(bytes));
    }
    _mm512_reduce_add_epi64(sum) as usize
}

#[cfg(test)]
mod tests {
    use super::super::avx512::Avx512;
    use super::super::tests::{Noise, Packed};
    use super::super::{Float, Format, Simd};
    use super::*;
    use crate::pack::Groups;

    #[test]
    fn rows_of_values_go_side_by_side_with_the_sums_of_one() {
        let Some(simd) = Avx512::new() else { return };
        let (float, cols) = (Float::Bf16, 96);
        let mut noise = Noise(21);
        let two = Format::KeepOf(Groups { keep: 2, of: 4 });
        let mut packed = Packed::new(&mut noise, two, float, (5, cols));
        let x = Group::exact(&noise.vec(cols), cols, 0..cols, simd.order(float));
        let row = |packed: &Packed, r: usize| packed.parts[1][r * cols / 8..][..cols / 8].to_vec();
        for changed in [false, true] {
            if changed {
                packed.parts[1][2 * cols / 8] = 0b0011_0111; // a bit more
            }
            let masks: Vec<_> = (0..4).map(|r| row(&packed, r)).collect();
            let rows: [Values; 4] = std::array::from_fn(|r| Values {
                mask: &masks[r],
                values: &packed.parts[0][r * cols..],
            });
            let one = rows.map(|row| simd.dot_values::<1>(float, row, &x).unwrap());
            let found = simd.dot_values_of(float, rows, 16, &x);
            assert_eq!(found, (!changed).then_some(one.map(|(_, sums)| sums[0])));
        }
    }
}
