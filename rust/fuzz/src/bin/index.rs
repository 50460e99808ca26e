//! The text of an index file: refused, or a map to files that lie inside of the folder.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rsprune_core::shard::{Dtype, Index, Layout, Writer, parse_index};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use tempfile::{TempDir, tempdir};

/// `outside.safetensors` and, beside it, `model` with two shards of one tensor each.
static OUTER: LazyLock<TempDir> = LazyLock::new(|| {
    let outer = tempdir().unwrap();
    fs::create_dir_all(outer.path().join("model/sub")).unwrap();
    shard(&outer.path().join("outside.safetensors"), "a");
    shard(&outer.path().join("model/1.safetensors"), "a");
    shard(&outer.path().join("model/sub/2.safetensors"), "b");
    outer
});

fn shard(path: &Path, tensor: &str) {
    let plan = [(tensor.to_string(), Dtype::U8, vec![1])];
    let mut writer =
        Writer::create(path, Layout::plan(&plan, &Default::default()).unwrap()).unwrap();
    writer.put(tensor, &[7]).unwrap();
    writer.finish().unwrap();
}

fuzz_target!(|json: &[u8]| {
    let Ok(weight_map) = parse_index(json, Path::new("index.json")) else { return };
    assert!(!weight_map.is_empty());
    let folder = OUTER.path().join("model");
    for file in weight_map.values() {
        assert!(file.ends_with(".safetensors"));
        assert!(folder.join(file).starts_with(&folder));
        assert!(!PathBuf::from(file).components().any(|part| part.as_os_str() == ".."));
    }
    fs::write(folder.join("model.safetensors.index.json"), json).unwrap();
    if let Ok(index) = Index::open(&folder) {
        let root = folder.canonicalize().unwrap();
        assert_eq!(index.weight_map, weight_map);
        assert!(index.files().iter().all(|file| file.canonicalize().unwrap().starts_with(&root)));
    }
});
