//! Packed weights: fewer bytes for the same numbers, each format on a page of its own.
//!
//! A linear's weight `[rows, cols]` is stored as several tensors, its *parts*; what they are follows
//! from the format's name, the weight's type and its shape ([`Format::layout`]), so sizes are known
//! before a weight is. [`unpack`] gives back what [`pack`] was given, bit for bit, or an error: parts
//! come from files of strangers. Everything is little-endian bytes here, as it lies in files.
//!
//! `keep-of`, `bitmap` and `signs` can be worked out from a weight. What the other formats hold only
//! the solver knows that made the weight: it calls their own `pack`.

pub mod binary;
mod bitmap;
pub mod bits;
mod keep_of;
mod positions;
pub mod residual;
pub mod row_column;
mod signs;
pub mod uniform;

pub use bitmap::Bitmap;
pub use positions::{Codes, Groups, spent};
pub use signs::SCALE_COLUMNS;

use crate::error::{Error, Result};
use crate::float::Float;
use crate::pattern::Pattern;
use std::fmt;
use std::ops::Range;

/// The version of all formats together; `quantization_config` of a folder holds it.
pub const VERSION: u32 = 1;

/// How a weight is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `keep-of 2:4`: the kept values, and a mask.
    KeepOf(Groups),
    /// `bitmap 12345`: that many values, and a mask.
    Bitmap(Bitmap),
    /// `signs 2:8`: one sign a kept weight, a scale for 256 columns of a row.
    Signs(Groups),
    /// `binary 6:8`: signs, residual signs, magnitude groups and means, as in BiLLM and PBS2P.
    Binary(Groups),
    /// `residual 2:8`: a sign a weight, and a second one a kept weight, each with such scales.
    Residual(Groups),
    /// `row-column`: one sign a weight, scales of rows and of columns.
    RowColumn,
    /// `uniform 3`: so many bits a weight, a scale and a zero for 128 columns of a row.
    Uniform(usize),
}

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

impl Format {
    /// Reads a name such as `keep-of 2:4`.
    pub fn parse(text: &str) -> Result<Format> {
        let unknown = || {
            let known = "keep-of n:m, bitmap COUNT, signs n:m, binary n:m, residual n:m, row-column, \
                 uniform BITS";
            Error::Pattern(format!("packed format {text:?}: unknown, expected one of {known}"))
        };
        if text == "row-column" {
            return Ok(Format::RowColumn);
        }
        let (name, argument) = text.split_once(' ').ok_or_else(unknown)?;
        match name {
            "keep-of" => Ok(Format::KeepOf(groups(text, argument, &[4, 8, 16])?)),
            "signs" => Ok(Format::Signs(groups(text, argument, &[4, 8])?)),
            "residual" => Ok(Format::Residual(groups(text, argument, &[4, 8])?)),
            "binary" => Ok(Format::Binary(groups(text, argument, &[4, 8])?)),
            "uniform" => Ok(Format::Uniform(number(argument).ok_or_else(unknown)?)),
            "bitmap" => {
                let values = number(argument).ok_or_else(unknown)?;
                Ok(Format::Bitmap(Bitmap { values }))
            }
            _ => Err(unknown()),
        }
    }

    /// The smallest format that holds a weight of this pattern.
    ///
    /// `signs` where all that a block of 256 columns keeps has one magnitude, else `keep-of`; for
    /// a ratio `bitmap`.
    pub fn choose(weight: &[u8], dense: &Dense, pattern: &Pattern) -> Result<Format> {
        match *pattern {
            Pattern::Ratio { .. } => Ok(Format::Bitmap(Bitmap::of(weight, dense)?)),
            Pattern::KeepOf { keep, of } => {
                let groups = Groups { keep, of };
                let is_signs = of < 16 && signs::pack(weight, dense, groups).is_ok();
                Ok(if is_signs { Format::Signs(groups) } else { Format::KeepOf(groups) })
            }
        }
    }

    /// The parts of a weight, in the order in which [`pack`] gives and [`unpack`] takes them.
    pub fn layout(&self, dense: &Dense) -> Result<Vec<Part>> {
        match self {
            Format::KeepOf(groups) => keep_of::layout(dense, *groups),
            Format::Bitmap(bitmap) => bitmap.layout(dense),
            Format::Signs(groups) => signs::layout(dense, *groups),
            Format::Binary(groups) => binary::layout(dense, *groups),
            Format::Residual(groups) => residual::layout(dense, *groups),
            Format::RowColumn => row_column::layout(dense),
            Format::Uniform(width) => uniform::layout(dense, *width),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Format::KeepOf(Groups { keep, of }) => write!(f, "keep-of {keep}:{of}"),
            Format::Bitmap(Bitmap { values }) => write!(f, "bitmap {values}"),
            Format::Signs(Groups { keep, of }) => write!(f, "signs {keep}:{of}"),
            Format::Binary(Groups { keep, of }) => write!(f, "binary {keep}:{of}"),
            Format::Residual(Groups { keep, of }) => write!(f, "residual {keep}:{of}"),
            Format::RowColumn => write!(f, "row-column"),
            Format::Uniform(width) => write!(f, "uniform {width}"),
        }
    }
}

/// Packs a weight: the bytes of every part of the layout.
///
/// # Errors
/// The weight is not of this format; says in which row and group.
pub fn pack(weight: &[u8], dense: &Dense, format: &Format) -> Result<Vec<Vec<u8>>> {
    length("weight", weight.len(), dense.nbytes())?;
    match format {
        Format::KeepOf(groups) => keep_of::pack(weight, dense, *groups),
        Format::Bitmap(bitmap) => bitmap.pack(weight, dense),
        Format::Signs(groups) => signs::pack(weight, dense, *groups),
        Format::Binary(_) | Format::Residual(_) | Format::RowColumn | Format::Uniform(_) => {
            let reason = "is packed by the method that made it, not from the weight's values";
            Err(Error::Pattern(format!("packed format {format}: {reason}")))
        }
    }
}

/// Some rows of a weight, unpacked. Nothing is allocated before the parts have their lengths.
///
/// # Errors
/// As [`unpack_into`].
pub fn unpack(
    parts: &[&[u8]],
    dense: &Dense,
    format: &Format,
    rows: Range<usize>,
) -> Result<Vec<u8>> {
    check(parts, dense, format, &rows)?;
    let mut out = vec![0; rows.len() * dense.row_bytes()];
    unpack_into(parts, dense, format, rows, &mut out)?;
    Ok(out)
}

/// Unpacks some rows of a weight into `out`, which holds just these rows.
///
/// # Errors
/// The parts are not what [`pack`] makes: a length, a count of bits, a code out of range, a bit
/// after the last item. Other rows are not looked at.
pub fn unpack_into(
    parts: &[&[u8]],
    dense: &Dense,
    format: &Format,
    rows: Range<usize>,
    out: &mut [u8],
) -> Result<()> {
    check(parts, dense, format, &rows)?;
    length("rows to unpack", out.len(), rows.len() * dense.row_bytes())?;
    match format {
        Format::KeepOf(groups) => keep_of::unpack(parts, dense, *groups, rows, out),
        Format::Bitmap(bitmap) => bitmap.unpack(parts, dense, rows, out),
        Format::Signs(groups) => signs::unpack(parts, dense, *groups, rows, out),
        Format::Binary(groups) => binary::unpack(parts, dense, *groups, rows, out),
        Format::Residual(groups) => residual::unpack(parts, dense, *groups, rows, out),
        Format::RowColumn => row_column::unpack(parts, dense, rows, out),
        Format::Uniform(width) => uniform::unpack(parts, dense, *width, rows, out),
    }
}

/// Refuses all that [`unpack`] of any row would, at a fraction of its cost.
///
/// # Errors
/// As [`unpack_into`], and for formats that are looked at only when they are unpacked.
pub fn validate(parts: &[&[u8]], dense: &Dense, format: &Format) -> Result<()> {
    check_parts(parts, &format.layout(dense)?)?;
    match format {
        Format::KeepOf(groups) => keep_of::validate(parts[1], dense, *groups),
        Format::Bitmap(bitmap) => bitmap.row_starts(parts[1], dense).map(|_| ()),
        Format::Signs(groups) => signs::validate(parts, dense, *groups),
        Format::Residual(groups) => residual::validate(parts, dense, *groups),
        Format::Binary(_) | Format::RowColumn | Format::Uniform(_) => {
            Err(Error::Option(format!("packed format {format}: has no kernels")))
        }
    }
}

/// Refuses parts of other lengths than the layout's, and rows that are not there.
fn check(parts: &[&[u8]], dense: &Dense, format: &Format, rows: &Range<usize>) -> Result<()> {
    check_parts(parts, &format.layout(dense)?)?;
    if rows.start > rows.end || rows.end > dense.rows {
        return Err(Error::Shape {
            what: "rows".into(),
            expected: format!("a range within 0..{}", dense.rows),
            found: format!("{}..{}", rows.start, rows.end),
        });
    }
    Ok(())
}

/// `2:4` with a group length of `lengths`.
fn groups(text: &str, argument: &str, lengths: &[usize]) -> Result<Groups> {
    let bad = || {
        let expected = format!("n:m with m of {lengths:?} and 0 < n <= m");
        Error::Pattern(format!("packed format {text:?}: expected {expected}"))
    };
    let (keep, of) = argument.split_once(':').ok_or_else(bad)?;
    let (keep, of) = (number(keep).ok_or_else(bad)?, number(of).ok_or_else(bad)?);
    if !lengths.contains(&of) || keep == 0 || keep > of {
        return Err(bad());
    }
    Ok(Groups { keep, of })
}

/// Digits without a sign or leading zeros: a format has one name.
fn number(text: &str) -> Option<usize> {
    let value: usize = text.parse().ok()?;
    (value.to_string() == text).then_some(value)
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
    if parts.len() != layout.len() {
        let names: Vec<_> = layout.iter().map(|part| part.name).collect();
        let (expected, found) = (names.join(", "), format!("{} of them", parts.len()));
        return Err(Error::Shape { what: "parts".into(), expected, found });
    }
    let mut pairs = layout.iter().zip(parts);
    pairs.try_for_each(|(part, bytes)| length(part.name, bytes.len(), part.nbytes))
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
#[cfg(test)]
mod tests;
