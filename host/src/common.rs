//! Memory that machines of related snapshots hold once.
//!
//! A machine's memory is mapped from the mount of its snapshot. Where that is equal to
//! another snapshot whose mount machines use already, it is mapped from there: a page that
//! one of them has read is in the kernel's cache for all. What is equal is known from the
//! two trees, by the ids of their pages, in time that follows what differs.
//!
//! The oldest such mount is taken, so that all heads of a chain come to share one. The
//! machine keeps both mounts, and needs both to be served.

use std::fs::{self, File};
use std::ops::Range;
use std::time::SystemTime;

use snapstore_store::{ImageDiff, SnapshotId, Store};

use crate::build::CommonMemory;
use crate::look;
use crate::mounts;
use crate::runtime::Runtime;
use crate::starter::Starter;

/// The image that is mapped.
const MEMORY: &str = "memory";
/// Mounts that are compared, the oldest first: a comparison with one that has nothing in
/// common costs reading as many leaves as [`MOST_DIFFERENT`] allows.
const MOST_MOUNTS: usize = 3;
/// The part of the pages that may differ: 1 of so many.
const MOST_DIFFERENT: u64 = 8;
/// Mappings of what differs; beyond, those that are near each other become one.
const MOST_RANGES: usize = 2048;
/// Ranges nearer than so many bytes are one from the beginning.
const NEAR_BYTES: u64 = 16 << 10;

/// A mount whose memory is nearly that of `id`, and the lock that keeps it. Nothing that
/// fails here keeps a machine from its own mount.
pub fn find(
    runtime: &Runtime,
    store: &Store,
    id: SnapshotId,
    starter: &mut Starter,
) -> Option<(CommonMemory, File)> {
    match try_find(runtime, store, id, starter) {
        Ok(found) => found,
        Err(error) => {
            tracing::debug!(%error, "memory is not shared with other snapshots' machines");
            None
        }
    }
}

fn try_find(
    runtime: &Runtime,
    store: &Store,
    id: SnapshotId,
    starter: &mut Starter,
) -> anyhow::Result<Option<(CommonMemory, File)>> {
    let mut mounts = mounts_of_machines(runtime)?;
    mounts.retain(|(_, other)| *other != id);
    if mounts.is_empty() {
        return Ok(None);
    }
    let own = store.manifest(id)?;
    let Some(memory) = own.image(MEMORY) else {
        return Ok(None);
    };
    let most_pages = memory.size_bytes / store.page_size().bytes() / MOST_DIFFERENT;
    for (_, other) in mounts.into_iter().take(MOST_MOUNTS) {
        let dir = runtime.mounts().join(other.to_string());
        // From here on it stays, if machines have it still.
        let Some(lock) = mounts::share_if_used(&dir.with_extension("lock"))? else {
            continue;
        };
        // Its server keeps the snapshot.
        let Ok(manifest) = store.manifest(other) else {
            continue;
        };
        if manifest.image(MEMORY).map(|image| image.size_bytes) != Some(memory.size_bytes) {
            continue;
        }
        let Some(diff) = store.diff_up_to(&manifest, &own, MEMORY, most_pages)? else {
            continue;
        };
        if look::which_shows(&other.to_string(), &[vec![dir.clone()]], Some(starter))?.is_none() {
            continue;
        }
        let common = CommonMemory {
            dir,
            snapshot: other.to_string(),
            differs: bounded(&diff, MOST_RANGES),
        };
        tracing::debug!(
            with = %other,
            pages = diff.changed_pages,
            ranges = common.differs.len(),
            "memory is shared with another snapshot's machines, but for what differs"
        );
        return Ok(Some((common, lock)));
    }
    Ok(None)
}

/// Those that were made for machines, the oldest first.
fn mounts_of_machines(runtime: &Runtime) -> anyhow::Result<Vec<(SystemTime, SnapshotId)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(runtime.mounts())? {
        let entry = entry?;
        let name = entry.file_name();
        let id = name.to_str().and_then(|name| name.strip_suffix(".lock"));
        // Writable views have longer names.
        if let Some(id) = id.and_then(SnapshotId::from_hex)
            && let Ok(metadata) = entry.metadata()
        {
            found.push((metadata.modified()?, id));
        }
    }
    found.sort();
    Ok(found)
}

/// What differs, in at most so many ranges: those nearest to each other become one.
fn bounded(diff: &ImageDiff, most: usize) -> Vec<Range<u64>> {
    let mut near = NEAR_BYTES;
    loop {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for range in &diff.ranges {
            let end = range.offset_bytes + range.length_bytes;
            match ranges.last_mut() {
                Some(last) if range.offset_bytes - last.end < near => last.end = end,
                _ => ranges.push(range.offset_bytes..end),
            }
        }
        if ranges.len() <= most {
            return ranges;
        }
        near *= 2;
    }
}

#[cfg(test)]
mod tests {
    use snapstore_store::ChangedRange;

    use super::*;

    fn diff(pages: impl Iterator<Item = u64>) -> ImageDiff {
        let ranges: Vec<_> = pages
            .map(|page| ChangedRange {
                offset_bytes: page * 4096,
                length_bytes: 4096,
            })
            .collect();
        ImageDiff {
            name: MEMORY.to_owned(),
            old_size_bytes: None,
            new_size_bytes: None,
            changed_pages: ranges.len() as u64,
            ranges,
        }
    }

    #[test]
    fn ranges_are_bounded_and_hold_all_that_differs() {
        assert!(bounded(&diff([].into_iter()), 4).is_empty());
        // Three pages between two are mapped along with them, not four.
        assert_eq!(
            bounded(&diff([0, 4, 9].into_iter()), 9),
            [0..20480, 36864..40960]
        );
        let scattered = diff((0..10_000).map(|n| n * 7));
        let ranges = bounded(&scattered, 100);
        assert!(
            !ranges.is_empty() && ranges.len() <= 100,
            "{}",
            ranges.len()
        );
        for range in &scattered.ranges {
            let holds = |own: &Range<u64>| own.contains(&range.offset_bytes);
            assert!(ranges.iter().any(holds), "{range:?}");
        }
        assert!(ranges.windows(2).all(|two| two[0].end < two[1].start));
    }
}
