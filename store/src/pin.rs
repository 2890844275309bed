//! Pins: keeping snapshots whole without a tag.

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::OwnedFd;

use crate::error::{Error, IoContext as _, Result};
use crate::gc::mark::Reachability;
use crate::id::SnapshotId;
use crate::lease::{Lease, LeaseTerms};
use crate::lock::is_read_only;
use crate::store::Store;

/// Keeps snapshots from being collected while it lives, tagged or not, unless
/// it says that it cannot ([`Pin::not_pinned`]).
///
/// ```
/// use snapstore_store::{GcOptions, PageSize, Silent, Store};
/// # use snapstore_store::{CommitRequest, ImageRole, Input, InputData, InputKind};
///
/// # let dir = tempfile::tempdir()?;
/// # let store = Store::create(&dir.path().join("store"), PageSize::default())?;
/// # let request = CommitRequest {
/// #     tag: "base".to_owned(),
/// #     inputs: vec![Input {
/// #         name: "memory".to_owned(),
/// #         role: ImageRole::Memory,
/// #         data: InputData::Bytes(vec![7; 8192].into()),
/// #         kind: InputKind::Full,
/// #     }],
/// #     ..CommitRequest::default()
/// # };
/// # store.commit(&request, &Silent)?;
/// let (id, pin) = store.pin("base")?;
/// store.remove_tags(&["base".to_owned()])?;
/// store.gc(GcOptions::default(), &Silent)?;
/// store.manifest(id)?; // still there
/// store.set_tag("again", id, false)?;
/// drop(pin);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Pin {
    lease: Result<Lease, Nothing>,
    ids: Vec<SnapshotId>,
}

/// In place of a lease.
#[derive(Debug)]
struct Nothing {
    why: NotPinned,
    /// What is handed on instead.
    descriptor: File,
}

impl Nothing {
    fn because_of(error: Error) -> Result<Self> {
        const NULL: &str = "/dev/null";
        let why = NotPinned::because_of(&error).ok_or(error)?;
        let descriptor = File::open(NULL).context("open", NULL.as_ref())?;
        Ok(Self { why, descriptor })
    }
}

/// Why a pin keeps nothing. What is read through it may be collected by whoever
/// can write to the store; reading it is then an error, and never other bytes.
#[derive(thiserror::Error, Clone, Copy, PartialEq, Eq, Debug)]
pub enum NotPinned {
    /// The filesystem is read-only here.
    #[error(
        "the store is on a read-only filesystem: where it can be written, a collection may remove what is in use here"
    )]
    ReadOnly,
    /// This user may not write to the store.
    #[error("this user may not write to the store, so a collection may remove what is in use here")]
    NotAllowed,
    /// Locks keep nobody away there ([`Error::NoLocks`]).
    #[error(
        "locks do not work on the store's filesystem, so a collection may remove what is in use here"
    )]
    NoLocks,
}

impl NotPinned {
    fn because_of(error: &Error) -> Option<Self> {
        match error {
            Error::NoLocks { .. } => Some(Self::NoLocks),
            Error::Io { source, .. } if source.kind() == ErrorKind::ReadOnlyFilesystem => {
                Some(Self::ReadOnly)
            }
            Error::Io { source, .. } if is_read_only(source) => Some(Self::NotAllowed),
            _ => None,
        }
    }
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
        let lease = match Lease::take(&self.layout, &LeaseTerms::viewer(Vec::new())) {
            Err(error) => Err(Nothing::because_of(error)?),
            // From here on nobody upgrades the store.
            Ok(lease) => {
                self.check_format()?;
                Ok(lease)
            }
        };
        Ok(Pin {
            lease,
            ids: Vec::new(),
        })
    }
}

impl Pin {
    /// A viewer's lease that claims these snapshots.
    pub(crate) fn new(lease: Lease, ids: Vec<SnapshotId>) -> Self {
        Self {
            lease: Ok(lease),
            ids,
        }
    }

    /// Why nothing is kept, if that is so: where nothing can be written, there is
    /// nothing to keep it with.
    #[must_use]
    pub fn not_pinned(&self) -> Option<NotPinned> {
        self.lease.as_ref().err().map(|nothing| nothing.why)
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
            let Ok(lease) = &self.lease else {
                self.ids = ids;
                return Ok(id);
            };
            let claim = LeaseTerms::viewer(ids.clone());
            if !lease.set_if(&claim, |_| store.is_tagged(id, name))? {
                // Under the lock, so that no collection deletes what was just seen.
                let _publish = store.publish_lock()?;
                if store.resolve(name)? != id {
                    continue;
                }
                Reachability::new(&store.chunks)?.add_snapshot(id)?;
                lease.set(&claim)?;
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
            if let Ok(lease) = &self.lease {
                lease.set(&LeaseTerms::viewer(ids.clone()))?;
            }
            self.ids = ids;
        }
        Ok(())
    }

    /// The open file whose lock is this pin, to be handed to another process:
    /// inherited by a child, or sent with `SCM_RIGHTS` (unix(7)). What is pinned
    /// stays so until every duplicate of it is closed, in whatever processes
    /// these are, or until one of them is unlocked (flock(2)). The next collection then
    /// removes the pin's file. The descriptor is close-on-exec.
    ///
    /// Of a pin that keeps nothing it is a descriptor that does nothing.
    #[must_use = "closing it ends the pin"]
    pub fn into_fd(self) -> OwnedFd {
        match self.lease {
            Ok(lease) => lease.into_fd(),
            Err(nothing) => nothing.descriptor.into(),
        }
    }
}
