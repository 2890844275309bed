//! A store: opening it, its settings, locks and images. `create` makes one, `tagging` has its tags.

mod create;
mod tagging;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rayon::ThreadPool;

use crate::cancel::Cancel;
use crate::chunks::Chunks;
use crate::error::{Error, IoContext as _, Result};
use crate::format::config::{Config, StoreFormat};
use crate::id::SnapshotId;
use crate::image::ImageReader;
use crate::index::{self, IndexWriter};
use crate::layout::Layout;
use crate::lock::{self, Lock, LockKind};
use crate::lock_probe;
use crate::manifest::{self, Image, Manifest};
use crate::opening;
use crate::page::PageSize;
use crate::sim::{self, Fault};
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
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).context("resolve", path)
}
