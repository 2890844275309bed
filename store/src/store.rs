//! Opening a store, and its snapshots and tags.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rayon::ThreadPool;

use crate::cancel::Cancel;
use crate::chunks::Chunks;
use crate::durable;
use crate::error::{Error, IoContext as _, Result};
use crate::format::config::{Config, StoreFormat};
use crate::gc::mark::Reachability;
use crate::id::SnapshotId;
use crate::image::ImageReader;
use crate::index::{self, IndexWriter};
use crate::layout::Layout;
use crate::lock::{self, Lock, LockKind};
use crate::lock_probe;
use crate::manifest::{self, Image, Manifest};
use crate::name::{check_new_tag, check_tag};
use crate::opening;
use crate::page::PageSize;
use crate::protection;
use crate::sim::{self, Fault};
use crate::tags;
use crate::threads;

/// A store: chunks, snapshots and tags in one directory.
///
/// Any number of processes may have a store open. Reading takes no locks.
///
/// Clones are handles of one open store, with its caches; each can have a timeout, a
/// [`Cancel`] and a pool of threads of its own. All of it may be used by any number of
/// threads.
///
/// ```
/// use snapstore_store::{PageSize, Store};
///
/// fn is_shared<T: Clone + Send + Sync + 'static>() {}
/// is_shared::<Store>();
///
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("store");
/// let store = Store::create(&path, PageSize::default())?;
/// let patient = store.clone().with_lock_timeout(std::time::Duration::from_secs(3600));
/// std::thread::spawn(move || patient.tags()).join().expect("no panic")?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Store {
    pub(crate) layout: Layout,
    pub(crate) chunks: Arc<Chunks>,
    pub(crate) config: Config,
    pub(crate) cancel: Cancel,
    lock_timeout: Duration,
    pool: Option<Arc<ThreadPool>>,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Store").field(&self.path()).finish()
    }
}

impl Store {
    /// Creates an empty store at `path`, which must not exist or be empty. Of several that
    /// create one there at the same time one does, and the others fail. What was left by
    /// one that was interrupted is used, whatever settings that was to have.
    ///
    /// # Errors
    /// [`Error::StoreExists`]; [`Error::NotEmpty`] if there is anything else in the
    /// directory; [`Error::Damaged`] if it is a store that has lost its configuration.
    pub fn create(path: &Path, page_size: PageSize) -> Result<Self> {
        Self::create_in_format(path, page_size, StoreFormat::Two)
    }

    /// The same in an older format, for programs that know only that.
    ///
    /// # Errors
    /// As [`Store::create`].
    pub fn create_in_format(path: &Path, page_size: PageSize, format: StoreFormat) -> Result<Self> {
        let layout = Layout::new(absolute(path)?);
        let had_parent = layout.root().ancestors().skip(1).find(|it| it.is_dir());
        let had_parent = had_parent.map(Path::to_owned);
        fs::create_dir_all(path).context("create", path)?;
        refuse_store(&layout)?;
        if let Err(error) = refuse_foreign_files(&layout) {
            // They may be those of a store that somebody else has created meanwhile.
            refuse_store(&layout)?;
            return Err(error);
        }
        for dir in layout.directories() {
            fs::create_dir_all(&dir).context("create", &dir)?;
        }
        let _publish = lock::acquire(&layout, LockKind::Publish, lock::DEFAULT_TIMEOUT)?;
        refuse_store(&layout)?;
        // Whatever an interrupted creation has left of it.
        durable::remove_dir(&layout.index())?;
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
        let config = Config::new(page_size, format)?;
        config.write(&layout.config(), &layout.config_copy())?;
        Self::open(path)
    }

    /// Opens the store at `path`.
    ///
    /// # Errors
    /// [`Error::NoStore`] if there is none; [`Error::Damaged`] if its
    /// configuration is damaged, or missing beside packs; [`Error::Newer`] if it has
    /// what only a newer version knows.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.is_dir() {
            return Err(Error::NoStore {
                path: path.to_owned(),
            });
        }
        let layout = Layout::new(absolute(path)?);
        let config = Config::read(&layout.config())?;
        let config = config.ok_or_else(|| opening::without_config(&layout))?;
        opening::check_directories(&layout)?;
        opening::restore_empty(&layout)?;
        Ok(Self {
            chunks: Arc::new(Chunks::new(layout.clone(), &config)),
            layout,
            config,
            cancel: Cancel::default(),
            lock_timeout: lock::DEFAULT_TIMEOUT,
            pool: None,
        })
    }

    /// How long to wait for another process that is publishing or collecting.
    #[must_use]
    pub fn with_lock_timeout(mut self, timeout: Duration) -> Self {
        self.lock_timeout = timeout;
        self
    }

    /// This handle's operations end with [`Error::Cancelled`] soon after the token is
    /// cancelled.
    #[must_use]
    pub fn with_cancel(mut self, cancel: Cancel) -> Self {
        self.cancel = cancel;
        self
    }

    /// This handle's commits and verifications share their work among these threads.
    /// Without, they use rayon's global pool.
    #[must_use]
    pub fn with_pool(mut self, pool: Arc<ThreadPool>) -> Self {
        self.pool = Some(pool);
        self
    }

    /// Does what shares its work among threads.
    pub(crate) fn in_pool<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        match &self.pool {
            Some(pool) => pool.install(work),
            None => {
                threads::start_pool(self.path())?;
                work()
            }
        }
    }

    /// Merges files of the index where nobody collects and there are many by now: a look-up
    /// has to ask each. To be called once a commit has been told to whoever waits for it.
    /// Takes half a minute at most, holds no lock that commits need, and changes nothing
    /// that is found.
    pub fn tidy_index(&self) {
        if let Err(error) = index::tidy(&self.layout.index(), index::MANY_RUNS) {
            tracing::debug!(%error, "the index stays as it is");
        }
    }

    /// The index, open for changes. The caller holds the publish lock. The first
    /// programs know RocksDB only, so in a store of format 1 there are no runs beside it.
    pub(crate) fn index_writer(&self) -> Result<IndexWriter> {
        let index = IndexWriter::open(&self.layout.index())?;
        Ok(match self.format() {
            StoreFormat::One => index.without_runs(),
            StoreFormat::Two => index,
        })
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

    /// The version of the store's format.
    #[must_use]
    pub fn format(&self) -> StoreFormat {
        self.config.format()
    }

    /// Whether an upgrade to this format has begun and not ended.
    #[must_use]
    pub fn is_upgrading(&self) -> bool {
        self.config.is_upgrading()
    }

    /// That the store is still of the format in which it was opened. To be asked by
    /// who has a lease, beside which no upgrade begins.
    pub(crate) fn check_format(&self) -> Result<()> {
        let path = self.layout.config();
        let now = Config::read(&path)?;
        if now.is_some_and(|now| now.format() == self.format()) {
            return Ok(());
        }
        Err(Error::Upgraded { path })
    }

    /// That this version may change the store.
    ///
    /// # Errors
    /// [`Error::ReadOnlyFeature`] if the store has a feature that it does not know.
    pub fn check_writable(&self) -> Result<()> {
        match self.config.read_only_feature() {
            None => Ok(()),
            Some(bit) => Err(Error::ReadOnlyFeature {
                path: self.layout.config(),
                bit,
            }),
        }
    }

    /// That locks keep others away where the store is, so that it can be changed.
    ///
    /// # Errors
    /// [`Error::NoLocks`] with the reason.
    pub fn check_locks(&self) -> Result<()> {
        lock_probe::check(&self.layout)
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

    /// The snapshot of this id.
    ///
    /// # Errors
    /// [`Error::Damaged`] if it is missing or damaged.
    pub fn manifest(&self, id: SnapshotId) -> Result<Manifest> {
        manifest::read(&self.chunks, id)
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
        let _publish = self.publish_lock()?;
        self.check_tag_free(tag, replace)?;
        if !self.is_tagged(id, tag)? {
            // Under the lock, so that no collection deletes what was just seen.
            Reachability::new(&self.chunks)?.add_snapshot(id)?;
        }
        tags::set(&self.layout, tag, id)
    }

    /// Removes tags, damaged ones too. What only they led to is freed by the
    /// next collection. One that is named twice is removed once.
    ///
    /// # Errors
    /// [`Error::NotFound`] if any of them does not exist, or [`Error::BadName`] if it
    /// can be no tag; then none is removed.
    /// [`Error::Protected`] if one is protected.
    pub fn remove_tags(&self, names: &[String]) -> Result<()> {
        let names: BTreeSet<&String> = names.iter().collect();
        names.iter().try_for_each(|name| check_tag(name))?;
        let _publish = self.publish_lock()?;
        for name in &names {
            if !tags::exists(&self.layout, name) {
                return Err(Error::NotFound {
                    name: (*name).clone(),
                });
            }
            protection::check(&self.layout, name)?;
        }
        names
            .into_iter()
            .try_for_each(|name| tags::remove(&self.layout, name))
    }

    /// Removes those of these tags that still name the snapshots they are given with and
    /// are not protected. Returns the tags that were removed: what was moved or
    /// protected since the caller looked stays.
    ///
    /// # Errors
    /// I/O errors; tags before the one that failed are removed.
    pub fn remove_tags_if(&self, tags: &[(String, SnapshotId)]) -> Result<Vec<String>> {
        let _publish = self.publish_lock()?;
        let mut removed = Vec::new();
        for (tag, id) in tags {
            if tags::get(&self.layout, tag)? == Some(*id)
                && !protection::is_protected(&self.layout, tag)?
            {
                tags::remove(&self.layout, tag)?;
                removed.push(tag.clone());
            }
        }
        Ok(removed)
    }

    /// Protects a tag from being removed or moved, or ends that.
    ///
    /// # Errors
    /// [`Error::NotFound`] if there is no such tag.
    pub fn protect_tag(&self, tag: &str, protected: bool) -> Result<()> {
        check_tag(tag)?;
        let _publish = self.publish_lock()?;
        if !tags::exists(&self.layout, tag) {
            return Err(Error::NotFound {
                name: tag.to_owned(),
            });
        }
        protection::set(&self.layout, tag, protected)
    }

    /// The tags that are protected.
    ///
    /// # Errors
    /// I/O errors only.
    pub fn protected_tags(&self) -> Result<BTreeSet<String>> {
        protection::all(&self.layout)
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
        self.check_writable()?;
        let lock = lock::acquire_unless(
            &self.cancel,
            &self.layout,
            LockKind::Publish,
            self.lock_timeout,
        )?;
        self.check_format()?;
        Ok(lock)
    }

    /// For looking at leases; `None` on a filesystem that is read-only here.
    pub(crate) fn allocate_lock_to_read(&self) -> Result<Option<Lock>> {
        lock::acquire_to_read(&self.layout, LockKind::Allocate, self.lock_timeout)
    }

    pub(crate) fn collect_lock(&self) -> Result<Lock> {
        self.check_writable()?;
        let lock = lock::acquire_unless(
            &self.cancel,
            &self.layout,
            LockKind::Collect,
            self.lock_timeout,
        )?;
        self.check_format_after_waiting()?;
        Ok(lock)
    }

    /// The collect lock for an operation that changes nothing: also on a
    /// filesystem that is read-only here.
    pub(crate) fn collect_lock_to_read(&self) -> Result<Option<Lock>> {
        let lock = lock::acquire_to_read_unless(
            &self.cancel,
            &self.layout,
            LockKind::Collect,
            self.lock_timeout,
        )?;
        self.check_format_after_waiting()?;
        Ok(lock)
    }

    /// Who has waited for an upgrade would look for chunks under the names that they
    /// had, and call them missing.
    fn check_format_after_waiting(&self) -> Result<()> {
        match sim::on(Fault::FormatNotLookedAt) {
            true => Ok(()),
            false => self.check_format(),
        }
    }

    /// Whether a commit or a tag of this name would be refused at once. It is
    /// looked at again when the tag is set.
    ///
    /// # Errors
    /// [`Error::TagExists`] unless `replace`; I/O errors.
    pub fn check_tag_free(&self, tag: &str, replace: bool) -> Result<()> {
        check_new_tag(tag)?;
        tags::check_directory(&self.layout)?;
        if replace {
            protection::check(&self.layout, tag)?;
        }
        let found = match tags::get(&self.layout, tag) {
            Err(Error::Damaged(_)) if replace => return Ok(()),
            other => other?,
        };
        match found {
            Some(id) if !replace => Err(Error::TagExists {
                tag: tag.to_owned(),
                id,
            }),
            _ => Ok(()),
        }
    }
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).context("resolve", path)
}

/// Fails if there is a store.
fn refuse_store(layout: &Layout) -> Result<()> {
    match Config::read(&layout.config())? {
        None => Ok(()),
        Some(config) => Err(Error::StoreExists {
            path: layout.root().to_owned(),
            page_bytes: config.page_size.bytes(),
        }),
    }
}

/// What is left of a creation that was interrupted, or of an empty store, may be
/// used.
fn refuse_foreign_files(layout: &Layout) -> Result<()> {
    let root = layout.root();
    if !layout.config().exists() && opening::has_packs(layout)? {
        return Err(opening::without_config(layout));
    }
    let mut ours: Vec<PathBuf> = layout.directories().into();
    // The last one is the filesystem's, at whose root a store may be.
    ours.extend([layout.index(), layout.config(), root.join("lost+found")]);
    if opening::is_empty(layout)? {
        ours.extend([layout.collector(), layout.recent_tags(), layout.damaged()]);
        ours.extend([layout.working_sets(), layout.rewrites()]);
        ours.extend(["mounts.log", "mounts.log.1"].map(|log| root.join(log)));
    }
    for entry in fs::read_dir(root).context("list", root)? {
        let path = entry.context("list", root)?.path();
        let of_creation = [".config.new", ".config-copy.new", "config-copy"];
        let of_creation = of_creation.iter().any(|name| path.ends_with(name));
        if !of_creation && !ours.contains(&path) {
            return Err(Error::NotEmpty {
                path: root.to_owned(),
            });
        }
    }
    Ok(())
}
