//! How a view of a remote begins: what does not depend on each other is asked for at the same
//! time.

use std::thread;

use snapstore_store::Store;

use crate::config::{CONFIG_KEY, Config};
use crate::error::Result;
use crate::protocol::{self, Answer, Ask, AtOnce, Unanswered, View};
use crate::remote::{Remote, block_on, who};

impl AtOnce for Remote {
    async fn at_once(&self, asks: &[Ask<'_>]) -> Vec<Result<Answer, Unanswered>> {
        let Some((first, others)) = asks.split_first() else {
            return Vec::new();
        };
        thread::scope(|scope| {
            let others = others.iter();
            let others: Vec<_> = others
                .map(|ask| scope.spawn(|| block_on(ask.of(self))))
                .collect();
            let first = block_on(first.of(self));
            let others = others.into_iter().map(|thread| match thread.join() {
                Ok(answer) => answer,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            [first].into_iter().chain(others).collect()
        })
    }
}

impl Remote {
    /// Begins to view a tag, if the bucket is a remote whose pages are as long as the
    /// store's. The head is read meanwhile if it is wanted. What is older than what was seen is
    /// refused.
    pub(crate) fn view(
        &self,
        store: Option<&Store>,
        tag: &str,
        wants_head: bool,
    ) -> Result<(Config, View)> {
        self.check_there()?;
        let prefix = protocol::tag_prefix(tag);
        let asks = [Ask::Get(CONFIG_KEY), Ask::List(&prefix)];
        let mut answers = block_on(self.at_once(&asks)).into_iter();
        let mut next = || answers.next().expect("each is answered");
        let (config, seen) = (next(), next());
        let config = self.config_of(config.map(Answer::bytes))?;
        if let Some(store) = store {
            self.check_pages_of(&config, store)?;
        }
        let seen = seen?.objects();
        let who = who();
        let view = protocol::view_seen(self, tag, &who, &seen, wants_head);
        let view = self.view_not_older(&self.seen(&config.id), tag, block_on(view))?;
        Ok((config, view))
    }
}
