//! The index: chunk key -> location.
//!
//! It is a cache of the pack footers. Losing it loses nothing: `repair` writes
//! it anew. `rocks` keeps it in RocksDB.

mod rocks;

use std::path::Path;

use crate::error::{Damage, Error};

pub(crate) use rocks::{IndexReader, IndexWriter};

fn damaged(path: &Path, reason: &str) -> Error {
    Damage::Index {
        path: path.to_owned(),
        reason: reason.to_owned(),
    }
    .into()
}
