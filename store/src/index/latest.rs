//! The newest entries of the index, without the rest of it.

use std::path::Path;

use super::run::{Known, Runs};
use crate::error::Result;
use crate::id::ChunkKey;
use crate::pack::Location;

/// Bytes of runs that are read instead of opening the index: of twice as many entries as there
/// are without a merge.
const MOST_BYTES: u64 = 1 << 20;

/// What was added to the index last and is in no sorted file yet, as it was when it was read.
/// It counts more than those, and is read without opening them, which takes longer than all
/// else that a reader of one manifest does.
pub(crate) struct LatestRuns(Runs);

impl LatestRuns {
    /// `None` if there is much of it, or a writer changes it just now.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        let seen = Runs::look(path)?;
        match seen.bytes(path)? > MOST_BYTES {
            true => Ok(None),
            false => Ok(Runs::load(path, seen, &Known::default())?.map(Self)),
        }
    }

    /// Where the chunk with this key is; `None` if only the whole index can tell.
    pub fn get(&self, key: ChunkKey) -> Option<Location> {
        self.0.get(&key.to_index_key()).flatten()
    }
}
