//! A whole safetensors file: refused, or read as the public reader reads it. Never a panic.
//!
//! What is accepted must tile its data section, be accepted by the `safetensors` crate with the
//! same tensors, give its bytes by copy and by map, and be planned again by `Layout`.
#![no_main]

use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use rsprune_core::shard::{Layout, Shard};
use safetensors::SafeTensors;
use std::fs;
use std::path::Path;
use std::sync::LazyLock;
use tempfile::{TempDir, tempdir};

const PREFIX: usize = 8;

static FOLDER: LazyLock<TempDir> = LazyLock::new(|| tempdir().unwrap());

fuzz_target!(|bytes: &[u8]| {
    let path = FOLDER.path().join("x.safetensors");
    fs::write(&path, bytes).unwrap();
    match Shard::open(&path) {
        Ok(shard) => agrees_with_the_public_reader(&shard, bytes),
        Err(error) => assert!(error.to_string().starts_with(&path.display().to_string())),
    }
});

fn agrees_with_the_public_reader(shard: &Shard, bytes: &[u8]) {
    let public = SafeTensors::deserialize(bytes).expect("we accept what the public reader refuses");
    assert_eq!(public.len(), shard.infos().len());
    let mut planned = Vec::new();
    let mut end = PREFIX as u64 + u64::from_le_bytes(bytes[..PREFIX].try_into().unwrap());
    for info in shard.infos() {
        assert_eq!(info.offset, end, "a hole or an overlap");
        end += info.nbytes;
        let theirs = public.tensor(&info.name).unwrap();
        assert_eq!(theirs.dtype().to_string(), info.dtype.name());
        assert!(theirs.shape().iter().map(|&n| n as u64).eq(info.shape.iter().copied()));
        let mut copied = vec![0; info.nbytes as usize];
        shard.read_into(&info.name, &mut copied).unwrap();
        assert_eq!(copied, theirs.data());
        assert_eq!(&shard.map(&info.name).unwrap()[..], theirs.data());
        planned.push((info.name.clone(), info.dtype, info.shape.clone()));
    }
    assert_eq!(end, bytes.len() as u64, "bytes without an owner");
    plans_a_file_that_is_read_alike(shard, &planned);
}

fn plans_a_file_that_is_read_alike(
    shard: &Shard,
    planned: &[(String, rsprune_core::shard::Dtype, Vec<u64>)],
) {
    let layout = Layout::plan(planned, shard.metadata()).unwrap();
    let json = &layout.header_bytes()[PREFIX..];
    let again =
        rsprune_core::shard::Header::parse(json, Path::new("again"), layout.file_len()).unwrap();
    assert_eq!(again.tensors, layout.infos());
    assert!(shard.metadata().iter().all(|(key, value)| again.metadata[key] == *value));
}

// Keeps the length prefix right in most inputs: a random one is refused before the JSON is seen.
fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let Some((prefix, rest)) = data[..size].split_first_chunk::<PREFIX>() else {
        return fuzzer_mutate(data, size, max_size);
    };
    let length = u64::from_le_bytes(*prefix);
    if seed % 8 == 0 || length > rest.len() as u64 || max_size < data.len() {
        return fuzzer_mutate(data, size, max_size);
    }
    let tail = rest[length as usize..].to_vec();
    let room = max_size - PREFIX - tail.len();
    let mutated = fuzzer_mutate(&mut data[PREFIX..], length as usize, room);
    data[..PREFIX].copy_from_slice(&(mutated as u64).to_le_bytes());
    data[PREFIX + mutated..][..tail.len()].copy_from_slice(&tail);
    PREFIX + mutated + tail.len()
});
