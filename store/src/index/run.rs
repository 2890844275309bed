//! Runs: index changes that are not in RocksDB yet.
//!
//! A publication is one small file, made durable by two flushes, and RocksDB is
//! not opened for it. Its files are in `runs/` in the index's directory, numbered
//! in their order: newer ones count. Once there are many, the next one holds all of
//! them, and says so in its name (`00000017.all` after `00000016.run`): what is
//! before it does not count any more, whether it is still there or not. Once there
//! are many entries in them, they become one sorted file of RocksDB, and the directory
//! is renamed away as a whole: were they removed one by one, an older one could
//! outlive a newer one in a power cut, and count again.
//! What is in a file: [`crate::format::index_run`].

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use crate::durable;
use crate::error::{Damage, Error, IoContext as _, Result};
use crate::format::index_run::Run;
pub(super) use crate::format::index_run::{Changes, KEY_LEN, Key};
use crate::pack::Location;

use super::damaged;

/// The runs of an index, as they were at one moment.
#[derive(Debug)]
pub(super) struct Runs {
    dir: PathBuf,
    seen: Seen,
    /// Oldest first.
    runs: Vec<Arc<Run>>,
}

/// The runs that this process has read last over one state of the sorted files. A run's file
/// never changes, and its name is not given to another one while they are the same: only
/// once runs are in them are they taken away, and numbered anew.
#[derive(Default, Debug)]
pub(super) struct Known(Mutex<Vec<(Name, Arc<Run>)>>);

/// What tells two states of the directory apart.
#[derive(PartialEq, Eq, Debug)]
pub(super) struct Seen {
    dir: Option<(u64, SystemTime)>,
    names: Vec<Name>,
}

/// The name of a run's file; sorted by number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Name {
    number: u64,
    /// Whether it holds what is before it, too.
    is_sum: bool,
}

impl Runs {
    /// Which runs the index at `index` has now. They are looked for before the sorted files
    /// are opened, and read after it ([`Runs::load`]): the other way round, what becomes a
    /// sorted file in between would be in neither.
    pub fn look(index: &Path) -> Result<Seen> {
        Seen::now(&dir(index))
    }

    /// Reads the runs of the index at `index` that were `seen`, but for those that are
    /// `known`; `None` if they have to be looked for again, since they have become a part
    /// of RocksDB meanwhile.
    pub fn load(index: &Path, seen: Seen, known: &Known) -> Result<Option<Self>> {
        let dir = dir(index);
        let mut known = known.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut runs = Vec::new();
        for name in seen.that_count() {
            let before = known.iter().find(|(known, _)| known == name);
            let run = match before {
                Some((_, run)) => run.clone(),
                None => match read(index, &name.path(&dir))? {
                    Some(run) => Arc::new(run),
                    None => return Ok(None),
                },
            };
            runs.push((*name, run));
        }
        // Others may have come in the place of those that were seen.
        if Seen::now(&dir)? != seen {
            return Ok(None);
        }
        known.clone_from(&runs);
        let runs = runs.into_iter().map(|(_, run)| run).collect();
        Ok(Some(Self { dir, seen, runs }))
    }

    pub fn count(&self) -> usize {
        self.runs.len()
    }

    /// How many entries there are in all of them.
    pub fn entries(&self) -> usize {
        self.runs.iter().map(|run| run.len()).sum()
    }

    /// What the newest run with this key makes of it.
    pub fn get(&self, key: &Key) -> Option<Option<Location>> {
        self.runs.iter().rev().find_map(|run| run.get(key))
    }

    /// The sum of all runs.
    pub fn changes(&self) -> Changes {
        self.runs.iter().flat_map(|run| run.changes()).collect()
    }

    /// Adds a run, durably. The caller holds the publish lock.
    pub fn add(&mut self, index: &Path, changes: &Changes) -> Result<()> {
        self.write(index, changes, false)
    }

    /// Adds a run and makes one of all, durably. The caller holds the publish lock.
    pub fn add_and_sum(&mut self, index: &Path, changes: &Changes) -> Result<()> {
        let mut sum = self.changes();
        sum.extend(changes.iter().map(|(key, at)| (*key, *at)));
        self.write(index, &sum, true)?;
        let names = std::mem::take(&mut self.seen.names);
        for name in &names[..names.len() - 1] {
            // One that stays does not count.
            durable::discard(&name.path(&self.dir));
        }
        self.runs.drain(..self.runs.len() - 1);
        self.seen = Seen::now(&self.dir)?;
        Ok(())
    }

    fn write(&mut self, index: &Path, changes: &Changes, is_sum: bool) -> Result<()> {
        if self.seen.dir.is_none() {
            durable::make_dir(&self.dir)?;
            durable::sync_dir(index)?;
        }
        let name = Name {
            number: self.seen.names.last().map_or(1, |last| last.number + 1),
            is_sum,
        };
        let run = Run::new(changes);
        match run.write(&name.path(&self.dir)) {
            // What was not made durable is not to be acknowledged.
            Err(Error::Unconfirmed { path, source, .. }) => {
                return Err(Error::io("flush", path, source));
            }
            other => other?,
        }
        self.runs.push(Arc::new(run));
        self.seen = Seen::now(&self.dir)?;
        Ok(())
    }
}

/// `None` if there is no such file.
fn read(index: &Path, path: &Path) -> Result<Option<Run>> {
    let found = match Run::read(path) {
        Err(Error::Damaged(Damage::File { reason, .. })) => return Err(damaged(index, reason)),
        other => other?,
    };
    match found {
        Some(None) => Err(damaged(index, "a run has a part of an entry")),
        found => Ok(found.flatten()),
    }
}

impl Seen {
    fn now(dir: &Path) -> Result<Self> {
        let absent = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
        let nothing = Self {
            dir: None,
            names: Vec::new(),
        };
        let found = match fs::metadata(dir) {
            Err(error) if absent(&error) => return Ok(nothing),
            other => other.context("inspect", dir)?,
        };
        let entries = match fs::read_dir(dir) {
            Err(error) if absent(&error) => return Ok(nothing),
            other => other.context("list", dir)?,
        };
        let mut names = Vec::new();
        for entry in entries {
            let name = entry.context("list", dir)?.file_name();
            names.extend(name.to_str().and_then(Name::parse));
        }
        names.sort_unstable();
        let changed = found.modified().context("inspect", dir)?;
        Ok(Self {
            dir: Some((found.ino(), changed)),
            names,
        })
    }

    /// Bytes of the runs that count. Those that are gone by now have none.
    pub fn bytes(&self, index: &Path) -> Result<u64> {
        let dir = dir(index);
        self.that_count().iter().try_fold(0, |sum, name| {
            let path = name.path(&dir);
            match fs::metadata(&path) {
                Ok(found) => Ok(sum + found.len()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(sum),
                Err(error) => Err(error).context("inspect", &path),
            }
        })
    }

    fn that_count(&self) -> &[Name] {
        let first = self.names.iter().rposition(|name| name.is_sum);
        &self.names[first.unwrap_or(0)..]
    }
}

impl Name {
    fn parse(name: &str) -> Option<Self> {
        let (number, kind) = name.split_once('.')?;
        Some(Self {
            number: number.parse().ok()?,
            is_sum: match kind {
                "run" => false,
                "all" => true,
                _ => return None,
            },
        })
    }

    fn path(self, dir: &Path) -> PathBuf {
        let kind = if self.is_sum { "all" } else { "run" };
        dir.join(format!("{:08}.{kind}", self.number))
    }
}

/// Takes all runs away, durably: what they hold is in RocksDB. The caller holds the
/// publish lock.
pub(super) fn take_away(index: &Path) -> Result<()> {
    let dir = dir(index);
    if !dir.exists() {
        return Ok(());
    }
    let old = index.join("runs.old");
    durable::remove_dir(&old)?;
    match durable::rename(&dir, &old) {
        // One that overlayfs shows from a lower layer.
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::CrossesDevices => {
            return take_away_one_by_one(&dir);
        }
        other => other?,
    }
    durable::sync_dir(index)?;
    durable::remove_dir(&old)
}

/// The oldest first, each durably: what is left then holds for each of its keys what is in
/// RocksDB, too.
fn take_away_one_by_one(dir: &Path) -> Result<()> {
    for name in Seen::now(dir)?.names {
        durable::unlink(&name.path(dir))?;
        durable::sync_dir(dir)?;
    }
    Ok(())
}

fn dir(index: &Path) -> PathBuf {
    index.join("runs")
}
