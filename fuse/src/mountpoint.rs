//! Looking at mount points, and undoing mounts, live or dead.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::io::Errno;
use rustix::mount::UnmountFlags;

use crate::error::{Error, Result};
use crate::server::SOURCE_PREFIX;

/// A snapstore mount in the kernel's table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mountpoint {
    /// Where it is mounted.
    pub dir: PathBuf,
    /// The store it shows, as its server says.
    pub store: PathBuf,
    /// The user whose server it is.
    pub user: u32,
}

impl Mountpoint {
    /// All snapstore mounts of this machine that this process can see.
    ///
    /// # Errors
    /// If `/proc/self/mountinfo` cannot be read.
    pub fn all() -> Result<Vec<Self>> {
        let path = Path::new("/proc/self/mountinfo");
        let table = fs::read_to_string(path).map_err(|source| Error::Io {
            action: "read",
            path: path.to_owned(),
            source,
        })?;
        Ok(table.lines().filter_map(parse_line).collect())
    }
}

/// `ID PARENT MAJ:MIN ROOT DIR OPTIONS [FIELDS] - TYPE SOURCE SUPER` (proc(5)).
fn parse_line(line: &str) -> Option<Mountpoint> {
    let (mount, filesystem) = line.split_once(" - ")?;
    let mut filesystem = filesystem.split(' ');
    // `fuse` when root mounts, `fuse.snapstore` through fusermount3.
    if !matches!(filesystem.next()?, "fuse" | "fuse.snapstore") {
        return None;
    }
    let source = unescape(filesystem.next()?);
    let mut options = filesystem.next()?.split(',');
    let user = options.find_map(|option| option.strip_prefix("user_id=")?.parse().ok())?;
    Some(Mountpoint {
        dir: unescape(mount.split(' ').nth(4)?).into(),
        store: source.strip_prefix(SOURCE_PREFIX)?.into(),
        user,
    })
}

/// Undoes the octal escapes of mountinfo (space, tab, newline, backslash).
fn unescape(field: &str) -> String {
    [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ]
    .iter()
    .fold(field.to_owned(), |text, (escape, plain)| {
        text.replace(escape, plain)
    })
}

/// Whether `dir` is a FUSE mount whose server is gone.
#[must_use]
pub fn is_dead(dir: &Path) -> bool {
    // Not stat(2): the kernel answers that from its cache.
    rustix::fs::statvfs(dir).is_err_and(|errno| errno == Errno::NOTCONN)
}

/// Makes sure `dir` can be mounted on: clears away a mount of ours whose server
/// is gone.
///
/// # Errors
/// [`Error::NoFuse`], [`Error::NotADirectory`], [`Error::AlreadyMounted`].
pub fn prepare(dir: &Path) -> Result<()> {
    fs::File::open("/dev/fuse").map_err(|source| Error::NoFuse { source })?;
    if is_dead(dir) {
        tracing::warn!(dir = %dir.display(), "unmounting what a dead server left");
        unmount(dir, true)?;
    }
    let metadata = fs::metadata(dir).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => Error::NotADirectory {
            path: dir.to_owned(),
        },
        _ => Error::Io {
            action: "inspect",
            path: dir.to_owned(),
            source,
        },
    })?;
    if !metadata.is_dir() {
        return Err(Error::NotADirectory {
            path: dir.to_owned(),
        });
    }
    if find(dir)?.is_some() {
        return Err(Error::AlreadyMounted {
            path: dir.to_owned(),
        });
    }
    Ok(())
}

/// Unmounts a snapstore mount. With `lazy` it disappears at once and ends when
/// its last user lets go of it; a mount whose server is gone always does.
///
/// # Errors
/// [`Error::NotMounted`], [`Error::InUse`].
pub fn unmount(dir: &Path, lazy: bool) -> Result<()> {
    let mounted = find(dir)?.ok_or_else(|| Error::NotMounted {
        path: dir.to_owned(),
    })?;
    let lazy = lazy || is_dead(dir);
    let flags = if lazy {
        UnmountFlags::DETACH | UnmountFlags::NOFOLLOW
    } else {
        UnmountFlags::NOFOLLOW
    };
    match rustix::mount::unmount(&mounted.dir, flags) {
        Ok(()) => Ok(()),
        Err(Errno::BUSY) => Err(Error::InUse {
            path: dir.to_owned(),
        }),
        Err(Errno::PERM) => unmount_as_user(&mounted.dir, lazy),
        Err(errno) => Err(Error::Io {
            action: "unmount",
            path: dir.to_owned(),
            source: errno.into(),
        }),
    }
}

/// Users other than root unmount through libfuse's setuid helper.
fn unmount_as_user(dir: &Path, lazy: bool) -> Result<()> {
    let mut command = Command::new("fusermount3");
    command
        .arg("-u")
        .args(lazy.then_some("-z"))
        .arg("--")
        .arg(dir);
    let failed = |source| Error::Io {
        action: "unmount (fusermount3)",
        path: dir.to_owned(),
        source,
    };
    let output = command.output().map_err(failed)?;
    let message = String::from_utf8_lossy(&output.stderr);
    if output.status.success() {
        Ok(())
    } else if message.contains("busy") {
        Err(Error::InUse {
            path: dir.to_owned(),
        })
    } else {
        Err(failed(io::Error::other(message.trim().to_owned())))
    }
}

/// The snapstore mount on top of `dir`. A dead mount cannot be resolved, so its
/// parent directory is.
fn find(dir: &Path) -> Result<Option<Mountpoint>> {
    let resolved = fs::canonicalize(dir).ok().or_else(|| {
        let absolute = std::path::absolute(dir).ok()?;
        let parent = fs::canonicalize(absolute.parent()?).ok()?;
        Some(parent.join(absolute.file_name()?))
    });
    let Some(resolved) = resolved else {
        return Ok(None);
    };
    Ok(Mountpoint::all()?
        .into_iter()
        .rev()
        .find(|mount| mount.dir == resolved))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_lines_are_told_apart() {
        let ours = "36 25 0:40 / /mnt/a\\040b ro,nosuid - fuse snapstore:/srv/store ro,user_id=1000,group_id=0";
        assert_eq!(
            parse_line(ours),
            Some(Mountpoint {
                dir: "/mnt/a b".into(),
                store: "/srv/store".into(),
                user: 1000,
            })
        );
        let other = "36 25 0:40 / /mnt ro shared:1 - fuse.sshfs host: ro";
        assert_eq!(parse_line(other), None);
    }

    #[test]
    fn what_is_not_mounted_cannot_be_unmounted() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let error = unmount(dir.path(), false).expect_err("nothing is mounted");
        assert!(matches!(error, Error::NotMounted { .. }), "{error}");
    }
}
