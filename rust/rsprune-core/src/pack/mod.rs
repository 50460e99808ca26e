//! Packed weights: fewer bytes for the same numbers, each format on a page of its own.
//!
//! A linear's weight `[rows, cols]` is stored as several tensors, its *parts*; what they are follows
//! from the format's name, the weight's type and its shape, so sizes are known before a weight is.
//! Everything is little-endian bytes here, as it lies in files.

pub mod binary;
pub mod bits;
mod positions;
pub mod row_column;
pub mod uniform;

pub use positions::{Codes, Groups, spent};

use crate::error::{Error, Result};
use crate::float::Float;
use crate::pattern::Pattern;
use std::fmt;

/// The weight that is packed: its type and shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dense {
    /// As which its numbers are stored.
    pub float: Float,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
}

/// What the elements of a part are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// Bits in bytes.
    Byte,
    /// Numbers.
    Float(Float),
}

/// One tensor of a packed weight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// What follows the linear's name and a dot.
    pub name: &'static str,
    /// Its type.
    pub element: Element,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its length.
    pub nbytes: usize,
}

impl Dense {
    /// Refuses a matrix without elements, and one too large to count.
    pub fn new(float: Float, rows: usize, cols: usize) -> Result<Dense> {
        let bytes = rows.checked_mul(cols).and_then(|n| n.checked_mul(float.size()));
        if bytes.is_none_or(|n| n == 0) {
            let reason = format!("expected a matrix with elements, found shape [{rows}, {cols}]");
            return Err(Error::Pattern(reason));
        }
        Ok(Dense { float, rows, cols })
    }

    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        self.cols * self.float.size()
    }

    /// Bytes of all rows.
    pub fn nbytes(&self) -> usize {
        self.rows * self.row_bytes()
    }
}

impl Element {
    /// The name in files, such as `U8`.
    pub fn name(self) -> &'static str {
        match self {
            Element::Byte => "U8",
            Element::Float(float) => float.name(),
        }
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Element::Byte => 1,
            Element::Float(float) => float.size(),
        }
    }
}

impl Part {
    /// A part whose lengths may have overflowed on the way.
    fn new(name: &'static str, element: Element, shape: &[Option<usize>]) -> Result<Part> {
        let too_large = || Error::Packed { part: name, reason: "too large to be counted".into() };
        let shape = shape.iter().copied().collect::<Option<Vec<_>>>().ok_or_else(too_large)?;
        let elements = shape.iter().try_fold(element.size(), |n, length| n.checked_mul(*length));
        Ok(Part { name, element, shape, nbytes: elements.ok_or_else(too_large)? })
    }
}

/// Refuses a row that cannot be cut in whole groups.
fn check_columns(dense: &Dense, groups: Groups) -> Result<()> {
    Pattern::KeepOf { keep: groups.keep, of: groups.of }.check("packed weight", dense.cols)
}

fn length(what: &str, found: usize, expected: usize) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    let (expected, found) = (format!("{expected} bytes"), format!("{found} bytes"));
    Err(Error::Shape { what: what.into(), expected, found })
}

/// An error at a place of a part.
fn at(part: &'static str, row: usize, reason: impl fmt::Display) -> Error {
    Error::Packed { part, reason: format!("row {row}: {reason}") }
}

/// Bits a weight takes when it is stored as `layout` says, everything counted.
pub fn true_bits(layout: &[Part], dense: &Dense) -> f64 {
    let nbytes: usize = layout.iter().map(|part| part.nbytes).sum();
    8.0 * nbytes as f64 / (dense.rows * dense.cols) as f64
}

/// Refuses parts whose number or lengths are not those of the layout.
fn check_parts(parts: &[&[u8]], layout: &[Part]) -> Result<()> {
    length("parts", parts.len(), layout.len())?;
    layout
        .iter()
        .zip(parts)
        .try_for_each(|(part, bytes)| length(part.name, bytes.len(), part.nbytes))
}

/// Writes `value` as `float` stores it; a zero has no sign.
fn store(float: Float, value: f32, out: &mut [u8]) {
    let value = float.round(value);
    let value = if value == 0.0 { 0.0 } else { value };
    match float {
        Float::F32 => out.copy_from_slice(&value.to_le_bytes()),
        _ => out.copy_from_slice(&float.to_bits(value).to_le_bytes()),
    }
}

/// Number `i` of a part of F16.
fn half(part: &[u8], i: usize) -> f32 {
    Float::F16.from_bits(u16::from_le_bytes([part[2 * i], part[2 * i + 1]]))
}

/// Refuses NaN and infinity among the numbers of a part of F16.
fn check_finite(name: &'static str, part: &[u8]) -> Result<()> {
    match (0..part.len() / 2).find(|i| !half(part, *i).is_finite()) {
        None => Ok(()),
        Some(i) => Err(Error::Packed {
            part: name,
            reason: format!("expected finite numbers, found {} at {i}", half(part, i)),
        }),
    }
}

#[cfg(test)]
mod decided_tests;
