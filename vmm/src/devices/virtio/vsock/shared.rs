//! What the device and its thread share.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::table::Table;

/// The queue of what the guest receives.
pub(super) const RECEIVE: usize = 0;

/// Whether the guest knows that its connections are gone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum News {
    /// There is nothing to know.
    None,
    /// It is to be told.
    Due,
    /// It was told. It gives the event's buffer back when it has dealt with it.
    Told(Instant),
}

/// The connections, and what the guest is to be told.
pub(super) struct Shared {
    pub table: Table,
    pub news: News,
    /// The thread is to end.
    pub ended: bool,
}

impl Shared {
    /// Whether the guest can be told something now.
    pub fn has_output(&self) -> bool {
        self.news == News::None && self.table.has_output()
    }
}

pub(super) fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
