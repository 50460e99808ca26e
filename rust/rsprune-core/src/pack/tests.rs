use super::*;
use proptest::prelude::*;

const FLOATS: [Float; 3] = [Float::F32, Float::Bf16, Float::F16];

fn bytes_of(values: &[f32], float: Float) -> Vec<u8> {
    let bytes = |v: &f32| match float {
        Float::F32 => v.to_le_bytes().to_vec(),
        _ => float.to_bits(*v).to_le_bytes().to_vec(),
    };
    values.iter().flat_map(bytes).collect()
}

fn packed(weight: &[u8], dense: &Dense, format: &Format) -> Result<Vec<Vec<u8>>> {
    let parts = pack(weight, dense, format)?;
    let layout = format.layout(dense)?;
    assert_eq!(parts.len(), layout.len());
    for (part, layout) in parts.iter().zip(&layout) {
        assert_eq!(part.len(), layout.nbytes);
        assert_eq!(layout.shape.iter().product::<usize>() * layout.element.size(), layout.nbytes);
    }
    Ok(parts)
}

/// Unpacks; `validate` refuses the same parts.
fn unpacked(parts: &[Vec<u8>], dense: &Dense, format: &Format) -> Result<Vec<u8>> {
    let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
    let weight = unpack(&parts, dense, format, 0..dense.rows);
    let told = |result: Result<()>| result.err().map(|error| error.to_string());
    let unpacking = weight.as_ref().err().map(|error| error.to_string());
    let validating = told(validate(&parts, dense, format));
    assert_eq!(validating.is_some(), unpacking.is_some());
    if !matches!(format, Format::Residual(_)) {
        assert_eq!(validating, unpacking); // of two planes either goes through in its own order
    }
    weight
}

/// Packs, unpacks, compares: all rows at once, and a few.
fn round_trip(weight: &[u8], dense: &Dense, format: &Format) {
    assert_eq!(Format::parse(&format.to_string()).unwrap(), *format);
    let parts = packed(weight, dense, format).unwrap();
    assert_eq!(unpacked(&parts, dense, format).unwrap(), weight);
    let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
    let rows = dense.rows / 3..dense.rows - dense.rows / 4;
    let mut some = vec![0xff; rows.len() * dense.row_bytes()];
    unpack_into(&parts, dense, format, rows.clone(), &mut some).unwrap();
    assert_eq!(some, weight[rows.start * dense.row_bytes()..rows.end * dense.row_bytes()]);
}

/// Random bits, among them -0, NaN and infinities, thinned to a pattern.
fn thinned(dense: &Dense, seed: u64, stays: impl Fn(usize, u64) -> bool) -> Vec<u8> {
    let mut state = seed | 1;
    let mut weight = vec![0; dense.nbytes()];
    for (i, bytes) in weight.chunks_exact_mut(dense.float.size()).enumerate() {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        if stays(i, state >> 40) {
            let negative_zero = 1u32 << (dense.float.size() * 8 - 1);
            let bits = if state >> 61 == 0 { negative_zero } else { (state >> 20) as u32 };
            bytes.copy_from_slice(&bits.to_le_bytes()[..dense.float.size()]);
        }
    }
    weight
}

/// Signs of exactly `keep` weights a group, some blocks without any.
fn signed(dense: &Dense, groups: Groups, seed: u64) -> Vec<f32> {
    let mut values = vec![0.0; dense.rows * dense.cols];
    for (row, values) in values.chunks_exact_mut(dense.cols).enumerate() {
        for (block, values) in values.chunks_mut(SCALE_COLUMNS).enumerate() {
            let scale = (seed % 5 + block as u64 + row as u64) as f32 / 64.0;
            for (i, group) in values.chunks_exact_mut(groups.of).enumerate() {
                for k in 0..groups.keep {
                    let column = (k + i + seed as usize) % groups.of;
                    let sign = if (i * 7 + k * 3 + row) % 5 < 2 { -1.0 } else { 1.0 };
                    group[column] = if scale == 0.0 { 0.0 } else { sign * scale };
                }
            }
        }
    }
    values
}

proptest! {
    #[test]
    fn values_come_back_bit_for_bit(
        rows in 1usize..9, groups in 1usize..40, of in prop::sample::select(vec![4usize, 8, 16]),
        keep in 1usize..=16, float in prop::sample::select(FLOATS.to_vec()), seed: u64,
    ) {
        let keep = keep.min(of);
        let dense = Dense::new(float, rows, groups * of).unwrap();
        let format = Format::KeepOf(Groups { keep, of });
        let weight = thinned(&dense, seed, |i, random| {
            (i % of + random as usize % of) % of < keep && i % of < keep
        });
        round_trip(&weight, &dense, &format);
        let pattern = Pattern::KeepOf { keep, of };
        // A few weights may happen to be signs.
        round_trip(&weight, &dense, &Format::choose(&weight, &dense, &pattern).unwrap());
    }

    #[test]
    fn any_sparsity_comes_back_bit_for_bit(
        rows in 1usize..9, cols in 1usize..70, of_ten in 0u64..=10,
        float in prop::sample::select(FLOATS.to_vec()), seed: u64,
    ) {
        let dense = Dense::new(float, rows, cols).unwrap();
        let weight = thinned(&dense, seed, |_, random| random % 10 < of_ten);
        let pattern = Pattern::Ratio { sparsity: 0.5, scope: crate::pattern::Scope::Row };
        let format = Format::choose(&weight, &dense, &pattern).unwrap();
        round_trip(&weight, &dense, &format);
    }

    #[test]
    fn signs_come_back_bit_for_bit(
        rows in 1usize..5, groups in 1usize..150, of in prop::sample::select(vec![4usize, 8]),
        keep in 1usize..=8, float in prop::sample::select(FLOATS.to_vec()), seed in 0u64..1000,
    ) {
        let groups_of = Groups { keep: keep.min(of), of };
        let dense = Dense::new(float, rows, groups * of).unwrap();
        let weight = bytes_of(&signed(&dense, groups_of, seed), float);
        let pattern = Pattern::KeepOf { keep: groups_of.keep, of };
        let format = Format::choose(&weight, &dense, &pattern).unwrap();
        prop_assert_eq!(format, Format::Signs(groups_of));
        round_trip(&weight, &dense, &format);
    }

    #[test]
    fn a_flipped_bit_is_seen_without_unpacking_or_not_at_all(
        rows in 1usize..4, cols in 1usize..5, which in 0usize..8, seed: u64,
    ) {
        let (dense, is_signs) = (Dense::new(Float::Bf16, rows, cols * 16).unwrap(), which > 3);
        let names = ["keep-of 2:4", "keep-of 3:8", "keep-of 5:16", "bitmap", "signs 2:8", "signs 3:4", "signs 8:8", "residual 2:8"];
        let mut format = Format::parse(if which == 3 { "bitmap 0" } else { names[which] }).unwrap();
        let weight = match format {
            Format::Signs(groups) | Format::Residual(groups) => bytes_of(&signed(&dense, groups, seed), Float::Bf16),
            Format::KeepOf(groups) => thinned(&dense, seed, |i, _| i % groups.of < groups.keep),
            _ => thinned(&dense, seed, |_, bits| bits % 3 == 0),
        };
        if let Format::Bitmap(_) = format {
            format = Format::Bitmap(Bitmap::of(&weight, &dense).unwrap());
        }
        let mut parts = match format {
            Format::Residual(groups) => {
                let planes = [residual::FIRST, groups].map(|groups| signed(&dense, groups, seed));
                residual::pack([&planes[0], &planes[1]], &dense, groups).unwrap()
            }
            _ => pack(&weight, &dense, &format).unwrap(),
        };
        prop_assert!(unpacked(&parts, &dense, &format).is_ok());
        let structure = if is_signs { 0..parts.len() } else { 1..2 };
        let mut refused = 0;
        for part in structure {
            for bit in 0..8 * parts[part].len() {
                parts[part][bit / 8] ^= 1 << (bit % 8);
                refused += usize::from(unpacked(&parts, &dense, &format).is_err());
                parts[part][bit / 8] ^= 1 << (bit % 8);
            }
        }
        prop_assert!(is_signs || refused == 8 * parts[1].len());
    }

    #[test]
    fn no_bytes_make_it_panic(
        rows in 1usize..4, cols in 1usize..5, which in 0usize..5, bytes: Vec<u8>, cut in 0usize..3,
    ) {
        let names = ["keep-of 2:4", "bitmap 7", "signs 2:8", "signs 3:4", "signs 8:8"];
        let format = Format::parse(names[which]).unwrap();
        let dense = Dense::new(Float::Bf16, rows, cols * 8).unwrap();
        let mut bytes = bytes.iter().cycle();
        let layout = format.layout(&dense).unwrap();
        let mut taken = |part: &Part| {
            (0..part.nbytes.saturating_sub(cut)).map(|_| *bytes.next().unwrap_or(&0)).collect()
        };
        let parts: Vec<Vec<u8>> = layout.iter().map(&mut taken).collect();
        if let Ok(weight) = unpacked(&parts, &dense, &format) {
            // What is accepted is a weight of this format.
            let again = pack(&weight, &dense, &format);
            prop_assert!(matches!(format, Format::Bitmap(_)) || again.is_ok());
        }
    }
}

#[test]
fn names_are_read_or_refused() {
    for bad in [
        "",
        "keep-of",
        "keep-of 2:5",
        "keep-of 0:4",
        "keep-of 5:4",
        "keep-of 02:4",
        "signs 2:16",
        "bitmap -1",
        "bitmap +1",
        "bitmap 1 ",
        "dense 1",
        "keep-of  2:4",
    ] {
        let message = Format::parse(bad).unwrap_err().to_string();
        assert!(message.contains("expected") && message.contains(bad), "{bad}: {message}");
    }
    let dense = Dense::new(Float::Bf16, 2, 6).unwrap();
    let message = Format::parse("keep-of 2:4").unwrap().layout(&dense).unwrap_err().to_string();
    assert!(message.contains("divisible by 4, found 6"), "{message}");
    assert!(
        Dense::new(Float::F32, 0, 4).is_err() && Dense::new(Float::F32, usize::MAX, 2).is_err()
    );
}

/// One format's parts of a 2 x 8 BF16 weight, broken by `damage`, and what is said of it.
fn refusal(format: &str, weight: &[f32], damage: impl Fn(&mut Vec<Vec<u8>>)) -> String {
    let dense = Dense::new(Float::Bf16, 2, weight.len() / 2).unwrap();
    let format = Format::parse(format).unwrap();
    let mut parts = packed(&bytes_of(weight, Float::Bf16), &dense, &format).unwrap();
    unpacked(&parts, &dense, &format).unwrap();
    damage(&mut parts);
    unpacked(&parts, &dense, &format).unwrap_err().to_string()
}

#[test]
fn broken_parts_are_refused_by_name() {
    let pruned = [0.0, 1.0, 0.0, 2.0, 3.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0];
    let keep_of = |damage: fn(&mut Vec<Vec<u8>>)| refusal("keep-of 2:4", &pruned[..8], damage);
    assert_eq!(keep_of(|p| p[1][1] = 0b111), "mask: row 1: group 0: expected 2 bits, found 3");
    assert_eq!(
        keep_of(|p| p[1][1] |= 0x10),
        "mask: row 1: expected zero bits after the last item, found ones"
    );
    assert_eq!(keep_of(|p| p[0].truncate(3)), "values: expected 8 bytes, found 3 bytes");
    assert_eq!(keep_of(|p| p.truncate(1)), "parts: expected values, mask, found 1 of them");
    let bitmap = |damage: fn(&mut Vec<Vec<u8>>)| refusal("bitmap 5", &pruned, damage);
    assert_eq!(bitmap(|p| p[1][0] = 0), "mask: expected 5 bits, found 2");
    assert!(bitmap(|p| p[1][1] = 0x80).starts_with("mask: row 1: expected zero bits after"));
    let signs = [0.0, 1.0, 0.0, -1.0, 2.0, 0.0, 2.0, 0.0];
    let signs = |damage: fn(&mut Vec<Vec<u8>>)| refusal("signs 2:4", &signs, damage);
    assert!(
        signs(|p| p[0][1] = 6)
            .contains("positions: row 1: group 0: expected a code below 6, found 6")
    );
    assert_eq!(
        signs(|p| p[1][0] = 4),
        "signs: row 0: expected zero bits after the last item, found ones"
    );
    for scale in [0x7c00u16, 0x7e00, 0x8000, 0xbc00, 0x3c01] {
        // infinity, NaN, -0, -1, and 1 + 2^-10, which bfloat16 does not hold
        let message = refusal("signs 2:4", &[0.0, 1.0, 0.0, -1.0, 2.0, 0.0, 2.0, 0.0], |p| {
            p[2][2..4].copy_from_slice(&scale.to_le_bytes());
        });
        assert!(message.starts_with("scales: row 1: expected a finite number"), "{message}");
    }
}

#[test]
fn weights_of_another_form_are_refused() {
    let refused = |format: &str, weight: &[f32]| {
        let dense = Dense::new(Float::F32, 1, weight.len()).unwrap();
        let format = Format::parse(format).unwrap();
        pack(&bytes_of(weight, Float::F32), &dense, &format).unwrap_err().to_string()
    };
    let found = refused("keep-of 2:4", &[0.0, 0.0, 0.0, 0.0, 1.0, -0.0, 1.0, 0.0]);
    assert_eq!(found, "weight: row 0: group 1: expected at most 2 non-zeros, found 3");
    assert!(refused("bitmap 3", &[1.0, 0.0, 2.0, 0.0]).contains("expected 3 non-zeros, found 2"));
    let one = "block 0: expected one magnitude, found 1 and 2";
    assert!(refused("signs 2:4", &[1.0, 0.0, 2.0, 0.0]).ends_with(one));
    assert!(refused("signs 2:4", &[1.0, 0.0, 0.0, 0.0]).ends_with("2 non-zeros a group, found 1"));
    assert!(refused("signs 1:4", &[0.1, 0.0, 0.0, 0.0]).contains("that F16 holds"));
    assert!(refused("signs 1:4", &[-0.0, 0.0, 0.0, 0.0]).contains("not -0"));
    assert!(refused("signs 1:4", &[f32::NAN, 0.0, 0.0, 0.0]).contains("found NaN"));
}

#[test]
fn sizes_are_those_of_the_specification() {
    let dense = Dense::new(Float::Bf16, 576, 1536).unwrap();
    let weights = (dense.rows * dense.cols) as f64;
    for (format, expected) in [
        ("keep-of 2:4", 9.0),
        ("bitmap 442368", 9.0),
        ("signs 2:8", 0.9375),
        ("signs 3:8", 1.1875),
        ("signs 3:4", 1.3125),
        ("signs 4:8", 1.4375),
        ("signs 8:8", 1.0625),
    ] {
        let layout = Format::parse(format).unwrap().layout(&dense).unwrap();
        let bytes: usize = layout.iter().map(|part| part.nbytes).sum();
        assert_eq!(bytes as f64 * 8.0 / weights, expected, "{format}");
    }
}

/// The bytes that the NumPy twin wrote, read by the Python tests as well.
#[test]
fn golden_bytes() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/packed.json");
    let cases: serde_json::Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let bytes = |hex: &serde_json::Value| -> Vec<u8> {
        let digits = hex.as_str().unwrap().as_bytes().chunks(2);
        digits.map(|d| u8::from_str_radix(str::from_utf8(d).unwrap(), 16).unwrap()).collect()
    };
    let cases = cases.as_array().unwrap();
    assert!(cases.len() > 10);
    for case in cases {
        let format = Format::parse(case["format"].as_str().unwrap()).unwrap();
        let float = Float::parse(case["dtype"].as_str().unwrap()).unwrap();
        let size = |i: usize| case["shape"][i].as_u64().unwrap() as usize;
        let dense = Dense::new(float, size(0), size(1)).unwrap();
        let weight = bytes(&case["weight"]);
        let parts = packed(&weight, &dense, &format).unwrap();
        for (part, layout) in parts.iter().zip(format.layout(&dense).unwrap()) {
            assert_eq!(*part, bytes(&case["parts"][layout.name]), "{format} {}", layout.name);
        }
        assert_eq!(unpacked(&parts, &dense, &format).unwrap(), weight);
    }
}
