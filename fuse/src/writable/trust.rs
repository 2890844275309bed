//! Whether a directory stays what it is: nobody but its user and root can put another one
//! in its place.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::process::{getegid, geteuid};

/// The user and group of this process.
pub(crate) fn user() -> (u32, u32) {
    (geteuid().as_raw(), getegid().as_raw())
}

const GROUP_WRITES: u32 = 0o020;
const OTHERS_WRITE: u32 = 0o002;
/// Only the owner of an entry can rename or remove it (inode(7), `S_ISVTX`).
const STICKY: u32 = 0o1000;

/// The first of a directory and those above it in which another user can rename or remove
/// what is there; `None` if there is none. This user's own group counts as the user.
///
/// # Errors
/// If one of them cannot be looked at.
pub(super) fn changeable_by_others(dir: &Path) -> io::Result<Option<PathBuf>> {
    let (user, group) = user();
    let dir = fs::canonicalize(dir)?;
    for part in dir.ancestors() {
        let found = fs::symlink_metadata(part)?;
        let writes = |bit: u32| found.mode() & bit != 0 && found.mode() & STICKY == 0;
        let is_own = found.uid() == 0 || found.uid() == user;
        let by_group = writes(GROUP_WRITES) && found.gid() != 0 && found.gid() != group;
        if !is_own || by_group || writes(OTHERS_WRITE) {
            return Ok(Some(part.to_owned()));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn what_others_can_write_to_is_named_unless_it_is_sticky() {
        let dir = tempfile::tempdir().unwrap();
        let within = dir.path().join("within");
        fs::create_dir(&within).unwrap();
        let set = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode));
        for (mode, is_named) in [
            (0o700, false),
            (0o755, false),
            (0o1777, false),
            (0o777, true),
        ] {
            set(dir.path(), mode).unwrap();
            let named = changeable_by_others(&within).unwrap();
            let whole = fs::canonicalize(dir.path()).unwrap();
            assert_eq!(named, is_named.then_some(whole), "{mode:o}");
        }
    }
}
