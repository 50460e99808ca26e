//! Weights of two planes, and rows longer than what a kernel takes at once.

use super::tests::{Noise, Packed, formats, from_bytes, product};
use super::*;
use crate::pack::{Groups, unpack};
use crate::par::Pool;
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// A weight in float32 is the sum itself, so there the unpacked weight is the oracle.
    #[test]
    fn two_planes_are_added(
        kind in formats().prop_filter("signs", |kind| matches!(kind, Format::Signs(_))),
        rows in 1usize..40,
        size in prop::sample::select(vec![8usize, 64, 200, 256, 520, 1100]),
        tokens in prop::sample::select(vec![1usize, 4, 9, 33]),
        seed: u64,
    ) {
        let Format::Signs(groups) = kind else { unreachable!("filtered") };
        let (noise, cols) = (&mut Noise(seed | 1), size.next_multiple_of(8));
        let dense = Dense::new(Float::F32, rows, cols).unwrap();
        let [one, two] = [Format::Signs(residual::FIRST), kind]
            .map(|kind| Packed::new(noise, kind, Float::F32, (rows, cols)));
        let parts = residual::pack([&one.weight, &two.weight], &dense, groups).unwrap();
        let mut packed = Packed { format: Format::Residual(groups), dense, parts, weight: vec![] };
        let bytes = unpack(&packed.parts(), &dense, &packed.format, 0..rows).unwrap();
        packed.weight = from_bytes(Float::F32, &bytes);
        let x = noise.vec(tokens * cols);
        let pool = Pool::new(1).unwrap();
        for kernel in Kernel::available() {
            let exact = packed.apply(&kernel, &pool, &x, Mode::Float32).unwrap();
            let rounded = packed.apply(&kernel, &pool, &x, Mode::Int8).unwrap();
            let planes = one.weight.iter().zip(&two.weight).map(|(a, b)| a.abs() + b.abs());
            let sizes: Vec<f32> = planes.collect();
            for (i, (sum, _, _)) in product(&packed, &x).into_iter().enumerate() {
                let (token, row) = (&x[i / rows * cols..][..cols], &sizes[i % rows * cols..][..cols]);
                let largest = token.iter().fold(0.0f32, |most, v| most.max(v.abs()));
                let weights: f64 = row.iter().map(|w| f64::from(*w)).sum();
                let block = 2.2 * cols as f64; // no scale is larger than 1.1
                let error = (f64::from(exact[i]) - sum).abs();
                prop_assert!(error <= block * cols as f64 * f64::from(f32::EPSILON), "{error}");
                let bound = f64::from(largest) / 254.0 * weights * 1.001 + 1e-4 * weights;
                let error = (f64::from(rounded[i]) - sum).abs();
                prop_assert!(error <= bound, "{} {kind}: {error} {bound}", kernel.name);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Beyond 16 blocks of scales, and beyond the columns whose activations stay near.
    #[test]
    fn long_rows_of_signs_with_one_token(
        kind in prop::sample::select(vec![(2, 8), (3, 4), (8, 8)]),
        rows in 1usize..9,
        cols in prop::sample::select(vec![4096usize + 264, 8192 + 264]),
        seed: u64,
    ) {
        let (noise, groups) = (&mut Noise(seed | 1), Groups { keep: kind.0, of: kind.1 });
        let packed = Packed::new(noise, Format::Signs(groups), Float::Bf16, (rows, cols));
        let x = noise.vec(cols);
        let expected = product(&packed, &x);
        let largest = x.iter().fold(0.0f32, |most, v| most.max(v.abs()));
        for kernel in Kernel::available() {
            let pool = Pool::new(1).unwrap();
            let exact = packed.apply(&kernel, &pool, &x, Mode::Float32).unwrap();
            let rounded = packed.apply(&kernel, &pool, &x, Mode::Int8).unwrap();
            for ((exact, rounded), (sum, weights, _)) in exact.iter().zip(rounded).zip(&expected) {
                let error = (f64::from(*exact) - sum).abs();
                prop_assert!(error <= 2e-6 * cols as f64, "{} {error}", kernel.name);
                let bound = f64::from(largest) / 254.0 * weights * 1.001 + 1e-4 * weights;
                prop_assert!((f64::from(rounded) - sum).abs() <= bound, "{}", kernel.name);
            }
        }
    }
}
