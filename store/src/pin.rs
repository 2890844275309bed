//! Pins: keeping snapshots whole without a tag.

use std::os::fd::OwnedFd;

use crate::error::Result;
use crate::gc::mark::Reach;
use crate::id::SnapshotId;
use crate::lease::{Claim, Lease};
use crate::store::Store;

/// Keeps snapshots from being collected while it lives, tagged or not.
#[derive(Debug)]
pub struct Pin {
    lease: Lease,
    ids: Vec<SnapshotId>,
}

impl Store {
    /// Pins the snapshot that `name` means now, so that it stays whole until
    /// the pin is dropped, whatever happens to its tag.
    ///
    /// # Errors
    /// As [`Pin::add`].
    pub fn pin(&self, name: &str) -> Result<(SnapshotId, Pin)> {
        let mut pin = self.empty_pin()?;
        let id = pin.add(self, name)?;
        Ok((id, pin))
    }

    /// A pin that holds nothing yet.
    ///
    /// # Errors
    /// I/O errors only.
    pub fn empty_pin(&self) -> Result<Pin> {
        let lease = Lease::take(&self.layout, &Claim::viewer(Vec::new()))?;
        Ok(Pin::new(lease, Vec::new()))
    }
}

impl Pin {
    /// A viewer's lease that claims these snapshots.
    pub(crate) fn new(lease: Lease, ids: Vec<SnapshotId>) -> Self {
        Self { lease, ids }
    }

    /// Also pins the snapshot that `name` means now. For one that has no tag
    /// this takes time in proportion to its length: parts of it may have been
    /// collected, so all that it needs is looked up.
    ///
    /// # Errors
    /// As [`Store::resolve`]; for a snapshot without a tag also
    /// [`crate::Error::Damaged`] if it is not whole any more, and
    /// [`crate::Error::Busy`].
    pub fn add(&mut self, store: &Store, name: &str) -> Result<SnapshotId> {
        loop {
            let id = store.resolve(name)?;
            if self.ids.contains(&id) {
                return Ok(id);
            }
            let mut ids = self.ids.clone();
            ids.push(id);
            let claim = Claim::viewer(ids.clone());
            if !self.lease.set_if(&claim, |_| store.is_tagged(id, name))? {
                // Under the lock, so that no collection deletes what was just seen.
                let _publish = store.publish_lock()?;
                if store.resolve(name)? != id {
                    continue;
                }
                Reach::new(&store.chunks)?.add_snapshot(id)?;
                self.lease.set(&claim)?;
            }
            self.ids = ids;
            return Ok(id);
        }
    }

    /// Ends the pin of this snapshot; others that it holds stay pinned.
    ///
    /// # Errors
    /// [`crate::Error::Busy`]; I/O errors. The snapshot is then still pinned.
    pub fn remove(&mut self, id: SnapshotId) -> Result<()> {
        let mut ids = self.ids.clone();
        ids.retain(|pinned| *pinned != id);
        if ids.len() < self.ids.len() {
            self.lease.set(&Claim::viewer(ids.clone()))?;
            self.ids = ids;
        }
        Ok(())
    }

    /// The open file whose lock is this pin, to be handed to another process:
    /// inherited by a child, or sent with `SCM_RIGHTS` (unix(7)). What is pinned
    /// stays so until every duplicate of it is closed, in whatever processes
    /// these are, or until one of them is unlocked (flock(2)). The next collection then
    /// removes the pin's file. The descriptor is close-on-exec.
    #[must_use = "closing it ends the pin"]
    pub fn into_fd(self) -> OwnedFd {
        self.lease.into_fd()
    }
}
