//! Signs of life of a view while all that it names is read, as a pull does. A mount gives them
//! from a thread of its own (`lazy/keep`).

use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::protocol::{self, Lease, RefKey, view};
use crate::remote::{Remote, block_on, who};

/// How soon one is tried again that could not be written.
const AGAIN: Duration = Duration::from_secs(60);

/// A view's lease while somebody reads.
pub struct Beats<'a> {
    remote: &'a Remote,
    lease: Lease,
    /// The record that is viewed, if it is not another view's.
    record: Option<RefKey>,
    last: Instant,
    next: Duration,
}

impl<'a> Beats<'a> {
    /// Of a view of what this record names, or of a head that another view keeps.
    pub fn new(remote: &'a Remote, lease: Lease, record: Option<RefKey>) -> Self {
        Self {
            remote,
            lease,
            record,
            last: Instant::now(),
            next: remote.view_beat,
        }
    }

    /// Gives a sign of life, if the last one was long ago, and looks whether it came too late.
    /// Then the view begins anew, if its tag still names the same head.
    ///
    /// # Errors
    /// [`protocol::Error::LeaseLost`]. That the bucket does not answer is no error yet.
    pub fn beat(&mut self) -> Result<()> {
        if self.last.elapsed() < self.next {
            return Ok(());
        }
        let beaten = self.beat_now();
        (self.last, self.next) = (Instant::now(), self.remote.view_beat);
        match beaten {
            Err(Error::Protocol(protocol::Error::Unanswered(error))) => {
                tracing::debug!(%error, "a lease is not kept alive for now");
                self.next = AGAIN.min(self.next);
                Ok(())
            }
            beaten => beaten,
        }
    }

    fn beat_now(&mut self) -> Result<()> {
        block_on(self.lease.beat(self.remote))?;
        if !self.is_fenced()? {
            return Ok(());
        }
        let lost = self.lost();
        let Some(record) = &self.record else {
            return Err(lost);
        };
        let again = match block_on(view(self.remote, &record.tag, &who())) {
            Ok(again) => again,
            Err(error @ protocol::Error::Unanswered(_)) => return Err(error.into()),
            Err(_) => return Err(lost),
        };
        let is_same = again.record.head == record.head;
        let ended = match is_same {
            true => std::mem::replace(&mut self.lease, again.lease),
            false => again.lease,
        };
        let _ = block_on(ended.end(self.remote));
        is_same.then_some(()).ok_or(lost)
    }

    fn is_fenced(&self) -> Result<bool> {
        let fence = self.lease.session().fence_key();
        Ok(self.remote.bucket.exists(&fence)?)
    }

    fn lost(&self) -> Error {
        let session = self.lease.session();
        protocol::Error::LeaseLost { session }.into()
    }

    /// Ends the view. What is missing from a snapshot whose view was given up is no damage.
    pub fn end<T>(self, read: Result<T>) -> Result<T> {
        let is_missing = matches!(&read, Err(Error::Protocol(protocol::Error::Missing { .. })));
        let read = match is_missing && self.is_fenced().unwrap_or(false) {
            true => Err(self.lost()),
            false => read,
        };
        // A lease that stays is given up by a collection.
        let _ = block_on(self.lease.end(self.remote));
        read
    }
}
