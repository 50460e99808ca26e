//! The formats whose contents a solver decides: golden bytes, round trips, refusals.

use super::{Dense, Element, Groups, Part, binary, residual, row_column, true_bits, uniform};
use crate::float::Float;
use binary::{BLOCK, KEPT, Levels, MINUS, SECOND};
use proptest::prelude::*;

fn dense(rows: usize, cols: usize) -> Dense {
    Dense::new(Float::F32, rows, cols).unwrap()
}

fn slices(parts: &[Vec<u8>]) -> Vec<&[u8]> {
    parts.iter().map(Vec::as_slice).collect()
}

fn numbers(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// Numbers below `below` that depend on the seed alone.
fn noise(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed | 1;
    move |below| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) % below
    }
}

fn names(layout: &[Part]) -> Vec<(&'static str, &'static str, Vec<usize>)> {
    layout.iter().map(|p| (p.name, p.element.name(), p.shape.clone())).collect()
}

const LEVELS: Levels = Levels { scales: [1.0, 2.0, 4.0, 0.5], means: [0.25, -0.25, 0.0] };

/// One row of one group, of which columns 0, 1, 3, 5, 6, 7 are kept and column 3 is salient.
fn one_group() -> binary::Decisions {
    let kept = [true, true, false, true, false, true, true, true];
    let codes = kept.map(u8::from).map(|kept| kept * KEPT);
    let mut found = binary::Decisions {
        codes: codes.to_vec(),
        salient: (0..8).map(|j| j == 3).collect(),
        levels: vec![LEVELS],
    };
    found.codes[0] |= MINUS;
    found.codes[3] |= SECOND;
    found.codes[7] |= MINUS | SECOND;
    found
}

#[test]
fn binary_bytes_are_those_of_the_page() {
    let (dense, groups) = (dense(1, 8), Groups { keep: 6, of: 8 });
    let parts = binary::pack(&one_group(), &dense, groups).unwrap();
    // Mask 0b1110_1011: 18 masks lack one of columns 5 to 7, and of the others one is smaller.
    assert_eq!(parts[0], [19]);
    assert_eq!(parts[1], [0b10_0001]);
    assert_eq!(parts[2], [0b10_0100]);
    assert_eq!(parts[3][..2], [0b1000, 0]);
    assert_eq!(parts[4], [0x00, 0x3c, 0x00, 0x40, 0x00, 0x44, 0x00, 0x38]);
    assert_eq!(parts[5], [0x00, 0x34, 0x00, 0xb4, 0x00, 0x00]);
    let mut out = vec![0; 32];
    binary::unpack(&slices(&parts), &dense, groups, 0..1, &mut out).unwrap();
    assert_eq!(numbers(&out), [-0.75, 1.25, 0.0, 3.5, 0.0, 1.25, 1.25, -2.25]);
}

#[test]
fn other_bytes_are_those_of_the_page() {
    let found = row_column::Decisions {
        minus: (0..9).map(|j| j % 3 == 0).collect(),
        scales: vec![2.0],
        columns: (0..9).map(|j| j as f32).collect(),
    };
    let parts = row_column::pack(&found, &dense(1, 9)).unwrap();
    assert_eq!(parts[0], [0b0100_1001, 0]);
    assert_eq!((&parts[1][..], parts[2].len()), (&[0x00, 0x40][..], 18));
    let mut out = vec![0; 36];
    row_column::unpack(&slices(&parts), &dense(1, 9), 0..1, &mut out).unwrap();
    assert_eq!(numbers(&out), [0.0, 2.0, 4.0, -6.0, 8.0, 10.0, -12.0, 14.0, 16.0]);
    assert!(numbers(&out)[0].is_sign_positive());

    let first = [1.0, -1.0, 1.0, 1.0, -1.0, -1.0, 1.0, 1.0];
    let second = [0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0];
    let groups = Groups { keep: 1, of: 8 };
    let parts = residual::pack([&first, &second], &dense(1, 8), groups).unwrap();
    assert_eq!(parts, [vec![0b0011_0010], vec![0, 0x3c], vec![2], vec![0], vec![0, 0x38]]);
    let mut out = vec![0; 32];
    residual::unpack(&slices(&parts), &dense(1, 8), groups, 0..1, &mut out).unwrap();
    assert_eq!(numbers(&out), [1.0, -1.0, 1.5, 1.0, -1.0, -1.0, 1.0, 1.0]);

    let codes = vec![0b101, 0b010, 0b111, 0b000];
    let found = uniform::Decisions { codes, scales: vec![0.5], zeros: vec![3] };
    let parts = uniform::pack(&found, &dense(1, 4), 3).unwrap();
    assert_eq!(parts, [vec![0b1101_0101, 0b0001], vec![0x00, 0x38], vec![3]]);
    let mut out = vec![0; 16];
    uniform::unpack(&slices(&parts), &dense(1, 4), 3, 0..1, &mut out).unwrap();
    assert_eq!(numbers(&out), [1.0, -0.5, 2.0, -1.5]);
}

#[test]
fn layouts_and_their_bits() {
    let dense = dense(64, 256);
    let layout = binary::layout(&dense, Groups { keep: 4, of: 8 }).unwrap();
    let expected = [
        ("positions", "U8", vec![64, 28]),
        ("signs", "U8", vec![64, 16]),
        ("second", "U8", vec![64, 16]),
        ("salient", "U8", vec![2, 16]),
        ("scales", "F16", vec![64, 2, 4]),
        ("means", "F16", vec![64, 2, 3]),
    ];
    assert_eq!(names(&layout), expected);
    assert!((true_bits(&layout, &dense) - (2.75 + 1.0 / 64.0)).abs() < 1e-12);
    assert_eq!(binary::layout(&dense, Groups { keep: 8, of: 8 }).unwrap().len(), 5);
    let layout = residual::layout(&dense, Groups { keep: 2, of: 8 }).unwrap();
    let expected = [
        ("signs", "U8", vec![64, 32]),
        ("scales", "F16", vec![64, 1]),
        ("residual_positions", "U8", vec![64, 20]),
        ("residual_signs", "U8", vec![64, 8]),
        ("residual_scales", "F16", vec![64, 1]),
    ];
    assert_eq!(names(&layout), expected);
    assert!((true_bits(&layout, &dense) - 2.0).abs() < 1e-12);
    let bits = true_bits(&uniform::layout(&dense, 3).unwrap(), &dense);
    assert!((bits - 3.1875).abs() < 1e-12);
    assert!(uniform::layout(&dense, 5).unwrap_err().to_string().contains("expected 2, 3, 4 or 8"));
    let odd = Dense::new(Float::F32, 2, 12).unwrap();
    assert!(binary::layout(&odd, Groups { keep: 8, of: 8 }).is_err());
}

#[test]
fn broken_parts_are_refused_by_name() {
    let (dense, groups) = (dense(1, 8), Groups { keep: 6, of: 8 });
    let good = binary::pack(&one_group(), &dense, groups).unwrap();
    let refused = |part: usize, at: usize, value: u8| {
        let mut parts = good.clone();
        parts[part][at] = value;
        let found = binary::unpack(&slices(&parts), &dense, groups, 0..1, &mut [0; 32]);
        found.unwrap_err().to_string()
    };
    assert!(refused(0, 0, 28).contains("positions: row 0: group 0: expected a code below 28"));
    assert!(refused(0, 0, 0b0011_0110).contains("zero bits after the last item"));
    assert!(refused(1, 0, 0b1000_0000).contains("signs"));
    assert!(refused(2, 0, 0b0100_0000).contains("second"));
    assert!(refused(3, 1, 1).contains("salient: expected zero bits from column 8 on"));
    assert!(refused(4, 1, 0x7c).contains("scales: expected finite numbers, found inf"));
    assert!(refused(5, 1, 0x7e).contains("means: expected finite numbers, found NaN"));
    let short: Vec<&[u8]> = slices(&good)[..5].to_vec();
    assert!(binary::unpack(&short, &dense, groups, 0..1, &mut [0; 32]).is_err());

    let (codes, scales): ([u8; 1], [u8; 2]) = ([0], [0, 0x3c]);
    let zeros = |zero: u8| {
        let four = Dense::new(Float::F32, 1, 4).unwrap();
        uniform::unpack(&[&codes, &scales, &[zero]], &four, 2, 0..1, &mut [0; 16])
    };
    assert!(zeros(3).is_ok());
    assert!(zeros(4).unwrap_err().to_string().contains("zeros: expected codes up to 3, found 4"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn binary_round_trips(rows in 1usize..4, groups in 1usize..20, keep in 1usize..=8, seed: u64) {
        let (dense, pattern) = (dense(rows, groups * 8), Groups { keep, of: 8 });
        let mut random = noise(seed);
        let mut codes = vec![0u8; rows * groups * 8];
        for group in codes.chunks_exact_mut(8) {
            while group.iter().filter(|c| **c != 0).count() < keep {
                group[random(8) as usize] = KEPT | (random(4) as u8) << 1;
            }
        }
        let blocks = dense.cols.div_ceil(BLOCK);
        let mut number = |_| Float::F16.round(random(2000) as f32 / 512.0 - 1.9);
        let levels: Vec<Levels> = (0..rows * blocks)
            .map(|_| Levels { scales: [0; 4].map(&mut number), means: [0; 3].map(&mut number) })
            .collect();
        let salient: Vec<bool> = (0..dense.cols).map(|_| random(9) == 0).collect();
        let found = binary::Decisions { codes, salient, levels };
        let layout = binary::layout(&dense, pattern).unwrap();
        let parts = binary::pack(&found, &dense, pattern).unwrap();
        prop_assert!(layout.iter().zip(&parts).all(|(part, bytes)| part.nbytes == bytes.len()));
        prop_assert!(layout.iter().all(|part| part.shape.iter().product::<usize>()
            * part.element.size() == part.nbytes));
        prop_assert_eq!(layout[0].element, Element::Byte);
        // The slow twin: each weight by itself. Rows may be asked for apart.
        for row in 0..rows {
            let mut out = vec![0; dense.row_bytes()];
            binary::unpack(&slices(&parts), &dense, pattern, row..row + 1, &mut out).unwrap();
            for (j, value) in numbers(&out).into_iter().enumerate() {
                let levels = found.levels[row * blocks + j / BLOCK];
                let code = found.codes[row * dense.cols + j];
                prop_assert_eq!(value, levels.value(code, found.salient[j]));
            }
        }
    }

    #[test]
    fn uniform_round_trips(rows in 1usize..4, cols in 1usize..300, width in 2usize..5, seed: u64) {
        let (dense, mut random) = (dense(rows, cols), noise(seed));
        let groups = rows * cols.div_ceil(uniform::GROUP);
        let codes: Vec<u8> = (0..rows * cols).map(|_| random(1 << width) as u8).collect();
        let zeros: Vec<u8> = (0..groups).map(|_| random(1 << width) as u8).collect();
        let scales: Vec<f32> = (0..groups).map(|_| random(64) as f32 / 32.0).collect();
        let found = uniform::Decisions { codes, scales, zeros };
        let parts = uniform::pack(&found, &dense, width).unwrap();
        let mut out = vec![0; dense.nbytes()];
        uniform::unpack(&slices(&parts), &dense, width, 0..rows, &mut out).unwrap();
        for (i, value) in numbers(&out).into_iter().enumerate() {
            let group = i / cols * cols.div_ceil(uniform::GROUP) + i % cols / uniform::GROUP;
            let expected = uniform::value(found.codes[i], found.zeros[group], found.scales[group]);
            prop_assert_eq!(value, expected);
        }
    }
}
