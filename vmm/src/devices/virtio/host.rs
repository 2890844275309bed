//! What devices and the machine around them tell each other: that the machine is about
//! to stop, and that the host has failed a device.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Shared by a machine and its devices. Clones are the same.
#[derive(Clone, Default)]
pub(crate) struct Host(Arc<Inner>);

#[derive(Default)]
struct Inner {
    pausing: AtomicBool,
    has_fault: AtomicBool,
    fault: Mutex<Option<String>>,
}

impl Host {
    /// From here on devices take no more requests, those in work are done; or they do
    /// again.
    pub fn set_pausing(&self, pausing: bool) {
        self.0.pausing.store(pausing, Ordering::SeqCst);
    }

    /// Whether devices take no more requests.
    pub fn is_pausing(&self) -> bool {
        self.0.pausing.load(Ordering::SeqCst)
    }

    /// The host could not do what a guest asked of a device: the machine has to stop,
    /// and the request is done again when it goes on. The first cause is kept.
    pub fn fail(&self, what: String) {
        let mut fault = self.lock();
        if fault.is_none() {
            tracing::warn!(what, "the host failed a device: the machine stops");
            *fault = Some(what);
        }
        self.0.has_fault.store(true, Ordering::SeqCst);
    }

    /// Whether [`Host::fail`] was called since [`Host::mended`].
    pub fn has_fault(&self) -> bool {
        self.0.has_fault.load(Ordering::SeqCst)
    }

    /// What failed.
    pub fn fault(&self) -> Option<String> {
        self.lock().clone()
    }

    /// Someone says that it can be tried again.
    pub fn mended(&self) {
        let mut fault = self.lock();
        *fault = None;
        self.0.has_fault.store(false, Ordering::SeqCst);
    }

    fn lock(&self) -> MutexGuard<'_, Option<String>> {
        self.0.fault.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
