//! The JSON header of a safetensors file, checked in full before a byte of it is trusted.

use super::dtype::{self, Dtype};
use super::{UniqueMap, broken, io_error};
use crate::error::Result;
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes before the JSON: its length as a little-endian u64.
pub(super) const PREFIX: u64 = 8;
/// The format's own bound on the length of the JSON.
pub(super) const MAX_JSON: u64 = 100_000_000;
/// The one key that is not a tensor.
pub(super) const METADATA: &str = "__metadata__";

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name on disk.
    pub name: String,
    /// Its element type.
    pub dtype: Dtype,
    /// Its shape, outermost first; empty for a scalar.
    pub shape: Vec<u64>,
    /// Where its bytes start, from the start of the file.
    pub offset: u64,
    /// How many bytes it has.
    pub nbytes: u64,
}

/// A header whose tensors are known to tile the file's data section exactly.
#[derive(Debug)]
pub struct Header {
    /// The tensors, sorted by offset.
    pub tensors: Vec<TensorInfo>,
    /// The `__metadata__` strings.
    pub metadata: BTreeMap<String, String>,
    /// Where the data section starts, from the start of the file.
    pub data_start: u64,
    by_name: HashMap<String, usize>,
}

impl Header {
    /// Reads and validates the header of `file`, which has `file_len` bytes. `path` is only used
    /// in messages.
    pub fn read(file: &File, path: &Path, file_len: u64) -> Result<Header> {
        if file_len < PREFIX {
            let reason = format!("truncated: expected at least {PREFIX} bytes, found {file_len}");
            return Err(broken(path, reason));
        }
        let mut prefix = [0; PREFIX as usize];
        file.read_exact_at(&mut prefix, 0).map_err(io_error(path, "read of the header length"))?;
        let json_len = check_length(u64::from_le_bytes(prefix), path, file_len)?;
        let mut json = vec![0; json_len];
        file.read_exact_at(&mut json, PREFIX)
            .map_err(io_error(path, format!("read of the {json_len}-byte header")))?;
        Header::parse(&json, path, file_len)
    }

    /// Validates the JSON part of a header against the length of its whole file.
    pub fn parse(json: &[u8], path: &Path, file_len: u64) -> Result<Header> {
        let text = std::str::from_utf8(json).map_err(|e| {
            let at = PREFIX + e.valid_up_to() as u64;
            broken(path, format!("the header is not UTF-8 at byte {at}"))
        })?;
        if !text.starts_with('{') {
            let found: String = text.chars().take(1).collect();
            let reason = format!("the header must start with \"{{\", found {found:?}");
            return Err(broken(path, reason));
        }
        let raw: RawHeader = serde_json::from_str(text)
            .map_err(|e| broken(path, format!("the header is not valid: {e}")))?;
        let data_start = PREFIX + json.len() as u64;
        let tensors = tile(raw.tensors, data_start, path, file_len)?;
        Ok(Header::new(tensors, raw.metadata, data_start))
    }

    /// A header of `tensors` that are known to be right.
    pub(super) fn new(
        tensors: Vec<TensorInfo>,
        metadata: BTreeMap<String, String>,
        data_start: u64,
    ) -> Header {
        let names = tensors.iter().enumerate();
        let by_name = names.map(|(i, t)| (t.name.clone(), i)).collect();
        Header { tensors, metadata, data_start, by_name }
    }

    /// The place of the tensor `name` in `tensors`.
    pub fn position(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }
}

/// The JSON length, once it is known to lie inside the format's bound and the file.
fn check_length(json_len: u64, path: &Path, file_len: u64) -> Result<usize> {
    if json_len == 0 || json_len > MAX_JSON {
        let reason = format!("header length: expected 1 to {MAX_JSON} bytes, found {json_len}");
        return Err(broken(path, reason));
    }
    if json_len > file_len - PREFIX {
        let whole = PREFIX + json_len;
        let reason = format!("truncated: the header ends at byte {whole}, file has {file_len}");
        return Err(broken(path, reason));
    }
    Ok(json_len as usize) // at most MAX_JSON
}

/// Sorts the tensors by offset and checks that their byte ranges fit their shapes, follow each
/// other without hole or overlap from the start of the data section, and end with the file.
fn tile(
    raw: Vec<(String, RawTensor)>,
    data_start: u64,
    path: &Path,
    file_len: u64,
) -> Result<Vec<TensorInfo>> {
    let mut tensors = raw
        .into_iter()
        .map(|(name, t)| check_tensor(name, t, data_start).map_err(|e| broken(path, e)))
        .collect::<Result<Vec<_>>>()?;
    // Stable, and empty tensors before the one that starts at the same byte.
    tensors.sort_by_key(|t| (t.offset, t.nbytes));
    let mut end = data_start;
    for tensor in &tensors {
        if tensor.offset != end {
            let kind = if tensor.offset < end { "overlap" } else { "hole" };
            let (name, expected) = (&tensor.name, end - data_start);
            let found = tensor.offset - data_start;
            let reason =
                format!("{kind}: tensor {name:?} expected at data byte {expected}, found {found}");
            return Err(broken(path, reason));
        }
        end += tensor.nbytes; // cannot overflow: check_tensor has made this sum
    }
    if file_len < end {
        let reason = format!("truncated: header promises {end} bytes, file has {file_len}");
        return Err(broken(path, reason));
    }
    if file_len > end {
        let reason =
            format!("header promises {end} bytes, file has {file_len}: the rest has no owner");
        return Err(broken(path, reason));
    }
    Ok(tensors)
}

/// One tensor with its absolute offset, if its byte range is a range and fits its shape.
fn check_tensor(
    name: String,
    raw: RawTensor,
    data_start: u64,
) -> std::result::Result<TensorInfo, String> {
    let RawTensor { dtype, shape, data_offsets: [begin, end] } = raw;
    let dtype = Dtype::parse(&dtype)
        .ok_or_else(|| format!("tensor {name:?}: {}", dtype::unknown(&dtype)))?;
    let nbytes = end
        .checked_sub(begin)
        .ok_or_else(|| format!("tensor {name:?}: begin {begin} is after end {end}"))?;
    let expected = dtype
        .nbytes(&shape)
        .ok_or_else(|| format!("tensor {name:?}: size of {dtype} {shape:?} overflows 64 bits"))?;
    if nbytes != expected {
        return Err(format!(
            "tensor {name:?}: {dtype} {shape:?} expected {expected} bytes, found {nbytes}"
        ));
    }
    if data_start.checked_add(end).is_none() {
        return Err(format!("tensor {name:?}: end {end} overflows 64 bits"));
    }
    Ok(TensorInfo { name, dtype, shape, offset: data_start + begin, nbytes })
}

/// A tensor as the JSON says it, unchecked. The dtype stays a string, so that the message about
/// an unknown one can be ours.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// The header as the JSON says it, in the order of the JSON, with no key twice.
struct RawHeader {
    tensors: Vec<(String, RawTensor)>,
    metadata: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(input: D) -> std::result::Result<RawHeader, D::Error> {
        input.deserialize_map(RawVisitor)
    }
}

struct RawVisitor;

impl<'de> Visitor<'de> for RawVisitor {
    type Value = RawHeader;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<RawHeader, A::Error> {
        let mut seen = HashSet::new();
        let mut tensors = Vec::new();
        let mut metadata = BTreeMap::new();
        while let Some(name) = map.next_key::<String>()? {
            if !seen.insert(name.clone()) {
                return Err(A::Error::custom(format!("duplicate key {name:?}")));
            }
            if name == METADATA {
                let value = map.next_value::<UniqueMap<String>>();
                metadata = value.map_err(|e| A::Error::custom(format!("{METADATA}: {e}")))?.0;
            } else {
                let value = map.next_value();
                let tensor =
                    value.map_err(|e| A::Error::custom(format!("tensor {name:?}: {e}")))?;
                tensors.push((name, tensor));
            }
        }
        Ok(RawHeader { tensors, metadata })
    }
}
