//! What a store holds, and what each snapshot adds to it.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use crate::chunks::Place;
use crate::error::{Error, IoContext as _, Result};
use crate::format::entry::ENTRY_LEN;
use crate::format::node::Child;
use crate::gc::mark::ChunkLocator;
use crate::id::{ChunkId, ChunkKind};
use crate::pack::{Location, PackNumber};
use crate::snapshots::TaggedSnapshot;
use crate::store::Store;
use crate::tree::read::node_id;

/// Numbers about a whole store.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct StoreStats {
    /// Tagged snapshots.
    pub snapshots: u64,
    /// The lengths of all their images, added up.
    pub logical_bytes: u64,
    /// Of those, bytes in pages that are not zero.
    pub nonzero_bytes: u64,
    /// Distinct pages that the tags need.
    pub distinct_pages: u64,
    /// The same in bytes, uncompressed.
    pub distinct_bytes: u64,
    /// Bytes those pages take in packs.
    pub page_stored_bytes: u64,
    /// Bytes that tree nodes and manifests take in packs.
    pub metadata_stored_bytes: u64,
    /// Bytes of pack entries that no tag needs, and of packs' frames.
    pub unreferenced_bytes: u64,
    /// Length of all pack files.
    pub pack_bytes: u64,
    /// Number of pack files.
    pub packs: u64,
    /// Length of the index's files.
    pub index_bytes: u64,
    /// Length of every file of the store.
    pub total_bytes: u64,
    /// Per tag, oldest snapshot first.
    pub per_snapshot: Vec<SnapshotStats>,
    /// Tags of snapshots that cannot be read whole, and why. They are not among the
    /// others, and what they need may be counted as needed by none.
    #[serde(skip)]
    pub unreadable: Vec<(String, Arc<Error>)>,
}

/// Numbers about one tagged snapshot.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct SnapshotStats {
    /// The tag.
    pub tag: String,
    /// The lengths of its images, added up.
    pub logical_bytes: u64,
    /// Bytes in pages that are not zero.
    pub nonzero_bytes: u64,
    /// Bytes in packs that only this snapshot needs: what removing its tag
    /// would let a collection free.
    pub exclusive_stored_bytes: u64,
}

/// What a tag would free, if all older ones were removed before it.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Reclaimable {
    /// The tag.
    pub tag: String,
    /// Bytes in packs that no younger tag and no protected one needs.
    pub freed_stored_bytes: u64,
}

impl StoreStats {
    fn needed_bytes(&self) -> u64 {
        self.page_stored_bytes + self.metadata_stored_bytes
    }
}

impl Store {
    /// What removing tags would let a collection free, if they were removed in this order:
    /// the oldest first. Protected tags are not among them. Takes time in proportion to
    /// the chunks stored.
    ///
    /// # Errors
    /// As [`Store::stats`].
    pub fn reclaimable(&self) -> Result<Vec<Reclaimable>> {
        let _collect = self.collect_lock_to_read()?;
        let snapshots = self.listing()?.snapshots;
        let protected = self.protected_tags()?;
        let (kept, going): (Vec<_>, Vec<_>) = snapshots
            .iter()
            .partition(|snapshot| protected.contains(&snapshot.tag));
        let mut owners = Owners::new(self, snapshots.len())?;
        let mut found = Vec::new();
        // Who goes last is counted first: a chunk is free when the last who needs it goes.
        for (number, snapshot) in (0..).zip(kept.iter().chain(going.iter().rev())) {
            self.cancel.check()?;
            let before = owners.totals.needed_bytes();
            match owners.visit(snapshot, number) {
                // What a broken snapshot needs is counted as far as it can be seen.
                Err(error) if error.is_of_what_is_stored() => {}
                other => other?,
            }
            found.push(Reclaimable {
                tag: snapshot.tag.clone(),
                freed_stored_bytes: owners.totals.needed_bytes() - before,
            });
        }
        let mut found = found.split_off(kept.len());
        found.reverse();
        Ok(found)
    }

    /// Counts what is stored. Takes time in proportion to the chunks stored.
    ///
    /// A snapshot that cannot be read whole is left out and named.
    ///
    /// # Errors
    /// I/O errors, and damage of the index or of the directory of tags.
    pub fn stats(&self) -> Result<StoreStats> {
        // A collection moves chunks while they are counted.
        let _collect = self.collect_lock_to_read()?;
        let listing = self.listing()?;
        let snapshots = listing.snapshots;
        let unreadable = listing.unreadable.into_iter();
        let mut unreadable: Vec<_> = unreadable
            .map(|(tag, error)| (tag, Arc::new(error)))
            .collect();
        let mut owners = Owners::new(self, snapshots.len())?;
        let mut per_snapshot = Vec::new();
        for (number, snapshot) in snapshots.iter().enumerate() {
            self.cancel.check()?;
            let images = &snapshot.manifest.images;
            let tag_number = u32::try_from(number).expect("tags are counted in 32 bits");
            match owners.visit(snapshot, tag_number) {
                Err(error) if error.is_of_what_is_stored() => {
                    unreadable.push((snapshot.tag.clone(), Arc::new(error)));
                    continue;
                }
                other => other?,
            }
            let stats = SnapshotStats {
                tag: snapshot.tag.clone(),
                logical_bytes: images.iter().map(|image| image.size_bytes).sum(),
                nonzero_bytes: images
                    .iter()
                    .map(|image| image.nonzero_pages * self.page_size().bytes())
                    .sum(),
                exclusive_stored_bytes: 0,
            };
            per_snapshot.push((number, stats));
        }
        let exclusive = &owners.exclusive;
        let per_snapshot: Vec<_> = per_snapshot
            .into_iter()
            .map(|(number, stats)| SnapshotStats {
                exclusive_stored_bytes: u64::try_from(exclusive[number]).unwrap_or(0),
                ..stats
            })
            .collect();
        let mut totals = owners.totals;
        totals.snapshots = per_snapshot.len() as u64;
        totals.unreadable = unreadable;
        totals.logical_bytes = per_snapshot.iter().map(|s| s.logical_bytes).sum();
        totals.nonzero_bytes = per_snapshot.iter().map(|s| s.nonzero_bytes).sum();
        totals.distinct_bytes = totals.distinct_pages * self.page_size().bytes();
        totals.per_snapshot = per_snapshot;
        self.count_files(&mut totals)?;
        Ok(totals)
    }

    /// The length of all files of the store.
    ///
    /// # Errors
    /// I/O errors only.
    pub fn bytes_on_disk(&self) -> Result<u64> {
        bytes_under(self.layout.root())
    }

    pub(crate) fn index_bytes(&self) -> Result<u64> {
        bytes_under(&self.layout.index())
    }

    fn count_files(&self, totals: &mut StoreStats) -> Result<()> {
        let layout = &self.layout;
        totals.packs = self.chunks.packs().sealed()?.len() as u64;
        totals.pack_bytes = bytes_under(&layout.packs())?;
        totals.index_bytes = self.index_bytes()?;
        totals.total_bytes = bytes_under(layout.root())?;
        totals.unreferenced_bytes = totals.pack_bytes.saturating_sub(totals.needed_bytes());
        Ok(())
    }
}

const SHARED: u32 = u32::MAX;
const NOBODY: u32 = u32::MAX - 1;

/// Per entry of each pack: nobody, one snapshot, or several.
#[derive(Default)]
struct Table(HashMap<PackNumber, Vec<u32>>);

impl Table {
    /// Adds a snapshot to an entry; returns who was there before.
    fn add(&mut self, at: Location, tag: u32) -> u32 {
        let position = at.entry.0 as usize;
        let entries = self.0.entry(at.pack).or_default();
        if entries.len() <= position {
            entries.resize(position + 1, NOBODY);
        }
        let before = entries[position];
        entries[position] = match before {
            NOBODY => tag,
            same if same == tag => tag,
            _ => SHARED,
        };
        before
    }
}

/// Who needs each entry.
struct Owners<'a> {
    places: ChunkLocator<'a>,
    needed_by: Table,
    /// Who has visited a node's children. Not the same: who needs a node only as
    /// a base does not need its children.
    entered_by: Table,
    exclusive: Vec<i64>,
    totals: StoreStats,
}

impl<'a> Owners<'a> {
    fn new(store: &'a Store, snapshots: usize) -> Result<Self> {
        Ok(Self {
            places: ChunkLocator::all(&store.chunks)?,
            needed_by: Table::default(),
            entered_by: Table::default(),
            exclusive: vec![0; snapshots],
            totals: StoreStats::default(),
        })
    }

    /// Notes all that a snapshot needs. `tag` is its number.
    fn visit(&mut self, snapshot: &TaggedSnapshot, tag: u32) -> Result<()> {
        self.own(snapshot.id.chunk(), None, tag)?;
        for image in &snapshot.manifest.images {
            let tree = image.tree();
            if let Some(root) = tree.root() {
                self.walk(root, tree.shape().root_level(), tag)?;
            }
        }
        Ok(())
    }

    fn walk(&mut self, child: Child, level: u8, tag: u32) -> Result<()> {
        let at = self.own(node_id(child), child.hint, tag)?;
        let before = self.entered_by.add(at, tag);
        if before == tag || before == SHARED {
            return Ok(());
        }
        let node = self.places.chunks().node(child, level)?;
        for (_, below) in node.present() {
            if level == 0 {
                self.own(node.child_id(below), below.hint, tag)?;
            } else {
                self.walk(below, level - 1, tag)?;
            }
        }
        Ok(())
    }

    /// Notes that `tag` needs a chunk and its base. Returns where the chunk is.
    fn own(&mut self, id: ChunkId, hint: Option<Location>, tag: u32) -> Result<Location> {
        let found = self.places.find(id, hint)?;
        if let Some(base) = &found.base {
            self.own_place(base, tag);
        }
        self.own_place(&found.place, tag);
        Ok(found.place.location())
    }

    fn own_place(&mut self, place: &Place, tag: u32) {
        let bytes = place.slot.stored_len() + ENTRY_LEN as u64;
        let signed = i64::try_from(bytes).expect("a chunk is small");
        match self.needed_by.add(place.location(), tag) {
            SHARED => {}
            same if same == tag => {}
            NOBODY => {
                self.exclusive[tag as usize] += signed;
                self.count(bytes, place.slot.entry.key.kind);
            }
            other => self.exclusive[other as usize] -= signed,
        }
    }

    fn count(&mut self, bytes: u64, kind: ChunkKind) {
        if kind == ChunkKind::Page {
            self.totals.distinct_pages += 1;
            self.totals.page_stored_bytes += bytes;
        } else {
            self.totals.metadata_stored_bytes += bytes;
        }
    }
}

fn bytes_under(path: &Path) -> Result<u64> {
    let metadata = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        other => other.context("inspect", path)?,
    };
    if !metadata.is_dir() {
        return Ok(metadata.len());
    }
    let mut total = 0;
    let entries = match fs::read_dir(path) {
        // Gone by now.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        other => other.context("list", path)?,
    };
    for entry in entries {
        total += bytes_under(&entry.context("list", path)?.path())?;
    }
    Ok(total)
}
