//! Every format on every path and in every mode, against `unpack` and a product in f64.

use super::*;
use crate::pack::{Bitmap, Groups, pack, unpack};
use crate::par::Pool;
use proptest::prelude::*;
use std::sync::atomic::AtomicBool;

pub(super) struct Noise(pub(super) u64);

impl Noise {
    /// Uniform in -1 to 1.
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    fn below(&mut self, bound: usize) -> usize {
        (((self.next() + 1.0) / 2.0 * bound as f32) as usize).min(bound - 1)
    }

    pub(super) fn vec(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.next()).collect()
    }
}

/// A weight of the format, some groups (or scales) of which are zero.
fn weight(noise: &mut Noise, kind: &Format, rows: usize, cols: usize) -> Vec<f32> {
    let mut weight = vec![0.0; rows * cols];
    for row in weight.chunks_mut(cols) {
        match *kind {
            Format::KeepOf(groups) => {
                for group in row.chunks_mut(groups.of) {
                    let size = if noise.next() < 0.9 { 1.0 } else { 0.0 };
                    for j in kept(noise, groups) {
                        group[j] = size * noise.next();
                    }
                }
            }
            Format::Signs(groups) => {
                for block in row.chunks_mut(row::BLOCK) {
                    let scale = if noise.next() < 0.8 { noise.next().abs() + 0.1 } else { 0.0 };
                    for group in block.chunks_mut(groups.of) {
                        for j in kept(noise, groups) {
                            let is_minus = noise.next() < 0.0 && scale > 0.0;
                            group[j] = if is_minus { -scale } else { scale };
                        }
                    }
                }
            }
            _ => {
                let density = noise.next();
                row.iter_mut().for_each(|w| *w = noise.next().min(density));
                row.iter_mut().filter(|w| **w == density).for_each(|w| *w = 0.0);
            }
        }
    }
    weight
}

/// Columns of a group to keep.
fn kept(noise: &mut Noise, groups: Groups) -> Vec<usize> {
    let mut columns: Vec<usize> = (0..groups.of).collect();
    for i in 0..groups.keep {
        columns.swap(i, i + noise.below(groups.of - i));
    }
    columns.truncate(groups.keep);
    columns
}

fn to_bytes(float: Float, values: &[f32]) -> Vec<u8> {
    match float {
        Float::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        _ => values.iter().flat_map(|v| float.to_bits(*v).to_le_bytes()).collect(),
    }
}

pub(super) fn from_bytes(float: Float, bytes: &[u8]) -> Vec<f32> {
    match float {
        Float::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        _ => bytes.as_chunks().0.iter().map(|b| float.from_bits(u16::from_le_bytes(*b))).collect(),
    }
}

/// A packed weight and what it unpacks to.
pub(super) struct Packed {
    pub(super) format: Format,
    pub(super) dense: Dense,
    pub(super) parts: Vec<Vec<u8>>,
    pub(super) weight: Vec<f32>,
}

impl Packed {
    pub(super) fn new(
        noise: &mut Noise,
        kind: Format,
        float: Float,
        (rows, cols): (usize, usize),
    ) -> Packed {
        let mut values = weight(noise, &kind, rows, cols);
        let to_f16 = |v: &mut f32| *v = Float::Bf16.round(Float::F16.round(*v));
        if matches!(kind, Format::Signs(_)) {
            values.iter_mut().for_each(to_f16);
        }
        let bytes = to_bytes(float, &values);
        let dense = Dense::new(float, rows, cols).unwrap();
        let format = match kind {
            Format::Bitmap(_) => Format::Bitmap(Bitmap::of(&bytes, &dense).unwrap()),
            other => other,
        };
        let parts = pack(&bytes, &dense, &format).unwrap();
        let borrowed: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
        let unpacked = unpack(&borrowed, &dense, &format, 0..rows).unwrap();
        Packed { format, dense, weight: from_bytes(float, &unpacked), parts }
    }

    pub(super) fn parts(&self) -> Vec<&[u8]> {
        self.parts.iter().map(Vec::as_slice).collect()
    }

    pub(super) fn apply(
        &self,
        kernel: &Kernel,
        pool: &Pool,
        x: &[f32],
        mode: Mode,
    ) -> Result<Vec<f32>> {
        let linear = Linear::new(*kernel, &self.format, self.dense, &self.parts())?;
        let cancel = AtomicBool::new(false);
        let mut y = vec![f32::NAN; x.len() / self.dense.cols * self.dense.rows];
        linear.apply(&Job::new(pool, &cancel), &self.parts(), x, mode, &mut y)?;
        Ok(y)
    }
}

pub(super) fn formats() -> impl Strategy<Value = Format> {
    let groups = |lengths: Vec<usize>| {
        let keep = |of: usize| (1..=of).prop_map(move |keep| Groups { keep, of });
        prop::sample::select(lengths).prop_flat_map(keep)
    };
    prop_oneof![
        groups(vec![4, 8, 16]).prop_map(Format::KeepOf),
        Just(Format::Bitmap(Bitmap { values: 0 })),
        groups(vec![4, 8]).prop_map(Format::Signs),
        prop::sample::select(vec![(2, 8), (3, 8), (3, 4), (4, 8), (8, 8)])
            .prop_map(|(keep, of)| Format::Signs(Groups { keep, of })),
    ]
}

/// Whole groups of sixteen, four or (for a bitmap) one column: edges of 8, 32, 64 and 256.
fn columns(format: &Format, size: usize) -> usize {
    match format {
        Format::KeepOf(groups) | Format::Signs(groups) => size.div_ceil(groups.of) * groups.of,
        _ => size,
    }
}

/// `(y, sum |w| , sum |w x|)` of every output in f64.
pub(super) fn product(packed: &Packed, x: &[f32]) -> Vec<(f64, f64, f64)> {
    let cols = packed.dense.cols;
    let rows = packed.weight.chunks(cols);
    x.chunks(cols)
        .flat_map(|x| {
            rows.clone().map(move |row| {
                row.iter().zip(x).fold((0.0, 0.0, 0.0), |(y, weights, terms), (w, x)| {
                    let (w, x) = (f64::from(*w), f64::from(*x));
                    (y + w * x, weights + w.abs(), terms + (w * x).abs())
                })
            })
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn products_are_those_of_the_unpacked_weight(
        kind in formats(),
        float in prop::sample::select(vec![Float::Bf16, Float::F16, Float::F32]),
        rows in 1usize..40,
        size in prop::sample::select(vec![1usize, 8, 30, 32, 33, 63, 64, 72, 200, 256, 260, 511, 520, 1100]),
        tokens in prop::sample::select(vec![1usize, 2, 3, 4, 5, 8, 9, 33]),
        seed: u64,
    ) {
        let mut noise = Noise(seed | 1);
        let packed = Packed::new(&mut noise, kind, float, (rows, columns(&kind, size)));
        let x = noise.vec(tokens * packed.dense.cols);
        let expected = product(&packed, &x);
        let pool = Pool::new(1).unwrap();
        for kernel in Kernel::available() {
            let y = packed.apply(&kernel, &pool, &x, Mode::Float32).unwrap();
            for (y, (sum, weights, terms)) in y.iter().zip(&expected) {
                // No term goes through more roundings than there are columns. Where signs are
                // summed before they are scaled, all of a block's activations (at most 1) count.
                let block = packed.weight.iter().fold(0.0f32, |most, w| most.max(w.abs()));
                let size = terms.max(f64::from(block) * packed.dense.cols as f64);
                let bound = size * packed.dense.cols as f64 * f64::from(f32::EPSILON) + weights * 1e-30;
                let error = (f64::from(*y) - sum).abs();
                prop_assert!(error <= bound, "{} {}: {y} {sum} {bound}", kernel.name, packed.format);
            }
            if matches!(kind, Format::Signs(_)) {
                let y = packed.apply(&kernel, &pool, &x, Mode::Int8).unwrap();
                let per_token = expected.chunks(rows).zip(x.chunks(packed.dense.cols));
                for (y, (expected, x)) in y.chunks(rows).zip(per_token) {
                    // Rounding moves an activation by half a 127th of the largest.
                    let largest = x.iter().fold(0.0f32, |most, v| most.max(v.abs()));
                    for (y, (sum, weights, _)) in y.iter().zip(expected) {
                        let bound = f64::from(largest) / 254.0 * weights * 1.001 + 1e-4 * weights;
                        let error = (f64::from(*y) - sum).abs();
                        prop_assert!(error <= bound, "{}: {y} {sum} {bound}", kernel.name);
                    }
                }
            }
        }
    }
}

/// One weight of every kind that is large enough for several workers.
fn samples(noise: &mut Noise) -> Vec<Packed> {
    let signs = |keep, of| Format::Signs(Groups { keep, of });
    let kinds = [
        Format::KeepOf(Groups { keep: 2, of: 4 }),
        Format::Bitmap(Bitmap { values: 0 }),
        signs(2, 8),
        signs(8, 8),
    ];
    kinds.map(|kind| Packed::new(noise, kind, Float::Bf16, (300, 520))).into()
}

#[test]
fn threads_change_no_bit() {
    let mut noise = Noise(5);
    let two = Format::KeepOf(Groups { keep: 2, of: 4 });
    // Whole words of columns, and so many rows that workers take several blocks at once.
    let many_rows = Packed::new(&mut noise, two, Float::Bf16, (1100, 512));
    for packed in samples(&mut noise).into_iter().chain([many_rows]) {
        for tokens in [1, 3, 33] {
            let x = noise.vec(tokens * packed.dense.cols);
            for kernel in Kernel::available() {
                let modes = [Mode::Float32, Mode::Int8];
                let is_signs = matches!(packed.format, Format::Signs(_));
                for mode in &modes[..if is_signs { 2 } else { 1 }] {
                    let run = |threads| {
                        let pool = Pool::new(threads).unwrap();
                        packed.apply(&kernel, &pool, &x, *mode).unwrap()
                    };
                    let one = run(1);
                    assert!(one.iter().all(|y| y.is_finite()));
                    assert!(one == run(2) && one == run(5), "{}", kernel.name);
                }
            }
        }
    }
}

#[test]
fn tokens_in_pieces_change_no_bit_of_a_long_call() {
    let mut noise = Noise(8);
    let packed =
        Packed::new(&mut noise, Format::KeepOf(Groups { keep: 1, of: 4 }), Float::F32, (3, 8));
    let tokens = many::TOKENS + 40;
    let x = noise.vec(tokens * 8);
    let pool = Pool::new(1).unwrap();
    for kernel in Kernel::available() {
        let all = packed.apply(&kernel, &pool, &x, Mode::Float32).unwrap();
        let rest = packed.apply(&kernel, &pool, &x[many::TOKENS * 8..], Mode::Float32).unwrap();
        assert_eq!(all[many::TOKENS * 3..], rest);
    }
}

#[test]
fn a_mask_that_was_changed_is_an_error_and_not_a_read_beyond_the_end() {
    let mut noise = Noise(3);
    let two = Format::KeepOf(Groups { keep: 2, of: 4 });
    let whole_words = Packed::new(&mut noise, two, Float::Bf16, (300, 512));
    for mut packed in samples(&mut noise).into_iter().take(2).chain([whole_words]) {
        let cols = packed.dense.cols;
        let pool = Pool::new(1).unwrap();
        let cancel = AtomicBool::new(false);
        for kernel in Kernel::available() {
            let linear =
                Linear::new(kernel, &packed.format, packed.dense, &packed.parts()).unwrap();
            let before = packed.parts[1].clone();
            packed.parts[1].fill(0xff);
            for tokens in [1, 33] {
                let (x, mut y) = (noise.vec(tokens * cols), vec![0.0; tokens * 300]);
                let job = Job::new(&pool, &cancel);
                let result = linear.apply(&job, &packed.parts(), &x, Mode::Float32, &mut y);
                let message = result.unwrap_err().to_string();
                assert!(message.contains("as many bits as there are values"), "{message}");
            }
            packed.parts[1] = before;
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let mut noise = Noise(9);
    let samples = samples(&mut noise);
    let (pool, kernel) = (Pool::new(1).unwrap(), Kernel::select().unwrap());
    let message = |result: Result<Vec<f32>>| result.unwrap_err().to_string();
    let short = vec![0.0; 519];
    let cancel = AtomicBool::new(false);
    let linear = |p: &Packed| Linear::new(kernel, &p.format, p.dense, &p.parts());
    let of_signs = linear(&samples[2]).unwrap();
    let job = Job::new(&pool, &cancel);
    let mut y = vec![0.0; 300];
    let result = of_signs.apply(&job, &samples[2].parts(), &short, Mode::Float32, &mut y);
    assert_eq!(
        result.unwrap_err().to_string(),
        "x: expected 1 rows of 520 values, found 519 values"
    );
    let found = message(samples[0].apply(&kernel, &pool, &vec![0.0; 520], Mode::Int8));
    assert_eq!(found, "mode int8: only for weights that are packed as signs");
    let result = of_signs.apply(&job, &samples[3].parts(), &vec![0.0; 520], Mode::Int8, &mut y);
    assert!(result.unwrap_err().to_string().starts_with("bytes of the parts: expected ["));
    let mut samples = samples;
    let mut bitmap = samples.remove(1);
    bitmap.parts[1][0] ^= 1;
    let found = linear(&bitmap).err().unwrap().to_string();
    assert!(found.starts_with("mask: expected") && found.contains("bits, found"), "{found}");
    let mut moved = samples.into_iter().next().unwrap();
    moved.parts[1][0] = 0b0001_0111; // as many bits, in other groups
    let found = linear(&moved).err().unwrap().to_string();
    assert_eq!(found, "mask: row 0: group 0: expected 2 bits, found 3");
    assert!(Mode::parse("float16").is_err());
    let two = Format::Residual(Groups { keep: 2, of: 8 });
    let found = Linear::new(kernel, &two, bitmap.dense, &[&[]]).err().unwrap().to_string();
    assert_eq!(found, "bytes of the parts: expected [19500, 1800, 12300, 5100, 1800], found [0]");
}

#[test]
fn a_token_that_is_not_finite_does_not_come_out_as_a_number() {
    let mut noise = Noise(4);
    let packed =
        Packed::new(&mut noise, Format::Signs(Groups { keep: 8, of: 8 }), Float::Bf16, (5, 64));
    let mut x = noise.vec(3 * 64);
    x[70] = f32::INFINITY;
    let pool = Pool::new(1).unwrap();
    for kernel in Kernel::available() {
        for mode in [Mode::Float32, Mode::Int8] {
            let y = packed.apply(&kernel, &pool, &x, mode).unwrap();
            for (i, y) in y.iter().enumerate() {
                let is_zero_row = packed.weight[i % 5 * 64..][..64].iter().all(|w| *w == 0.0);
                assert_eq!(y.is_finite(), i / 5 != 1 || (is_zero_row && y == &0.0), "{i} {y}");
            }
        }
    }
}

#[test]
fn one_token_has_the_sums_of_an_unpacked_weight_where_rows_go_side_by_side() {
    let mut noise = Noise(11);
    let pool = Pool::new(2).unwrap();
    for float in [Float::Bf16, Float::F16, Float::F32] {
        for (keep, of) in [(2, 4), (1, 4), (3, 4), (5, 8), (7, 16)] {
            // The last of three blocks of rows has five; beyond 8,192 columns a second piece begins, of
            // whole words of 32 and of a part of one.
            for cols in [32, 96, 8208, 8256] {
                let format = Format::KeepOf(Groups { keep, of });
                let packed = Packed::new(&mut noise, format, float, (37, cols));
                let x = noise.vec(cols);
                let expected: Vec<_> = product(&packed, &x).iter().map(|(y, ..)| *y).collect();
                let norm = expected.iter().map(|y| y * y).sum::<f64>().sqrt();
                assert!(norm > 0.0);
                for kernel in Kernel::available() {
                    let y = packed.apply(&kernel, &pool, &x, Mode::Float32).unwrap();
                    let off = y.iter().zip(&expected).map(|(y, e)| (f64::from(*y) - e).powi(2));
                    let error = off.sum::<f64>().sqrt() / norm;
                    assert!(error < 3e-6, "{keep}:{of} {float:?} {cols} {}: {error}", kernel.name);
                }
            }
        }
    }
}
