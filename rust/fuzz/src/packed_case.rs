//! A packed weight as one file: a line with format, dtype, rows and columns, divided by `|`, then
//! the bytes of all parts. The last part takes what is left, so that a length can be wrong.

use rsprune_core::float::Float;
use rsprune_core::pack::{Dense, Format, unpack, validate};

/// The weight of a file, with what it takes to pack it again; an error's text else.
pub fn unpack_file(file: &[u8]) -> Result<(Vec<u8>, Dense, Format), String> {
    let split = file.iter().position(|b| *b == b'\n').ok_or("no first line")?;
    let line = str::from_utf8(&file[..split]).map_err(|e| e.to_string())?;
    let words: Vec<&str> = line.split('|').collect();
    let [format, dtype, rows, cols] = words[..] else { return Err("not four words".into()) };
    let number = |text: &str| text.parse::<usize>().map_err(|e| e.to_string());
    let float = Float::parse(dtype).map_err(|e| e.to_string())?;
    let dense = Dense::new(float, number(rows)?, number(cols)?).map_err(|e| e.to_string())?;
    let format = Format::parse(format).map_err(|e| e.to_string())?;
    let layout = format.layout(&dense).map_err(|e| e.to_string())?;
    let mut rest = &file[split + 1..];
    let mut parts = Vec::new();
    for (i, part) in layout.iter().enumerate() {
        let length = if i + 1 < layout.len() { part.nbytes.min(rest.len()) } else { rest.len() };
        let (part, after) = rest.split_at(length);
        parts.push(part);
        rest = after;
    }
    let weight = unpack(&parts, &dense, &format, 0..dense.rows).map_err(|e| e.to_string());
    // What has kernels is validated before it is multiplied: both refuse the same.
    if !matches!(format, Format::Binary(_) | Format::RowColumn | Format::Uniform(_)) {
        assert_eq!(validate(&parts, &dense, &format).is_err(), weight.is_err());
    }
    Ok((weight?, dense, format))
}
