//! Tags: mutable names for snapshots, one sealed file each.
//!
//! The file of a tag is the commit point of everything that publishes: it is
//! replaced in one rename, after all it leads to is durable. Changes are made
//! under the publish lock; reading needs none.

use std::collections::BTreeMap;
use std::fs;

use crate::durable;
use crate::error::{Damage, Error, IoContext as _, Result};
use crate::id::SnapshotId;
use crate::layout::Layout;
use crate::name::check_tag;
use crate::sealed_file::Format;
use crate::sim::{self, StepKind};

const FORMAT: Format = Format {
    magic: *b"SNAPTAG1",
    version: 1,
};

/// The snapshot a tag names; `None` if there is no such tag.
pub(crate) fn get(layout: &Layout, tag: &str) -> Result<Option<SnapshotId>> {
    if check_tag(tag).is_err() {
        return Ok(None);
    }
    let path = layout.tags().join(tag);
    let Some(payload) = FORMAT.read(&path)? else {
        return Ok(None);
    };
    let id = payload.try_into().map_err(|_| Damage::File {
        path,
        reason: "wrong length",
    })?;
    Ok(Some(SnapshotId::from_bytes(id)))
}

/// All tags, sorted by name. A damaged one is an error.
pub(crate) fn all(layout: &Layout) -> Result<BTreeMap<String, SnapshotId>> {
    let mut tags = BTreeMap::new();
    for (name, id) in each(layout)? {
        tags.insert(name, id?);
    }
    Ok(tags)
}

/// All tags in any order, damaged ones with their error.
pub(crate) fn each(layout: &Layout) -> Result<Vec<(String, Result<SnapshotId>)>> {
    let dir = layout.tags();
    sim::before(StepKind::List, &dir).context("list", &dir)?;
    let mut tags = Vec::new();
    for entry in fs::read_dir(&dir).context("list", &dir)? {
        let name = entry.context("list", &dir)?.file_name();
        // Temporary files begin with a dot and are no tags.
        let Some(name) = name.to_str().filter(|name| check_tag(name).is_ok()) else {
            continue;
        };
        match get(layout, name) {
            // Removed since the directory was read.
            Ok(None) => {}
            Ok(Some(id)) => tags.push((name.to_owned(), Ok(id))),
            Err(error) => tags.push((name.to_owned(), Err(error))),
        }
    }
    Ok(tags)
}

/// At most `count` tags, the latest set first.
pub(crate) fn latest(layout: &Layout, count: usize) -> Result<Vec<String>> {
    let dir = layout.tags();
    let mut dated = Vec::new();
    for entry in fs::read_dir(&dir).context("list", &dir)? {
        let entry = entry.context("list", &dir)?;
        let name = entry.file_name();
        let Some(name) = name.to_str().filter(|name| check_tag(name).is_ok()) else {
            continue;
        };
        // One that was removed since the directory was read is left out.
        if let Ok(set) = entry.metadata().and_then(|metadata| metadata.modified()) {
            dated.push((set, name.to_owned()));
        }
    }
    dated.sort_unstable();
    Ok(dated
        .into_iter()
        .rev()
        .take(count)
        .map(|(_, name)| name)
        .collect())
}

/// Whether there is such a tag, damaged or not.
pub(crate) fn exists(layout: &Layout, tag: &str) -> bool {
    check_tag(tag).is_ok() && layout.tags().join(tag).exists()
}

/// Points a tag at a snapshot, durably. The caller holds the publish lock.
pub(crate) fn set(layout: &Layout, tag: &str, id: SnapshotId) -> Result<()> {
    check_tag(tag)?;
    FORMAT.write(&layout.tags().join(tag), id.as_bytes())
}

/// Removes a tag, durably. The caller holds the publish lock.
pub(crate) fn remove(layout: &Layout, tag: &str) -> Result<()> {
    if !exists(layout, tag) {
        return Err(Error::NotFound {
            name: tag.to_owned(),
        });
    }
    durable::unlink(&layout.tags().join(tag))?;
    durable::sync_dir(&layout.tags())
}
