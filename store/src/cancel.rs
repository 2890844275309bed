//! Stopping an operation before it is done.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};

/// Stops the operations of a [`crate::Store`] that was given it
/// ([`crate::Store::with_cancel`]): they look at it every few milliseconds of their
/// work and while they wait for locks, and then end with [`Error::Cancelled`], as if
/// they had failed: a commit leaves no trace, a collection that has begun to delete
/// is gone on with by the next one. What is done before it is looked at stays done.
///
/// Clones are one token. It is never reset: make another one.
///
/// ```
/// use snapstore_store::{Cancel, Error, GcOptions, PageSize, Silent, Store};
///
/// # let dir = tempfile::tempdir()?;
/// # let store = Store::create(&dir.path().join("store"), PageSize::default())?;
/// let cancel = Cancel::default();
/// let stoppable = store.clone().with_cancel(cancel.clone());
/// cancel.cancel(); // from another thread, or a signal handler
/// let done = stoppable.gc(GcOptions::default(), &Silent);
/// assert!(matches!(done, Err(Error::Cancelled)));
/// // Other handles of the same store are not concerned.
/// store.gc(GcOptions::default(), &Silent)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Stops what has this token.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether it was cancelled.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// That it was not cancelled.
    ///
    /// # Errors
    /// [`Error::Cancelled`].
    pub fn check(&self) -> Result<()> {
        match self.is_cancelled() {
            true => Err(Error::Cancelled),
            false => Ok(()),
        }
    }
}

/// A flag that a signal handler sets, for one.
impl From<Arc<AtomicBool>> for Cancel {
    fn from(flag: Arc<AtomicBool>) -> Self {
        Self(flag)
    }
}
