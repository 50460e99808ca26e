//! Which files a folder's checkpoint has, and every way in which a folder is refused.

use rsprune_core::shard::{Dtype, Index, Layout, Writer, checkpoint_files};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

const INDEX: &str = "model.safetensors.index.json";

/// Writes a shard whose tensors have one byte each.
fn shard(path: &Path, names: &[&str]) {
    let tensors: Vec<_> = names.iter().map(|n| (n.to_string(), Dtype::U8, vec![1])).collect();
    let layout = Layout::plan(&tensors, &Default::default()).unwrap();
    let mut writer = Writer::create(path, layout).unwrap();
    names.iter().for_each(|name| writer.put(name, &[7]).unwrap());
    writer.finish().unwrap();
}

/// Writes an index of (tensor, file) pairs.
fn index(folder: &Path, entries: &[(&str, &str)]) {
    let pairs: Vec<_> = entries.iter().map(|(t, f)| format!("{t:?}:{f:?}")).collect();
    let json =
        format!(r#"{{"metadata":{{"total_size":2.0}},"weight_map":{{{}}}}}"#, pairs.join(","));
    fs::write(folder.join(INDEX), json).unwrap();
}

#[track_caller]
fn refused(folder: &Path, parts: &[&str]) {
    let message = Index::open(folder).unwrap_err().to_string();
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }
}

#[test]
fn the_index_rules_and_not_the_folder_listing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    fs::create_dir(path.join("sub")).unwrap();
    shard(&path.join("m-1.safetensors"), &["a", "b"]);
    shard(&path.join("sub/m-2.safetensors"), &["c"]);
    shard(&path.join("model.safetensors"), &["other"]);
    index(
        path,
        &[("c", "sub/m-2.safetensors"), ("a", "m-1.safetensors"), ("b", "m-1.safetensors")],
    );
    let files = checkpoint_files(path).unwrap();
    assert_eq!(files, [path.join("m-1.safetensors"), path.join("sub/m-2.safetensors")]);
    let index = Index::open(path).unwrap();
    assert_eq!(index.weight_map["c"], "sub/m-2.safetensors");
    assert_eq!(index.weight_map.len(), 3);
}

#[test]
fn a_single_file_needs_no_index() {
    let folder = tempfile::tempdir().unwrap();
    shard(&folder.path().join("model.safetensors"), &["a"]);
    let index = Index::open(folder.path()).unwrap();
    assert_eq!(index.weight_map["a"], "model.safetensors");
    assert_eq!(index.files(), [folder.path().join("model.safetensors")]);
}

#[test]
fn folders_without_weights() {
    let folder = tempfile::tempdir().unwrap();
    refused(folder.path(), &["model.safetensors", "found neither"]);
    fs::write(folder.path().join("pytorch_model.bin"), "x").unwrap();
    refused(folder.path(), &["pytorch_model.bin", "never loaded", "convert them to safetensors"]);
    shard(&folder.path().join("other.safetensors"), &["a"]);
    refused(folder.path(), &["other.safetensors", "chosen by the index"]);
    refused(&folder.path().join("no"), &["open of the checkpoint folder"]);
}

#[test]
fn names_that_leave_the_folder() {
    let outer = tempfile::tempdir().unwrap();
    let folder = outer.path().join("model");
    fs::create_dir(&folder).unwrap();
    shard(&outer.path().join("x.safetensors"), &["a"]);
    let absolute = outer.path().join("x.safetensors").display().to_string();
    let names = ["../x.safetensors", &absolute, "sub/../../x.safetensors", "./x.safetensors", ""];
    for name in names.into_iter().chain(["..\\x.safetensors", "C:\\x.safetensors"]) {
        index(&folder, &[("a", name)]);
        refused(&folder, &[r#"tensor "a""#, "not a path inside the folder"]);
    }
}

#[test]
fn names_that_are_no_safetensors() {
    let folder = tempfile::tempdir().unwrap();
    index(folder.path(), &[("a", "pytorch_model-1.bin")]);
    refused(folder.path(), &[r#"tensor "a""#, "pytorch_model-1.bin", "never loaded"]);
    index(folder.path(), &[("a", "config.json")]);
    refused(folder.path(), &["not a .safetensors file"]);
}

#[test]
fn links_out_of_the_folder() {
    let outer = tempfile::tempdir().unwrap();
    let folder = outer.path().join("model");
    fs::create_dir_all(outer.path().join("blobs")).unwrap();
    fs::create_dir(&folder).unwrap();
    shard(&outer.path().join("blobs/x"), &["a"]);
    let link = folder.join("x.safetensors");
    symlink(outer.path().join("blobs/x"), &link).unwrap();
    index(&folder, &[("a", "x.safetensors")]);
    refused(&folder, &["x.safetensors", "leaves the checkpoint folder", "blobs/x"]);
    // The single file and the index itself are held to the same rule.
    fs::remove_file(folder.join(INDEX)).unwrap();
    fs::rename(&link, folder.join("model.safetensors")).unwrap();
    refused(&folder, &["model.safetensors", "leaves the checkpoint folder"]);
    fs::write(outer.path().join("i.json"), "{}").unwrap();
    symlink(outer.path().join("i.json"), folder.join(INDEX)).unwrap();
    refused(&folder, &[INDEX, "leaves the checkpoint folder"]);
    // A linked directory on the way out.
    fs::remove_file(folder.join(INDEX)).unwrap();
    shard(&outer.path().join("blobs/y.safetensors"), &["a"]);
    symlink("../blobs", folder.join("sub")).unwrap();
    index(&folder, &[("a", "sub/y.safetensors")]);
    refused(&folder, &["sub/y.safetensors", "leaves the checkpoint folder"]);
}

#[test]
fn links_inside_the_folder_and_a_link_to_the_folder() {
    let outer = tempfile::tempdir().unwrap();
    let folder = outer.path().join("model");
    fs::create_dir(&folder).unwrap();
    shard(&folder.join("x.safetensors"), &["a"]);
    symlink("x.safetensors", folder.join("model.safetensors")).unwrap();
    symlink("model", outer.path().join("alias")).unwrap();
    assert!(Index::open(&folder).is_ok());
    assert!(Index::open(outer.path().join("alias")).is_ok());
}

#[test]
fn the_hub_cache_links_into_its_own_blobs_only() {
    let outer = tempfile::tempdir().unwrap();
    let repo = outer.path().join("models--org--name");
    let folder = repo.join("snapshots/0123abcd");
    let other = outer.path().join("models--org--other");
    for path in [&folder, &repo.join("blobs"), &other.join("blobs")] {
        fs::create_dir_all(path).unwrap();
    }
    shard(&repo.join("blobs/h1"), &["a"]);
    index(&repo.join("blobs"), &[("a", "m-1.safetensors")]);
    fs::rename(repo.join("blobs").join(INDEX), repo.join("blobs/h2")).unwrap();
    symlink("../../blobs/h1", folder.join("m-1.safetensors")).unwrap();
    symlink("../../blobs/h2", folder.join(INDEX)).unwrap();
    let index = Index::open(&folder).unwrap();
    assert_eq!(index.files(), [folder.join("m-1.safetensors")]);

    shard(&other.join("blobs/h1"), &["a"]);
    fs::remove_file(folder.join("m-1.safetensors")).unwrap();
    symlink(other.join("blobs/h1"), folder.join("m-1.safetensors")).unwrap();
    refused(&folder, &["leaves the checkpoint folder", "models--org--other"]);
}

#[test]
fn an_index_whose_link_dangles_is_not_ignored() {
    let folder = tempfile::tempdir().unwrap();
    shard(&folder.path().join("model.safetensors"), &["a"]);
    symlink("gone", folder.path().join(INDEX)).unwrap();
    refused(folder.path(), &[INDEX, "resolution of links failed"]);
}

#[test]
fn missing_shards_and_tensors() {
    let folder = tempfile::tempdir().unwrap();
    index(folder.path(), &[("a", "m.safetensors")]);
    refused(folder.path(), &[r#"tensor "a""#, r#""m.safetensors", which is missing"#]);
    shard(&folder.path().join("m.safetensors"), &["b"]);
    refused(folder.path(), &[r#"tensor "a""#, r#""m.safetensors", which does not hold it"#]);
}

#[test]
fn tensors_in_two_files() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    shard(&path.join("m-1.safetensors"), &["a", "b"]);
    shard(&path.join("m-2.safetensors"), &["b", "c"]);
    let map = [("a", "m-1.safetensors"), ("b", "m-1.safetensors"), ("c", "m-2.safetensors")];
    index(path, &map);
    refused(path, &[r#"tensor "b""#, r#"mapped to "m-1.safetensors""#, r#"in "m-2.safetensors""#]);
    // A tensor that the index does not name is no tensor of the checkpoint, wherever it lies.
    index(path, &[map[0], map[2]]);
    assert!(Index::open(path).is_ok());
}

#[test]
fn a_file_under_two_names() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    shard(&path.join("m-1.safetensors"), &["a", "b"]);
    symlink("m-1.safetensors", path.join("m-2.safetensors")).unwrap();
    index(path, &[("a", "m-1.safetensors"), ("b", "m-2.safetensors")]);
    refused(path, &[r#"tensor "b""#, "there only", r#"in "m-1.safetensors""#]);
}

#[test]
fn an_index_that_is_too_large_or_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(INDEX);
    fs::File::create(&path).unwrap().set_len(100_000_001).unwrap(); // sparse
    refused(folder.path(), &[INDEX, "at most 100000000 bytes, found 100000001"]);
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    refused(folder.path(), &[INDEX, "expected a regular file"]);
}

/// Opening a pipe waits for its other end: forever, if a folder holds one in place of a file.
#[test]
fn pipes_are_refused_and_not_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    for name in [INDEX, "model.safetensors"] {
        let path = folder.path().join(name);
        let made = std::process::Command::new("mkfifo").arg(&path).status().unwrap();
        assert!(made.success());
        refused(folder.path(), &[name, "expected a regular file"]);
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn broken_indices() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(INDEX);
    let deep = "[".repeat(100_000);
    for (json, part) in [
        (deep.as_str(), "not valid"),
        (&format!(r#"{{"weight_map":{{"a":{deep}"#), "not valid"),
        (&format!(r#"{{"metadata":{deep}"#), "not valid"),
        ("{\"weight_map\":{\"a\0\":\"x\"}}", "not valid"),
        (r#"{"weight_map":{"a":"x","a":"y"}}"#, r#"duplicate key "a""#),
        (r#"{"weight_map":{},"weight_map":{}}"#, "duplicate field"),
        (r#"{"weight_map":{"a":1}}"#, r#"key "a""#),
        (r#"{"weight_map":{}}"#, "weight_map is empty"),
        (r#"{"metadata":{}}"#, "missing field `weight_map`"),
        ("[1", "not valid"),
        ("", "not valid"),
    ] {
        fs::write(&path, json).unwrap();
        refused(folder.path(), &[INDEX, part]);
    }
}
