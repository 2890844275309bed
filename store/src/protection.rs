//! Tags that nobody removes or moves by mistake.
//!
//! A tag is protected while there is an empty file of its name in `protected/`. Older
//! programs do not look at it: they remove such a tag as any other.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::ErrorKind;

use crate::durable;
use crate::error::{Damage, Error, IoContext as _, Result};
use crate::layout::Layout;
use crate::name::check_tag;
use crate::opening::NO_DIRECTORY;

/// Whether a tag is protected.
pub(crate) fn is_protected(layout: &Layout, tag: &str) -> Result<bool> {
    let path = layout.protected().join(tag);
    match fs::symlink_metadata(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) if error.kind() == ErrorKind::NotADirectory => Err(no_directory(layout)),
        other => other.map(|_| true).context("inspect", &path),
    }
}

/// Which tags are protected is not known.
fn no_directory(layout: &Layout) -> Error {
    Damage::File {
        path: layout.protected(),
        reason: NO_DIRECTORY,
    }
    .into()
}

/// All protected tags.
pub(crate) fn all(layout: &Layout) -> Result<BTreeSet<String>> {
    let dir = layout.protected();
    let entries = match fs::read_dir(&dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(BTreeSet::new()),
        Err(error) if error.kind() == ErrorKind::NotADirectory => return Err(no_directory(layout)),
        other => other.context("list", &dir)?,
    };
    let mut tags = BTreeSet::new();
    for entry in entries {
        let name = entry.context("list", &dir)?.file_name();
        if let Some(name) = name.to_str().filter(|name| check_tag(name).is_ok()) {
            tags.insert(name.to_owned());
        }
    }
    Ok(tags)
}

/// Protects a tag, or no more. The caller holds the publish lock and has checked the
/// tag's name.
pub(crate) fn set(layout: &Layout, tag: &str, protected: bool) -> Result<()> {
    let dir = layout.protected();
    let path = dir.join(tag);
    if is_protected(layout, tag)? == protected {
        return Ok(());
    }
    if !protected {
        return durable::remove_file(&path);
    }
    if !dir.is_dir() {
        durable::make_dir(&dir)?;
        durable::sync_dir(layout.root())?;
    }
    let options = OpenOptions::new().write(true).create(true).to_owned();
    durable::create(&path, &options).context("create", &path)?;
    // An empty file has nothing but its name that could be lost.
    durable::sync_dir(&dir)
}

/// That a tag may be removed or moved.
///
/// # Errors
/// [`Error::Protected`]; [`Error::Damaged`] if that cannot be told.
pub(crate) fn check(layout: &Layout, tag: &str) -> Result<()> {
    match is_protected(layout, tag)? {
        true => Err(Error::Protected {
            tag: tag.to_owned(),
        }),
        false => Ok(()),
    }
}
