//! Directories of one user alone, and files that others may have removed.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::Path;

use anyhow::{Context as _, bail};

/// Whether a path still leads to this file.
pub fn is_same(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(ours), Ok(theirs)) => (ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino()),
        _ => false,
    }
}

/// Removes a file, if it is there.
pub(super) fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Makes a directory that only this user can enter; one of another user's, or
/// one that others may enter, is refused.
pub(super) fn make_private(dir: &Path) -> anyhow::Result<()> {
    match DirBuilder::new().mode(0o700).recursive(false).create(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if let Some(parent) = dir.parent() {
                fs::create_dir_all(parent)
                    .with_context(|| format!("cannot create {}", parent.display()))?;
            }
            return make_private(dir);
        }
        other => other.with_context(|| format!("cannot create {}", dir.display()))?,
    }
    let found = match fs::symlink_metadata(dir) {
        // Whoever cleared away what was left in it has removed it meanwhile.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return make_private(dir),
        other => other.with_context(|| format!("cannot inspect {}", dir.display()))?,
    };
    let ours = found.uid() == rustix::process::geteuid().as_raw();
    if !found.is_dir() || !ours || found.mode() & 0o077 != 0 {
        bail!(
            "{} is not a directory of this user alone; remove it, `chmod 700` it, or name another \
             with SNAPSTORE_RUNTIME_DIR",
            dir.display()
        );
    }
    Ok(())
}
