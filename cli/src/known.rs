//! The remotes that a store knows: a file of it, which each command reads anew.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Write as _};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context as _, bail};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use snapstore_host::Usage;
use snapstore_remote::Place;
use snapstore_store::{Damage, Error};

/// The remotes of a store, by their names: a JSON object of URLs, or of places with all that
/// `remote add` was told, in this file of it.
const FILE: &str = "remotes.json";
/// The next one, until it is whole.
const PART: &str = "remotes.json.new";
/// Locked (flock(2)) by who changes it.
const LOCK: &str = "locks/remotes";

/// A remote as a store knows it.
#[derive(Serialize, Deserialize)]
pub struct Known {
    #[serde(flatten)]
    pub place: Place,
    /// Whether the store has used a remote in this directory.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub used: bool,
}

/// A place of which there is nothing else to say is written as its URL alone.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Written {
    Url(String),
    Known(Known),
}

impl From<Written> for Known {
    fn from(written: Written) -> Self {
        match written {
            Written::Url(url) => Self {
                place: Place::new(&url),
                used: false,
            },
            Written::Known(known) => known,
        }
    }
}

impl From<Known> for Written {
    fn from(known: Known) -> Self {
        match !known.used && known.place == Place::new(&known.place.url) {
            true => Self::Url(known.place.url),
            false => Self::Known(known),
        }
    }
}

/// The remotes of the store at this path.
pub fn remotes(store: &Path) -> anyhow::Result<BTreeMap<String, Known>> {
    let path = store.join(FILE);
    match fs::read(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(BTreeMap::new()),
        Err(error) if error.kind() == ErrorKind::IsADirectory => {
            Err(damaged(path, "it is a directory"))
        }
        read => {
            let read = read.with_context(|| format!("cannot read {}", path.display()))?;
            let written: Result<BTreeMap<String, Written>, _> = serde_json::from_slice(&read);
            let Ok(written) = written else {
                return Err(damaged(path, "it does not list remotes"));
            };
            Ok(written
                .into_iter()
                .map(|(name, one)| (name, one.into()))
                .collect())
        }
    }
}

fn damaged(path: PathBuf, reason: &'static str) -> anyhow::Error {
    Error::Damaged(Damage::File { path, reason }).into()
}

/// What is wrong with the list, if anything is.
pub fn damage(store: &Path) -> anyhow::Result<Option<Damage>> {
    match remotes(store).map_err(anyhow::Error::downcast) {
        Ok(_) => Ok(None),
        Err(Ok(Error::Damaged(damage))) => Ok(Some(damage)),
        Err(Ok(error)) => Err(error.into()),
        Err(Err(error)) => Err(error),
    }
}

/// Moves the list to the store's `damaged/` if it is damaged: under a name that nothing has
/// there.
pub fn set_aside(store: &Path) -> anyhow::Result<Option<Damage>> {
    if damage(store)?.is_none() {
        return Ok(None);
    }
    let _lock = lock(store)?;
    let Some(found) = damage(store)? else {
        return Ok(None);
    };
    let path = store.join(FILE);
    let cannot = || format!("cannot set {} aside", path.display());
    let dir = store.join("damaged");
    fs::create_dir_all(&dir).with_context(cannot)?;
    let free = (0_u32..).map(|number| match number {
        0 => dir.join(FILE),
        _ => dir.join(format!("{FILE}.{number}")),
    });
    let free = free
        .into_iter()
        .find(|to| fs::symlink_metadata(to).is_err());
    // First where it is from then on: it is never in neither.
    fs::rename(&path, free.expect("numbers do not run out"))
        .and_then(|()| File::open(&dir)?.sync_all())
        .and_then(|()| File::open(store)?.sync_all())
        .with_context(cannot)?;
    Ok(Some(found))
}

/// Removes what one left who was killed while it wrote the list.
pub fn tidy(store: &Path) -> anyhow::Result<()> {
    let part = store.join(PART);
    if fs::symlink_metadata(&part).is_err() {
        return Ok(());
    }
    let _lock = lock(store)?;
    match fs::remove_file(&part) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", part.display()))
        }
        _ => Ok(()),
    }
}

/// Waits until nobody else changes the list.
fn lock(store: &Path) -> anyhow::Result<File> {
    let lock = store.join(LOCK);
    let cannot = || format!("cannot lock {}", lock.display());
    let file = File::create(&lock).with_context(cannot)?;
    while let Err(error) = flock(&file, FlockOperation::LockExclusive) {
        if error != Errno::INTR {
            return Err(error).with_context(cannot);
        }
    }
    Ok(file)
}

/// That a directory can be a bucket of this store: the files of one would be taken for those
/// of the other.
pub fn check_apart(store: &Path, url: &str) -> anyhow::Result<()> {
    let Some(dir) = url.strip_prefix("file://") else {
        return Ok(());
    };
    let bucket = resolved(Path::new(dir));
    let store = resolved(store);
    if store.starts_with(&bucket) && store != bucket {
        bail!(Usage(format!(
            "the store {} is in {dir}, and a bucket may hold no store; choose another directory",
            store.display()
        )));
    }
    let is_store = |dir: &&Path| **dir == store || is_store(dir);
    if let Some(other) = bucket.ancestors().find(is_store) {
        bail!(Usage(format!(
            "{dir} is in the store {}, whose files would be mixed up with the bucket's; choose a \
             directory outside of it",
            other.display()
        )));
    }
    Ok(())
}

fn is_store(dir: &Path) -> bool {
    ["config", "tags", "packs", "locks"]
        .iter()
        .all(|name| dir.join(name).exists())
}

/// The path without links, as far as it is there.
fn resolved(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    for above in path.ancestors() {
        if let (Ok(found), Ok(rest)) = (fs::canonicalize(above), path.strip_prefix(above)) {
            let mut found = found;
            for one in rest.components() {
                match one {
                    Component::ParentDir => drop(found.pop()),
                    one => found.push(one),
                }
            }
            return found;
        }
    }
    path
}

/// Changes which remotes the store knows, if `change` says that it has. Of those who do so at
/// once each sees what the one before has written.
pub fn change(
    store: &Path,
    change: impl FnOnce(&mut BTreeMap<String, Known>) -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    let path = store.join(FILE);
    let unwritten = || format!("cannot write {}", path.display());
    let _lock = lock(store)?;
    let mut known = remotes(store)?;
    if !change(&mut known)? {
        return Ok(());
    }
    let written: BTreeMap<_, Written> = known
        .into_iter()
        .map(|(name, one)| (name, one.into()))
        .collect();
    let bytes = serde_json::to_vec_pretty(&written)?;
    // Only who has the lock writes it. What is not durable when it is renamed may be empty
    // after the power failed.
    let part = store.join(PART);
    let written = File::create(&part)
        .and_then(|mut file| file.write_all(&bytes).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&part, &path));
    if written.is_err() {
        let _ = fs::remove_file(&part);
    }
    written
        .and_then(|()| File::open(store)?.sync_all())
        .with_context(unwritten)
}
