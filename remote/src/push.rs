//! A push: the protocol, with an upload as its work.

use std::cell::Cell;
use std::sync::Mutex;

use snapstore_store::{Progress, Store};

use crate::error::{Error, Result};
use crate::protocol::{self, Mode, Pushed};
use crate::remote::{Remote, block_on, who};
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
        self.check_pages(store)?;
        let parts = store.parts(name)?;
        let snapshot = *parts.id().as_bytes();
        let mode = if replace { Mode::Replace } else { Mode::New };
        let report = Mutex::new(PushReport {
            id: parts.id().to_string(),
            ..PushReport::default()
        });
        let failed = Cell::new(None);
        let mut work = Upload::new(store, &parts, tag, progress, &report, &failed);
        let pushed = block_on(protocol::push(
            self,
            tag,
            &mode,
            snapshot,
            &who(),
            &mut work,
        ));
        if let Some(error) = failed.take() {
            return Err(Error::Store(error));
        }
        let mut report = report.into_inner().unwrap_or_default();
        report.already = matches!(pushed?, Pushed::Already(_));
        Ok(report)
    }
}
