//! A snapshot of a bucket that is read where it is, as it is asked for.
//!
//! `source` goes from the head (`places`) to leaves to pages; `blocks` reads parts of packs,
//! each once at a time (`flights`); `cache` keeps them on this host; `ahead` reads what nobody has asked
//! for yet: the working set, what was `recorded` here, what `stream` says is likely to be asked for next, and the rest
//! (`fill`); `hedge` says what is asked for a second time; `counts` tells why what was read; `keep` keeps
//! the snapshot in the bucket.

mod ahead;
mod blocks;
mod cache;
mod counts;
mod failure;
mod fill;
mod flights;
mod hedge;
mod keep;
mod places;
mod recorded;
mod source;
mod stream;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use snapstore_store::{ForeignSnapshot, Store};

use crate::error::{Error, Result};
use crate::lazy::ahead::Ahead;
use crate::lazy::blocks::Blocks;
use crate::lazy::cache::Cache;
pub use crate::lazy::counts::{LazyCounts, Requested};
use crate::lazy::keep::Keeper;
pub(crate) use crate::lazy::recorded::Recorded;
use crate::lazy::source::Source;
use crate::objects::Objects;
use crate::protocol::{self, View};
use crate::remote::{Remote, block_on, hex};

/// What was read of remotes is kept in this directory of a store.
pub const CACHE: &str = "cache";

/// How a snapshot is read that stays in the bucket.
#[derive(Clone, Debug)]
pub struct LazyOptions {
    /// Where what was read is kept, for all buckets; nowhere without it.
    pub cache: Option<PathBuf>,
    /// The most that is kept.
    pub cache_limit_bytes: u64,
    /// How long a read waits for a bucket that does not answer.
    pub timeout: Duration,
    /// Whether what is likely to be touched first is read before it is asked for.
    pub prefetches: bool,
    /// Whether all of it is read in the end, as far as the limit allows.
    pub fills: bool,
}

/// A snapshot of a bucket that stays there.
pub struct Lazy {
    snapshot: ForeignSnapshot,
    source: Arc<Source>,
    keeper: Keeper,
    reaches_network: bool,
}

impl Remote {
    /// Begins to read what a tag of the remote names where it is. It stays there, whatever
    /// becomes of the tag, until [`Lazy::end`].
    ///
    /// # Errors
    /// As [`Remote::pull`].
    pub fn lazy(self, store: &Store, tag: &str, options: &LazyOptions) -> Result<Lazy> {
        let demanded = crate::open::open_for_demand(&self.place, options.timeout)?;
        self.lazy_by(store, tag, options, demanded)
    }

    /// The same, with what is demanded from these objects.
    pub(crate) fn lazy_by(
        self,
        store: &Store,
        tag: &str,
        options: &LazyOptions,
        demanded: Box<dyn Objects>,
    ) -> Result<Lazy> {
        let (config, view) = self.view(Some(store), tag, true)?;
        let bucket = hex(&config.id);
        match self.shown(store, &view, options, demanded, &bucket) {
            Ok((snapshot, source)) => {
                self.seen(&config.id).remember(&view.record);
                Ok(Lazy {
                    reaches_network: self.bucket.requests().is_some(),
                    snapshot,
                    source,
                    keeper: Keeper::start(Arc::new(self), view)?,
                })
            }
            Err(error) => {
                let _ = block_on(view.lease.end(&self));
                Err(error)
            }
        }
    }

    fn shown(
        &self,
        store: &Store,
        view: &View,
        options: &LazyOptions,
        demanded: Box<dyn Objects>,
        bucket: &str,
    ) -> Result<(ForeignSnapshot, Arc<Source>)> {
        let opened = self.open_view(view)?;
        let dir = options
            .cache
            .as_ref()
            .filter(|_| options.cache_limit_bytes > 0);
        let cache = dir.and_then(|dir| {
            let cache = Cache::open(dir, bucket, options.cache_limit_bytes);
            let warn = |error: &std::io::Error| {
                let dir = dir.display();
                tracing::warn!(%dir, %error, "what is read of the remote is not kept");
            };
            cache.inspect_err(warn).ok()
        });
        let recorded = dir.filter(|_| cache.is_some());
        let recorded = recorded.map(|dir| Recorded::of(&dir.join(bucket), &opened.snapshot));
        let blocks = Arc::new(Blocks::new(demanded, cache, options.timeout));
        let no_thread = |error: std::io::Error| Error::from(protocol::Error::Work(error.into()));
        let ahead = Ahead::start(&blocks).map_err(no_thread)?;
        let label = format!("{} of {}", opened.key, self.url());
        let manifest = opened.head.manifest.clone();
        let wanted = (options.prefetches, options.fills);
        let source = Arc::new(Source::new(opened, blocks, ahead, recorded, wanted));
        let page_size = store.page_size();
        let snapshot =
            ForeignSnapshot::new(&manifest, page_size, Path::new(&label), source.clone())?;
        Ok((snapshot, source))
    }
}

impl Lazy {
    /// The snapshot.
    #[must_use]
    pub fn snapshot(&self) -> &ForeignSnapshot {
        &self.snapshot
    }

    /// Whether it is read over the network.
    #[must_use]
    pub fn reaches_network(&self) -> bool {
        self.reaches_network
    }

    /// Whether all of it is being read: not once it is here, or there is no room for it.
    #[must_use]
    pub fn fills(&self) -> bool {
        self.source.fills()
    }

    /// What was read so far.
    #[must_use]
    pub fn counts(&self) -> LazyCounts {
        self.source.blocks().counts.sum()
    }

    /// Nobody reads it any more: it may go from the bucket.
    pub fn end(self) {
        self.source.blocks().end();
        self.keeper.end();
    }
}
