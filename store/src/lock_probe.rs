//! Filesystems on which flock(2) keeps nobody away.
//!
//! Everything that changes a store relies on locks. Several kernels may have one
//! filesystem, and each may keep its locks to itself; then two processes would
//! both believe that they are alone, and the second would lose what the first
//! has acknowledged. Where that may be so, nothing is written.
//!
//! Whether locks of this kernel's own processes exclude each other is tried with
//! two open files. Whether those of others do cannot be tried from here: the type
//! of the filesystem and its options decide. A filesystem that only one kernel
//! has is fine, and that is what any unknown one is taken for.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::io::Errno;

use crate::error::{Error, IoContext as _, Result};
use crate::layout::Layout;
use crate::mount_table::{MountEntry, mount_id, mount_table};
use crate::regular::{self, Opened};

/// Of a user who knows that nobody else has the filesystem.
const TRUST: &str = "SNAPSTORE_TRUST_LOCKS";

/// `f_type` of filesystems that may have to do with other machines (statfs(2),
/// linux/magic.h): 9p, FUSE (virtiofs, too), NFS, SMB, SMB 2, AFS, GFS 2.
const SHARED: [u64; 7] = [
    0x0102_1997,
    0x6573_5546,
    0x6969,
    0xff53_4d42,
    0xfe53_4d42,
    0x5346_414f,
    0x0116_1970,
];

/// Refuses to write where locks keep nobody away.
pub(crate) fn check(layout: &Layout) -> Result<()> {
    let root = layout.root();
    let found = rustix::fs::statfs(root).context("inspect", root)?;
    let kind = found.f_type.cast_unsigned() & 0xffff_ffff;
    if pretended().is_none() && !SHARED.contains(&kind) {
        return Ok(());
    }
    if std::env::var_os(TRUST).is_some_and(|value| value == "1") {
        return Ok(());
    }
    let (filesystem, options) = filesystem_of(root)?;
    let why = match why_not(&filesystem, &options) {
        Some(why) => why,
        None if exclude_each_other(&probed(layout))? => return Ok(()),
        None => "which does not honour locks",
    };
    Err(Error::NoLocks {
        path: root.to_owned(),
        filesystem,
        why,
    })
}

/// Why locks on this type of filesystem keep nobody away.
fn why_not(filesystem: &str, options: &[String]) -> Option<&'static str> {
    const OTHERS: &str = "whose locks do not reach its other users";
    let has = |wanted: &[&str]| {
        options
            .iter()
            .any(|option| wanted.contains(&option.as_str()))
    };
    let local = match filesystem {
        "virtiofs" | "9p" => true,
        "fuse.sshfs" | "fuse.s3fs" | "fuse.rclone" | "fuse.gcsfuse" | "fuse.goofys"
        | "fuse.mount-s3" | "fuse.curlftpfs" | "fuse.davfs" => true,
        "nfs" | "nfs4" => has(&["nolock", "local_lock=all", "local_lock=flock"]),
        "cifs" | "smb3" => has(&["nobrl"]),
        "afs" => true,
        "gfs2" | "ocfs2" => has(&["localflocks"]),
        _ => false,
    };
    local.then_some(OTHERS)
}

/// Its type, and its own options.
fn filesystem_of(path: &Path) -> Result<(String, Vec<String>)> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(path, flags, Mode::empty()).context("open", path)?;
    let id = mount_id(&dir).context("inspect", path)?;
    let table = mount_table().context("read", "/proc/self/mountinfo".as_ref())?;
    let entry = table.into_iter().find(|entry| entry.id == id);
    let text = |name: &OsStr| String::from_utf8_lossy(name.as_bytes()).into_owned();
    let known = |entry: MountEntry| {
        let options = entry.options.iter().map(|option| text(option));
        (text(&entry.filesystem), options.collect())
    };
    let (filesystem, options) = entry.map_or_else(|| ("unknown".to_owned(), Vec::new()), known);
    Ok((pretended().unwrap_or(filesystem), options))
}

/// Tests pretend that all filesystems are of a type, in builds with debug
/// assertions.
fn pretended() -> Option<String> {
    if cfg!(debug_assertions) {
        return std::env::var("SNAPSTORE_PRETEND_FILESYSTEM").ok();
    }
    None
}

/// What to try locks on: a store that is being created has no configuration yet, and of
/// one that is to be repaired the disk may not read it.
fn probed(layout: &Layout) -> PathBuf {
    let config = layout.config();
    match regular::open(&config) {
        Ok(Opened::File(_)) => config,
        _ => layout.locks(),
    }
}

/// Whether the lock on one open file keeps that on another one away.
fn exclude_each_other(path: &Path) -> Result<bool> {
    let open = || File::open(path).context("open", path);
    let (one, other) = (open()?, open()?);
    Ok(excludes(|| {
        flock(&one, FlockOperation::NonBlockingLockShared)?;
        flock(&other, FlockOperation::NonBlockingLockExclusive)
    }))
}

/// Whether the second of two locks was refused because of the first.
fn excludes(lock_both: impl FnOnce() -> Result<(), Errno>) -> bool {
    lock_both() == Err(Errno::WOULDBLOCK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filesystems_are_told_apart_by_type_and_options() {
        let why = |filesystem, options: &[&str]| {
            let options: Vec<_> = options.iter().map(|&option| option.to_owned()).collect();
            why_not(filesystem, &options).is_some()
        };
        for local in ["virtiofs", "9p", "fuse.sshfs", "afs"] {
            assert!(why(local, &["rw"]), "{local}");
        }
        assert!(why("nfs4", &["rw", "local_lock=all"]));
        assert!(why("nfs", &["rw", "nolock", "local_lock=flock"]));
        assert!(why("cifs", &["nobrl"]));
        assert!(!why("nfs4", &["rw", "local_lock=none"]));
        assert!(!why("cifs", &["rw"]));
        for one_kernel in ["ext4", "tmpfs", "fuse.fuse-overlayfs", "fuseblk", "zfs"] {
            assert!(!why(one_kernel, &["rw"]), "{one_kernel}");
        }
    }

    #[test]
    fn locks_of_this_kernel_are_tried() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(exclude_each_other(file.path()).unwrap());
        assert!(!excludes(|| Ok(())), "both were granted");
        assert!(!excludes(|| Err(Errno::NOLCK)), "there are none");
        assert!(!excludes(|| Err(Errno::OPNOTSUPP)), "there are none");
    }
}
