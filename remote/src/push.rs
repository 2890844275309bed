//! A push: the protocol, with an upload as its work.

use std::cell::Cell;
use std::sync::Mutex;

use snapstore_store::{Parts, Progress, Store};

use crate::error::{Error, Result};
use crate::first::Wanted;
use crate::lazy::CACHE;
use crate::protocol::{self, Mode, Pushed, RefKey};
use crate::remote::{Remote, block_on, hex, who};
use crate::upload::{PushReport, Upload};

impl Remote {
    /// Pushes a local snapshot under a tag.
    ///
    /// # Errors
    /// As [`protocol::push`], and of the store.
    pub fn push(
        &self,
        store: &Store,
        name: &str,
        tag: &str,
        replace: bool,
        progress: &(dyn Progress + Sync),
    ) -> Result<PushReport> {
        let bucket = self.check_pages(store)?.id;
        let cache = store.path().join(CACHE).join(hex(&bucket));
        let parts = store.parts(name)?;
        let snapshot = *parts.id().as_bytes();
        let mode = if replace { Mode::Replace } else { Mode::New };
        let report = Mutex::new(PushReport {
            id: parts.id().to_string(),
            ..PushReport::default()
        });
        let failed = Cell::new(None);
        let mut work = Upload::new(store, &parts, tag, progress, &report, &failed, cache)
            .with_seen(self.seen(&bucket));
        let who = who();
        let mut push = |mode: &Mode| {
            let pushed = protocol::push(self, tag, mode, snapshot, &who, &mut work);
            match (block_on(pushed), failed.take()) {
                (_, Some(error)) => Err(Error::Store(error)),
                (pushed, None) => Ok(pushed?),
            }
        };
        let pushed = push(&mode)?;
        let (Pushed::Now(record) | Pushed::Already(record)) = &pushed;
        self.seen(&bucket).remember(record);
        let already = match pushed {
            Pushed::Now(_) => false,
            Pushed::Already(record) if self.lacks_working_set(store, &parts, &record)? => {
                // The same snapshot once more, in other packs.
                push(&Mode::Repack(record))?;
                true
            }
            Pushed::Already(_) => true,
        };
        let mut report = report.into_inner().unwrap_or_default();
        report.already = already;
        Ok(report)
    }

    /// Whether there is one here, and none there.
    fn lacks_working_set(&self, store: &Store, parts: &Parts<'_>, record: &RefKey) -> Result<bool> {
        let wanted = Wanted::of(store, parts);
        if wanted.sets.is_empty() {
            return Ok(false);
        }
        match self.open_head(record) {
            Ok(opened) => Ok(opened.head.first.is_none() && wanted.is_of(&opened.head)),
            // The tag was changed since it was seen to name this, and that was collected.
            Err(Error::Protocol(protocol::Error::Missing { .. }))
                if !self.bucket.exists(&record.key())? =>
            {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }
}
