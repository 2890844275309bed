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
        let (collected, tidied) = self.collect_with(options, &mut Heads::default())?;
        tidied.map(|()| collected)
    }

    /// The same where some heads were read already. What came of tidying the runs of hooks is
    /// told beside it: nobody relies on them, and what was deleted by then is.
    pub(crate) fn collect_with(
        &self,
        options: Options,
        heads: &mut Heads,
    ) -> Result<(Collected, Result<()>)> {
        self.page_bytes()?;
        let collected = block_on(protocol::collect_with(self, options, heads))?;
        let tidied = match options.dry_run {
            true => Ok(()),
            false => hooks::tidy(self),
        };
        Ok((collected, tidied))
    }
}
