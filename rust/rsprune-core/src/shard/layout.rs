//! The plan of a safetensors file: every offset and the header, before the first tensor exists.

use super::dtype::Dtype;
use super::header::{Header, MAX_JSON, METADATA, PREFIX, TensorInfo};
use crate::error::{Error, Result};
use std::collections::BTreeMap;

/// Bound on the data section: file offsets are signed 64-bit and the header needs room, too.
const MAX_DATA: u64 = 1 << 62;

/// The complete shape of a file to be written: header bytes, offsets, length. The same tensors
/// give the same bytes, in whatever order they are named.
#[derive(Debug)]
pub struct Layout {
    header: Header,
    header_bytes: Vec<u8>,
    file_len: u64,
}

impl Layout {
    /// Plans a file of `tensors` (name, type, shape). They are stored by falling element size,
    /// then by name: so each starts at a multiple of its element size. `metadata` is completed by
    /// `format: pt`, without which transformers refuses a file.
    pub fn plan(
        tensors: &[(String, Dtype, Vec<u64>)],
        metadata: &BTreeMap<String, String>,
    ) -> Result<Layout> {
        let mut infos = place(tensors)?;
        let end = infos.last().map_or(0, |last| last.offset + last.nbytes);
        let mut metadata = metadata.clone();
        metadata.entry("format".into()).or_insert("pt".into());
        let header_bytes = encode(&infos, &metadata)?;
        let data_start = header_bytes.len() as u64;
        for info in &mut infos {
            info.offset += data_start; // cannot overflow: `place` leaves room for any header
        }
        let header = Header::new(infos, metadata, data_start);
        check_names(&header)?;
        Ok(Layout { header, header_bytes, file_len: data_start + end })
    }

    /// Length of the whole file.
    pub fn file_len(&self) -> u64 {
        self.file_len
    }

    /// The first bytes of the file: length, JSON, padding.
    pub fn header_bytes(&self) -> &[u8] {
        &self.header_bytes
    }

    /// The tensors in file order.
    pub fn infos(&self) -> &[TensorInfo] {
        &self.header.tensors
    }

    /// The place of the tensor `name` in [`Layout::infos`].
    pub(super) fn position(&self, name: &str) -> Option<usize> {
        self.header.position(name)
    }
}

/// Sorts the tensors and puts each behind the one before it, from byte 0 of the data section.
fn place(tensors: &[(String, Dtype, Vec<u64>)]) -> Result<Vec<TensorInfo>> {
    let mut sorted: Vec<_> = tensors.iter().collect();
    sorted.sort_by(|a, b| (b.1.size(), &a.0).cmp(&(a.1.size(), &b.0)));
    let mut infos = Vec::with_capacity(sorted.len());
    let mut end = 0u64;
    for (name, dtype, shape) in sorted {
        let nbytes = dtype.nbytes(shape);
        let next = nbytes.and_then(|n| end.checked_add(n)).filter(|&n| n <= MAX_DATA);
        let (Some(nbytes), Some(next)) = (nbytes, next) else {
            return Err(Error::Option(format!(
                "tensor {name:?}: with {dtype} {shape:?} the file exceeds {MAX_DATA} bytes"
            )));
        };
        infos.push(TensorInfo {
            name: name.clone(),
            dtype: *dtype,
            shape: shape.clone(),
            offset: end,
            nbytes,
        });
        end = next;
    }
    Ok(infos)
}

/// Refuses a name that is used twice or means something else.
fn check_names(header: &Header) -> Result<()> {
    for (i, info) in header.tensors.iter().enumerate() {
        let name = &info.name;
        if header.position(name) != Some(i) {
            return Err(Error::Option(format!("tensor {name:?} is planned twice")));
        }
        if name == METADATA {
            return Err(Error::Option(format!("no tensor may be named {name:?}")));
        }
    }
    Ok(())
}

/// Length prefix and JSON, padded so that the data section starts at a multiple of 8. Written by
/// hand, because the order of the keys is part of the format that readers have seen so far:
/// metadata first, then tensors by offset.
fn encode(infos: &[TensorInfo], metadata: &BTreeMap<String, String>) -> Result<Vec<u8>> {
    let quote = |text: &str| serde_json::Value::from(text).to_string();
    let pairs: Vec<_> =
        metadata.iter().map(|(key, value)| format!("{}:{}", quote(key), quote(value))).collect();
    let mut json = format!("{{{}:{{{}}}", quote(METADATA), pairs.join(","));
    for info in infos {
        let shape: Vec<_> = info.shape.iter().map(u64::to_string).collect();
        json += &format!(
            ",{}:{{\"dtype\":\"{}\",\"shape\":[{}],\"data_offsets\":[{},{}]}}",
            quote(&info.name),
            info.dtype,
            shape.join(","),
            info.offset,
            info.offset + info.nbytes
        );
    }
    json.push('}');
    let padded = json.len().next_multiple_of(8);
    if padded as u64 > MAX_JSON {
        return Err(Error::Option(format!(
            "the header of {} tensors needs {padded} bytes, the format allows {MAX_JSON}: write \
             more, smaller files",
            infos.len()
        )));
    }
    let mut bytes = (padded as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(json.as_bytes());
    bytes.resize(PREFIX as usize + padded, b' ');
    Ok(bytes)
}
