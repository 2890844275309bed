//! A view's lease, kept alive as long as somebody reads.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use crate::error::Result;
use crate::protocol::{self, Lease, RefKey, View, view};
use crate::remote::{Remote, block_on, who};

/// How soon a sign of life is tried again that could not be written.
const AGAIN: Duration = Duration::from_secs(60);

/// Keeps a view. Dropped, it leaves the lease to a collection.
#[derive(Debug)]
pub struct Keeper {
    end: Sender<()>,
    thread: JoinHandle<()>,
}

/// A view that is kept.
struct Kept {
    remote: Arc<Remote>,
    lease: Lease,
    record: RefKey,
    is_lost: bool,
}

impl Keeper {
    /// Keeps this view, from a thread of its own.
    pub fn start(remote: Arc<Remote>, view: View) -> Result<Self> {
        let (end, wait) = channel();
        let mut kept = Kept {
            remote,
            lease: view.lease,
            record: view.record,
            is_lost: false,
        };
        let thread = Builder::new()
            .name("lease".to_owned())
            .spawn(move || kept.work(&wait))
            .map_err(|error| protocol::Error::Work(error.into()))?;
        Ok(Self { end, thread })
    }

    /// Ends the view, as far as the bucket answers.
    pub fn end(self) {
        drop(self.end);
        let _ = self.thread.join();
    }
}

impl Kept {
    fn work(&mut self, end: &Receiver<()>) {
        let mut next = self.remote.view_beat;
        while end.recv_timeout(next) == Err(RecvTimeoutError::Timeout) {
            next = match self.beat() {
                Ok(()) => self.remote.view_beat,
                Err(error) => {
                    tracing::debug!(%error, "a lease is not kept alive for now");
                    AGAIN.min(self.remote.view_beat)
                }
            };
        }
        // One that stays is given up by a collection.
        let _ = block_on(self.lease.end(&*self.remote));
    }

    fn beat(&mut self) -> Result<()> {
        let remote = self.remote.clone();
        block_on(self.lease.beat(&*remote))?;
        let fence = self.lease.session().fence_key();
        if self.is_lost || !remote.bucket.exists(&fence)? {
            return Ok(());
        }
        // This host slept for more than a day.
        let again = block_on(view(&*remote, &self.record.tag, &who()))?;
        if again.record.head == self.record.head {
            self.lease = again.lease;
            return Ok(());
        }
        self.is_lost = true;
        let _ = block_on(again.lease.end(&*remote));
        tracing::error!(
            tag = self.record.tag,
            "this host was silent for so long that a collection of the remote gave its view up, \
             and the tag names another snapshot by now: what is shown may be gone"
        );
        Ok(())
    }
}
