//! How a mount is used: what was read of it, and in what pieces.
//!
//! Whoever maps a mounted image reads what he touches, and what the kernel reads around that.
//! A program that advises the kernel otherwise (huge pages, above all) reads most of the image
//! instead, and nothing goes wrong that anybody would see. The server sees it: by itself the
//! kernel asks for no more at once than the mount's read-ahead.

use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use serde::Serialize;
use snapstore_fuse::{MountCounters, Mountpoint};

use crate::error::{Busy, NotFound};
use crate::look::{self, ShownFile};

/// Below this much nothing is said: a program may read a table or a header at once.
const LEAST_BYTES: u64 = 2 << 20;

/// As people read it: what is no text is replaced.
fn lossy<S: serde::Serializer>(path: &Path, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&path.to_string_lossy())
}

/// How a mount is used.
#[derive(Debug, Serialize)]
pub struct MountUse {
    /// The directory that was asked for.
    #[serde(serialize_with = "lossy")]
    pub dir: PathBuf,
    /// The store that it shows.
    #[serde(serialize_with = "lossy")]
    pub store: PathBuf,
    /// Whether it can be written to.
    pub writable: bool,
    /// Whether more was read in pieces that somebody asked for than page by page.
    pub reads_large: bool,
    /// What the server of the whole mount has counted.
    pub counters: MountCounters,
    /// The files in the directory.
    pub files: Vec<ShownFile>,
}

/// Asks the server of the mount that `dir` is in.
///
/// # Errors
/// [`NotFound`] if there is none of this user or root; [`Busy`] if its server does not answer.
pub fn of(dir: &Path) -> anyhow::Result<MountUse> {
    // As the kernel has it, without asking a server.
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let held = match rustix::fs::open(dir, flags, Mode::empty()) {
        Err(Errno::NOENT | Errno::NOTDIR) => {
            bail!(NotFound(format!("there is no directory {}", dir.display())))
        }
        other => other.with_context(|| format!("cannot open {}", dir.display()))?,
    };
    let dir = std::fs::read_link(format!("/proc/self/fd/{}", held.as_raw_fd()))?;
    drop(held);
    let none = || NotFound(format!("{} is in no mount of this user", dir.display()));
    let user = rustix::process::geteuid().as_raw();
    let all = Mountpoint::all()?.into_iter();
    // The last one at a place is what a path leads to, the longest one what is nearest.
    let mount = all
        .filter(|mount| [0, user].contains(&mount.user) && dir.starts_with(&mount.dir))
        .max_by_key(|mount| mount.dir.components().count())
        .ok_or_else(none)?;
    let silent = || {
        Busy(format!(
            "the server of the mount at {} does not answer",
            mount.dir.display()
        ))
    };
    let counters = look::counters(std::slice::from_ref(&mount.dir));
    let counters = counters.into_iter().flatten().next().ok_or_else(silent)?;
    let files = look::files(&dir).with_context(|| format!("cannot look at {}", dir.display()))?;
    Ok(MountUse {
        store: mount.store.clone(),
        writable: mount.is_writable,
        reads_large: reads_large(&counters),
        files: files.ok_or_else(none)?,
        counters,
        dir,
    })
}

fn reads_large(counters: &MountCounters) -> bool {
    let large = counters.large_read_bytes;
    large >= LEAST_BYTES && large > counters.read_bytes / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_long_reads_are_nothing_to_speak_of() {
        let counters = |large_read_bytes, read_bytes| MountCounters {
            large_read_bytes,
            read_bytes,
            ..MountCounters::default()
        };
        assert!(reads_large(&counters(2 << 20, 3 << 20)));
        assert!(!reads_large(&counters(1 << 20, 1 << 20)));
        assert!(!reads_large(&counters(4 << 20, 64 << 20)));
    }
}
