//! Which files form a checkpoint, and which tensor lies in which of them.

use super::reader::Shard;
use super::{UniqueMap, broken, io_error};
use crate::error::Result;
use serde::Deserialize;
use serde::de::IgnoredAny;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Component, Path, PathBuf};

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
/// Far above any real index, far below what would hurt.
const MAX_INDEX: u64 = 100_000_000;
const PICKLED: &str = "pickled weights (.bin, .pt, .pth, .ckpt) are never loaded, because loading \
                       them runs code: convert them to safetensors first";

/// The files of a checkpoint folder, checked against their own headers.
#[derive(Debug)]
pub struct Index {
    /// The checkpoint.
    pub folder: PathBuf,
    /// Tensor name -> file name, relative to `folder`.
    pub weight_map: BTreeMap<String, String>,
}

/// The index file. Its `metadata` (sums that nothing here relies on) may hold anything.
#[derive(Deserialize)]
struct RawIndex {
    weight_map: UniqueMap<String>,
    #[serde(default, rename = "metadata")]
    _metadata: IgnoredAny,
}

impl Index {
    /// Reads the checkpoint in `folder`: `model.safetensors.index.json` if it is there, else
    /// `model.safetensors`. Every file must lie in the folder (or in the blobs of its Hub cache),
    /// have a valid header and hold the tensors that are promised of it.
    pub fn open(folder: impl Into<PathBuf>) -> Result<Index> {
        let folder = folder.into();
        let root = folder.canonicalize();
        let root = root.map_err(io_error(&folder, "open of the checkpoint folder"))?;
        let weight_map = if present(&folder.join(INDEX)) {
            read_index(&folder, &root)?
        } else if present(&folder.join(SINGLE)) {
            let shard = open_shard(&folder, &root, SINGLE)?;
            let names = shard.infos().iter().map(|t| t.name.clone());
            names.map(|name| (name, SINGLE.to_string())).collect()
        } else {
            return Err(broken(&folder, why_no_weights(&folder)?));
        };
        Ok(Index { folder, weight_map })
    }

    /// The files, each once, sorted by name.
    pub fn files(&self) -> Vec<PathBuf> {
        let names: BTreeSet<_> = self.weight_map.values().collect();
        names.iter().map(|name| self.folder.join(name)).collect()
    }
}

/// The weight files of the checkpoint in `folder`, sorted by name. See [`Index::open`].
pub fn checkpoint_files(folder: &Path) -> Result<Vec<PathBuf>> {
    Ok(Index::open(folder)?.files())
}

/// Whether there is something of that name: also a dangling link, as a download that lost its
/// index must not be taken for a checkpoint without one.
fn present(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

/// The weight map of the index file, each entry confirmed by the header of its shard.
fn read_index(folder: &Path, root: &Path) -> Result<BTreeMap<String, String>> {
    let path = folder.join(INDEX);
    check_inside(&path, root, INDEX)?;
    let meta = fs::metadata(&path).map_err(io_error(&path, "stat"))?;
    if !meta.is_file() {
        return Err(broken(&path, "expected a regular file"));
    }
    let length = meta.len();
    if length > MAX_INDEX {
        let reason = format!("expected at most {MAX_INDEX} bytes, found {length}");
        return Err(broken(&path, reason));
    }
    let bytes = fs::read(&path).map_err(io_error(&path, "read"))?;
    let weight_map = parse_index(&bytes, &path)?;
    let mut shards: BTreeMap<&str, Shard> = BTreeMap::new();
    for (tensor, file) in &weight_map {
        if !shards.contains_key(file.as_str()) {
            if !present(&folder.join(file)) {
                let reason = format!("tensor {tensor:?} is mapped to {file:?}, which is missing");
                return Err(broken(&path, reason));
            }
            shards.insert(file, open_shard(folder, root, file)?);
        }
        if shards[file.as_str()].info(tensor).is_err() {
            let reason = format!("tensor {tensor:?} is mapped to {file:?}, which does not hold it");
            return Err(broken(&path, reason));
        }
    }
    check_held_once(&path, &weight_map, &shards)?;
    Ok(weight_map)
}

/// The weight map in the text of an index file: tensor name -> name of a safetensors file inside
/// of the folder. No file is looked at; `path` is only used in messages.
pub fn parse_index(json: &[u8], path: &Path) -> Result<BTreeMap<String, String>> {
    let raw: RawIndex = serde_json::from_slice(json)
        .map_err(|e| broken(path, format!("the index is not valid: {e}")))?;
    let weight_map = raw.weight_map.0;
    if weight_map.is_empty() {
        return Err(broken(path, "weight_map is empty"));
    }
    for (tensor, file) in &weight_map {
        check_name(path, tensor, file)?;
    }
    Ok(weight_map)
}

/// Refuses a tensor that lies in a second file, too: some readers take the file that the index
/// names, others the last one that they have read.
fn check_held_once(
    index: &Path,
    weight_map: &BTreeMap<String, String>,
    shards: &BTreeMap<&str, Shard>,
) -> Result<()> {
    for (file, shard) in shards {
        for tensor in shard.infos().iter().map(|info| &info.name) {
            if let Some(named) = weight_map.get(tensor).filter(|named| named != file) {
                let reason = format!(
                    "tensor {tensor:?} is mapped to {named:?}, expected it there only, found it \
                     in {file:?}, too"
                );
                return Err(broken(index, reason));
            }
        }
    }
    Ok(())
}

/// Refuses file names that are no plain relative path to a safetensors file. A backslash is a
/// separator on other systems, so that a name with one could mean two things.
fn check_name(index: &Path, tensor: &str, file: &str) -> Result<()> {
    let plain = |c| matches!(c, Component::Normal(_));
    let relative = !file.contains('\\') && Path::new(file).components().all(plain);
    let problem = if !relative || file.is_empty() {
        "which is not a path inside the folder"
    } else if is_pickled(file) {
        PICKLED
    } else if !file.ends_with(".safetensors") {
        "which is not a .safetensors file"
    } else {
        return Ok(());
    };
    let reason = format!("tensor {tensor:?} is mapped to {file:?}: {problem}");
    Err(broken(index, reason))
}

fn open_shard(folder: &Path, root: &Path, file: &str) -> Result<Shard> {
    let path = folder.join(file);
    check_inside(&path, root, file)?;
    Shard::open(path)
}

/// Refuses a link out of the folder `root` (which is resolved already). The one exception is the
/// Hugging Face cache, where `<repo>/snapshots/<revision>/<file>` links to `<repo>/blobs/<hash>`.
fn check_inside(path: &Path, root: &Path, file: &str) -> Result<()> {
    let real = path.canonicalize();
    let real = real.map_err(io_error(path, "resolution of links"))?;
    let in_blobs = hub_blobs(root).is_some_and(|blobs| real.starts_with(blobs));
    if real.starts_with(root) || in_blobs {
        return Ok(());
    }
    let real = real.display();
    let reason = format!("{file:?} leaves the checkpoint folder, it is a link to {real}");
    Err(broken(path, reason))
}

/// `<repo>/blobs`, if `root` is or lies in `<repo>/snapshots/<revision>`.
fn hub_blobs(root: &Path) -> Option<PathBuf> {
    root.ancestors().find_map(|revision| {
        let snapshots = revision.parent()?;
        let is_cache = snapshots.file_name()? == "snapshots";
        is_cache.then(|| snapshots.with_file_name("blobs"))
    })
}

fn is_pickled(file: &str) -> bool {
    let endings = [".bin", ".pt", ".pth", ".ckpt"];
    endings.iter().any(|ending| file.ends_with(ending))
}

/// Says of a folder without the two known names what is there instead.
fn why_no_weights(folder: &Path) -> Result<String> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(io_error(folder, "list"))? {
        let entry = entry.map_err(io_error(folder, "list"))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    let reason = format!("expected {INDEX} or {SINGLE}, found");
    if let Some(name) = names.iter().find(|name| name.ends_with(".safetensors")) {
        return Ok(format!(
            "{reason} {name:?}: shards are chosen by the index, not by their names"
        ));
    }
    if let Some(name) = names.iter().find(|name| is_pickled(name)) {
        return Ok(format!("{reason} {name:?}: {PICKLED}"));
    }
    Ok(format!("{reason} neither"))
}
