//! Where things are inside a store's directory.
//!
//! ```text
//! STORE/
//!   config           page size and format version            (sealed file)
//!   collector        garbage collector's epoch and condemned packs (sealed file)
//!   rewrites         how much was rewritten, and what need not be again (sealed file)
//!   tags/NAME        a snapshot id under a name               (sealed file)
//!   recent-tags      those set last; a guess that may be lost  (sealed file)
//!   packs/N.pack     sealed packs, immutable
//!   packs/N.open     packs being written, locked by their writer
//!   index/           RocksDB: chunk key -> pack and entry; rebuildable
//!   working-sets/    which pages those who restore a snapshot touch first (sealed files);
//!                    a guess that may be lost
//!   damaged/         packs that `repair` has set aside
//!   leases/          who is using the store now; locked by their holders
//!   locks/           publish, gc and allocate locks, pack number counter
//! ```

use std::path::{Path, PathBuf};

use crate::id::SnapshotId;
use crate::pack::PackNumber;

#[derive(Clone, Debug)]
pub(crate) struct Layout {
    root: PathBuf,
    index: &'static str,
}

impl Layout {
    pub fn new(root: PathBuf) -> Self {
        Self {
            root,
            index: "index",
        }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn config(&self) -> PathBuf {
        self.root.join("config")
    }

    /// The copy of the configuration: nothing else tells what the keys are made with.
    pub fn config_copy(&self) -> PathBuf {
        self.root.join("config-copy")
    }

    pub fn collector(&self) -> PathBuf {
        self.root.join("collector")
    }

    pub fn rewrites(&self) -> PathBuf {
        self.root.join("rewrites")
    }

    pub fn tags(&self) -> PathBuf {
        self.root.join("tags")
    }

    /// Where there is an empty file for each tag that is protected. Made when the first
    /// one is.
    pub fn protected(&self) -> PathBuf {
        self.root.join("protected")
    }

    pub fn recent_tags(&self) -> PathBuf {
        self.root.join("recent-tags")
    }

    pub fn working_sets(&self) -> PathBuf {
        self.root.join("working-sets")
    }

    pub fn working_set(&self, snapshot: SnapshotId, image: &str) -> PathBuf {
        self.working_sets().join(format!("{snapshot}.{image}"))
    }

    pub fn packs(&self) -> PathBuf {
        self.root.join("packs")
    }

    pub fn pack(&self, number: PackNumber) -> PathBuf {
        self.packs().join(format!("{number}.pack"))
    }

    pub fn open_pack(&self, number: PackNumber) -> PathBuf {
        self.packs().join(format!("{number}.open"))
    }

    pub fn index(&self) -> PathBuf {
        self.root.join(self.index)
    }

    /// Where the index is that `repair` has just replaced.
    pub fn old_index(&self) -> PathBuf {
        self.root.join("index.old")
    }

    /// The same store with an index that is being made.
    pub fn with_fresh_index(&self) -> Self {
        Self {
            root: self.root.clone(),
            index: "index.new",
        }
    }

    /// Where `repair` puts packs that hold damage.
    pub fn damaged(&self) -> PathBuf {
        self.root.join("damaged")
    }

    pub fn leases(&self) -> PathBuf {
        self.root.join("leases")
    }

    pub fn locks(&self) -> PathBuf {
        self.root.join("locks")
    }

    /// The directories of a store, in the order of their creation.
    pub fn directories(&self) -> [PathBuf; 4] {
        [self.tags(), self.packs(), self.leases(), self.locks()]
    }
}
