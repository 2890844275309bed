//! Snapshots that stay in a remote: `mount` and `restore` of `REMOTE/TAG`.

use anyhow::bail;
use snapstore_host::mount_server::RemoteReading;
use snapstore_host::{Busy, Usage};
use snapstore_remote::{CACHE, Lazy, LazyCounts, LazyOptions, Remote};
use snapstore_store::{SnapshotId, Store};
use snapstore_vmm::control::Origin;

use crate::args::{ReadingArgs, of_remote};
use crate::commands::remote::{remember, remote};
use crate::commands::remote_told::told;
use crate::context::Context;
use crate::format::{count, size};
use crate::logging::say;
use crate::progress::{Bar, Unit};

/// A tag of a remote, as it is typed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RemoteTagName {
    pub remote: String,
    pub tag: String,
}

impl RemoteTagName {
    /// `REMOTE/TAG`; `None` if it is a name of this store.
    pub fn parse(name: &str) -> anyhow::Result<Option<Self>> {
        let parts = of_remote(name)?;
        Ok(parts.map(|(remote, tag)| Self { remote, tag }))
    }

    /// The remote, of which nothing is asked yet.
    pub fn open(&self, store: &Store) -> anyhow::Result<Remote> {
        remote(store, &self.remote)
    }
}

impl std::fmt::Display for RemoteTagName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.remote, self.tag)
    }
}

/// As it was asked for.
pub fn reading(args: &ReadingArgs, fills: bool) -> RemoteReading {
    RemoteReading {
        id: None,
        timeout: std::time::Duration::from_secs(args.remote_timeout),
        cache_limit_bytes: args.cache_limit,
        fills,
    }
}

/// Begins to read a snapshot where it is, what is likely to be touched first before it is
/// asked for.
pub fn begin(
    store: &Store,
    name: &RemoteTagName,
    reading: &RemoteReading,
    prefetches: bool,
) -> anyhow::Result<Lazy> {
    let options = LazyOptions {
        cache: Some(store.path().join(CACHE)),
        cache_limit_bytes: reading.cache_limit_bytes,
        timeout: reading.timeout,
        prefetches,
        fills: reading.fills,
    };
    let lazy = told(name.open(store)?.lazy(store, &name.tag, &options))?;
    remember(store, &name.remote);
    let id = lazy.snapshot().id().to_string();
    if reading.id.as_ref().is_some_and(|wanted| *wanted != id) {
        end(lazy);
        bail!(Busy(format!(
            "{name} names another snapshot by now; run the command again"
        )));
    }
    Ok(lazy)
}

/// Ends the reading; the log tells what it took.
pub fn end(lazy: Lazy) {
    let counts = lazy.counts();
    let LazyCounts {
        demand,
        working_set,
        ahead,
        fill,
        hedges,
        hedges_won,
        thrown_away,
    } = counts;
    tracing::info!(
        fetched_bytes = counts.fetched_bytes(),
        failed_requests = counts.failed_requests(),
        demand_requests = demand.requests,
        demand_bytes = demand.bytes,
        working_set_requests = working_set.requests,
        working_set_bytes = working_set.bytes,
        ahead_requests = ahead.requests,
        ahead_bytes = ahead.bytes,
        fill_requests = fill.requests,
        fill_bytes = fill.bytes,
        hedges,
        hedges_won,
        thrown_away,
        "a remote was read"
    );
    lazy.end();
}

/// What a name means to who restores it: a snapshot of this store, or one that stays in its
/// remote. One that a tag here names, too, is read here.
pub fn find(
    store: &Store,
    name: &str,
    args: &ReadingArgs,
    fills: bool,
) -> anyhow::Result<(String, Option<(SnapshotId, RemoteReading)>)> {
    let Some(remote_name) = RemoteTagName::parse(name)? else {
        return Ok((name.to_owned(), None));
    };
    let id = told(remote_name.open(store)?.snapshot_of(&remote_name.tag))?;
    match store.tags_of(id)?.pop() {
        Some(tag) => Ok((tag, None)),
        None => Ok((name.to_owned(), Some((id, reading(args, fills))))),
    }
}

/// Brings what a machine was restored from here, if that is still only in its remote: a
/// commit is made on top of it. Returns the tag that names it here, which is not the one that
/// the commit is to have.
pub fn complete(
    context: &Context,
    store: &Store,
    origin: &Origin,
    wanted: &str,
) -> anyhow::Result<Option<String>> {
    let (Some(id), Some(name)) = (&origin.snapshot, &origin.tag) else {
        return Ok(None);
    };
    let (Some(id), Some(name)) = (SnapshotId::from_hex(id), RemoteTagName::parse(name)?) else {
        return Ok(None);
    };
    if store.has_snapshot(id)? {
        return Ok(None);
    }
    let named = store.tag(&name.tag)?;
    let tag = match name.tag != wanted && named.is_none_or(|named| named == id) {
        true => name.tag.clone(),
        false => format!("{}-{}", name.tag, id.short()),
    };
    let remote = name.open(store)?;
    let bar = Bar::new(Unit::Bytes);
    let pulled = told(remote.pull_snapshot(store, &name.tag, *id.as_bytes(), &tag, &bar))?;
    if !context.json() {
        say!(
            "The machine was restored from {name}; pulled that first: {} pages, {}, named {tag} here.",
            count(pulled.pages),
            size(pulled.bytes)
        );
    }
    Ok(Some(tag))
}

/// What cannot be done with a snapshot that stays in a remote.
pub fn not_with(option: &str, name: &RemoteTagName) -> anyhow::Error {
    Usage(format!(
        "{option} needs a snapshot of this store: `snapstore pull {name}` brings it here"
    ))
    .into()
}
