//! Which pages of an image those who restore it touch first.
//!
//! A mount's server sees the first touch of each page. It records them in their order,
//! and the next mount gives these pages to the kernel before anybody asks for them. What
//! is recorded is no part of a snapshot: a file per image beside it, which costs speed if
//! it is lost, and nothing else. So it is not made durable, and what is wrong with one is
//! no damage.
//!
//! **What is known.** Pages that were given to the kernel unasked are not seen when they
//! are touched. So each page has a history of the recordings that tell: it was asked for,
//! or was not though the kernel did not have it. The set is what was touched in at least
//! half of them. Some pages of the set are left out of each mount, so that something is
//! known of every part of the set: how many of these are asked for is its **hit rate**.

pub(crate) mod set;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::durable;
use crate::error::{Damage, Result};
use crate::format::working_set::{VERSION_2, decode, encode, format_of};
use crate::id::SnapshotId;
use crate::layout::Layout;
use crate::store::Store;
use set::WorkingSet;

impl Store {
    /// The working set of an image; `None` if nothing was recorded.
    ///
    /// # Errors
    /// [`crate::Error::Damaged`] if its file is damaged, [`crate::Error::Newer`] if a newer
    /// version has written it. Both are as good as none.
    pub fn working_set(&self, snapshot: SnapshotId, image: &str) -> Result<Option<WorkingSet>> {
        let path = self.layout.working_set(snapshot, image);
        let Some((_, payload)) = VERSION_2.read_versioned(&path)? else {
            return Ok(None);
        };
        let decoded = decode(&payload).ok_or(Damage::File {
            path,
            reason: "malformed",
        });
        Ok(Some(decoded?))
    }

    /// Keeps the working set of an image, until a collection finds that the snapshot is
    /// gone. It is not made durable.
    ///
    /// # Errors
    /// If the store cannot be written.
    pub fn keep_working_set(
        &self,
        snapshot: SnapshotId,
        image: &str,
        set: &WorkingSet,
    ) -> Result<()> {
        self.check_writable()?;
        let path = self.layout.working_set(snapshot, image);
        durable::make_dir(&self.layout.working_sets())?;
        durable::replace_guess(&path, &format_of(set).encode(&path, &encode(set)))
    }
}

impl WorkingSet {
    /// As it is kept (docs/FORMAT.md), for whoever keeps it elsewhere.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        encode(self)
    }

    /// What [`WorkingSet::to_bytes`] gave; `None` if this is something else.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        decode(bytes)
    }
}

/// The files of working sets, each with the snapshot it is of, and what is left of such
/// files that were never finished.
pub(crate) fn files(layout: &Layout) -> Vec<(Option<SnapshotId>, PathBuf)> {
    let entries = fs::read_dir(layout.working_sets()).into_iter().flatten();
    entries
        .flatten()
        .map(|entry| (snapshot_of(&entry.path()), entry.path()))
        .filter(|(id, path)| {
            let name = path.file_name().unwrap_or_default();
            id.is_some() || durable::is_temporary(name)
        })
        .collect()
}

fn snapshot_of(path: &Path) -> Option<SnapshotId> {
    let (id, _) = path.file_name()?.to_str()?.split_once('.')?;
    SnapshotId::from_hex(id)
}

/// Removes those whose snapshot is none of these roots.
pub(crate) fn collect(
    layout: &Layout,
    files: &[(Option<SnapshotId>, PathBuf)],
    roots: &BTreeSet<SnapshotId>,
) {
    let gone = files.iter().filter(|(id, _)| {
        // Whoever writes an unfinished one needs only to try again.
        id.is_none_or(|id| !roots.contains(&id))
    });
    gone.for_each(|(_, path)| durable::discard(path));
    if !files.is_empty() {
        // It goes only if it is empty.
        durable::discard(&layout.working_sets());
    }
}
