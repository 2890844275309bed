//! What the device and its thread share.

use std::sync::atomic::{AtomicBool, Ordering};

use super::tap::Tap;

/// The queue of what the guest receives.
pub(super) const RECEIVE: usize = 0;

/// The tap, and what has become of it.
pub(super) struct Link {
    pub tap: Tap,
    /// The host's interface is gone.
    pub lost: AtomicBool,
    /// The thread is to end.
    pub ended: AtomicBool,
}

impl Link {
    /// Returns whether that is new.
    pub fn lose(&self) -> bool {
        !self.lost.swap(true, Ordering::Relaxed)
    }

    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }
}
