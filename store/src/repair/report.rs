//! What a repair did.

use std::collections::BTreeMap;

use crate::error::Damage;
use crate::id::SnapshotId;

/// What a repair did and what it could not do.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct RepairReport {
    /// Chunks in the new index.
    pub indexed_chunks: u64,
    /// Small files that were rebuilt.
    pub rebuilt_files: Vec<String>,
    /// Tags that were recovered, and the snapshots they name now.
    pub recovered_tags: BTreeMap<String, SnapshotId>,
    /// Tags whose files are damaged and that no readable snapshot fits. They are
    /// left as they are.
    pub lost_tags: Vec<String>,
    /// Tags that only a newer version or another user can read, and why. They are left as
    /// they are.
    pub left_alone: Vec<String>,
    /// Damage that was found; the packs that hold it are now in `damaged/`.
    pub remaining: Vec<Damage>,
    /// Tags of snapshots that cannot be read whole.
    pub broken_snapshots: Vec<String>,
    /// Those of them whose manifests are lost: no commit makes them whole again.
    pub lost_manifests: Vec<String>,
}

impl RepairReport {
    /// Each pack is looked at more than once.
    pub(super) fn add(&mut self, damage: Damage) {
        if !self.remaining.contains(&damage) {
            self.remaining.push(damage);
        }
    }
}
