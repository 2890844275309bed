//! Leases: who is using the store, so that the collector spares what they need.
//!
//! A lease is a file in `leases/` that its holder keeps locked with flock(2);
//! the kernel releases the lock when the holder ends, however it ends, and the
//! next collection removes the file. A file that is locked but cannot be
//! parsed counts as a writer of epoch 0, which stops every deletion.
//!
//! - A **writer** (commit) relies on chunks that no snapshot refers to yet. Its
//!   lease carries the collector's epoch from the moment it began: no pack
//!   condemned at or after that epoch is deleted while it lives. It also pins
//!   its parent.
//! - A **viewer** (mount, diff) reads published snapshots. Its lease pins them:
//!   they are roots like tags.
//!
//! Leases are written and looked at under the allocate lock. Whoever pins a
//! snapshot makes sure under the same lock that it is a root already: tagged, or
//! pinned by a viewer. A collection that deletes sees then the old root, or the
//! new one, since tags stay as they are while it does so. What is no root may be
//! half collected: it is pinned only by who holds the publish lock, which stops
//! deletions, and has found it whole.

use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use crate::durable;
use crate::error::{IoContext as _, Result, is_unreadable};
pub(crate) use crate::format::lease::LeaseTerms;
use crate::format::lease::{FORMAT, decode, encode};
use crate::id::SnapshotId;
use crate::layout::Layout;
use crate::lock::{self, Lock, LockKind};
use crate::regular::Opened;
use crate::sim::{self, StepKind};

/// A lease held by this process until it is dropped.
#[derive(Debug)]
pub(crate) struct Lease {
    // Before the file, so that it is dropped first: under the name of a file
    // that is unlocked somebody else may have made a lease of his own.
    name: Name,
    file: File,
    layout: Layout,
}

/// The name of a lease's file, which goes with it unless it is `kept`.
#[derive(Debug)]
struct Name {
    path: PathBuf,
    kept: bool,
}

/// A lease held by a live process, as the collector sees it.
#[derive(Debug)]
pub(crate) struct LiveLease {
    pub claim: LeaseTerms,
    pub holder: String,
}

impl Lease {
    /// Takes a lease. A writer's lease starts at epoch 0, which blocks every
    /// deletion, until [`Lease::set`] narrows it: reading the epoch first would
    /// leave a gap in which a collection could miss this writer.
    pub fn take(layout: &Layout, claim: &LeaseTerms) -> Result<Self> {
        let _allocate = lock::acquire(layout, LockKind::Allocate, lock::DEFAULT_TIMEOUT)?;
        let (file, path) = create_unique(layout)?;
        lock::try_exclusive(&file, &path)?;
        let lease = Self {
            name: Name { path, kept: false },
            file,
            layout: layout.clone(),
        };
        lease.write(claim)?;
        Ok(lease)
    }

    /// Replaces what this lease claims.
    pub fn set(&self, claim: &LeaseTerms) -> Result<()> {
        self.set_if(claim, |_| Ok(true)).map(|_| ())
    }

    /// Replaces what this lease claims if the condition holds, which is looked
    /// at under the same allocate lock. Returns whether it holds.
    pub fn set_if(
        &self,
        claim: &LeaseTerms,
        holds: impl FnOnce(&Lock) -> Result<bool>,
    ) -> Result<bool> {
        let allocate = lock::acquire(&self.layout, LockKind::Allocate, lock::DEFAULT_TIMEOUT)?;
        let holds = holds(&allocate)?;
        if holds {
            self.write(claim)?;
        }
        Ok(holds)
    }

    /// The locked file: the lease lives until the last duplicate is closed.
    pub fn into_fd(mut self) -> OwnedFd {
        self.name.kept = true;
        self.file.into()
    }

    /// On a full disk a viewer's lease stays empty, which stops every deletion: what is
    /// there can be read, and a collection says who reads it. Between the two steps it may
    /// hold half of what it claims, which cannot be parsed and stops them, too.
    fn write(&self, claim: &LeaseTerms) -> Result<()> {
        let path = &self.name.path;
        let bytes = FORMAT.encode(path, &encode(claim));
        match durable::write_at(&self.file, path, &bytes, 0) {
            Ok(()) => self.set_len(bytes.len() as u64),
            Err(error) if error.is_full_disk() && claim.writing_since.is_none() => {
                tracing::debug!("no room for a lease: it keeps everything");
                self.set_len(0)
            }
            Err(error) => Err(error),
        }
    }

    fn set_len(&self, len: u64) -> Result<()> {
        let path = &self.name.path;
        sim::before(StepKind::Write, path)
            .and_then(|()| self.file.set_len(len))
            .context("write", path)
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        if !self.kept {
            // If this fails the next collection removes the file.
            durable::discard(&self.path);
        }
    }
}

/// All leases of live processes; removes those of dead ones where it can.
pub(crate) fn live(layout: &Layout) -> Result<Vec<LiveLease>> {
    let _allocate = lock::acquire_to_read(layout, LockKind::Allocate, lock::DEFAULT_TIMEOUT)?;
    list(layout)
}

/// Whether a live viewer pins this snapshot. A writer's pins do not count: they
/// end with its commit, which may be over at once.
pub(crate) fn viewed(layout: &Layout, id: SnapshotId, allocate: &Lock) -> Result<bool> {
    Ok(live_under(layout, allocate)?
        .iter()
        .any(|lease| lease.claim.writing_since.is_none() && lease.claim.pins.contains(&id)))
}

/// The same for who holds the allocate lock already.
pub(crate) fn live_under(layout: &Layout, _allocate: &Lock) -> Result<Vec<LiveLease>> {
    list(layout)
}

fn list(layout: &Layout) -> Result<Vec<LiveLease>> {
    let dir = layout.leases();
    sim::before(StepKind::List, &dir).context("list", &dir)?;
    let mut leases = Vec::new();
    let entries = match fs::read_dir(&dir) {
        // Then nobody has a lease.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(leases),
        other => other.context("list", &dir)?,
    };
    for entry in entries {
        let path = entry.context("list", &dir)?.path();
        let file = match lock::open_to_lock(&path) {
            Ok(Opened::File(file)) => file,
            // A lease is a file: whatever else lies here is nobody's.
            Ok(Opened::Absent | Opened::Odd(_)) => continue,
            // Whether its holder lives, and what it needs, is not known.
            Err(error) if is_unreadable(&error) || error.kind() == ErrorKind::PermissionDenied => {
                let holder = format!(
                    "{} of {}, which cannot be read ({error}): remove it if that has ended",
                    path.display(),
                    holder(&path)
                );
                leases.push(LiveLease {
                    claim: LeaseTerms::EVERYTHING,
                    holder,
                });
                continue;
            }
            Err(other) => return Err(other).context("open", &path),
        };
        if lock::try_exclusive(&file, &path)? {
            durable::discard(&path);
            continue;
        }
        let claim = FORMAT
            .read(&path)
            .ok()
            .flatten()
            .and_then(|payload| decode(&payload))
            .unwrap_or(LeaseTerms::EVERYTHING);
        leases.push(LiveLease {
            claim,
            holder: holder(&path),
        });
    }
    Ok(leases)
}

/// Whose lease a file is, by its name.
fn holder(path: &Path) -> String {
    let name = path.file_name().and_then(|name| name.to_str());
    let pid = name.and_then(|name| name.split('-').next());
    format!("process {}", pid.unwrap_or("?"))
}

fn create_unique(layout: &Layout) -> Result<(File, PathBuf)> {
    let pid = std::process::id();
    let mut serial = 0;
    loop {
        let path = layout.leases().join(format!("{pid}-{serial}"));
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true);
        match durable::create(&path, &options) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => serial += 1,
            // A copy of a store may have lost it.
            Err(error) if error.kind() == ErrorKind::NotFound && !layout.leases().exists() => {
                let dir = layout.leases();
                fs::create_dir(&dir).context("create", &dir)?;
            }
            other => return Ok((other.context("create", &path)?, path)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;
    use crate::format::collector::Epoch;

    fn layout() -> (tempfile::TempDir, Layout) {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path().to_owned());
        for sub in layout.directories() {
            fs::create_dir(sub).unwrap();
        }
        (dir, layout)
    }

    #[test]
    fn a_live_lease_is_seen_and_a_dropped_one_is_gone() {
        let (_dir, layout) = layout();
        let pins = vec![
            SnapshotId::from_bytes([3; 32]),
            SnapshotId::from_bytes([4; 32]),
        ];
        let claim = LeaseTerms::viewer(pins);
        let lease = Lease::take(&layout, &claim).unwrap();
        assert_eq!(live(&layout).unwrap()[0].claim, claim);
        lease.set(&LeaseTerms::viewer(vec![])).unwrap();
        assert_eq!(live(&layout).unwrap()[0].claim, LeaseTerms::viewer(vec![]));
        drop(lease);
        assert!(live(&layout).unwrap().is_empty());
    }

    #[test]
    fn a_lease_lives_as_long_as_a_duplicate_of_its_file() {
        let (_dir, layout) = layout();
        let id = SnapshotId::from_bytes([3; 32]);
        let lease = Lease::take(&layout, &LeaseTerms::viewer(vec![id])).unwrap();
        let fd = lease.into_fd();
        let duplicate = fd.try_clone().unwrap();
        drop(fd);
        assert_eq!(live(&layout).unwrap()[0].claim.pins, [id]);
        drop(duplicate);
        assert_eq!(fs::read_dir(layout.leases()).unwrap().count(), 1);
        assert!(live(&layout).unwrap().is_empty());
        assert_eq!(fs::read_dir(layout.leases()).unwrap().count(), 0);
    }

    #[test]
    fn a_claim_is_replaced_only_if_its_condition_holds() {
        let (_dir, layout) = layout();
        let [one, two] = [1, 2].map(|byte| SnapshotId::from_bytes([byte; 32]));
        let lease = Lease::take(&layout, &LeaseTerms::viewer(vec![one])).unwrap();
        let other = Lease::take(&layout, &LeaseTerms::viewer(vec![])).unwrap();
        let seen = |id| {
            other.set_if(&LeaseTerms::viewer(vec![id]), |lock| {
                viewed(&layout, id, lock)
            })
        };
        assert!(!seen(two).unwrap());
        assert!(seen(one).unwrap());
        drop(lease);
        // Now by the other one alone.
        assert!(seen(one).unwrap());
        // A writer is no evidence.
        let claim = LeaseTerms {
            writing_since: Some(Epoch::FIRST),
            pins: vec![two],
        };
        let _writer = Lease::take(&layout, &claim).unwrap();
        assert!(!seen(two).unwrap());
    }

    #[test]
    fn an_abandoned_file_is_removed_and_an_unreadable_live_one_blocks_everything() {
        let (_dir, layout) = layout();
        fs::write(layout.leases().join("1-0"), b"left behind").unwrap();
        assert!(live(&layout).unwrap().is_empty());
        assert_eq!(fs::read_dir(layout.leases()).unwrap().count(), 0);

        let lease = Lease::take(&layout, &LeaseTerms::viewer(vec![])).unwrap();
        lease.file.write_all_at(b"torn", 3).unwrap();
        assert_eq!(live(&layout).unwrap()[0].claim, LeaseTerms::EVERYTHING);
    }
}
