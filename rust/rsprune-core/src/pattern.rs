//! Which weights may stay: `keep:of` groups along a row, or a sparsity ratio.

use crate::error::{Error, Result};
use std::fmt;

/// Over what a sparsity ratio is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Every output row has the ratio.
    Row,
    /// The matrix as a whole has it.
    Matrix,
}

/// A sparsity pattern.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pattern {
    /// At most `keep` non-zeros in every aligned group of `of` weights of a row (2:4, 4:8, ...).
    KeepOf {
        /// Weights that may stay.
        keep: usize,
        /// The group's length.
        of: usize,
    },
    /// A fraction of zeros.
    Ratio {
        /// Zeros over all weights, at least 0 and below 1.
        sparsity: f64,
        /// Over what it is counted.
        scope: Scope,
    },
}

impl Pattern {
    /// Reads `2:4`, `50%` or `0.5`.
    pub fn parse(text: &str, scope: Scope) -> Result<Pattern> {
        let bad = |why: &str| {
            Error::Pattern(format!("pattern {text:?}: {why} (expected 2:4, 4:8, ..., 50% or 0.5)"))
        };
        if let Some((keep, of)) = text.split_once(':') {
            let number = |s: &str| s.trim().parse::<usize>().map_err(|_| bad("not two numbers"));
            let (keep, of) = (number(keep)?, number(of)?);
            if ![4, 8, 16].contains(&of) {
                return Err(bad("the group must be 4, 8 or 16 weights long"));
            }
            if keep == 0 || keep > of {
                return Err(bad("must keep at least one and at most all weights of a group"));
            }
            return Ok(Pattern::KeepOf { keep, of });
        }
        let (digits, unit) = match text.trim().strip_suffix('%') {
            Some(percent) => (percent, 100.0),
            None => (text.trim(), 1.0),
        };
        let sparsity = digits.trim().parse::<f64>().map_err(|_| bad("not a number"))? / unit;
        if !(0.0..1.0).contains(&sparsity) {
            return Err(bad("a ratio must be at least 0 and below 1 (below 100%)"));
        }
        Ok(Pattern::Ratio { sparsity, scope })
    }

    /// Refuses a matrix whose rows cannot be cut in whole groups.
    pub fn check(&self, name: &str, cols: usize) -> Result<()> {
        match *self {
            Pattern::KeepOf { of, .. } if !cols.is_multiple_of(of) => Err(Error::Pattern(format!(
                "{name}: pattern {self} needs input columns divisible by {of}, found {cols}"
            ))),
            _ => Ok(()),
        }
    }

    /// Zeros that `len` weights get under a ratio.
    pub fn zeros(sparsity: f64, len: usize) -> usize {
        (sparsity * len as f64).round() as usize
    }

    /// Those of the weights `from..to` of a unit that is pruned in parts: what all parts have
    /// together is what [`Pattern::zeros`] says of the whole.
    pub(crate) fn zeros_between(sparsity: f64, from: usize, to: usize) -> usize {
        Pattern::zeros(sparsity, to) - Pattern::zeros(sparsity, from)
    }

    /// Sets to zero what the pattern does not allow: in every unit the entries with the smallest
    /// `|value| * scale[column]`, the first of equals first. `values` is `[rows, cols]`.
    pub fn project(&self, values: &mut [f32], cols: usize, scale: Option<&[f32]>) {
        match (*self, scale) {
            (Pattern::KeepOf { keep, of: 4 }, None) => return keep_largest::<4>(values, keep),
            (Pattern::KeepOf { keep, of: 8 }, None) => return keep_largest::<8>(values, keep),
            _ => {}
        }
        let unit = match *self {
            Pattern::KeepOf { of, .. } => of,
            Pattern::Ratio { scope: Scope::Row, .. } => cols,
            Pattern::Ratio { sparsity, scope: Scope::Matrix } => {
                return zero_smallest(values, Pattern::zeros(sparsity, values.len()), |i| {
                    scale.map_or(1.0, |s| s[i % cols])
                });
            }
        };
        let mut scores = Vec::with_capacity(unit);
        for (u, group) in values.chunks_mut(unit.max(1)).enumerate() {
            scores.clear();
            let column = |i: usize| (u * unit + i) % cols;
            scores.extend(
                group
                    .iter()
                    .enumerate()
                    .map(|(i, v)| v.abs() * scale.map_or(1.0, |s| s[column(i)])),
            );
            let zeros = match *self {
                Pattern::KeepOf { keep, of } => of - keep,
                Pattern::Ratio { sparsity, .. } => Pattern::zeros(sparsity, group.len()),
            };
            for_smallest(&scores, zeros, |i| group[i] = 0.0);
        }
    }

    /// Whether `values [rows, cols]` has at least the zeros of the pattern, everywhere.
    pub fn holds(&self, values: &[f32], cols: usize) -> bool {
        let zeros = |unit: &[f32]| unit.iter().filter(|v| **v == 0.0).count();
        match *self {
            Pattern::KeepOf { keep, of } => {
                cols.is_multiple_of(of) && values.chunks(of).all(|g| zeros(g) >= of - keep)
            }
            Pattern::Ratio { sparsity, scope: Scope::Row } => {
                values.chunks(cols).all(|r| zeros(r) >= Pattern::zeros(sparsity, cols))
            }
            Pattern::Ratio { sparsity, scope: Scope::Matrix } => {
                zeros(values) >= Pattern::zeros(sparsity, values.len())
            }
        }
    }
}

/// Keeps the `keep` largest of every `OF` values without a branch: iterative solvers do this to all
/// weights in every step. Of equals the last one counts as larger, as in [`for_smallest`].
fn keep_largest<const OF: usize>(values: &mut [f32], keep: usize) {
    for group in values.as_chunks_mut::<OF>().0 {
        let mut larger = [0usize; OF];
        for i in 0..OF {
            for j in i + 1..OF {
                let second = group[j].abs() >= group[i].abs();
                larger[i] += usize::from(second);
                larger[j] += usize::from(!second);
            }
        }
        for (value, larger) in group.iter_mut().zip(larger) {
            *value = if larger < keep { *value } else { 0.0 };
        }
    }
}

/// Sets the `count` entries with the smallest `|value| * scale(index)` to zero, of equals the first.
/// Whole matrices are not sorted but counted, twice: no copy of them is made.
fn zero_smallest(values: &mut [f32], count: usize, scale: impl Fn(usize) -> f32) {
    if count == 0 {
        return;
    }
    let score = |i: usize, v: f32| order(v.abs() * scale(i));
    let (mut below, mut threshold) = (0, 0u32);
    for shift in [16, 0] {
        let mut counts = vec![0usize; 1 << 16];
        for (i, v) in values.iter().enumerate() {
            let key = score(i, *v);
            if shift == 16 || key >> 16 == threshold >> 16 {
                counts[(key >> shift) as usize & 0xffff] += 1;
            }
        }
        let mut digit = 0;
        while below + counts[digit] < count {
            below += counts[digit];
            digit += 1;
        }
        threshold |= (digit as u32) << shift;
    }
    let mut ties = count - below;
    for (i, v) in values.iter_mut().enumerate() {
        let key = score(i, *v);
        if key < threshold || (key == threshold && ties > 0) {
            ties -= usize::from(key == threshold);
            *v = 0.0;
        }
    }
}

/// The place of a float in [`f32::total_cmp`]'s order.
fn order(value: f32) -> u32 {
    let bits = value.to_bits();
    bits ^ if bits >> 31 == 1 { u32::MAX } else { 1 << 31 }
}

/// Calls `mark` with the indices of the `count` smallest scores; ties go to the lowest index, so
/// the count is exact and the choice does not depend on how the scores were sorted.
pub(crate) fn for_smallest(scores: &[f32], count: usize, mut mark: impl FnMut(usize)) {
    if count == 0 {
        return;
    }
    let (mut small, mut large) = ([0.0f32; 16], Vec::new()); // groups must not cost an allocation
    let sorted = if scores.len() <= small.len() {
        small[..scores.len()].copy_from_slice(scores);
        &mut small[..scores.len()]
    } else {
        large.extend_from_slice(scores);
        &mut large[..]
    };
    let (below, threshold, _) = sorted.select_nth_unstable_by(count - 1, f32::total_cmp);
    let threshold = *threshold;
    let smaller = below.iter().filter(|s| s.total_cmp(&threshold).is_lt()).count();
    let mut ties = count - smaller;
    for (i, score) in scores.iter().enumerate() {
        match score.total_cmp(&threshold) {
            std::cmp::Ordering::Less => mark(i),
            std::cmp::Ordering::Equal if ties > 0 => {
                ties -= 1;
                mark(i);
            }
            _ => {}
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match *self {
            Pattern::KeepOf { keep, of } => write!(f, "{keep}:{of}"),
            Pattern::Ratio { sparsity, .. } => write!(f, "{}%", sparsity * 100.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn patterns_are_read_or_refused_with_the_reason() {
        let parse = |t| Pattern::parse(t, Scope::Row);
        assert_eq!(parse("2:4").unwrap(), Pattern::KeepOf { keep: 2, of: 4 });
        assert_eq!(parse("50%").unwrap(), parse("0.5").unwrap());
        for bad in ["2:5", "0:4", "5:4", "x:4", "100%", "1.0", "-1", "", "nan"] {
            let message = parse(bad).unwrap_err().to_string();
            assert!(message.contains("expected 2:4"), "{bad}: {message}");
        }
        let message = parse("2:4").unwrap().check("model.q", 6).unwrap_err().to_string();
        assert!(message.contains("model.q") && message.contains('6'));
    }

    proptest! {
        #[test]
        fn projection_zeroes_exactly_the_smallest(
            rows in 1usize..5, groups in 1usize..5, keep in 1usize..8, ties: bool, seed: u32,
        ) {
            let cols = groups * 8;
            let value = |i: usize| {
                let h = (i as u32 + 1).wrapping_mul(seed | 1) >> 20;
                if ties { (h % 3) as f32 - 1.0 } else { h as f32 - 2000.5 }
            };
            let w: Vec<f32> = (0..rows * cols).map(value).collect();
            let scale: Vec<f32> = (0..cols).map(|c| 1.0 + (c % 3) as f32).collect();
            let sparsity = f64::from(8 - keep as u32) / 8.0;
            for pattern in [
                Pattern::KeepOf { keep, of: 8 },
                Pattern::KeepOf { keep: keep.div_ceil(2), of: 4 },
                Pattern::Ratio { sparsity, scope: Scope::Row },
                Pattern::Ratio { sparsity, scope: Scope::Matrix },
            ] {
                // Without a scale groups take a path of their own.
                let (mut unscaled, mut ones) = (w.clone(), w.clone());
                pattern.project(&mut unscaled, cols, None);
                pattern.project(&mut ones, cols, Some(&vec![1.0; cols]));
                prop_assert_eq!(unscaled, ones);
                let mut v = w.clone();
                pattern.project(&mut v, cols, Some(&scale));
                prop_assert!(pattern.holds(&v, cols));
                let unit = match pattern {
                    Pattern::KeepOf { of, .. } => of,
                    Pattern::Ratio { scope: Scope::Row, .. } => cols,
                    _ => rows * cols,
                };
                for u in 0..w.len() / unit {
                    // The slow twin: a stable sort of (score, index).
                    let range = u * unit..(u + 1) * unit;
                    let mut order: Vec<usize> = range.collect();
                    order.sort_by(|a, b| {
                        (w[*a].abs() * scale[a % cols]).total_cmp(&(w[*b].abs() * scale[b % cols]))
                    });
                    let zeros = match pattern {
                        Pattern::KeepOf { keep, of } => of - keep,
                        _ => (sparsity * unit as f64).round() as usize,
                    };
                    for (place, i) in order.iter().enumerate() {
                        prop_assert_eq!(v[*i], if place < zeros { 0.0 } else { w[*i] });
                    }
                }
            }
        }
    }
}
