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

use crate::error::{Damage, Error};

#[cfg(feature = "sim")]
pub(crate) use double::{IndexReader, IndexWriter, forget as forget_indexes};
#[cfg(not(feature = "sim"))]
pub(crate) use rocks::{IndexReader, IndexWriter};

fn damaged(path: &Path, reason: &str) -> Error {
    Damage::Index {
        path: path.to_owned(),
        reason: reason.to_owned(),
    }
    .into()
}
