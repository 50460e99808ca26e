//! `y = x W^T` straight from a packed weight `W [rows, cols]`.
//!
//! ```text
//! few tokens:  for every row: walk its bits once, decode in registers, one product per token
//! many tokens: decode 98 rows x 256 columns to f32, multiply by all tokens, next columns
//! ```
//! Few tokens are bound by the bytes of the weight, many by arithmetic. Every output is summed over
//! columns in one order that follows from the format, the instruction set, the number of tokens of the
//! call and the row's place; not from the number of threads.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_rows;
mod few;
mod input;
mod many;
mod row;
mod scalar;

use crate::error::{Error, Result};
use crate::float::Float;
use crate::kernels::Kernel;
use crate::pack::{Dense, Format, residual, validate};
use crate::par::Job;
use input::{Group, Order, padded};
use row::{Signs, Table, Values};
use std::ops::Range;

/// Tokens up to which walking the bits once more for every four of them beats decoding to memory.
const FEW: usize = 8;

/// In which numbers a product is formed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Activations, products and sums in f32.
    Float32,
    /// Activations rounded to 8 bits, each token by its largest; sums of 256 products are exact.
    Int8,
}

impl Mode {
    /// Reads `float32` or `int8`.
    pub fn parse(name: &str) -> Result<Mode> {
        match name {
            "float32" => Ok(Mode::Float32),
            "int8" => Ok(Mode::Int8),
            _ => Err(Error::Option(format!("mode {name:?}: expected float32 or int8"))),
        }
    }
}

/// The innermost loops for one instruction set. A value of the type is proof that the CPU has it.
trait Simd: Copy + Sync {
    /// The order in which values of this type meet the columns.
    fn order(self, float: Float) -> Order;

    /// How many values there were, and `sum_j w_j x_tj`; `None` where the mask has more bits.
    fn dot_values<const T: usize>(
        self,
        float: Float,
        row: Values,
        x: &Group<f32>,
    ) -> Option<(usize, [f32; T])>;

    /// `dot_values` of several rows with a single token, which all have `each` values in every 32 columns
    /// (`validate` saw that). `None` where a mask has another number of bits by now, or where the rows have
    /// to be taken one by one.
    fn dot_values_of<const R: usize>(
        self,
        _float: Float,
        _rows: [Values; R],
        _each: usize,
        _x: &Group<f32>,
    ) -> Option<[f32; R]> {
        None
    }

    /// Overwrites `out` with the weights of its columns; how many values that took.
    fn expand_values(self, float: Float, row: Values, out: &mut [f32]) -> Option<usize>;

    /// Writes the mask of every eight columns, from the first code of `stream` on.
    fn masks(self, table: &Table, stream: &[u8], masks: &mut [u8]) {
        table.read(stream, masks);
    }

    /// `sum_j w_j x_tj`.
    fn dot_signs<const T: usize>(self, row: Signs, x: &Group<f32>) -> [f32; T];

    /// `dot_signs` of several rows with a single token.
    fn dot_signs_of<const R: usize>(self, rows: [Signs; R], x: &Group<f32>) -> [f32; R] {
        rows.map(|row| self.dot_signs::<1>(row, x)[0])
    }

    /// Overwrites `out` with the weights of its columns, one block of them at most.
    fn expand_signs(self, row: Signs, out: &mut [f32]);

    /// `unit_t sum_j w_j x_tj`.
    fn dot_signs_int8<const T: usize>(self, row: Signs, x: &Group<i8>) -> [f32; T];

    /// `dot_signs_int8` of several rows with a single token.
    fn dot_signs_int8_of<const R: usize>(self, rows: [Signs; R], x: &Group<i8>) -> [f32; R] {
        rows.map(|row| self.dot_signs_int8::<1>(row, x)[0])
    }
}

#[derive(Clone, Copy)]
enum Path {
    Scalar(scalar::Scalar),
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(avx512::Avx512),
}

impl Path {
    /// What of this CPU serves beside `kernel`: older AVX-512 cannot expand half types.
    fn beside(kernel: &Kernel) -> Path {
        #[cfg(target_arch = "x86_64")]
        if kernel.name != "scalar" {
            let newest = avx512::Avx512::new().filter(|_| kernel.name == "avx512");
            if let Some(path) = newest.map(Path::Avx512) {
                return path;
            }
            if let Some(path) = avx2::Avx2::new() {
                return Path::Avx2(path);
            }
        }
        let _ = kernel;
        Path::Scalar(scalar::Scalar)
    }
}

/// Runs `$body` with `$simd` bound to the instruction set of `$path`.
macro_rules! with_simd {
    ($path:expr, $simd:ident => $body:expr) => {
        match $path {
            Path::Scalar($simd) => $body,
            #[cfg(target_arch = "x86_64")]
            Path::Avx2($simd) => $body,
            #[cfg(target_arch = "x86_64")]
            Path::Avx512($simd) => $body,
        }
    };
}

/// A packed weight, ready for products: one plane, or two that are added.
pub struct Linear {
    dense: Dense,
    nbytes: Vec<usize>,
    planes: Vec<Plane>,
}

impl Linear {
    /// Reads what a call needs to know beforehand. `parts` are those of the format's layout.
    ///
    /// # Errors
    /// A format without kernels, or parts that [`crate::pack::unpack`] would refuse.
    pub fn new(kernel: Kernel, format: &Format, dense: Dense, parts: &[&[u8]]) -> Result<Linear> {
        let nbytes: Vec<_> = format.layout(&dense)?.iter().map(|part| part.nbytes).collect();
        let mut linear = Linear { dense, nbytes, planes: vec![] };
        linear.check_parts(parts)?;
        if !matches!(format, Format::Bitmap(_)) {
            validate(parts, &dense, format)?; // a bitmap's bits are counted for its row starts
        }
        let formats = match *format {
            Format::Residual(groups) => vec![Format::Signs(residual::FIRST), Format::Signs(groups)],
            one => vec![one],
        };
        let mut rest = parts;
        for format in formats {
            let (own, others) = rest.split_at(format.layout(&dense)?.len());
            linear.planes.push(Plane::new(kernel, &format, dense, own)?);
            rest = others;
        }
        Ok(linear)
    }

    /// `y [tokens, rows] = x [tokens, cols] W^T`, from the same parts. What two planes add up to is not
    /// rounded to the weight's type, as it is where the weight is unpacked.
    ///
    /// # Errors
    /// Sizes that do not fit; `int8` for weights that are not signs; a mask that was changed.
    pub fn apply(
        &self,
        job: &Job,
        parts: &[&[u8]],
        x: &[f32],
        mode: Mode,
        y: &mut [f32],
    ) -> Result<()> {
        self.check_parts(parts)?;
        let Dense { rows, cols, .. } = self.dense;
        let tokens = y.len() / rows;
        if x.len() != tokens * cols || y.len() != tokens * rows {
            return Err(Error::Shape {
                what: "x".into(),
                expected: format!("{tokens} rows of {cols} values"),
                found: format!("{} values", x.len()),
            });
        }
        let (first, more) = self.planes.split_first().expect("one plane or more");
        let (own, mut rest) = parts.split_at(first.parts);
        first.apply(job, own, x, mode, y)?;
        for plane in more {
            let (own, others) = rest.split_at(plane.parts);
            let mut terms = vec![0.0; y.len()];
            plane.apply(job, own, x, mode, &mut terms)?;
            y.iter_mut().zip(terms).for_each(|(sum, term)| *sum += term);
            rest = others;
        }
        Ok(())
    }

    fn check_parts(&self, parts: &[&[u8]]) -> Result<()> {
        let found: Vec<_> = parts.iter().map(|part| part.len()).collect();
        if found == self.nbytes {
            return Ok(());
        }
        let (what, expected) = ("bytes of the parts".into(), format!("{:?}", self.nbytes));
        Err(Error::Shape { what, expected, found: format!("{found:?}") })
    }
}

/// What a format's bytes mean, where rows start, and which kernels serve them.
struct Plane {
    kernel: Kernel,
    path: Path,
    dense: Dense,
    /// How many there are.
    parts: usize,
    kind: Kind,
}

enum Kind {
    /// The first value of every row and the end of the last; how many there are in 32 columns, where that
    /// is the same everywhere.
    Values { starts: Vec<usize>, each: Option<usize> },
    /// How positions are coded, bytes of signs for 64 columns, and of signs and scales of a row.
    Signs { table: Option<Table>, step: usize, widths: (usize, usize) },
}

impl Plane {
    fn new(kernel: Kernel, format: &Format, dense: Dense, parts: &[&[u8]]) -> Result<Plane> {
        let kind = match format {
            Format::KeepOf(groups) => {
                let kept = dense.cols / groups.of * groups.keep;
                let starts = (0..=dense.rows).map(|row| row * kept).collect();
                Kind::Values { starts, each: Some(32 / groups.of * groups.keep) }
            }
            Format::Bitmap(bitmap) => {
                Kind::Values { starts: bitmap.row_starts(parts[1], &dense)?, each: None }
            }
            Format::Signs(groups) => {
                let [.., signs, scales] = parts else { unreachable!("signs have both") };
                Kind::Signs {
                    table: Table::new(*groups),
                    step: 8 * groups.keep / groups.of,
                    widths: (signs.len() / dense.rows, scales.len() / dense.rows),
                }
            }
            Format::Binary(_) | Format::Residual(_) | Format::RowColumn | Format::Uniform(_) => {
                return Err(Error::Option(format!("packed format {format}: has no kernels")));
            }
        };
        Ok(Plane { path: Path::beside(&kernel), kernel, dense, parts: parts.len(), kind })
    }

    fn apply(
        &self,
        job: &Job,
        parts: &[&[u8]],
        x: &[f32],
        mode: Mode,
        y: &mut [f32],
    ) -> Result<()> {
        let tokens = y.len() / self.dense.rows;
        let is_int8 = mode == Mode::Int8;
        if is_int8 && !matches!(self.kind, Kind::Signs { .. }) {
            let reason = "mode int8: only for weights that are packed as signs";
            return Err(Error::Option(reason.into()));
        }
        if tokens == 0 {
            return Ok(());
        }
        // Rows of W outermost, as workers share them; a single token needs no other order.
        let mut columns = if tokens > 1 { vec![0.0; y.len()] } else { vec![] };
        let out = if tokens > 1 { &mut columns[..] } else { &mut *y };
        with_simd!(self.path, simd => match is_int8 || tokens <= FEW {
            true => few::apply(self, simd, job, parts, (x, mode), out)?,
            false => many::apply(self, simd, job, parts, x, out)?,
        });
        if tokens > 1 {
            transpose(&columns, tokens, y);
        }
        Ok(())
    }

    /// The mask and the values of a row; others may follow.
    fn values<'a>(&self, starts: &[usize], parts: &[&'a [u8]], row: usize) -> Values<'a> {
        let width = self.dense.cols.div_ceil(8);
        let mask = &parts[1][row * width..(row + 1) * width];
        Values { mask, values: &parts[0][starts[row] * self.dense.float.size()..] }
    }

    /// Signs and scales of a row, with its mask as `masks` holds it.
    fn signs<'a>(&self, parts: &[&'a [u8]], row: usize, mask: Option<&'a [u8]>) -> Signs<'a> {
        let Kind::Signs { step, widths: (signs_width, scales_width), .. } = self.kind else {
            unreachable!("asked for by kind")
        };
        let [.., signs, scales] = *parts else { unreachable!("checked beside the layout") };
        Signs {
            mask,
            signs: &signs[row * signs_width..],
            step,
            scales: &scales[row * scales_width..(row + 1) * scales_width],
        }
    }

    /// The masks of some rows, each of whole 64 columns; empty where they need no writing out.
    fn masks<S: Simd>(&self, simd: S, parts: &[&[u8]], rows: Range<usize>) -> Vec<u8> {
        let Kind::Signs { table: Some(table), .. } = &self.kind else { return vec![] };
        let width = padded(self.dense.cols) / 8;
        let stream_width = parts[0].len() / self.dense.rows;
        let mut masks = vec![0; rows.len() * width];
        for (row, masks) in rows.zip(masks.chunks_mut(width)) {
            simd.masks(table, &parts[0][row * stream_width..], masks);
        }
        masks
    }
}

/// `||y - exact|| / ||exact||`; 0 where both are zero.
pub fn relative_error(y: &[f32], exact: &[f32]) -> f64 {
    let norm = |terms: &mut dyn Iterator<Item = f64>| terms.map(|v| v * v).sum::<f64>().sqrt();
    let error = norm(&mut y.iter().zip(exact).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    if error == 0.0 { 0.0 } else { error / norm(&mut exact.iter().map(|v| f64::from(*v))) }
}

/// The error of a mask with more bits than the file has values.
fn too_few_values(row: usize) -> Error {
    let reason = format!("row {row}: expected as many bits as there are values, found more");
    Error::Packed { part: "mask", reason }
}

/// `to [cols, rows]` from `from [rows, cols]`.
fn transpose(from: &[f32], cols: usize, to: &mut [f32]) {
    const TILE: usize = 16; // rows of `from` whose cache lines are used up at once
    let rows = from.len() / cols;
    for (tile, from) in from.chunks(TILE * cols).enumerate() {
        for c in 0..cols {
            let to = &mut to[c * rows + tile * TILE..][..from.len() / cols];
            for (r, to) in to.iter_mut().enumerate() {
                *to = from[r * cols + c];
            }
        }
    }
}

#[cfg(test)]
mod sign_tests;
#[cfg(test)]
mod tests;
