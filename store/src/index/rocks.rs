//! RocksDB: sorted files of index entries. The only user of that library.
//!
//! It is opened in a time that hardly depends on how many entries there are: files
//! are large, and their indexes and filters cut into blocks that are read when they
//! are needed, into a cache of bounded size. All files are opened at once: so a view
//! stays what it is while another process merges and deletes them.
//!
//! Entries come as whole sorted files. There is no memtable with entries and no log
//! to replay, and durability is one step. RocksDB's own block checksums are checked
//! on every read.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use rocksdb::{
    BlockBasedIndexType, BlockBasedOptions, Cache, ColumnFamilyDescriptor, DB, DBCompactionStyle,
    DBCompressionType, DEFAULT_COLUMN_FAMILY_NAME, IngestExternalFileOptions, IteratorMode,
    LogLevel, Options, ReadOptions, SstFileWriter, UniversalCompactOptions, WaitForCompactOptions,
};

use super::damaged;
use super::run::{self, Changes, Key};
use crate::durable;
use crate::error::{Damage, Error, IoContext as _, Result};
use crate::memory;
use crate::pack::Location;
use crate::regular;
use crate::threads;

/// Memory for blocks of entries, indexes and filters, per process.
pub(crate) const CACHE_BYTES: usize = 32 << 20;
/// Address space that an index takes when it is opened, beside the cache.
const OPEN_BYTES: usize = 48 << 20;
const BLOOM_BITS_PER_KEY: f64 = 10.0;
/// Files of 18 million entries: few, since each is opened with the index. While one is written
/// its filter and index are in memory, two bytes an entry.
const FILE_BYTES: u64 = 1 << 30;
/// Sorted runs from which on a merge takes them.
const MERGE_FROM_RUNS: i32 = 4;
/// RocksDB's own number of levels.
const LEVELS: u64 = 7;

/// The sorted files as they were when they were opened.
pub(super) struct Sorted {
    db: DB,
    path: PathBuf,
    opened: Option<State>,
    /// What lies over them.
    pub known_runs: run::Known,
}

/// What tells two states of the files apart: RocksDB names its list of files in
/// `CURRENT`, and appends to that list.
#[derive(Clone, PartialEq, Eq, Debug)]
struct State {
    current: (u64, SystemTime),
    list: String,
    list_len: u64,
}

/// What this process has open, to be shared.
static OPEN: Mutex<Vec<Weak<Sorted>>> = Mutex::new(Vec::new());

impl Sorted {
    /// Opens the files that there are now.
    pub fn open(path: &Path) -> Result<Arc<Self>> {
        if !exists(path) {
            return Err(damaged(path, "it is missing"));
        }
        let state = State::now(path);
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|known| known.strong_count() > 0);
        let known = open.iter().filter_map(Weak::upgrade);
        if let Some(known) = known
            .filter(|known| state.is_some() && known.opened == state)
            .find(|known| known.path == path)
        {
            return Ok(known);
        }
        check_files(path)?;
        memory::check(OPEN_BYTES + CACHE_BYTES).context("get memory for", path)?;
        threads::check_for_index(path)?;
        let db = opened(path, || {
            // With its columns named: without, RocksDB first opens all of it to see whether
            // there is a single file, and then once more.
            let column = ColumnFamilyDescriptor::new(DEFAULT_COLUMN_FAMILY_NAME, options());
            DB::open_cf_descriptors_read_only(&options(), path, [column], false)
        })?;
        threads::index_is_open();
        let unchanged = State::now(path) == state;
        let opened = Arc::new(Self {
            db,
            path: path.to_owned(),
            opened: state.filter(|_| unchanged),
            known_runs: run::Known::default(),
        });
        open.push(Arc::downgrade(&opened));
        Ok(opened)
    }

    pub fn is_outdated(&self) -> bool {
        self.opened.is_none() || State::now(&self.path) != self.opened
    }

    /// What is filed under this key.
    pub fn get(&self, key: &Key) -> Result<Option<Location>> {
        let found = self.db.get_pinned(key);
        let found = found.map_err(|error| failed(&self.path, &error))?;
        found.map(|value| self.location(&value)).transpose()
    }

    /// What is filed under these keys, in their order.
    pub fn get_many(&self, keys: &[Key]) -> Result<Vec<Option<Location>>> {
        let found = self.db.multi_get(keys).into_iter();
        found
            .map(|found| {
                let value = found.map_err(|error| failed(&self.path, &error))?;
                value.map(|value| self.location(&value)).transpose()
            })
            .collect()
    }

    /// The entries of this kind and those after it, sorted.
    pub fn scan(&self, kind: u8) -> impl Iterator<Item = Result<(Key, Location)>> + '_ {
        let mut read = ReadOptions::default();
        read.set_verify_checksums(true);
        read.fill_cache(false);
        let from = [kind];
        let mode = IteratorMode::From(&from, rocksdb::Direction::Forward);
        self.db.iterator_opt(mode, read).map(|item| {
            let (key, value) = item.map_err(|error| failed(&self.path, &error))?;
            let key = Key::try_from(&*key);
            let key = key.map_err(|_| damaged(&self.path, "a key is malformed"))?;
            Ok((key, self.location(&value)?))
        })
    }

    /// Sorted runs beside the oldest one: a look-up asks each, and each has files that are
    /// opened with the index.
    pub fn unmerged_runs(&self) -> Result<u64> {
        let at_level = |level: u64| {
            let name = format!("rocksdb.num-files-at-level{level}");
            let counted = self.db.property_int_value(name.as_str());
            counted.map(Option::unwrap_or_default)
        };
        let mut runs = 0;
        // A level is one run, but for the newest, where each file is one.
        for level in 0..LEVELS {
            let files = at_level(level).map_err(|error| failed(&self.path, &error))?;
            runs += if level == 0 { files } else { files.min(1) };
        }
        Ok(runs.saturating_sub(1))
    }

    fn location(&self, value: &[u8]) -> Result<Location> {
        let value = value.try_into().map(Location::from_bytes);
        value.map_err(|_| damaged(&self.path, "a value is malformed"))
    }
}

impl State {
    fn now(path: &Path) -> Option<Self> {
        let current = path.join("CURRENT");
        let found = fs::metadata(&current).ok()?;
        let list = regular::read_to_string(&current)?;
        let list_len = fs::metadata(path.join(list.trim())).ok()?.len();
        Some(Self {
            current: (found.ino(), found.modified().ok()?),
            list,
            list_len,
        })
    }
}

/// Whether there is an index.
pub(super) fn exists(path: &Path) -> bool {
    path.join("CURRENT").exists()
}

/// That RocksDB, which opens whatever has the name of a file of its own, waits for no pipe
/// and follows no link.
fn check_files(path: &Path) -> Result<()> {
    let Ok(entries) = std::fs::read_dir(path) else {
        // That is for RocksDB to say.
        return Ok(());
    };
    for entry in entries.flatten() {
        let odd = entry.file_type().ok().filter(|kind| !kind.is_dir());
        if let Some(reason) = odd.and_then(regular::why_odd) {
            let name = entry.file_name();
            return Err(damaged(path, &format!("{}: {reason}", name.display())));
        }
    }
    Ok(())
}

/// Makes an empty index.
pub(super) fn create(path: &Path) -> Result<()> {
    let mut options = options();
    options.create_if_missing(true);
    open_to_write(path, &options).map(drop)
}

/// Adds one sorted file, durably.
pub(super) fn ingest(path: &Path, changes: &Changes) -> Result<()> {
    let db = open_to_ingest(path)?;
    let file = path.join("new-entries.sst");
    write_file(path, &file, changes.iter().map(|(key, at)| (*key, *at)))?;
    move_in(&db, path, &file)
}

/// Adds a sorted file of [`write_file`], durably.
pub(super) fn ingest_file(path: &Path, file: &Path) -> Result<()> {
    move_in(&open_to_ingest(path)?, path, file)
}

/// Writes a sorted file of ascending keys for the index at `path`.
pub(super) fn write_file(
    path: &Path,
    file: &Path,
    changes: impl Iterator<Item = (Key, Option<Location>)>,
) -> Result<()> {
    let failed = |error: rocksdb::Error| failed(path, &error);
    // Left by a process that was killed.
    durable::unlink(file)?;
    let options = options();
    let mut writer = SstFileWriter::create(&options);
    writer.open(file).map_err(failed)?;
    for (key, at) in changes {
        match at {
            Some(at) => writer.put(key, at.to_bytes()),
            None => writer.delete(key),
        }
        .map_err(failed)?;
    }
    writer.finish().map_err(failed)
}

fn open_to_ingest(path: &Path) -> Result<DB> {
    let mut options = options();
    options.set_disable_auto_compactions(true);
    open_to_write(path, &options)
}

fn move_in(db: &DB, path: &Path, file: &Path) -> Result<()> {
    durable::foreign_step("flush index", path);
    let mut ingest = IngestExternalFileOptions::default();
    ingest.set_move_files(true);
    db.ingest_external_file_opts(&ingest, vec![&file])
        .map_err(|error| failed(path, &error))
}

/// Merges files as far as that pays, for a bounded time.
pub(super) fn merge(path: &Path, longest: Duration) -> Result<()> {
    let db = open_to_write(path, &options())?;
    let mut wait = WaitForCompactOptions::default();
    wait.set_timeout(u64::try_from(longest.as_micros()).unwrap_or(u64::MAX));
    let merged = db.wait_for_compact(&wait);
    db.cancel_all_background_work(true);
    merged.map_err(|error| failed(path, &error))
}

/// RocksDB ends the process where it gets no memory or no thread.
fn open_to_write(path: &Path, options: &Options) -> Result<DB> {
    check_files(path)?;
    memory::check(OPEN_BYTES + CACHE_BYTES).context("get memory for", path)?;
    threads::check_for_index(path)?;
    opened(path, || DB::open(options, path))
}

/// Opens RocksDB. Before it takes its lock it puts away the log of whoever had it open
/// before, and fails if another process has just done that.
fn opened(path: &Path, open: impl Fn() -> Result<DB, rocksdb::Error>) -> Result<DB> {
    let mut attempts = 100;
    loop {
        match open() {
            Err(error) if attempts > 0 && error.to_string().contains("LOG.old") => {
                attempts -= 1;
                std::thread::sleep(Duration::from_millis(2));
            }
            done => return done.map_err(|error| failed(path, &error)),
        }
    }
}

fn options() -> Options {
    let mut table = BlockBasedOptions::default();
    table.set_bloom_filter(BLOOM_BITS_PER_KEY, false);
    table.set_block_cache(&shared_cache());
    table.set_format_version(5);
    table.set_index_type(BlockBasedIndexType::TwoLevelIndexSearch);
    table.set_partition_filters(true);
    // The index of these blocks is read when a file is opened.
    table.set_metadata_block_size(16 << 10);
    table.set_cache_index_and_filter_blocks(true);
    table.set_cache_index_and_filter_blocks_with_high_priority(true);
    table.set_pin_top_level_index_and_filter(true);
    let mut options = Options::default();
    options.set_block_based_table_factory(&table);
    // Keys are hashes: nothing to compress.
    options.set_compression_type(DBCompressionType::None);
    options.set_max_open_files(-1);
    options.set_target_file_size_base(FILE_BYTES);
    options.set_max_bytes_for_level_base(FILE_BYTES);
    options.set_level_zero_file_num_compaction_trigger(MERGE_FROM_RUNS);
    // Files of like sizes are merged: an entry is rewritten as often as the index has
    // doubled, not with each few new files. Keys are hashes, so any file overlaps any other.
    options.set_compaction_style(DBCompactionStyle::Universal);
    let mut like_sizes = UniversalCompactOptions::default();
    like_sizes.set_size_ratio(50);
    options.set_universal_compaction_options(&like_sizes);
    options.set_skip_stats_update_on_db_open(true);
    options.set_stats_dump_period_sec(0);
    options.set_stats_persist_period_sec(0);
    // There are few files.
    options.set_max_file_opening_threads(1);
    options.set_keep_log_file_num(1);
    options.set_max_log_file_size(64 << 10);
    options.set_max_manifest_file_size(1 << 20);
    // Nothing is written into it.
    options.set_write_buffer_size(64 << 10);
    options.set_log_level(LogLevel::Error);
    options.set_max_background_jobs(2);
    options
}

fn shared_cache() -> Cache {
    static CACHE: LazyLock<Cache> = LazyLock::new(|| Cache::new_lru_cache(CACHE_BYTES));
    CACHE.clone()
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
    let unreadable = [
        "Input/output error",
        "Structure needs cleaning",
        "No data available",
        "Bad message",
    ];
    match error.kind() {
        rocksdb::ErrorKind::Corruption => Damage::Index {
            path: path.to_owned(),
            reason: message,
        }
        .into(),
        // The disk cannot read a file of it.
        _ if unreadable.iter().any(|text| message.contains(text)) => Damage::Index {
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(super) mod tests {
    use rocksdb::{FlushOptions, MemtableFactory, WriteBatch, WriteOptions};

    use super::*;
    use crate::id::ChunkKey;

    /// An index as it was written before there were runs.
    pub fn make_as_before(path: &Path, entries: impl Iterator<Item = (ChunkKey, Location)>) {
        let mut table = BlockBasedOptions::default();
        table.set_bloom_filter(BLOOM_BITS_PER_KEY, false);
        table.set_format_version(5);
        let mut options = Options::default();
        options.create_if_missing(true);
        options.set_block_based_table_factory(&table);
        options.set_compression_type(DBCompressionType::None);
        options.set_memtable_factory(MemtableFactory::Vector);
        options.set_allow_concurrent_memtable_write(false);
        let db = DB::open(&options, path).unwrap();
        let mut without_log = WriteOptions::default();
        without_log.disable_wal(true);
        for (number, (key, at)) in entries.enumerate() {
            let mut batch = WriteBatch::default();
            batch.put(key.to_index_key(), at.to_bytes());
            db.write_opt(batch, &without_log).unwrap();
            if number % 10_000 == 9_999 {
                db.flush_opt(&FlushOptions::default()).unwrap();
            }
        }
    }

    /// Keeps others from writing.
    pub fn hold(path: &Path) -> impl Drop + use<> {
        open_to_write(path, &options()).unwrap()
    }
}
