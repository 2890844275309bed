//! The index in RocksDB.
//!
//! Entries are written without a write-ahead log and flushed as one sorted
//! file, so that a reader never has a log to replay and durability is one
//! step. RocksDB's own block checksums are checked on every read.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::SystemTime;

use rocksdb::{
    BlockBasedOptions, Cache, DB, DBCompressionType, FlushOptions, IteratorMode, LogLevel,
    MemtableFactory, Options, ReadOptions, WaitForCompactOptions, WriteBatch, WriteOptions,
};

use super::damaged;
use crate::durable;
use crate::error::{Damage, Error, Result};
use crate::id::{ChunkKey, ChunkKind};
use crate::pack::Location;
use crate::threads;

/// Memory for index blocks, per open handle.
pub(crate) const CACHE_BYTES: usize = 32 << 20;
const BLOOM_BITS_PER_KEY: f64 = 10.0;
/// Entries per write batch.
const BATCH_ENTRIES: usize = 4096;
const OPEN_ATTEMPTS: u32 = 8;
/// Sorted files beyond which a publisher waits for RocksDB to merge them.
const MERGE_ABOVE_FILES: u64 = 12;

/// A view of the index as it was when it was opened.
pub(crate) struct IndexReader {
    db: DB,
    path: PathBuf,
    /// What `CURRENT` was: every writer makes it anew.
    opened: Option<(u64, SystemTime)>,
}

/// The index, open for changes. The holder has the publish lock.
pub(crate) struct IndexWriter {
    db: DB,
    path: PathBuf,
}

impl IndexReader {
    /// Opens the index as it is now, even while another process writes it.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.join("CURRENT").exists() {
            return Err(damaged(path, "it is missing"));
        }
        threads::check_for_index(path)?;
        let opened = current(path);
        // A writer may delete a merged file between our reading its name and
        // opening it; then the next attempt sees the new names.
        let mut attempt = 0;
        loop {
            match DB::open_for_read_only(&options(), path, false) {
                Ok(db) => {
                    return Ok(Self {
                        db,
                        path: path.to_owned(),
                        opened,
                    });
                }
                Err(error) if attempt >= OPEN_ATTEMPTS => return Err(failed(path, &error)),
                Err(_) => std::thread::sleep(std::time::Duration::from_millis(1 << attempt.min(5))),
            }
            attempt += 1;
        }
    }

    /// Whether the index has been written since: this view may hold on to files
    /// that are deleted.
    pub fn is_outdated(&self) -> bool {
        current(&self.path) != self.opened
    }

    /// Where the chunk with this key is.
    pub fn get(&self, key: ChunkKey) -> Result<Option<Location>> {
        let found = self
            .db
            .get_pinned(key.to_index_key())
            .map_err(|error| failed(&self.path, &error))?;
        found.map(|value| self.location(&value)).transpose()
    }

    /// Where the chunks with these keys are, in the order of the keys.
    pub fn get_many(&self, keys: &[ChunkKey]) -> Result<Vec<Option<Location>>> {
        self.db
            .multi_get(keys.iter().map(|key| key.to_index_key()))
            .into_iter()
            .map(|found| {
                let value = found.map_err(|error| failed(&self.path, &error))?;
                value.map(|value| self.location(&value)).transpose()
            })
            .collect()
    }

    /// All entries, sorted by kind and key.
    pub fn entries(&self) -> impl Iterator<Item = Result<(ChunkKey, Location)>> + '_ {
        self.scan(IteratorMode::Start)
    }

    /// All entries of manifests.
    pub fn manifests(&self) -> impl Iterator<Item = Result<(ChunkKey, Location)>> + '_ {
        const FIRST: [u8; 1] = [ChunkKind::Manifest as u8];
        self.scan(IteratorMode::From(&FIRST, rocksdb::Direction::Forward))
    }

    fn scan(
        &self,
        mode: IteratorMode<'_>,
    ) -> impl Iterator<Item = Result<(ChunkKey, Location)>> + '_ {
        let mut read = ReadOptions::default();
        read.set_verify_checksums(true);
        read.fill_cache(false);
        self.db.iterator_opt(mode, read).map(|item| {
            let (key, value) = item.map_err(|error| failed(&self.path, &error))?;
            let key = parse_key(&key).ok_or_else(|| damaged(&self.path, "a key is malformed"))?;
            Ok((key, self.location(&value)?))
        })
    }

    fn location(&self, value: &[u8]) -> Result<Location> {
        parse_location(value).ok_or_else(|| damaged(&self.path, "a value is malformed"))
    }
}

impl IndexWriter {
    /// Opens the index for changes, creating an empty one if there is none.
    pub fn open_or_create(path: &Path) -> Result<Self> {
        threads::check_for_index(path)?;
        let mut options = options();
        options.create_if_missing(true);
        Ok(Self {
            db: DB::open(&options, path).map_err(|error| failed(path, &error))?,
            path: path.to_owned(),
        })
    }

    /// Opens an index that must exist.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.join("CURRENT").exists() {
            return Err(damaged(path, "it is missing"));
        }
        threads::check_for_index(path)?;
        Ok(Self {
            db: DB::open(&options(), path).map_err(|error| failed(path, &error))?,
            path: path.to_owned(),
        })
    }

    /// Adds or replaces entries; durable after [`IndexWriter::flush`].
    pub fn put(&self, entries: impl IntoIterator<Item = (ChunkKey, Location)>) -> Result<()> {
        self.write(entries, |batch, (key, location)| {
            batch.put(key.to_index_key(), location.to_bytes());
        })
    }

    /// Removes those of `keys` that map to a location `doomed` accepts.
    ///
    /// All are looked up before the first is removed: a look-up among changes that
    /// are not flushed sorts them all.
    pub fn remove_if(
        &self,
        keys: impl IntoIterator<Item = ChunkKey>,
        doomed: impl Fn(Location) -> bool,
    ) -> Result<()> {
        let mut remove = Vec::new();
        for key in keys {
            if self.get(key)?.is_some_and(&doomed) {
                remove.push(key);
            }
        }
        self.write(remove, |batch, key| batch.delete(key.to_index_key()))
    }

    /// Where the chunk with this key is.
    pub fn get(&self, key: ChunkKey) -> Result<Option<Location>> {
        let found = self
            .db
            .get_pinned(key.to_index_key())
            .map_err(|error| failed(&self.path, &error))?;
        found
            .map(|value| {
                parse_location(&value).ok_or_else(|| damaged(&self.path, "a value is malformed"))
            })
            .transpose()
    }

    /// Makes all changes durable.
    pub fn flush(&self) -> Result<()> {
        durable::foreign_step("flush index", &self.path);
        let failed = |error| failed(&self.path, &error);
        let mut flush = FlushOptions::default();
        flush.set_wait(true);
        self.db.flush_opt(&flush).map_err(failed)?;
        let files = self
            .db
            .property_int_value("rocksdb.num-files-at-level0")
            .map_err(failed)?;
        if files.is_some_and(|count| count > MERGE_ABOVE_FILES) {
            self.db
                .wait_for_compact(&WaitForCompactOptions::default())
                .map_err(failed)?;
        }
        Ok(())
    }

    fn write<T>(
        &self,
        items: impl IntoIterator<Item = T>,
        add: impl Fn(&mut WriteBatch, T),
    ) -> Result<()> {
        let mut without_log = WriteOptions::default();
        without_log.disable_wal(true);
        let mut items = items.into_iter();
        loop {
            let mut batch = WriteBatch::default();
            items
                .by_ref()
                .take(BATCH_ENTRIES)
                .for_each(|item| add(&mut batch, item));
            if batch.is_empty() {
                return Ok(());
            }
            self.db
                .write_opt(batch, &without_log)
                .map_err(|error| failed(&self.path, &error))?;
        }
    }
}

/// Identity of the file that RocksDB names its present state in.
fn current(path: &Path) -> Option<(u64, SystemTime)> {
    let found = std::fs::metadata(path.join("CURRENT")).ok()?;
    Some((found.ino(), found.modified().ok()?))
}

fn options() -> Options {
    let mut table = BlockBasedOptions::default();
    table.set_bloom_filter(BLOOM_BITS_PER_KEY, false);
    table.set_block_cache(&shared_cache());
    table.set_format_version(5);
    let mut options = Options::default();
    options.set_block_based_table_factory(&table);
    // Keys are hashes: nothing to compress.
    options.set_compression_type(DBCompressionType::None);
    options.set_max_open_files(-1);
    // There are few files.
    options.set_max_file_opening_threads(1);
    options.set_keep_log_file_num(1);
    options.set_max_log_file_size(64 << 10);
    options.set_max_manifest_file_size(1 << 20);
    options.set_level_zero_file_num_compaction_trigger(8);
    options.set_write_buffer_size(32 << 20);
    // Changes come in bulk and are flushed at once: sorting them then is cheaper
    // than keeping them sorted. This memtable takes one writer at a time.
    options.set_memtable_factory(MemtableFactory::Vector);
    options.set_allow_concurrent_memtable_write(false);
    options.set_log_level(LogLevel::Error);
    options.increase_parallelism(2);
    options
}

fn shared_cache() -> Cache {
    static CACHE: LazyLock<Cache> = LazyLock::new(|| Cache::new_lru_cache(CACHE_BYTES));
    CACHE.clone()
}

fn parse_key(key: &[u8]) -> Option<ChunkKey> {
    let (kind, prefix) = key.split_first()?;
    Some(ChunkKey {
        kind: ChunkKind::from_byte(*kind)?,
        prefix: prefix.try_into().ok()?,
    })
}

fn parse_location(value: &[u8]) -> Option<Location> {
    Some(Location::from_bytes(value.try_into().ok()?))
}

fn failed(path: &Path, error: &rocksdb::Error) -> Error {
    let message = error.to_string();
    // The system's own failures are no damage.
    let causes = [
        ("No space left on device", rustix::io::Errno::NOSPC),
        ("Disk quota exceeded", rustix::io::Errno::DQUOT),
        ("Too many open files in system", rustix::io::Errno::NFILE),
        ("Too many open files", rustix::io::Errno::MFILE),
        ("Cannot allocate memory", rustix::io::Errno::NOMEM),
        ("Resource temporarily unavailable", rustix::io::Errno::AGAIN),
        ("Read-only file system", rustix::io::Errno::ROFS),
        ("Permission denied", rustix::io::Errno::ACCESS),
    ];
    // Whatever RocksDB made of them: one is called an invalid argument.
    if let Some((_, errno)) = causes.iter().find(|(text, _)| message.contains(text)) {
        return Error::io("use the index", path, std::io::Error::from(*errno));
    }
    match error.kind() {
        rocksdb::ErrorKind::Corruption => Damage::Index {
            path: path.to_owned(),
            reason: message,
        }
        .into(),
        _ => Error::Index {
            path: path.to_owned(),
            message,
        },
    }
}
