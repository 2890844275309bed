//! A collection: the protocol's, and then the runs of hooks.

use crate::error::Result;
use crate::hooks;
use crate::protocol::{self, Collected, Options};
use crate::remote::{Remote, block_on};

impl Remote {
    /// Collects what no tag and no view needs.
    ///
    /// # Errors
    /// As [`protocol::collect`].
    pub fn collect(&self, options: Options) -> Result<Collected> {
        self.page_bytes()?;
        let collected = block_on(protocol::collect(self, options))?;
        if !options.dry_run {
            hooks::tidy(self)?;
        }
        Ok(collected)
    }
}
