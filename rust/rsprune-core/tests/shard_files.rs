//! Writing and reading back: golden bytes, round trips, and what is left behind by failures.

use proptest::prelude::*;
use rsprune_core::Error;
use rsprune_core::shard::{Dtype, Header, Layout, Shard, Writer, write_file};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

type Named = (String, Dtype, Vec<u64>);

fn named(name: &str, dtype: Dtype, shape: &[u64]) -> Named {
    (name.to_string(), dtype, shape.to_vec())
}

fn plan(tensors: &[Named]) -> Layout {
    Layout::plan(tensors, &BTreeMap::new()).unwrap()
}

/// Names in a folder, sorted.
fn listing(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> =
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn target(folder: &tempfile::TempDir) -> PathBuf {
    folder.path().join("x.safetensors")
}

/// The same bytes as `safetensors.numpy.save(..., metadata={"format": "pt"})` of safetensors
/// 0.8.0, for b = f32 arange(3), a"é = i8 [[1, 2]], w = f64 5, h = f16 zeros((0, 4)).
#[test]
fn golden_bytes_of_the_public_writer() {
    let mut golden = b"\x00\x01\x00\x00\x00\x00\x00\x00".to_vec();
    golden.extend_from_slice(
        concat!(
            r#"{"__metadata__":{"format":"pt"},"w":{"dtype":"F64","shape":[],"data_offsets":[0,8]},"#,
            r#""b":{"dtype":"F32","shape":[3],"data_offsets":[8,20]},"#,
            r#""h":{"dtype":"F16","shape":[0,4],"data_offsets":[20,20]},"#,
            r#""a\"é":{"dtype":"I8","shape":[1,2],"data_offsets":[20,22]}} "#
        )
        .as_bytes(),
    );
    let header = golden.clone();
    golden.extend_from_slice(b"\x00\x00\x00\x00\x00\x00\x14@");
    golden.extend_from_slice(b"\x00\x00\x00\x00\x00\x00\x80?\x00\x00\x00@\x01\x02");

    let folder = tempfile::tempdir().unwrap();
    let layout = plan(&[
        named("a\"é", Dtype::I8, &[1, 2]),
        named("h", Dtype::F16, &[0, 4]),
        named("w", Dtype::F64, &[]),
        named("b", Dtype::F32, &[3]),
    ]);
    assert_eq!(layout.header_bytes(), header);
    assert_eq!(layout.file_len(), golden.len() as u64);
    let mut writer = Writer::create(target(&folder), layout).unwrap();
    writer.put("h", &[]).unwrap();
    writer.put("b", &golden[header.len() + 8..][..12]).unwrap();
    writer.put("w", &5f64.to_le_bytes()).unwrap();
    writer.put("a\"é", &[1, 2]).unwrap();
    writer.finish().unwrap();
    assert_eq!(fs::read(target(&folder)).unwrap(), golden);
    assert_eq!(listing(folder.path()), ["x.safetensors"]);
}

#[test]
fn metadata_is_sorted_and_keeps_a_format_of_the_caller() {
    let metadata = [("z", "\n"), ("format", "np"), ("a", "1")];
    let metadata = metadata.map(|(k, v)| (k.to_string(), v.to_string())).into();
    let layout = Layout::plan(&[], &metadata).unwrap();
    let json = String::from_utf8(layout.header_bytes()[8..].to_vec()).unwrap();
    assert_eq!(json.trim_end(), r#"{"__metadata__":{"a":"1","format":"np","z":"\n"}}"#);
}

#[test]
fn plans_that_cannot_be() {
    let refused = |tensors: &[Named], part: &str| {
        let message = Layout::plan(tensors, &BTreeMap::new()).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    };
    refused(
        &[named("a", Dtype::U8, &[1]), named("a", Dtype::F32, &[1])],
        r#""a" is planned twice"#,
    );
    refused(&[named("__metadata__", Dtype::U8, &[1])], r#"named "__metadata__""#);
    refused(&[named("a", Dtype::F64, &[1 << 60])], r#"tensor "a": with F64"#);
    refused(&[named("a", Dtype::F64, &[1 << 63])], r#"tensor "a": with F64"#);
    let half = named("a", Dtype::U8, &[1 << 61]);
    refused(&[half, named("b", Dtype::U8, &[(1 << 61) + 1])], r#"tensor "b": with U8"#);
    refused(&[named(&"n".repeat(100_000_000), Dtype::U8, &[1])], "more, smaller files");
}

#[test]
fn puts_are_checked() {
    let folder = tempfile::tempdir().unwrap();
    let layout = plan(&[named("a", Dtype::F32, &[2]), named("b", Dtype::U8, &[1])]);
    let mut writer = Writer::create(target(&folder), layout).unwrap();
    assert!(matches!(writer.put("c", &[]), Err(Error::MissingTensor { name, .. }) if name == "c"));
    let message = writer.put("a", &[0; 7]).unwrap_err().to_string();
    assert!(message.contains("tensor \"a\"") && message.contains("expected 8"), "{message}");
    writer.put("a", &[0; 8]).unwrap();
    let message = writer.put("a", &[0; 8]).unwrap_err().to_string();
    assert!(message.contains("\"a\" was put twice"), "{message}");
    let message = writer.finish().unwrap_err().to_string();
    assert!(message.contains(r#"1 of 2 tensors were never put: ["b"]"#), "{message}");
    assert!(listing(folder.path()).is_empty());
}

#[test]
fn the_name_appears_only_when_finished() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(target(&folder), "old").unwrap();
    fs::write(folder.path().join("x.safetensors.tmp"), "stale, and longer than the new one")
        .unwrap();
    let layout = plan(&[named("a", Dtype::U8, &[1])]);
    let (header, length) = (layout.header_bytes().to_vec(), layout.file_len());
    let mut writer = Writer::create(target(&folder), layout).unwrap();
    let temp = folder.path().join("x.safetensors.tmp");
    assert_eq!(fs::metadata(&temp).unwrap().len(), length); // reserved
    assert!(fs::read(&temp).unwrap().starts_with(&header));
    assert_eq!(fs::read(target(&folder)).unwrap(), b"old");
    writer.put("a", &[9]).unwrap();
    assert_eq!(fs::read(target(&folder)).unwrap(), b"old");
    writer.finish().unwrap();
    assert_eq!(fs::read(target(&folder)).unwrap(), [&header[..], &[9]].concat());
    assert_eq!(listing(folder.path()), ["x.safetensors"]);
}

#[test]
fn a_dropped_writer_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let writer = Writer::create(target(&folder), plan(&[named("a", Dtype::U8, &[1])])).unwrap();
    assert_eq!(listing(folder.path()), ["x.safetensors.tmp"]);
    drop(writer);
    assert!(listing(folder.path()).is_empty());
}

#[test]
fn two_writers_of_one_file_do_not_mix() {
    let folder = tempfile::tempdir().unwrap();
    let layout = || plan(&[named("a", Dtype::U8, &[1])]);
    let mut first = Writer::create(target(&folder), layout()).unwrap();
    let mut second = Writer::create(target(&folder), layout()).unwrap();
    first.put("a", &[1]).unwrap();
    second.put("a", &[2]).unwrap();
    let message = first.finish().unwrap_err().to_string();
    assert!(message.contains("another process"), "{message}");
    second.finish().unwrap();
    assert_eq!(fs::read(target(&folder)).unwrap().last(), Some(&2));
}

#[test]
fn a_full_disk_is_seen_at_creation() {
    let folder = tempfile::tempdir().unwrap();
    // More than any disk: refused by its free space, so that the test fills nothing.
    let layout = plan(&[named("a", Dtype::U8, &[1 << 61])]);
    let message = Writer::create(target(&folder), layout).unwrap_err().to_string();
    assert!(message.contains("reservation of 2305843009213"), "{message}");
    assert!(listing(folder.path()).is_empty());
}

#[test]
fn write_file_replaces_as_a_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    write_file(&path, b"first, long").unwrap();
    write_file(&path, b"2").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"2");
    assert_eq!(listing(folder.path()), ["config.json"]);
    let message = write_file(&folder.path().join("no/x"), b"").unwrap_err().to_string();
    assert!(message.contains("no/x.tmp: create failed"), "{message}");
}

#[test]
fn write_file_replaces_a_link_and_not_its_target() {
    let folder = tempfile::tempdir().unwrap();
    let (path, blob) = (folder.path().join("config.json"), folder.path().join("blob"));
    fs::write(&blob, "blob").unwrap();
    std::os::unix::fs::symlink(&blob, &path).unwrap();
    std::os::unix::fs::symlink(&blob, folder.path().join("config.json.tmp")).unwrap();
    write_file(&path, b"new").unwrap();
    assert_eq!(fs::read(&blob).unwrap(), b"blob");
    assert_eq!(fs::read(&path).unwrap(), b"new");
    assert!(!path.is_symlink());
}

#[test]
fn reads_are_checked() {
    let folder = tempfile::tempdir().unwrap();
    let path = target(&folder);
    let mut writer = Writer::create(&path, plan(&[named("a", Dtype::U8, &[10_000])])).unwrap();
    writer.put("a", &[1; 10_000]).unwrap();
    writer.finish().unwrap();
    let shard = Shard::open(&path).unwrap();
    assert!(matches!(shard.read_into("b", &mut []), Err(Error::MissingTensor { .. })));
    assert!(matches!(shard.map("b"), Err(Error::MissingTensor { .. })));
    let message = shard.read_into("a", &mut [0; 9]).unwrap_err().to_string();
    assert!(message.contains("expected 10000 bytes, found 9 bytes"), "{message}");
    // The file loses its end after it was opened.
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(5_000).unwrap();
    let end = shard.info("a").unwrap().offset + 10_000;
    let read = shard.read_into("a", &mut [0; 10_000]);
    for outcome in [read, shard.map("a").map(|_| ())] {
        let message = outcome.unwrap_err().to_string();
        let expected = format!("tensor \"a\" ends at byte {end}, file has 5000");
        assert!(message.contains("the file shrank") && message.contains(&expected), "{message}");
    }
    assert!(Shard::open(&path).unwrap_err().to_string().contains("truncated"));
}

#[test]
fn a_file_that_was_written_to_is_not_trusted() {
    let folder = tempfile::tempdir().unwrap();
    let path = target(&folder);
    let mut writer = Writer::create(&path, plan(&[named("a", Dtype::U8, &[100])])).unwrap();
    writer.put("a", &[1; 100]).unwrap();
    writer.finish().unwrap();
    let shard = Shard::open(&path).unwrap();
    shard.read_into("a", &mut [0; 100]).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    let past = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1);
    file.set_modified(past).unwrap(); // another time, whatever the resolution of the clock
    let message = shard.read_into("a", &mut [0; 100]).unwrap_err().to_string();
    assert!(message.contains("written to after it was opened: tensor \"a\""), "{message}");
}

#[test]
fn parts_and_copies_are_the_whole() {
    let folder = tempfile::tempdir().unwrap();
    let length = (9 << 20) + 5; // two pieces of a copy, and a rest
    let tensors = [named("a", Dtype::U8, &[length]), named("b", Dtype::U8, &[0])];
    let data: Vec<u8> = (0..length).map(|i| (i % 251) as u8).collect();
    let mut writer = Writer::create(target(&folder), plan(&tensors)).unwrap();
    writer.put("a", &data).unwrap();
    writer.put("b", &[]).unwrap();
    writer.finish().unwrap();
    let shard = Shard::open(target(&folder)).unwrap();
    let mut part = [0; 300];
    shard.read_part("a", 1000, &mut part).unwrap();
    assert_eq!(part, data[1000..1300]);
    for start in [length - 299, u64::MAX] {
        let message = shard.read_part("a", start, &mut part).unwrap_err().to_string();
        assert!(message.contains("part of tensor \"a\""), "{message}");
    }
    let copy = folder.path().join("copy.safetensors");
    let mut writer = Writer::create(&copy, plan(&tensors)).unwrap();
    assert!(matches!(writer.copy("c", &shard, "c"), Err(Error::MissingTensor { .. })));
    writer.copy("a", &shard, "a").unwrap();
    assert!(writer.copy("a", &shard, "a").unwrap_err().to_string().contains("put twice"));
    writer.copy("b", &shard, "b").unwrap();
    writer.finish().unwrap();
    assert_eq!(fs::read(copy).unwrap(), fs::read(target(&folder)).unwrap());
}

#[test]
fn maps_outlive_the_shard_and_survive_release() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = [named("a", Dtype::U8, &[5_000]), named("b", Dtype::U8, &[9_001])];
    let mut writer = Writer::create(target(&folder), plan(&tensors)).unwrap();
    let b: Vec<u8> = (0..9_001).map(|i| (i % 251) as u8).collect();
    writer.put("b", &b).unwrap();
    writer.put("a", &[1; 5_000]).unwrap();
    writer.finish().unwrap();
    let shard = Shard::open(target(&folder)).unwrap();
    assert_ne!(shard.info("b").unwrap().offset % 4096, 0); // the map starts inside a page
    let map = shard.map("b").unwrap();
    drop(shard);
    assert_eq!(map[..], b);
    map.release().unwrap();
    assert_eq!(map[..], b);
}

fn any_tensors() -> impl Strategy<Value = Vec<Named>> {
    let dtype = proptest::sample::select(Dtype::all().collect::<Vec<_>>());
    let one = (dtype, proptest::collection::vec(0u64..6, 0..4));
    proptest::collection::btree_map("\\PC{0,8}", one, 0..8)
        .prop_map(|map| map.into_iter().map(|(n, (d, s))| (n, d, s)).collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// What is put comes back by both readers, aligned, from a header equal to the plan; and
    /// neither the order of planning nor that of putting changes a byte.
    #[test]
    fn round_trip(
        (tensors, shuffled) in any_tensors().prop_flat_map(|t| (Just(t.clone()), Just(t).prop_shuffle())),
        seed in any::<u8>(),
    ) {
        prop_assume!(tensors.iter().all(|t| t.0 != "__metadata__"));
        let folder = tempfile::tempdir().unwrap();
        let mut files = Vec::new();
        for (file, order) in [("1", &tensors), ("2", &shuffled)] {
            let layout = plan(order);
            prop_assert_eq!(layout.header_bytes().len() % 8, 0);
            let path = folder.path().join(file);
            let mut writer = Writer::create(&path, layout).unwrap();
            for (name, dtype, shape) in order {
                writer.put(name, &content(name, seed, dtype.nbytes(shape).unwrap())).unwrap();
            }
            writer.finish().unwrap();
            files.push(fs::read(&path).unwrap());
        }
        prop_assert_eq!(&files[0], &files[1]);

        let layout = plan(&tensors);
        let shard = Shard::open(folder.path().join("1")).unwrap();
        prop_assert_eq!(shard.infos(), layout.infos());
        for info in shard.infos() {
            prop_assert_eq!(info.offset % info.dtype.size(), 0);
            let expected = content(&info.name, seed, info.nbytes);
            let mut read = vec![0; info.nbytes as usize];
            shard.read_into(&info.name, &mut read).unwrap();
            prop_assert_eq!(&read, &expected);
            prop_assert_eq!(&shard.map(&info.name).unwrap()[..], &expected[..]);
        }
        let json = &layout.header_bytes()[8..];
        prop_assert!(Header::parse(json, Path::new("x"), layout.file_len()).is_ok());
    }
}

/// Bytes that differ from tensor to tensor.
fn content(name: &str, seed: u8, nbytes: u64) -> Vec<u8> {
    let base = name.bytes().fold(seed, |a, b| a.wrapping_mul(31).wrapping_add(b));
    (0..nbytes).map(|i| base.wrapping_add(i as u8)).collect()
}
