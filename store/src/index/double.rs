//! The index in the memory of one process, for the simulator.
//!
//! It promises what the files promise and nothing more: a reader sees the
//! entries that were flushed before it was opened; a writer sees its own at
//! once; what was not flushed is lost when the writer goes, all of it or all
//! but the oldest batches, since too many entries are flushed early; one writer at
//! a time. Directories stand for indexes as they do on disk, so that `repair` can swap them: the file `CURRENT` in each holds
//! the number under which the entries are found here.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use super::{PreparedFor, damaged};
use crate::error::{Error, IoContext as _, Result};
use crate::id::{ChunkKey, ChunkKind};
use crate::pack::{Location, PackNumber};
use crate::sim::{self, StepKind};

type Entries = BTreeMap<ChunkKey, Location>;
/// `None` removes the entry.
type Batch = Vec<(ChunkKey, Option<Location>)>;

/// One index.
#[derive(Default)]
struct Instance {
    flushed: Arc<Entries>,
    has_writer: bool,
}

static INSTANCES: LazyLock<Mutex<HashMap<u64, Instance>>> = LazyLock::new(Mutex::default);
static NEXT_NUMBER: AtomicU64 = AtomicU64::new(1);

fn instances() -> MutexGuard<'static, HashMap<u64, Instance>> {
    INSTANCES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Frees the entries of the indexes with these numbers.
pub(crate) fn forget(numbers: impl IntoIterator<Item = u64>) {
    let mut instances = instances();
    for number in numbers {
        instances.remove(&number);
    }
}

/// A view of the index as it was when it was opened.
pub(crate) struct IndexReader {
    entries: Arc<Entries>,
    number: u64,
    path: PathBuf,
}

/// Entries for the index to take over.
pub(crate) struct Prepared(Batch);

/// What was looked up before a writer had the publish lock.
pub(crate) struct Ahead(Arc<Entries>);

/// The index, open for changes. The holder has the publish lock.
pub(crate) struct IndexWriter {
    number: u64,
    path: PathBuf,
    state: Mutex<WriterState>,
}

#[derive(Default)]
struct WriterState {
    flushed: Arc<Entries>,
    batches: Vec<Batch>,
}

/// What was added last: here one half of the index as it was when it was read, so that both
/// what it tells and what it does not tell is met.
pub(crate) struct LatestRuns(Arc<Entries>);

impl LatestRuns {
    /// `None` if there is no index.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        before(StepKind::IndexOpen, path)?;
        let number = number(path)?;
        let entries = number.map(|number| flushed(number, path)).transpose()?;
        Ok(entries.map(Self))
    }

    /// Where the chunk with this key is.
    pub fn get(&self, key: ChunkKey) -> Option<Location> {
        let is_told = key.prefix[0].is_multiple_of(2);
        self.0.get(&key).copied().filter(|_| is_told)
    }
}

impl IndexReader {
    /// Opens the index as it is now, even while another process writes it.
    pub fn open(path: &Path) -> Result<Self> {
        before(StepKind::IndexOpen, path)?;
        let number = number(path)?.ok_or_else(|| damaged(path, "it is missing"))?;
        Ok(Self {
            entries: flushed(number, path)?,
            number,
            path: path.to_owned(),
        })
    }

    /// Whether the index has been written since. Holding on to a view costs
    /// nothing here.
    pub fn is_outdated(&self) -> bool {
        false
    }

    /// Where the chunk with this key is.
    pub fn get(&self, key: ChunkKey) -> Result<Option<Location>> {
        before(StepKind::IndexGet, &self.path)?;
        Ok(self.entries.get(&key).copied())
    }

    /// Where the chunks with these keys are, in the order of the keys.
    pub fn get_many(&self, keys: &[ChunkKey]) -> Result<Vec<Option<Location>>> {
        before(StepKind::IndexGet, &self.path)?;
        Ok(keys
            .iter()
            .map(|key| self.entries.get(key).copied())
            .collect())
    }

    /// Looks these keys up for [`IndexWriter::use_ahead`].
    pub fn look_ahead(&self, _: &[ChunkKey]) -> Result<Ahead> {
        Ok(Ahead(self.entries.clone()))
    }

    /// Writes changes that a writer can take over.
    pub fn prepare(
        &self,
        _: PreparedFor,
        changes: &[(ChunkKey, Option<Location>)],
    ) -> Result<Prepared> {
        before(StepKind::Write, &self.path)?;
        Ok(Prepared(changes.to_vec()))
    }

    /// All entries, sorted by kind and key.
    pub fn entries(&self) -> impl Iterator<Item = Result<(ChunkKey, Location)>> + '_ {
        self.entries.iter().map(|(key, at)| Ok((*key, *at)))
    }

    /// All entries of manifests.
    pub fn manifests(&self) -> impl Iterator<Item = Result<(ChunkKey, Location)>> + '_ {
        let first = ChunkKey {
            kind: ChunkKind::Manifest,
            prefix: [0; 16],
        };
        self.entries.range(first..).map(|(key, at)| Ok((*key, *at)))
    }
}

impl IndexWriter {
    /// Opens the index for changes, creating an empty one if there is none.
    pub fn open_or_create(path: &Path) -> Result<Self> {
        before(StepKind::IndexOpen, path)?;
        if number(path)?.is_none() {
            create(path)?;
        }
        Self::open_existing(path)
    }

    /// Opens an index that must exist.
    pub fn open(path: &Path) -> Result<Self> {
        before(StepKind::IndexOpen, path)?;
        Self::open_existing(path)
    }

    /// It has no runs.
    pub fn without_runs(self) -> Self {
        self
    }

    fn open_existing(path: &Path) -> Result<Self> {
        let number = number(path)?.ok_or_else(|| damaged(path, "it is missing"))?;
        let flushed = flushed(number, path)?;
        let mut instances = instances();
        let instance = instances.entry(number).or_default();
        if instance.has_writer {
            return Err(Error::Index {
                path: path.to_owned(),
                message: "two writers".to_owned(),
            });
        }
        instance.has_writer = true;
        Ok(Self {
            number,
            path: path.to_owned(),
            state: Mutex::new(WriterState {
                flushed,
                ..WriterState::default()
            }),
        })
    }

    /// Adds or replaces entries; durable after [`IndexWriter::flush`].
    pub fn put(&self, entries: impl IntoIterator<Item = (ChunkKey, Location)>) -> Result<()> {
        let batch = entries.into_iter().map(|(key, at)| (key, Some(at)));
        self.write(batch.collect())
    }

    /// Removes those of `keys` that still map to a location `doomed` accepts.
    pub fn remove_if(
        &self,
        keys: impl IntoIterator<Item = ChunkKey>,
        mut doomed: impl FnMut(Location) -> bool,
    ) -> Result<()> {
        let mut remove = Batch::new();
        for key in keys {
            if self.get(key)?.is_some_and(&mut doomed) {
                remove.push((key, None));
            }
        }
        self.write(remove)
    }

    /// Where the chunk with this key is.
    pub fn get(&self, key: ChunkKey) -> Result<Option<Location>> {
        before(StepKind::IndexGet, &self.path)?;
        let state = self.state();
        let written = state.batches.iter().rev().find_map(|batch| {
            let found = batch.iter().rev().find(|(known, _)| *known == key);
            found.map(|(_, at)| *at)
        });
        Ok(written.unwrap_or_else(|| state.flushed.get(&key).copied()))
    }

    /// False: the index has been written since.
    pub fn use_ahead(&self, ahead: Ahead) -> bool {
        Arc::ptr_eq(&ahead.0, &self.state().flushed)
    }

    /// The keys of all entries that may have changed since; `None` if they are not known,
    /// which happens when many have.
    pub fn changed_since(&self, view: &IndexReader) -> Result<Option<Vec<ChunkKey>>> {
        let now = self.state().flushed.clone();
        if view.number != self.number {
            return Ok(None);
        }
        let keys = now.keys().chain(view.entries.keys());
        let changed = keys.filter(|key| now.get(key) != view.entries.get(key));
        let changed: Vec<ChunkKey> = changed.copied().collect();
        let is_known = changed.is_empty() || sim::choose(4) > 0;
        Ok(is_known.then_some(changed))
    }

    /// Takes over entries that were prepared, durably and all at once. False if somebody
    /// is in the way.
    pub fn take(&self, prepared: Prepared) -> Result<bool> {
        before(StepKind::IndexFlush, &self.path)?;
        self.state().batches.push(prepared.0);
        self.apply(usize::MAX);
        Ok(true)
    }

    /// Makes all changes durable.
    pub fn flush(&self) -> Result<()> {
        before(StepKind::IndexFlush, &self.path)?;
        self.apply(usize::MAX);
        Ok(())
    }

    fn write(&self, batch: Batch) -> Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        before(StepKind::IndexPut, &self.path)?;
        self.state().batches.push(batch);
        Ok(())
    }

    /// Flushes the oldest `count` batches.
    fn apply(&self, count: usize) {
        let mut state = self.state();
        let count = count.min(state.batches.len());
        let batches: Vec<_> = state.batches.drain(..count).collect();
        let entries = Arc::make_mut(&mut state.flushed);
        for (key, at) in batches.into_iter().flatten() {
            match at {
                Some(at) => entries.insert(key, at),
                None => entries.remove(&key),
            };
        }
        if let Some(instance) = instances().get_mut(&self.number) {
            instance.flushed = state.flushed.clone();
        }
    }

    fn state(&self) -> MutexGuard<'_, WriterState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for IndexWriter {
    fn drop(&mut self) {
        let batches = self.state().batches.len();
        if batches > 0 {
            self.apply(sim::choose(batches + 1));
        }
        if let Some(instance) = instances().get_mut(&self.number) {
            instance.has_writer = false;
        }
    }
}

/// Nothing is left beside it.
pub(crate) fn sweep(_: &Path, _: impl Fn(PackNumber) -> Result<bool>) -> Result<()> {
    Ok(())
}

/// Merging files changes nothing that can be seen, and there are none here.
pub(crate) fn tidy(_: &Path, _: u64) -> Result<()> {
    Ok(())
}

fn before(kind: StepKind, path: &Path) -> Result<()> {
    sim::before(kind, path).context("use the index at", path)
}

/// The number of the index in this directory; `None` if there is none.
fn number(path: &Path) -> Result<Option<u64>> {
    let current = path.join("CURRENT");
    match fs::read_to_string(&current) {
        Ok(text) => match text.trim().parse() {
            Ok(number) => Ok(Some(number)),
            Err(_) => Err(damaged(path, "CURRENT is malformed")),
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).context("read", &current),
    }
}

fn flushed(number: u64, path: &Path) -> Result<Arc<Entries>> {
    let instances = instances();
    let found = instances.get(&number).map(|found| found.flushed.clone());
    found.ok_or_else(|| damaged(path, "no index of this number is in memory"))
}

/// RocksDB flushes what it creates, but not the name of its directory.
fn create(path: &Path) -> Result<()> {
    let number = NEXT_NUMBER.fetch_add(1, Ordering::Relaxed);
    instances().insert(number, Instance::default());
    sim::note_index(number);
    fs::create_dir_all(path).context("create", path)?;
    let current = path.join("CURRENT");
    fs::write(&current, format!("{number}\n")).context("write", &current)?;
    sim::changed(path);
    sim::changed(&current);
    sim::synced_file(&current);
    sim::synced_dir(path);
    Ok(())
}
