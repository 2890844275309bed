//! The index: chunk key -> location.
//!
//! It is a cache of the pack footers. Losing it loses nothing: `repair` writes
//! it anew. `rocks` keeps it in RocksDB; that is the only one a program that is
//! shipped has. `double` keeps it in the memory of one process, for the
//! simulator, and promises what RocksDB promises and nothing more.

#[cfg(feature = "sim")]
mod double;
#[cfg_attr(feature = "sim", allow(dead_code))]
mod rocks;
#[cfg(all(test, feature = "sim"))]
#[allow(clippy::unwrap_used)]
mod tests;

use std::path::Path;

use crate::error::{Damage, Error, Result};
use crate::id::ChunkKey;
use crate::pack::Location;

#[cfg(feature = "sim")]
pub(crate) use double::{IndexReader, IndexWriter, forget as forget_indexes};
#[cfg(not(feature = "sim"))]
pub(crate) use rocks::{IndexReader, IndexWriter};

/// Where a chunk with this key is, as a reader or a writer of the index sees it.
pub(crate) trait Lookup {
    /// The place; `None` if there is no entry.
    fn look_up(&self, key: ChunkKey) -> Result<Option<Location>>;
}

impl Lookup for IndexReader {
    fn look_up(&self, key: ChunkKey) -> Result<Option<Location>> {
        self.get(key)
    }
}

impl Lookup for IndexWriter {
    fn look_up(&self, key: ChunkKey) -> Result<Option<Location>> {
        self.get(key)
    }
}

fn damaged(path: &Path, reason: &str) -> Error {
    Damage::Index {
        path: path.to_owned(),
        reason: reason.to_owned(),
    }
    .into()
}
