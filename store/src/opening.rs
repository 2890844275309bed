//! What a directory is: a store, what is left of one, or none.
//!
//! Copies lose what is empty: git, some archives and synchronisation leave empty
//! directories out. What was empty is made again when a store is opened. What was not
//! is damage, and `repair` says what can be rebuilt of it.

use std::fs;
use std::path::Path;

use crate::error::{Damage, Error, IoContext as _, Result};
use crate::index::IndexWriter;
use crate::layout::Layout;
use crate::lock::{self, LockKind, is_read_only};
use crate::name::check_tag;
use crate::pack::PackNumber;

/// The error for a directory without a configuration.
pub(crate) fn without_config(layout: &Layout) -> Error {
    match has_packs(layout) {
        Ok(true) => Damage::File {
            path: layout.config(),
            reason: "it is missing",
        }
        .into(),
        Ok(false) => Error::NoStore {
            path: layout.root().to_owned(),
        },
        Err(error) => error,
    }
}

/// Whether this is a store or what is left of one.
pub(crate) fn is_store(layout: &Layout) -> Result<bool> {
    Ok(is_there(&layout.config()) || has_packs(layout)?)
}

/// What stands in the place of a directory of the store and is none. A link to a directory
/// is one.
pub(crate) fn no_directories(layout: &Layout) -> Vec<std::path::PathBuf> {
    let mut dirs = layout.directories().to_vec();
    dirs.push(layout.index());
    dirs.retain(|dir| is_there(dir) && !dir.is_dir());
    dirs
}

/// The same of directories that only those need who ask for what is in them.
pub(crate) fn no_directories_beside(layout: &Layout) -> Vec<std::path::PathBuf> {
    let mut dirs = vec![layout.protected(), layout.working_sets()];
    dirs.retain(|dir| is_there(dir) && !dir.is_dir());
    dirs
}

/// Why such a thing is damage.
pub(crate) const NO_DIRECTORY: &str = "it is not a directory";

/// That each directory of the store that is there is one.
pub(crate) fn check_directories(layout: &Layout) -> Result<()> {
    match no_directories(layout).pop() {
        Some(path) => Err(Damage::File {
            path,
            reason: NO_DIRECTORY,
        }
        .into()),
        None => Ok(()),
    }
}

/// Makes the directories again that were empty and are missing.
pub(crate) fn restore_empty(layout: &Layout) -> Result<()> {
    for dir in [layout.leases(), layout.locks()] {
        if !is_there(&dir) {
            make(&dir)?;
        }
    }
    let lost = [layout.tags(), layout.packs(), layout.index()];
    if lost.iter().all(|dir| is_there(dir)) || !is_empty(layout)? {
        return Ok(());
    }
    // Under the lock, since somebody else may be about to fill them.
    let _publish = match lock::acquire(layout, LockKind::Publish, lock::DEFAULT_TIMEOUT) {
        Err(Error::Io { source, .. }) if is_read_only(&source) => return Ok(()),
        Err(Error::NoLocks { .. }) => return Ok(()),
        other => other?,
    };
    if !is_empty(layout)? {
        return Ok(());
    }
    make(&layout.tags())?;
    make(&layout.packs())?;
    if !is_there(&layout.index()) {
        drop(IndexWriter::open_or_create(&layout.index())?);
    }
    Ok(())
}

/// Whether nothing was ever committed, or all of it is gone.
pub(crate) fn is_empty(layout: &Layout) -> Result<bool> {
    Ok(!has_packs(layout)? && !any_name(&layout.tags(), |name| check_tag(name).is_ok())?)
}

/// Whether there are packs, whole or not.
pub(crate) fn has_packs(layout: &Layout) -> Result<bool> {
    any_name(&layout.packs(), |name| {
        let digits = name.strip_suffix(".pack");
        digits.and_then(PackNumber::parse).is_some()
    })
}

/// The error for a directory of a store that is not there.
pub(crate) fn missing_directory(path: &Path) -> Error {
    Damage::File {
        path: path.to_owned(),
        reason: "the directory is missing",
    }
    .into()
}

fn any_name(dir: &Path, wanted: impl Fn(&str) -> bool) -> Result<bool> {
    use std::io::ErrorKind::{NotADirectory, NotFound};
    let entries = match fs::read_dir(dir) {
        Err(error) if matches!(error.kind(), NotFound | NotADirectory) => return Ok(false),
        other => other.context("list", dir)?,
    };
    for entry in entries {
        let name = entry.context("list", dir)?.file_name();
        if name.to_str().is_some_and(&wanted) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn is_there(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

/// Where nothing can be written, reading goes without.
fn make(dir: &Path) -> Result<()> {
    match fs::create_dir(dir) {
        Err(error) if is_read_only(&error) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        other => other.context("create", dir),
    }
}
