//! Every rule of the header has a file that breaks it, and the message says which and where.

use proptest::prelude::*;
use rsprune_core::shard::{Header, Shard};
use std::fs;
use std::path::Path;

/// A file of `json` as it stands (no padding) and `data` zero bytes.
fn file(json: &str, data: usize) -> Vec<u8> {
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(json.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

/// Opens `bytes` as a file and returns the message of the error, which must name the file.
fn refusal(bytes: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    fs::write(&path, bytes).unwrap();
    let message = Shard::open(&path).unwrap_err().to_string();
    assert!(message.starts_with(&path.display().to_string()), "{message}");
    message
}

#[track_caller]
fn refused(json: &str, data: usize, parts: &[&str]) {
    says(&refusal(&file(json, data)), parts);
}

#[track_caller]
fn says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }
}

/// One U8 tensor per (name, begin, end).
fn tensors(ranges: &[(&str, u64, u64)]) -> String {
    let entries: Vec<_> = ranges
        .iter()
        .map(|(name, begin, end)| {
            let length = end.saturating_sub(*begin);
            format!(
                r#""{name}":{{"dtype":"U8","shape":[{length}],"data_offsets":[{begin},{end}]}}"#
            )
        })
        .collect();
    format!("{{{}}}", entries.join(","))
}

#[test]
fn accepts_what_the_rules_allow() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    // Out of order, a scalar, two empty tensors, trailing spaces.
    let json = r#"{"b":{"dtype":"F32","shape":[],"data_offsets":[2,6]},
        "__metadata__":{"format":"pt"},
        "a":{"shape":[2,1],"dtype":"I8","data_offsets":[0,2]},
        "e":{"dtype":"F64","shape":[0,7],"data_offsets":[2,2]},
        "z":{"dtype":"U8","shape":[0],"data_offsets":[6,6]}}   "#;
    fs::write(&path, file(json, 6)).unwrap();
    let shard = Shard::open(&path).unwrap();
    let names: Vec<_> = shard.infos().iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, ["a", "e", "b", "z"]);
    assert_eq!(shard.info("b").unwrap().offset, 8 + json.len() as u64 + 2);
    assert_eq!(shard.info("b").unwrap().nbytes, 4);
    assert_eq!(shard.metadata()["format"], "pt");
    fs::write(&path, file("{}", 0)).unwrap();
    assert!(Shard::open(&path).unwrap().infos().is_empty());
}

#[test]
fn shorter_than_the_prefix() {
    says(&refusal(&[]), &["truncated", "at least 8 bytes, found 0"]);
    says(&refusal(&[2, 0, 0, 0, 0, 0, 0]), &["found 7"]);
}

#[test]
fn header_length_zero_or_too_large() {
    says(&refusal(&[0; 16]), &["expected 1 to 100000000 bytes, found 0"]);
    let mut bytes = 100_000_001u64.to_le_bytes().to_vec();
    says(&refusal(&bytes), &["expected 1 to 100000000 bytes, found 100000001"]);
    bytes = u64::MAX.to_le_bytes().to_vec();
    says(&refusal(&bytes), &["found 18446744073709551615"]);
}

#[test]
fn header_beyond_the_file() {
    let mut bytes = file("{}", 0);
    bytes[0] = 3;
    says(&refusal(&bytes), &["truncated", "ends at byte 11, file has 10"]);
}

#[test]
fn not_utf8() {
    let mut bytes = file(r#"{"a":1}"#, 0);
    bytes[10] = 0xff;
    says(&refusal(&bytes), &["not UTF-8 at byte 10"]);
}

#[test]
fn not_an_object() {
    refused("[]", 0, &["must start with", r#"found "[""#]);
    refused(" {}", 0, &["must start with", r#"found " ""#]);
}

#[test]
fn not_json() {
    refused("{", 0, &["not valid", "EOF"]);
    refused("{}{}", 0, &["not valid", "trailing"]);
    refused(r#"{"a":NaN}"#, 0, &["not valid", r#"tensor "a""#]);
    refused(r#"{"\ud800\u0061":1}"#, 0, &["not valid", "surrogate"]);
}

#[test]
fn duplicate_tensor() {
    let json = tensors(&[("a", 0, 1), ("a", 1, 2)]);
    refused(&json, 2, &[r#"duplicate key "a""#]);
    // The same name, spelled otherwise.
    let json = tensors(&[("a", 0, 1), ("\\u0061", 1, 2)]);
    refused(&json, 2, &[r#"duplicate key "a""#]);
}

#[test]
fn duplicate_metadata_and_fields() {
    refused(r#"{"__metadata__":{},"__metadata__":{}}"#, 0, &[r#"duplicate key "__metadata__""#]);
    refused(r#"{"__metadata__":{"k":"1","k":"2"}}"#, 0, &["__metadata__", r#"duplicate key "k""#]);
    refused(
        r#"{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}"#,
        1,
        &[r#"tensor "a""#, "duplicate field `dtype`"],
    );
}

#[test]
fn deep_json() {
    let deep = format!(r#"{{"a":{}{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
    refused(&deep, 0, &["not valid"]);
    let deep = format!(r#"{{"a":{{"shape":{}"#, "[".repeat(100_000));
    refused(&deep, 0, &["not valid"]);
}

#[test]
fn metadata_that_is_not_text() {
    refused(r#"{"__metadata__":{"k":1}}"#, 0, &["__metadata__", r#"key "k""#, "expected a string"]);
    refused(r#"{"__metadata__":null}"#, 0, &["__metadata__", "expected a JSON object"]);
}

#[test]
fn unknown_dtype() {
    let json = r#"{"a":{"dtype":"F128","shape":[1],"data_offsets":[0,1]}}"#;
    refused(json, 1, &[r#"tensor "a""#, r#"unknown dtype "F128""#, "BF16"]);
    refused(&json.replace("F128", "F4"), 1, &[r#"tensor "a""#, "less than a byte"]);
}

#[test]
fn unknown_missing_and_mistyped_fields() {
    let good = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#;
    let named = r#"tensor "a""#;
    refused(&good.replace(":[1]", ":[1],\"x\":0"), 1, &[named, "unknown field `x`"]);
    refused(&good.replace(",\"shape\":[1]", ""), 1, &[named, "missing field `shape`"]);
    refused(&good.replace(":[1]", ":[-1]"), 1, &[named, "-1"]);
    refused(&good.replace(":[1]", ":[1.0]"), 1, &[named, "floating point"]);
    refused(&good.replace(":[1]", ":[18446744073709551616]"), 1, &[named]);
    refused(&good.replace("[0,1]", "[0,1,2]"), 1, &[named]);
    refused(&good.replace("[0,1]", "[0]"), 1, &[named]);
    refused(r#"{"a":1}"#, 0, &[named]);
}

#[test]
fn begin_after_end() {
    refused(&tensors(&[("a", 3, 2)]), 3, &[r#"tensor "a""#, "begin 3 is after end 2"]);
}

#[test]
fn sizes_that_overflow() {
    let json = r#"{"a":{"dtype":"U64","shape":[4294967296,4294967296],"data_offsets":[0,0]}}"#;
    refused(json, 0, &[r#"tensor "a""#, "U64 [4294967296, 4294967296] overflows"]);
    let max = u64::MAX;
    refused(
        &tensors(&[("a", 0, max)]),
        0,
        &[r#"tensor "a""#, "end 18446744073709551615 overflows"],
    );
}

#[test]
fn range_that_does_not_fit_the_shape() {
    let json = r#"{"a":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,11]}}"#;
    refused(json, 11, &[r#"tensor "a""#, "BF16 [2, 3] expected 12 bytes, found 11"]);
}

#[test]
fn overlap_and_hole() {
    let json = tensors(&[("a", 0, 4), ("b", 3, 6)]);
    refused(&json, 6, &["overlap", r#"tensor "b" expected at data byte 4, found 3"#]);
    let json = tensors(&[("a", 0, 4), ("b", 0, 4)]);
    refused(&json, 4, &["overlap", r#"tensor "b" expected at data byte 4, found 0"#]);
    let json = tensors(&[("a", 0, 4), ("b", 2, 2)]); // an empty tensor inside of another
    refused(&json, 4, &["overlap", r#"tensor "b""#]);
    let json = tensors(&[("b", 5, 6), ("a", 0, 4)]);
    refused(&json, 6, &["hole", r#"tensor "b" expected at data byte 4, found 5"#]);
    refused(&tensors(&[("a", 1, 2)]), 2, &["hole", "expected at data byte 0, found 1"]);
}

#[test]
fn file_too_short_or_too_long() {
    let json = tensors(&[("a", 0, 4)]);
    let whole = 8 + json.len() + 4;
    let promise = format!("header promises {whole} bytes, file has {}", whole - 1);
    refused(&json, 3, &["truncated", &promise]);
    let promise = format!("header promises {whole} bytes, file has {}", whole + 1);
    refused(&json, 5, &[&promise, "no owner"]);
}

#[test]
fn not_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let message = Shard::open(folder.path()).unwrap_err().to_string();
    says(&message, &["expected a regular file"]);
    let message = Shard::open(folder.path().join("no")).unwrap_err().to_string();
    says(&message, &["no: open failed"]);
}

/// JSON that is close to a header: valid pieces with a few characters changed.
fn mutated() -> impl Strategy<Value = Vec<u8>> {
    let json = r#"{"__metadata__":{"a":"b"},"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"F16","shape":[1,2],"data_offsets":[3,7]}}"#;
    let edit = (0..json.len(), proptest::sample::select(b"0123456789[]{},:\"aU \\\xff".as_slice()));
    proptest::collection::vec(edit, 0..4).prop_map(move |edits| {
        let mut bytes = json.as_bytes().to_vec();
        edits.into_iter().for_each(|(at, byte)| bytes[at] = byte);
        bytes
    })
}

proptest! {
    /// Whatever the bytes: an error or a header that tiles the file; never a panic.
    #[test]
    fn any_header_is_refused_or_tiles(json in mutated(), data in 0u64..12) {
        let file_len = 8 + json.len() as u64 + data;
        if let Ok(header) = Header::parse(&json, Path::new("x"), file_len) {
            let mut end = header.data_start;
            for tensor in &header.tensors {
                prop_assert_eq!(tensor.offset, end);
                let elements: u64 = tensor.shape.iter().product();
                prop_assert_eq!(tensor.nbytes, elements * tensor.dtype.size());
                end += tensor.nbytes;
            }
            prop_assert_eq!(end, file_len);
        }
    }

    #[test]
    fn any_bytes_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
        let _ = Header::parse(&bytes, Path::new("x"), 8 + bytes.len() as u64);
    }
}
