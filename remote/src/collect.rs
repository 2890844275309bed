//! A collection: the protocol's, and then the runs of hooks.

use crate::error::Result;
use crate::hooks;
use crate::protocol::{self, Collected, Heads, Options};
use crate::remote::{Remote, block_on};

impl Remote {
    /// Collects what no tag and no view needs.
    ///
    /// # Errors
    /// As [`protocol::collect`].
    pub fn collect(&self, options: Options) -> Result<Collected> {
        self.collect_with(options, &mut Heads::default())
    }

    /// The same where some heads were read already.
    pub(crate) fn collect_with(&self, options: Options, heads: &mut Heads) -> Result<Collected> {
        self.page_bytes()?;
        let collected = block_on(protocol::collect_with(self, options, heads))?;
        if !options.dry_run {
            hooks::tidy(self)?;
        }
        Ok(collected)
    }
}
