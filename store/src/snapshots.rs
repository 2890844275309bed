//! Finding snapshots: by tag, by id, by the beginning of an id; and listing them.
//!
//! What is asked of one snapshot looks at a bounded number of tags, wherever that
//! is possible: a store may have very many. A tag or a manifest that cannot be read
//! stands in nobody's way but of who asks for it.

use std::collections::{BTreeSet, HashMap};

use crate::error::{Error, Result, readable};
use crate::id::SnapshotId;
use crate::lease;
use crate::manifest::Manifest;
use crate::name;
use crate::store::Store;
use crate::tags;

/// An id prefix must have this many digits.
const MIN_PREFIX_DIGITS: usize = 4;

/// A tagged snapshot.
#[derive(Debug, Clone)]
pub struct TaggedSnapshot {
    /// The tag.
    pub tag: String,
    /// The snapshot it names.
    pub id: SnapshotId,
    /// What the snapshot holds.
    pub manifest: Manifest,
}

/// What the tags of a store name.
///
/// ```
/// use snapstore_store::{PageSize, Store};
///
/// # let dir = tempfile::tempdir()?;
/// # let store = Store::create(&dir.path().join("store"), PageSize::default())?;
/// let listing = store.listing()?;
/// for snapshot in &listing.snapshots {
///     println!("{} is {}", snapshot.tag, snapshot.id.short());
/// }
/// for (tag, error) in &listing.unreadable {
///     eprintln!("{tag}: {error}");
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Listing {
    /// Snapshots, oldest first.
    pub snapshots: Vec<TaggedSnapshot>,
    /// Tags that lead to no snapshot that can be read: damaged, made by a newer
    /// version, or not to be read by this process. Sorted by name.
    pub unreadable: Vec<(String, Error)>,
}

impl Store {
    /// All tagged snapshots, oldest first.
    ///
    /// # Errors
    /// The first tag or manifest that is damaged or was made by a newer version.
    pub fn snapshots(&self) -> Result<Vec<TaggedSnapshot>> {
        let listing = self.listing()?;
        match listing.unreadable.into_iter().next() {
            Some((_, error)) => Err(error),
            None => Ok(listing.snapshots),
        }
    }

    /// All tags: those whose snapshots can be read, and the others with the reason.
    ///
    /// # Errors
    /// I/O errors, and damage of the index where that is opened: not for what was committed
    /// lately.
    pub fn listing(&self) -> Result<Listing> {
        let mut snapshots = Vec::new();
        let mut unreadable = Vec::new();
        let mut each = tags::each(&self.layout)?;
        each.sort_by(|(one, _), (other, _)| one.cmp(other));
        for (tag, id) in each {
            match id.and_then(|id| Ok((id, self.manifest(id)?))) {
                Ok((id, manifest)) => snapshots.push(TaggedSnapshot { tag, id, manifest }),
                Err(error) if error.is_of_what_is_stored() => unreadable.push((tag, error)),
                Err(other) => return Err(other),
            }
        }
        let depths = depths(&snapshots);
        snapshots.sort_by_cached_key(|snapshot| {
            let depth = depths.get(&snapshot.id).copied();
            (
                snapshot.manifest.created_unix_seconds,
                depth,
                snapshot.tag.clone(),
            )
        });
        Ok(Listing {
            snapshots,
            unreadable,
        })
    }

    /// The snapshot that `name` means: a tag, or the beginning of an id.
    ///
    /// # Errors
    /// [`Error::NotFound`], or [`Error::Ambiguous`] for a prefix of several ids;
    /// [`Error::BadName`] for what can be neither.
    pub fn resolve(&self, name: &str) -> Result<SnapshotId> {
        name::check_snapshot(name)?;
        // Before any tag: versions before this one let a tag have the name of an id.
        // One look, however many snapshots there are.
        if let Some(id) = SnapshotId::from_hex(name)
            && self.has_snapshot(id)?
        {
            return Ok(id);
        }
        if let Some(id) = tags::get(&self.layout, name)? {
            return Ok(id);
        }
        let not_found = || Error::NotFound {
            name: name.to_owned(),
        };
        let is_prefix = name.len() >= MIN_PREFIX_DIGITS
            && name.len() < 64
            && name
                .bytes()
                .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if !is_prefix {
            return Err(not_found());
        }
        let mut found: Vec<SnapshotId> = self
            .untagged_and_tagged()?
            .into_iter()
            .filter(|id| id.to_string().starts_with(name))
            .collect();
        match (found.pop(), found.len()) {
            (None, _) => Err(not_found()),
            (Some(id), 0) => Ok(id),
            (Some(_), others) => Err(Error::Ambiguous {
                prefix: name.to_owned(),
                count: others + 1,
            }),
        }
    }

    /// Whether a snapshot has a tag. Looks at the tags first that it is likely to
    /// have, since a store may have very many. A tag that cannot be read is not a
    /// tag of it.
    pub(crate) fn is_tagged(&self, id: SnapshotId, likely_tag: &str) -> Result<bool> {
        let names = |tag: &str| -> Result<bool> {
            Ok(readable(tags::get(&self.layout, tag))?.flatten() == Some(id))
        };
        if names(likely_tag)? {
            return Ok(true);
        }
        if let Some(manifest) = readable(self.manifest(id))?
            && names(&manifest.first_tag)?
        {
            return Ok(true);
        }
        Ok(!self.tags_of(id)?.is_empty())
    }

    /// All tags of a snapshot, sorted; those that cannot be read are none of them.
    ///
    /// # Errors
    /// I/O errors only.
    pub fn tags_of(&self, id: SnapshotId) -> Result<Vec<String>> {
        let each = tags::each(&self.layout)?.into_iter();
        let mut tags: Vec<_> = each
            .filter(|(_, tagged)| matches!(tagged, Ok(tagged) if *tagged == id))
            .map(|(tag, _)| tag)
            .collect();
        tags.sort_unstable();
        Ok(tags)
    }

    /// Whether this store has a snapshot, whole or not: its manifest is indexed, or
    /// something here names or pins it.
    ///
    /// # Errors
    /// I/O errors only.
    pub fn has_snapshot(&self, id: SnapshotId) -> Result<bool> {
        let indexed = || -> Result<bool> {
            let index = self.chunks.refresh_index()?;
            for key in self.chunks.keys().in_index(id.chunk()) {
                if let Some(at) = index.get(key)?
                    && self.chunks.manifest_id_at(key, at)? == Some(id)
                {
                    return Ok(true);
                }
            }
            Ok(false)
        };
        if readable(indexed())?.unwrap_or(false) {
            return Ok(true);
        }
        let pinned = match self.allocate_lock_to_read()? {
            Some(allocate) => lease::viewed(&self.layout, id, &allocate)?,
            None => false,
        };
        Ok(pinned || !self.tags_of(id)?.is_empty())
    }

    /// Every snapshot that is tagged or whose manifest is still in the index.
    fn untagged_and_tagged(&self) -> Result<BTreeSet<SnapshotId>> {
        let each = tags::each(&self.layout)?.into_iter();
        let mut ids: BTreeSet<_> = each.filter_map(|(_, id)| id.ok()).collect();
        let index = self.chunks.refresh_index()?;
        for entry in index.manifests() {
            let (key, location) = entry?;
            if let Some(Some(id)) = readable(self.chunks.manifest_id_at(key, location))? {
                ids.insert(id);
            }
        }
        Ok(ids)
    }
}

/// How many of the listed snapshots each one descends from: snapshots of the
/// same second are in the order of their chain.
fn depths(snapshots: &[TaggedSnapshot]) -> HashMap<SnapshotId, usize> {
    let parents: HashMap<_, _> = snapshots
        .iter()
        .map(|snapshot| (snapshot.id, snapshot.manifest.parent))
        .collect();
    let mut depths = HashMap::new();
    for snapshot in snapshots {
        let mut unknown = Vec::new();
        let mut next = Some(snapshot.id);
        let known = loop {
            match next {
                Some(id) if depths.contains_key(&id) => break depths[&id] + 1,
                Some(id) if parents.contains_key(&id) => {
                    unknown.push(id);
                    next = parents[&id];
                }
                _ => break 0,
            }
        };
        for (id, depth) in unknown.into_iter().rev().zip(known..) {
            depths.insert(id, depth);
        }
    }
    depths
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commit::chunk_writer::ChunkWriter;
    use crate::commit::input::{Input, InputData, InputKind};
    use crate::commit::{CommitRequest, ParentChoice};
    use crate::gc::GcOptions;
    use crate::manifest::ImageRole;
    use crate::page::PageSize;
    use crate::progress::Silent;

    fn commit(store: &Store, tag: &str, fill: u8) -> Result<SnapshotId> {
        let request = CommitRequest {
            tag: tag.to_owned(),
            parent: ParentChoice::Automatic,
            inputs: vec![Input {
                name: "memory".to_owned(),
                role: ImageRole::Memory,
                data: InputData::Bytes(vec![fill; 8192].into()),
                kind: InputKind::Full,
            }],
            ..CommitRequest::default()
        };
        Ok(store.commit(&request, &Silent)?.id)
    }

    /// Versions before let a tag have such a name.
    #[test]
    fn a_whole_id_goes_before_a_tag_of_that_name() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::create(&dir.path().join("store"), PageSize::default()).unwrap();
        let one = commit(&store, "one", 1).unwrap();
        let other = commit(&store, "other", 2).unwrap();
        let nobodys = "ab".repeat(32);
        for name in [&one.to_string(), &nobodys] {
            tags::set(&store.layout, name, other).unwrap();
        }
        assert_eq!(store.resolve(&one.to_string()).unwrap(), one);
        assert_eq!(store.resolve(&nobodys).unwrap(), other);
        store.remove_tags(&[one.to_string(), nobodys]).unwrap();
        assert_eq!(store.resolve(&one.to_string()).unwrap(), one);
    }

    /// Tags a manifest of format version 3.
    fn publish_newer(store: &Store, tag: &str) -> SnapshotId {
        let encoded = [&3_u32.to_le_bytes()[..], b"what nobody knows yet"].concat();
        let id = SnapshotId::of_manifest(&encoded);
        let mut sink = ChunkWriter::new(store).unwrap();
        sink.put(id.chunk(), &encoded, None).unwrap();
        let sealed = sink.seal().unwrap();
        let _publish = store.publish_lock().unwrap();
        sink.publish_pack(sealed.as_ref()).unwrap();
        tags::set(&store.layout, tag, id).unwrap();
        id
    }

    fn is_newer<T>(done: Result<T>) -> bool {
        matches!(done, Err(Error::Newer { version: 3, .. }))
    }

    #[test]
    fn a_snapshot_of_a_newer_version_is_neither_damaged_nor_collected() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::create(&dir.path().join("store"), PageSize::KIB_4).unwrap();
        commit(&store, "one", 1).unwrap();
        let newer = publish_newer(&store, "newer");
        commit(&store, "two", 2).unwrap();

        assert!(is_newer(store.manifest(newer)));
        assert!(is_newer(store.snapshots()));
        let listing = store.listing().unwrap();
        assert_eq!(listing.snapshots.len(), 2);
        assert_eq!(listing.unreadable[0].0, "newer");
        // Known by its id, and able to get another name.
        assert_eq!(store.resolve(&newer.to_string()).unwrap(), newer);
        store.set_tag("also-newer", newer, false).unwrap();

        // What it needs is unknown: nothing may be deleted.
        store.remove_tags(&["one".to_owned()]).unwrap();
        let packs = store.chunks.packs().sealed().unwrap();
        assert!(is_newer(store.gc(GcOptions::default(), &Silent)));
        assert_eq!(store.chunks.packs().sealed().unwrap(), packs);
        assert!(is_newer(store.manifest(newer)));
        if let Ok(report) = store.verify(true, &Silent) {
            assert_eq!(report.findings, [], "it is no damage");
        }
        commit(&store, "newer", 3).unwrap_err();
        Store::repair(store.path(), &Silent).unwrap();
        let store = Store::open(store.path()).unwrap();
        assert_eq!(store.chunks.packs().sealed().unwrap(), packs);
        assert!(is_newer(store.manifest(newer)));
        assert_eq!(store.tag("newer").unwrap(), Some(newer));
    }
}
