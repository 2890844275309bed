//! The index on disk: RocksDB, and over it the runs that are not in it yet.
//!
//! Nobody waits for RocksDB to write but who brings it many entries. A publication
//! adds a run; once there are more than [`MAX_RUN_ENTRIES`] entries in them, they
//! become one sorted file. Merging such files is left to the
//! collector ([`tidy`]), and where nobody ever collects to whoever has committed, once
//! that is told ([`crate::Store::tidy_index`]). Neither holds the publish lock then.

use std::collections::{BTreeMap, btree_map};
use std::iter::Peekable;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::rocks::{self, Sorted};
use super::run::{Changes, Key, Runs, take_away};
use super::{PreparedFor, damaged};
use crate::durable;
use crate::error::{Error, IoContext as _, Result};
use crate::id::{ChunkKey, ChunkKind};
use crate::pack::{Location, PackNumber};

/// Runs that there are at most; then one is made of all.
const MAX_RUNS: usize = 16;
/// Entries in them.
const MAX_RUN_ENTRIES: usize = 16 << 10;
/// Entries in them if RocksDB cannot take them over: a merge is under way.
const MOST_RUN_ENTRIES: usize = 512 << 10;
/// Entries that a writer keeps in memory.
const MAX_PENDING: usize = 1 << 20;
const OPEN_ATTEMPTS: u32 = 9;
/// How long a merge takes at most; the next one goes on.
const LONGEST_MERGE: Duration = Duration::from_secs(30);
/// How often it is looked whether somebody still merges.
const RETRY: Duration = Duration::from_millis(5);

/// A view of the index as it was when it was opened.
pub(crate) struct IndexReader {
    sorted: Arc<Sorted>,
    runs: Runs,
    path: PathBuf,
}

/// Entries that are written, for the index to take over.
pub(crate) struct Prepared {
    /// `None` if there are no entries.
    file: Option<PathBuf>,
}

/// What the sorted files say of some keys, looked up before a writer has the publish lock:
/// in a large index that takes a read of the disk for each.
pub(crate) struct Ahead {
    sorted: Arc<Sorted>,
    found: BTreeMap<Key, Option<Location>>,
}

impl Drop for Prepared {
    fn drop(&mut self) {
        if let Some(file) = self.file.take() {
            durable::discard(&file);
        }
    }
}

/// The index, open for changes. The holder has the publish lock.
pub(crate) struct IndexWriter {
    path: PathBuf,
    keeps_runs: bool,
    state: Mutex<WriterState>,
}

struct WriterState {
    view: IndexReader,
    ahead: Option<Ahead>,
    pending: Changes,
}

impl WriterState {
    /// What is pending counts most, then the runs as they are now.
    fn get(&self, key: &Key) -> Result<Option<Location>> {
        if let Some(found) = self.pending.get(key) {
            return Ok(*found);
        }
        if let Some(found) = self.view.runs.get(key) {
            return Ok(found);
        }
        let ahead = self.ahead.as_ref();
        let ahead = ahead.filter(|ahead| Arc::ptr_eq(&ahead.sorted, &self.view.sorted));
        match ahead.and_then(|ahead| ahead.found.get(key)) {
            Some(found) => Ok(*found),
            None => self.view.sorted.get(key),
        }
    }
}

impl IndexReader {
    /// Opens the index as it is now, even while another process writes it.
    pub fn open(path: &Path) -> Result<Self> {
        let mut attempt = 0;
        loop {
            attempt += 1;
            if let Some(opened) = Self::try_open(path, attempt == OPEN_ATTEMPTS)? {
                return Ok(opened);
            }
            if attempt == OPEN_ATTEMPTS {
                return Err(Error::Busy {
                    path: path.to_owned(),
                    holder: "a process that writes it all the time".to_owned(),
                });
            }
            std::thread::sleep(Duration::from_millis(1 << attempt.min(5)));
        }
    }

    /// `None` if a writer came between: it may delete a merged file, or make runs a
    /// sorted file, after their names were read and before they are opened.
    fn try_open(path: &Path, is_last: bool) -> Result<Option<Self>> {
        let seen = Runs::look(path)?;
        let sorted = match Sorted::open(path) {
            Err(error) if !is_last && rocks::exists(path) && !error.is_exhaustion() => {
                return Ok(None);
            }
            other => other?,
        };
        // Had the runs become sorted files meanwhile, they would hide newer entries.
        let runs = Runs::load(path, seen, &sorted.known_runs)?;
        Ok(runs.map(|runs| Self {
            sorted,
            runs,
            path: path.to_owned(),
        }))
    }

    /// What its runs change.
    #[cfg(test)]
    pub fn changes(&self) -> Changes {
        self.runs.changes()
    }

    /// Whether sorted files have been written since: this view may hold on to
    /// some that are deleted.
    pub fn is_outdated(&self) -> bool {
        self.sorted.is_outdated()
    }

    /// Where the chunk with this key is.
    pub fn get(&self, key: ChunkKey) -> Result<Option<Location>> {
        let key = key.to_index_key();
        match self.runs.get(&key) {
            Some(found) => Ok(found),
            None => self.sorted.get(&key),
        }
    }

    /// Where the chunks with these keys are, in the order of the keys.
    pub fn get_many(&self, keys: &[ChunkKey]) -> Result<Vec<Option<Location>>> {
        let keys: Vec<Key> = keys.iter().map(|key| key.to_index_key()).collect();
        let mut found = self.sorted.get_many(&keys)?;
        if self.runs.count() > 0 {
            for (key, found) in keys.iter().zip(&mut found) {
                if let Some(newer) = self.runs.get(key) {
                    *found = newer;
                }
            }
        }
        Ok(found)
    }

    /// Looks these keys up for [`IndexWriter::use_ahead`].
    pub fn look_ahead(&self, keys: &[ChunkKey]) -> Result<Ahead> {
        let keys: Vec<Key> = keys.iter().map(|key| key.to_index_key()).collect();
        let found = self.sorted.get_many(&keys)?;
        Ok(Ahead {
            sorted: self.sorted.clone(),
            found: keys.into_iter().zip(found).collect(),
        })
    }

    /// Writes changes, sorted by key, to a file that a writer can take over. It stands
    /// beside the others under a name that says what it is for.
    pub fn prepare(
        &self,
        made_for: PreparedFor,
        changes: &[(ChunkKey, Option<Location>)],
    ) -> Result<Prepared> {
        if changes.is_empty() {
            return Ok(Prepared { file: None });
        }
        let file = prepared_path(&self.path, made_for);
        let prepared = Prepared {
            file: Some(file.clone()),
        };
        let changes = changes.iter().map(|(key, at)| (key.to_index_key(), *at));
        rocks::write_file(&self.path, &file, changes)?;
        Ok(prepared)
    }

    /// All entries, sorted by kind and key.
    pub fn entries(&self) -> impl Iterator<Item = Result<(ChunkKey, Location)>> + '_ {
        self.scan(ChunkKind::Page)
    }

    /// All entries of manifests.
    pub fn manifests(&self) -> impl Iterator<Item = Result<(ChunkKey, Location)>> + '_ {
        self.scan(ChunkKind::Manifest)
    }

    /// The entries of this kind and those after it.
    fn scan(&self, from: ChunkKind) -> impl Iterator<Item = Result<(ChunkKey, Location)>> + '_ {
        let mut changes = self.runs.changes();
        let mut first = [0; super::run::KEY_LEN];
        first[0] = from as u8;
        let changes = changes.split_off(&first);
        let overlaid = Overlaid {
            changes: changes.into_iter().peekable(),
            sorted: self.sorted.scan(first[0]).peekable(),
        };
        overlaid.map(|entry| {
            let (key, at) = entry?;
            let key = parse_key(key).ok_or_else(|| damaged(&self.path, "a key is malformed"))?;
            Ok((key, at))
        })
    }
}

/// Sorted entries with changes over them.
struct Overlaid<S: Iterator> {
    changes: Peekable<btree_map::IntoIter<Key, Option<Location>>>,
    sorted: Peekable<S>,
}

impl<S: Iterator<Item = Result<(Key, Location)>>> Iterator for Overlaid<S> {
    type Item = Result<(Key, Location)>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let (change, is_over) = match (self.changes.peek(), self.sorted.peek()) {
                (Some((changed, _)), Some(Ok((key, _)))) => (changed <= key, changed == key),
                (Some(_), None) => (true, false),
                _ => (false, false),
            };
            if !change {
                return self.sorted.next();
            }
            if is_over {
                self.sorted.next();
            }
            if let Some((key, Some(at))) = self.changes.next() {
                return Some(Ok((key, at)));
            }
        }
    }
}

impl IndexWriter {
    /// Opens the index for changes, creating an empty one if there is none.
    pub fn open_or_create(path: &Path) -> Result<Self> {
        if !rocks::exists(path) {
            rocks::create(path)?;
        }
        Self::open(path)
    }

    /// Opens an index that must exist.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            keeps_runs: true,
            state: Mutex::new(WriterState {
                view: IndexReader::open(path)?,
                ahead: None,
                pending: Changes::new(),
            }),
        })
    }

    /// Leaves nothing in runs, for programs that know no more than RocksDB.
    pub fn without_runs(mut self) -> Self {
        self.keeps_runs = false;
        self
    }

    /// Adds or replaces entries; durable after [`IndexWriter::flush`].
    pub fn put(&self, entries: impl IntoIterator<Item = (ChunkKey, Location)>) -> Result<()> {
        let entries = entries.into_iter();
        self.change(entries.map(|(key, at)| (key, Some(at))))
    }

    /// Removes those of `keys` that map to a location `doomed` accepts.
    pub fn remove_if(
        &self,
        keys: impl IntoIterator<Item = ChunkKey>,
        mut doomed: impl FnMut(Location) -> bool,
    ) -> Result<()> {
        let mut remove = Vec::new();
        for key in keys {
            if self.get(key)?.is_some_and(&mut doomed) {
                remove.push((key, None));
            }
        }
        self.change(remove)
    }

    /// Where the chunk with this key is.
    pub fn get(&self, key: ChunkKey) -> Result<Option<Location>> {
        self.state().get(&key.to_index_key())
    }

    /// Takes what was looked up before for what the sorted files say. False: these are
    /// others by now, and whatever is needed is looked up again.
    pub fn use_ahead(&self, ahead: Ahead) -> bool {
        let mut state = self.state();
        let is_current = Arc::ptr_eq(&ahead.sorted, &state.view.sorted);
        state.ahead = is_current.then_some(ahead);
        is_current
    }

    /// The keys of all entries that may have changed since, and of those that lie over
    /// what [`IndexWriter::take`] brings; `None` if they are not known.
    pub fn changed_since(&self, view: &IndexReader) -> Result<Option<Vec<ChunkKey>>> {
        let state = self.state();
        if !Arc::ptr_eq(&state.view.sorted, &view.sorted) || view.sorted.is_outdated() {
            return Ok(None);
        }
        let keys = state.view.runs.changes().into_keys();
        Ok(Some(keys.filter_map(parse_key).collect()))
    }

    /// Takes over entries that were prepared, durably and all at once, with nothing else
    /// pending. False if somebody merges files at the moment. What the writer itself finds
    /// is as before.
    pub fn take(&self, mut prepared: Prepared) -> Result<bool> {
        let Some(file) = &prepared.file else {
            return Ok(true);
        };
        match rocks::ingest_file(&self.path, file) {
            Ok(()) => {
                prepared.file = None;
                Ok(true)
            }
            Err(error) if error.is_full_disk() => Err(error),
            Err(error) => {
                tracing::debug!(%error, "index entries are entered a few at a time");
                Ok(false)
            }
        }
    }

    /// Makes all changes durable.
    pub fn flush(&self) -> Result<()> {
        let mut state = self.state();
        let WriterState { view, pending, .. } = &mut *state;
        let entries = view.runs.entries() + pending.len();
        if entries == 0 || pending.is_empty() && self.keeps_runs {
            return Ok(());
        }
        if entries > MAX_RUN_ENTRIES || !self.keeps_runs {
            let sorted = match self.keeps_runs {
                true => sort_in(&self.path, view, pending),
                // There is no other place for them: who merges has to come to his end.
                false => waiting(|| sort_in(&self.path, view, pending)),
            };
            match sorted {
                Ok(()) => {
                    *view = IndexReader::open(&self.path)?;
                    pending.clear();
                    return Ok(());
                }
                // They can wait: for the end of a merge, for memory, for threads.
                Err(error)
                    if self.keeps_runs && entries <= MOST_RUN_ENTRIES && !error.is_full_disk() =>
                {
                    tracing::debug!(%error, "index entries stay unsorted");
                }
                Err(error) => return Err(error),
            }
        }
        if view.runs.count() < MAX_RUNS {
            view.runs.add(&self.path, pending)?;
        } else {
            view.runs.add_and_sum(&self.path, pending)?;
        }
        pending.clear();
        Ok(())
    }

    fn change(
        &self,
        changes: impl IntoIterator<Item = (ChunkKey, Option<Location>)>,
    ) -> Result<()> {
        let mut state = self.state();
        for (key, at) in changes {
            state.pending.insert(key.to_index_key(), at);
            if state.pending.len() >= MAX_PENDING {
                let WriterState { view, pending, .. } = &mut *state;
                sort_in(&self.path, view, pending)?;
                *view = IndexReader::open(&self.path)?;
                pending.clear();
            }
        }
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, WriterState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tries again for as long as somebody merges at most.
fn waiting(mut attempt: impl FnMut() -> Result<()>) -> Result<()> {
    let until = Instant::now() + 2 * LONGEST_MERGE;
    loop {
        match attempt() {
            Err(error) if error.is_held_by_another() && Instant::now() < until => {
                std::thread::sleep(RETRY);
            }
            done => return done,
        }
    }
}

/// Makes one sorted file of RocksDB of the runs and of what comes after them.
///
/// Order: the file, then the runs go. The other way round a crash would lose
/// entries; between the two they are there twice, and the same.
fn sort_in(path: &Path, view: &IndexReader, pending: &Changes) -> Result<()> {
    let mut changes = view.runs.changes();
    changes.extend(pending.iter().map(|(key, at)| (*key, *at)));
    rocks::ingest(path, &changes)?;
    take_away(path)
}

/// Merges sorted runs if there are more than `leave` beside the oldest, for a bounded time. Changes
/// nothing that a look-up finds, and waits for nobody: what somebody else merges or
/// writes at the moment is left to him.
pub(crate) fn tidy(path: &Path, leave: u64) -> Result<()> {
    if Sorted::open(path)?.unmerged_runs()? <= leave {
        return Ok(());
    }
    match rocks::merge(path, LONGEST_MERGE) {
        Err(error) => {
            tracing::debug!(%error, "sorted files of the index stay unmerged");
            Ok(())
        }
        merged => merged,
    }
}

fn prepared_path(index: &Path, made_for: PreparedFor) -> PathBuf {
    index.join(match made_for {
        PreparedFor::Pack(number) => format!("entries-{number}.sst"),
        PreparedFor::Removal => "entries-removed.sst".to_owned(),
    })
}

/// Removes what [`IndexReader::prepare`] has written for packs that nobody writes any
/// more, and for collections that have ended. The caller collects.
pub(crate) fn sweep(path: &Path, is_written: impl Fn(PackNumber) -> Result<bool>) -> Result<()> {
    let Ok(entries) = std::fs::read_dir(path) else {
        return Ok(());
    };
    for entry in entries {
        let name = entry.context("list", path)?.file_name();
        let number = name.to_str().and_then(|name| {
            PackNumber::parse(name.strip_prefix("entries-")?.strip_suffix(".sst")?)
        });
        if let Some(number) = number
            && !is_written(number)?
        {
            durable::discard(&prepared_path(path, PreparedFor::Pack(number)));
        }
    }
    durable::discard(&prepared_path(path, PreparedFor::Removal));
    Ok(())
}

fn parse_key(key: Key) -> Option<ChunkKey> {
    let (kind, prefix) = key.split_first()?;
    Some(ChunkKey {
        kind: ChunkKind::from_byte(*kind)?,
        prefix: prefix.try_into().ok()?,
    })
}
