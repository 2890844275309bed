//! Opening a store, and its snapshots and tags.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::chunks::Chunks;
use crate::commit::parent::readable;
use crate::durable;
use crate::error::{Damage, Error, ErrorClass, IoContext as _, Result};
use crate::gc::mark::Reach;
use crate::id::SnapshotId;
use crate::image::ImageReader;
use crate::index::IndexWriter;
use crate::layout::Layout;
use crate::lease;
use crate::lock::{self, Lock, LockKind};
use crate::manifest::{self, Image, Manifest};
use crate::page::PageSize;
use crate::sealed_file::Format;
use crate::tags;

/// The payload is the page size in bytes, u32.
pub(crate) const CONFIG_FORMAT: Format = Format {
    magic: *b"SNAPCONF",
    version: 1,
};
/// An id prefix must have this many digits.
const MIN_PREFIX_DIGITS: usize = 4;

/// A store: chunks, snapshots and tags in one directory.
///
/// Any number of processes may have a store open. Reading takes no locks.
pub struct Store {
    pub(crate) layout: Layout,
    pub(crate) chunks: Arc<Chunks>,
    lock_timeout: Duration,
}

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
#[derive(Debug)]
pub struct Listing {
    /// Snapshots, oldest first.
    pub snapshots: Vec<TaggedSnapshot>,
    /// Tags that lead to no snapshot that can be read: damaged, or made by a newer
    /// version. Sorted by name.
    pub unreadable: Vec<(String, Error)>,
}

impl Store {
    /// Creates an empty store at `path`, which must not exist or be empty.
    ///
    /// # Errors
    /// [`Error::NotEmpty`] if there is anything else in the directory.
    pub fn create(path: &Path, page_size: PageSize) -> Result<Self> {
        let layout = Layout::new(absolute(path)?);
        let had_parent = layout.root().ancestors().skip(1).find(|it| it.is_dir());
        let had_parent = had_parent.map(Path::to_owned);
        fs::create_dir_all(path).context("create", path)?;
        refuse_foreign_files(&layout)?;
        for dir in layout.directories() {
            fs::create_dir_all(&dir).context("create", &dir)?;
        }
        let _publish = lock::acquire(&layout, LockKind::Publish, lock::DEFAULT_TIMEOUT)?;
        if layout.config().exists() {
            return Self::open(path);
        }
        drop(IndexWriter::open_or_create(&layout.index())?);
        durable::sync_dir(layout.root())?;
        // Up to the first directory that was there before.
        for dir in layout.root().ancestors().skip(1) {
            durable::sync_dir(dir)?;
            if Some(dir) == had_parent.as_deref() {
                break;
            }
        }
        // Last: a directory with a configuration is a complete store.
        CONFIG_FORMAT.write(&layout.config(), &page_size.as_u32().to_le_bytes())?;
        Self::open(path)
    }

    /// Opens the store at `path`.
    ///
    /// # Errors
    /// [`Error::NoStore`] if there is none; [`Error::Damaged`] if its
    /// configuration is damaged.
    pub fn open(path: &Path) -> Result<Self> {
        let no_store = || Error::NoStore {
            path: path.to_owned(),
        };
        if !path.is_dir() {
            return Err(no_store());
        }
        let layout = Layout::new(absolute(path)?);
        let payload = CONFIG_FORMAT.read(&layout.config())?.ok_or_else(no_store)?;
        let page_size = payload
            .try_into()
            .ok()
            .and_then(|bytes| PageSize::from_bytes(u64::from(u32::from_le_bytes(bytes))).ok())
            .ok_or_else(|| Damage::File {
                path: layout.config(),
                reason: "malformed",
            })?;
        Ok(Self {
            chunks: Arc::new(Chunks::new(layout.clone(), page_size)),
            layout,
            lock_timeout: lock::DEFAULT_TIMEOUT,
        })
    }

    /// How long to wait for another process that is publishing or collecting.
    #[must_use]
    pub fn with_lock_timeout(mut self, timeout: Duration) -> Self {
        self.lock_timeout = timeout;
        self
    }

    /// The store's directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.layout.root()
    }

    /// The store's page size.
    #[must_use]
    pub fn page_size(&self) -> PageSize {
        self.chunks.page_size()
    }

    /// All tags.
    ///
    /// # Errors
    /// The first damaged tag file.
    pub fn tags(&self) -> Result<BTreeMap<String, SnapshotId>> {
        tags::all(&self.layout)
    }

    /// The names of all tags, damaged ones too.
    ///
    /// # Errors
    /// I/O errors only.
    pub fn tag_names(&self) -> Result<Vec<String>> {
        let mut names: Vec<_> = tags::each(&self.layout)?
            .into_iter()
            .map(|(name, _)| name)
            .collect();
        names.sort();
        Ok(names)
    }

    /// The snapshot that a tag names; `None` if there is no such tag.
    ///
    /// # Errors
    /// [`Error::Damaged`] if the tag's file is damaged.
    pub fn tag(&self, name: &str) -> Result<Option<SnapshotId>> {
        tags::get(&self.layout, name)
    }

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
    /// I/O errors, and damage of the index.
    pub fn listing(&self) -> Result<Listing> {
        let mut snapshots = Vec::new();
        let mut unreadable = Vec::new();
        let mut each = tags::each(&self.layout)?;
        each.sort_by(|(one, _), (other, _)| one.cmp(other));
        for (tag, id) in each {
            match id.and_then(|id| Ok((id, self.manifest(id)?))) {
                Ok((id, manifest)) => snapshots.push(TaggedSnapshot { tag, id, manifest }),
                Err(error) => match error.class() {
                    ErrorClass::Damaged | ErrorClass::Newer => unreadable.push((tag, error)),
                    _ => return Err(error),
                },
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

    /// The snapshot of this id.
    ///
    /// # Errors
    /// [`Error::Damaged`] if it is missing or damaged.
    pub fn manifest(&self, id: SnapshotId) -> Result<Manifest> {
        manifest::read(&self.chunks, id)
    }

    /// The snapshot that `name` means: a tag, or the beginning of an id.
    ///
    /// # Errors
    /// [`Error::NotFound`], or [`Error::Ambiguous`] for a prefix of several ids.
    pub fn resolve(&self, name: &str) -> Result<SnapshotId> {
        if let Some(id) = tags::get(&self.layout, name)? {
            return Ok(id);
        }
        let not_found = || Error::NotFound {
            name: name.to_owned(),
        };
        let is_prefix = name.len() >= MIN_PREFIX_DIGITS
            && name.len() <= 64
            && name
                .bytes()
                .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if !is_prefix {
            return Err(not_found());
        }
        if let Some(id) = SnapshotId::from_hex(name) {
            // One look, however many snapshots there are.
            return match self.has_snapshot(id)? {
                true => Ok(id),
                false => Err(not_found()),
            };
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

    /// Reads an image of a snapshot as a flat file.
    #[must_use]
    pub fn image_reader(&self, image: &Image) -> ImageReader {
        ImageReader::new(self.chunks.clone(), image)
    }

    /// Points `tag` at a snapshot. With `replace` an existing tag is moved.
    ///
    /// # Errors
    /// [`Error::TagExists`] without `replace`; [`Error::Damaged`] if parts of a
    /// snapshot that had no tag any more have been collected.
    pub fn set_tag(&self, tag: &str, id: SnapshotId, replace: bool) -> Result<()> {
        crate::name::check_tag(tag)?;
        let _publish = self.publish_lock()?;
        self.check_tag_free(tag, replace)?;
        if !self.is_tagged(id, tag)? {
            // Under the lock, so that no collection deletes what was just seen.
            Reach::new(&self.chunks)?.add_snapshot(id)?;
        }
        tags::set(&self.layout, tag, id)
    }

    /// Removes tags, damaged ones too. What only they led to is freed by the
    /// next collection. One that is named twice is removed once.
    ///
    /// # Errors
    /// [`Error::NotFound`] if any of them does not exist; then none is removed.
    pub fn remove_tags(&self, names: &[String]) -> Result<()> {
        let names: BTreeSet<&String> = names.iter().collect();
        let _publish = self.publish_lock()?;
        for name in &names {
            if !tags::exists(&self.layout, name) {
                return Err(Error::NotFound {
                    name: (*name).clone(),
                });
            }
        }
        names
            .into_iter()
            .try_for_each(|name| tags::remove(&self.layout, name))
    }

    /// Reads a short image whole, such as a VM state.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if it is longer than `limit_bytes`; nothing is
    /// allocated then. Damage as [`ImageReader::read_at`].
    pub fn read_file_image(&self, image: &Image, limit_bytes: u64) -> Result<Vec<u8>> {
        let fits = usize::try_from(image.size_bytes).ok();
        let fits = fits.filter(|_| image.size_bytes <= limit_bytes);
        let len = fits.ok_or_else(|| Error::TooLarge {
            path: image.name.clone().into(),
            size_bytes: image.size_bytes,
            limit_bytes,
        })?;
        let mut bytes = vec![0; len];
        self.image_reader(image).read_at(&mut bytes, 0)?;
        Ok(bytes)
    }

    /// Lets go of files that were deleted while this store held them open, so that
    /// their space is free: of packs that were collected, and of an older index.
    /// For those who keep a store open for long; every few seconds is often enough.
    pub fn let_go_of_deleted(&self) {
        self.chunks.let_go_of_deleted();
    }

    pub(crate) fn publish_lock(&self) -> Result<Lock> {
        lock::acquire(&self.layout, LockKind::Publish, self.lock_timeout)
    }

    pub(crate) fn collect_lock(&self) -> Result<Lock> {
        lock::acquire(&self.layout, LockKind::Collect, self.lock_timeout)
    }

    /// The collect lock for an operation that changes nothing: also on a
    /// filesystem that is read-only here.
    pub(crate) fn collect_lock_to_read(&self) -> Result<Option<Lock>> {
        lock::acquire_to_read(&self.layout, LockKind::Collect, self.lock_timeout)
    }

    /// Whether a commit or a tag of this name would be refused at once. It is
    /// looked at again when the tag is set.
    ///
    /// # Errors
    /// [`Error::TagExists`] unless `replace`; I/O errors.
    pub fn check_tag_free(&self, tag: &str, replace: bool) -> Result<()> {
        match tags::get(&self.layout, tag)? {
            Some(id) if !replace => Err(Error::TagExists {
                tag: tag.to_owned(),
                id,
            }),
            _ => Ok(()),
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
        let key = id.chunk().key();
        let indexed = || match self.chunks.refresh_index()?.get(key)? {
            Some(at) => self.chunks.manifest_id_at(key, at),
            None => Ok(None),
        };
        if readable(indexed())?.flatten() == Some(id) {
            return Ok(true);
        }
        let allocate = lock::acquire(&self.layout, LockKind::Allocate, self.lock_timeout)?;
        Ok(lease::viewed(&self.layout, id, &allocate)? || !self.tags_of(id)?.is_empty())
    }

    /// Every snapshot that is tagged or whose manifest is still in the index.
    fn untagged_and_tagged(&self) -> Result<BTreeSet<SnapshotId>> {
        let each = tags::each(&self.layout)?.into_iter();
        let mut ids: BTreeSet<_> = each.filter_map(|(_, id)| id.ok()).collect();
        let index = self.chunks.refresh_index()?;
        for entry in index.manifests() {
            let (key, location) = entry?;
            if let Some(id) = self.chunks.manifest_id_at(key, location)? {
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

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).context("resolve", path)
}

/// An interrupted creation leaves only directories of ours, which may be used.
fn refuse_foreign_files(layout: &Layout) -> Result<()> {
    let ours: Vec<PathBuf> = layout
        .directories()
        .into_iter()
        .chain([layout.index()])
        .collect();
    let root = layout.root();
    for entry in fs::read_dir(root).context("list", root)? {
        let path = entry.context("list", root)?.path();
        let temporary = path.ends_with(".config.new");
        if !temporary && !ours.contains(&path) {
            return Err(Error::NotEmpty {
                path: root.to_owned(),
            });
        }
    }
    Ok(())
}
