//! Runs of a bucket, read once: their names are never used again, so what a host has kept of
//! them stays what it is.
//!
//! ```text
//! cache/BUCKET/SESSION-N.hooks     a run, as it is in the bucket
//! ```
//! Nothing of it is trusted, or made durable: a run has its own check. Runs that have gone from the bucket
//! go here with the next look.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::thread;

use crate::error::usable;
use crate::hooks::run::{LONGEST_RUN_BYTES, Run};
use crate::protocol::{Error, Name, Result};
use crate::remote::Remote;

/// Runs that are read at once.
const AT_ONCE: usize = 8;
/// The most that is read of a bucket's runs, the newest first.
const MOST_RUNS: usize = 4096;
const MOST_BYTES: u64 = 256 << 20;
const SUFFIX: &str = "hooks";

/// The runs that are there.
pub struct Runs<'a> {
    remote: &'a Remote,
    dir: Option<PathBuf>,
    left: Vec<Name>,
}

impl<'a> Runs<'a> {
    /// Looks which runs there are. Those that were read are kept in this directory, if there
    /// is one.
    pub fn list(remote: &'a Remote, dir: Option<&Path>) -> Result<Self> {
        let listed = usable(remote.bucket.list("hooks/").map_err(Error::from))?;
        let mut listed = listed.unwrap_or_default();
        listed.sort_by_key(|one| one.modified);
        let names: BTreeSet<Name> = listed
            .iter()
            .filter_map(|one| Name::parse_hooks(&one.key))
            .collect();
        let mut left = Vec::new();
        let mut total_bytes = 0_u64;
        for one in listed.iter().rev() {
            let Some(name) = Name::parse_hooks(&one.key) else {
                continue;
            };
            let is_run = one.len_bytes <= LONGEST_RUN_BYTES;
            if is_run && left.len() < MOST_RUNS && total_bytes + one.len_bytes <= MOST_BYTES {
                total_bytes += one.len_bytes;
                left.push(name);
            }
        }
        let dir = dir.and_then(|dir| {
            let made = fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(dir);
            made.ok()?;
            forget_others(dir, &names);
            Some(dir.to_owned())
        });
        Ok(Self { remote, dir, left })
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.left.is_empty()
    }

    /// The next ones, but for those that cannot be read. `None` once that were all.
    pub fn next(&mut self) -> Result<Option<Vec<Run>>> {
        if self.left.is_empty() {
            return Ok(None);
        }
        let names: Vec<Name> = self.left.drain(..AT_ONCE.min(self.left.len())).collect();
        let read: Vec<Result<Option<Run>>> = thread::scope(|scope| {
            let (remote, dir) = (self.remote, self.dir.as_deref());
            let threads = names
                .iter()
                .map(|name| scope.spawn(move || read(remote, dir, *name)));
            let threads: Vec<_> = threads.collect();
            let joined = threads.into_iter().map(|thread| thread.join());
            joined.map(|run| run.unwrap_or(Ok(None))).collect()
        });
        let read: Vec<Option<Run>> = read.into_iter().collect::<Result<_>>()?;
        Ok(Some(read.into_iter().flatten().collect()))
    }
}

fn read(remote: &Remote, dir: Option<&Path>, name: Name) -> Result<Option<Run>> {
    let key = name.hooks_key();
    let path = dir.map(|dir| dir.join(format!("{name}.{SUFFIX}")));
    if let Some(path) = &path
        && let Ok(run) = read_kept(path, &key)
    {
        return Ok(Some(run));
    }
    let found = usable(remote.bucket.get(&key, None).map_err(Error::from))?;
    let Some(bytes) = found.flatten() else {
        return Ok(None);
    };
    let Ok(run) = Run::decode(&key, &bytes) else {
        tracing::debug!(key, "a run of hooks is not used, since it is none");
        return Ok(None);
    };
    if let Some(path) = &path
        && let Err(error) = keep(path, &bytes)
    {
        tracing::debug!(%error, "a run of hooks is not kept");
    }
    Ok(Some(run))
}

fn read_kept(path: &Path, key: &str) -> io::Result<Run> {
    let found = fs::symlink_metadata(path)?;
    if !found.is_file() || found.len() > LONGEST_RUN_BYTES {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Run::decode(key, &fs::read(path)?).map_err(|_| io::ErrorKind::InvalidData.into())
}

fn keep(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let part = path.with_extension(format!("{:032x}.{SUFFIX}", crate::random()?));
    let written = fs::File::create_new(&part)
        .and_then(|mut file| file.write_all(bytes))
        .and_then(|()| fs::rename(&part, path));
    if written.is_err() {
        let _ = fs::remove_file(&part);
    }
    written
}

/// Removes what is kept of runs that are no more, and what was left half written.
fn forget_others(dir: &Path, names: &BTreeSet<Name>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.extension().is_none_or(|suffix| suffix != SUFFIX) {
            continue;
        }
        let name = path
            .file_stem()
            .and_then(|stem| Name::parse(stem.to_str()?));
        if name.is_none_or(|name| !names.contains(&name)) {
            // Somebody else's half-written one is written again some time.
            let _ = fs::remove_file(&path);
        }
    }
}
