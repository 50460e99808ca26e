//! The fuzzers' seeds, held to what their names say: `accept-*` is read, `reject-*` is refused.

#[path = "../../fuzz/src/packed_case.rs"]
mod packed_case;

use rsprune_core::shard::{Shard, parse_index};
use std::fs;
use std::path::{Path, PathBuf};

/// The files of rust/fuzz/corpus/`target`; both kinds must be there, `refused` or more
/// of the second.
fn corpus(target: &str, refused: usize) -> Vec<(String, PathBuf)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let entries = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap());
    let files: Vec<_> = entries.map(|e| (e.file_name().into_string().unwrap(), e.path())).collect();
    for (kind, least) in [("accept-", 2), ("reject-", refused)] {
        let found = files.iter().filter(|(name, _)| name.starts_with(kind)).count();
        assert!(found >= least, "{found} files {kind}* in {}", folder.display());
    }
    files
}

#[track_caller]
fn holds<T, E: std::fmt::Display>(name: &str, outcome: Result<T, E>) {
    match outcome {
        Ok(_) => assert!(name.starts_with("accept-"), "{name} was accepted"),
        Err(e) => assert!(name.starts_with("reject-"), "{name}: {e}"),
    }
}

#[test]
fn headers() {
    for (name, path) in corpus("header", 15) {
        holds(&name, Shard::open(path));
    }
}

#[test]
fn indices() {
    for (name, path) in corpus("index", 15) {
        holds(&name, parse_index(&fs::read(&path).unwrap(), &path));
    }
}

#[test]
fn packed_weights() {
    for format in ["keep_of", "bitmap", "signs", "decided"] {
        for (name, path) in corpus(format, 5) {
            holds(&name, packed_case::unpack_file(&fs::read(path).unwrap()));
        }
    }
}
