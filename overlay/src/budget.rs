//! How much room overlays may take together.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Room that several overlays share. Clones are the same room.
#[derive(Clone, Debug)]
pub struct Budget(Arc<Room>);

#[derive(Debug)]
struct Room {
    most_bytes: u64,
    used_bytes: AtomicU64,
}

impl Budget {
    /// At most so many bytes; without it as many as there are.
    #[must_use]
    pub fn new(most_bytes: Option<u64>) -> Self {
        Self(Arc::new(Room {
            most_bytes: most_bytes.unwrap_or(u64::MAX),
            used_bytes: AtomicU64::new(0),
        }))
    }

    /// Takes room.
    ///
    /// # Errors
    /// `StorageFull` if there is not so much.
    pub fn take(&self, bytes: u64) -> io::Result<()> {
        let room = &self.0;
        let add = |used: u64| {
            let after = used.checked_add(bytes)?;
            (after <= room.most_bytes).then_some(after)
        };
        let order = Ordering::Relaxed;
        match room.used_bytes.fetch_update(order, order, add) {
            Ok(_) => Ok(()),
            Err(_) => Err(io::Error::new(
                io::ErrorKind::StorageFull,
                "its overlay is as large as it may be (--overlay-limit)",
            )),
        }
    }

    /// Takes room that is in use already, as when an overlay is found again.
    pub fn take_anyway(&self, bytes: u64) {
        self.0.used_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Gives room back.
    pub fn give_back(&self, bytes: u64) {
        let order = Ordering::Relaxed;
        let less = |used: u64| Some(used.saturating_sub(bytes));
        let _ = self.0.used_bytes.fetch_update(order, order, less);
    }

    /// How much is taken.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.0.used_bytes.load(Ordering::Relaxed)
    }
}
