//! safetensors files: validated headers, bounded reads, planned atomic writes.
//!
//! A file is `8-byte little-endian length | JSON header | data`, and the header's byte ranges
//! tile the data section: sorted by offset they start at 0, leave no hole, do not overlap and end
//! with the file. Nothing is trusted before all of that is checked (`header`). Which files form
//! a checkpoint is said by its index, never by a glob (`index`). Reading one tensor takes memory
//! for one tensor (`reader`); a file is planned to the last byte (`layout`), reserved, filled in any
//! order and shown under its name only when it is complete and on disk (`writer`).

mod dtype;
mod folder;
mod header;
mod index;
mod layout;
mod reader;
mod writer;

pub use dtype::Dtype;
pub use folder::exchange;
pub use header::{Header, TensorInfo};
pub use index::{Index, checkpoint_files, parse_index};
pub use layout::Layout;
pub use reader::{Mapped, Shard};
pub use writer::{Writer, write_file};

use crate::error::Error;
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::path::Path;

/// A broken format rule in the file `path`.
fn broken(path: &Path, reason: impl Into<String>) -> Error {
    Error::Format { path: path.to_path_buf(), reason: reason.into() }
}

/// Turns the operating system's answer to `action` on `path` into our error.
fn io_error(path: &Path, action: impl Into<String>) -> impl FnOnce(std::io::Error) -> Error {
    move |source| Error::Io { path: path.to_path_buf(), action: action.into(), source }
}

/// A JSON object that refuses a repeated key, where serde's own maps silently keep the last one:
/// two readers that disagree on which one counts would see two different checkpoints.
struct UniqueMap<V>(BTreeMap<String, V>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for UniqueMap<V> {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        input.deserialize_map(UniqueVisitor(PhantomData))
    }
}

struct UniqueVisitor<V>(PhantomData<V>);

impl<'de, V: Deserialize<'de>> Visitor<'de> for UniqueVisitor<V> {
    type Value = UniqueMap<V>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut unique = BTreeMap::new();
        while let Some(key) = map.next_key::<String>()? {
            let value =
                map.next_value().map_err(|e| A::Error::custom(format!("key {key:?}: {e}")))?;
            if unique.contains_key(&key) {
                return Err(A::Error::custom(format!("duplicate key {key:?}")));
            }
            unique.insert(key, value);
        }
        Ok(UniqueMap(unique))
    }
}
