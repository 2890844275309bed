//! A pull: what the store has not is read from the bucket, checked, and given to an
//! import.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};
use std::thread;

use serde::Serialize;
use snapstore_store::{
    Error as StoreError, ImportRequest, Imported, NodeParts, PartsWriter, Progress, Receiving,
    Silent, SnapshotId, Store, WorkingSet, check_tag, decode_page,
};

use crate::beats::Beats;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::head::{Head, LeafPlace, PagePlace, decode_leaf, read_together};
use crate::lazy::{CACHE, Recorded};
use crate::opened::Opened;
use crate::protocol::{self, Lease, LeaseKind, Leased, Malformed, Name, view};
use crate::remote::{Remote, block_on, hex, who};

/// Places that are so near each other are read with one request.
const GAP_BYTES: u32 = 64 << 10;
const MOST_AT_ONCE_BYTES: u32 = 8 << 20;
/// How often all is looked at when a repair or a collection took away what was there.
const ATTEMPTS: u32 = 3;

/// What a pull did.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Pulled {
    /// The snapshot's id.
    pub id: String,
    /// The tag that names it here.
    pub tag: String,
    /// Pages that were read from the bucket.
    pub pages: u64,
    /// Bytes that were.
    pub bytes: u64,
    /// How many chunks the store did not have.
    pub added_chunks: u64,
}

/// What is read and counted.
struct Fetch<'a, 'b> {
    remote: &'a Remote,
    beats: &'a mut Beats<'b>,
    store: &'a Store,
    head_key: String,
    head: Head,
    moved: BTreeMap<Name, Name>,
    progress: &'a (dyn Progress + Sync),
    pages: u64,
    bytes: u64,
}

impl Remote {
    /// Stores what a tag of the remote names, under a tag of the store. Only what the
    /// store has not is read.
    ///
    /// # Errors
    /// As [`protocol::view`]; [`protocol::Error::Damaged`] and
    /// [`protocol::Error::Missing`] name the object that is not what its writer made; as
    /// [`Store::import`].
    pub fn pull(
        &self,
        store: &Store,
        tag: &str,
        as_tag: &str,
        replace: bool,
        progress: &(dyn Progress + Sync),
    ) -> Result<Pulled> {
        store.check_tag_free(as_tag, replace).or_else(|error| {
            // It may name this snapshot already.
            store.tag(as_tag)?.map(|_| ()).ok_or(error)
        })?;
        let mut attempts = ATTEMPTS;
        loop {
            attempts -= 1;
            let (config, view) = self.view(Some(store), tag, true)?;
            let cache = cache_of(store, &config);
            let opened = self.open_view(&view);
            if opened.is_ok() {
                self.seen(&config.id).remember(&view.record);
            }
            let mut beats = Beats::new(self, view.lease, Some(view.record));
            let store = (store, cache.as_path());
            let take = |opened| self.take(store, (opened, &mut beats), as_tag, replace, progress);
            let pulled = opened.and_then(take);
            match beats.end(pulled) {
                // This host slept for more than a day, and the snapshot may be gone.
                Err(Error::Protocol(protocol::Error::LeaseLost { session })) if attempts > 0 => {
                    tracing::warn!(%session, "a view was given up meanwhile: the pull begins anew");
                }
                pulled => return pulled,
            }
        }
    }

    /// Stores this snapshot, which a tag of the remote names, or named and somebody still
    /// views, as a machine that was restored from it does.
    ///
    /// # Errors
    /// As [`Remote::pull`]; [`protocol::Error::Gone`] if neither is so.
    pub fn pull_snapshot(
        &self,
        store: &Store,
        tag: &str,
        id: [u8; 32],
        as_tag: &str,
        progress: &(dyn Progress + Sync),
    ) -> Result<Pulled> {
        let cache = cache_of(store, &self.check_pages(store)?);
        let store = (store, cache.as_path());
        match block_on(view(self, tag, &who())) {
            Ok(view) => {
                let opened = self.open_view(&view);
                let mut beats = Beats::new(self, view.lease, Some(view.record));
                let pulled = opened.and_then(|opened| match opened.snapshot == id {
                    true => {
                        let opened = (opened, &mut beats);
                        self.take(store, opened, as_tag, false, progress).map(Some)
                    }
                    false => Ok(None),
                });
                if let Some(pulled) = beats.end(pulled)? {
                    return Ok(pulled);
                }
            }
            Err(protocol::Error::NoTag { .. } | protocol::Error::Gone { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        let mut damaged = None;
        for (other, _, lease) in block_on(protocol::leases(self))? {
            let head = match lease.map(|lease| lease.kind) {
                Ok(LeaseKind::View(head)) => head,
                Ok(_) => continue,
                Err(error) => {
                    // It may be the one that keeps the snapshot, if none of the others does.
                    damaged = Some(error);
                    continue;
                }
            };
            let opened = match self.open_head_of(head, "a view") {
                Ok(opened) if opened.snapshot == id => opened,
                Err(error @ Error::Protocol(protocol::Error::Unanswered(_))) => return Err(error),
                // Of another snapshot, or of a view that has just ended.
                _ => continue,
            };
            let own = block_on(Lease::begin(self, LeaseKind::View(head), &who()))?;
            let mut beats = Beats::new(self, own, None);
            // A collection that has not seen the own lease has seen the other one.
            let is_there = |(session, _, _): &Leased| *session == other;
            let pulled = match block_on(protocol::leases(self)) {
                Ok(leases) if leases.iter().any(is_there) => {
                    let opened = (opened, &mut beats);
                    self.take(store, opened, as_tag, false, progress).map(Some)
                }
                Ok(_) => Ok(None),
                Err(error) => Err(error.into()),
            };
            if let Some(pulled) = beats.end(pulled)? {
                return Ok(pulled);
            }
        }
        let gone = || protocol::Error::Gone {
            name: format!("snapshot {}, which tag {tag:?} named,", hex(&id)),
        };
        Err(damaged.unwrap_or_else(gone).into())
    }

    fn take(
        &self,
        (store, cache): (&Store, &Path),
        (opened, beats): (Opened, &mut Beats<'_>),
        as_tag: &str,
        replace: bool,
        progress: &(dyn Progress + Sync),
    ) -> Result<Pulled> {
        let mut fetch = Fetch {
            remote: self,
            store,
            head_key: opened.key,
            head: opened.head,
            moved: opened.moved,
            progress,
            beats,
            pages: 0,
            bytes: opened.len_bytes,
        };
        let imported = fetch.import(as_tag, replace)?;
        fetch.keep_working_sets(&opened.snapshot, cache);
        Ok(Pulled {
            id: hex(&opened.snapshot),
            tag: as_tag.to_owned(),
            pages: fetch.pages,
            bytes: fetch.bytes,
            added_chunks: imported.added_chunks,
        })
    }
}

/// Where what was read of a bucket is kept.
fn cache_of(store: &Store, config: &Config) -> PathBuf {
    store.path().join(CACHE).join(hex(&config.id))
}

impl Fetch<'_, '_> {
    /// Keeps what is known of those who restored it before, if nothing is known in the store:
    /// from mounts of it on this host, or from whoever pushed it. It is a guess, which may be
    /// lost.
    fn keep_working_sets(&self, id: &[u8; 32], cache: &Path) {
        let recorded = Recorded::of(cache, id);
        let Some(id) = SnapshotId::from_hex(&hex(id)) else {
            return;
        };
        for image in self.head.trees.iter().map(|tree| &tree.image) {
            let sets = self.head.first.iter().flat_map(|first| &first.sets);
            let mut pushed = sets.filter(|(of, _)| of == image);
            let pushed = || WorkingSet::from_bytes(&pushed.next()?.1);
            let Some(set) = recorded.read(image).or_else(pushed) else {
                continue;
            };
            // Its name becomes a part of a file's name.
            if check_tag(image).is_err() {
                continue;
            }
            if matches!(self.store.working_set(id, image), Ok(None)) {
                let kept = self.store.keep_working_set(id, image, &set);
                kept.unwrap_or_else(|error| tracing::debug!(%error, "a working set is not kept"));
            }
        }
    }

    fn import(&mut self, tag: &str, replace: bool) -> Result<Imported> {
        let mut attempts = ATTEMPTS;
        loop {
            attempts -= 1;
            match self.try_import(tag, replace) {
                Err(crate::Error::Store(StoreError::Overtaken { .. })) if attempts > 0 => {}
                other => return other,
            }
        }
    }

    fn try_import(&mut self, tag: &str, replace: bool) -> Result<Imported> {
        let label = format!("{} of {}", self.head_key, self.remote.url());
        let request = ImportRequest {
            replace,
            label: label.clone().into(),
            stream_bytes: None,
        };
        let (reader, writer) = io::pipe().map_err(no_pipe)?;
        let receiving = &self.store.receive()?;
        thread::scope(|scope| {
            let import = thread::Builder::new()
                .name("import".to_owned())
                .spawn_scoped(scope, || receiving.import(&request, reader, &Silent))
                .map_err(no_pipe)?;
            let sent = self.send(receiving, BufWriter::new(writer), Path::new(&label), tag);
            let imported = import.join().expect("an import does not panic");
            match (sent, imported) {
                // Whoever reads no more says why.
                (
                    Err(crate::Error::Store(snapstore_store::Error::Io { source, .. })),
                    Err(error),
                ) if source.kind() == io::ErrorKind::BrokenPipe => Err(error.into()),
                (Err(error), _) => Err(error),
                (Ok(()), imported) => Ok(imported?),
            }
        })
    }

    fn send(
        &mut self,
        receiving: &Receiving<'_>,
        out: impl io::Write,
        label: &Path,
        tag: &str,
    ) -> Result<()> {
        let out = PartsWriter::new(out, label, self.store.page_size())?;
        let leaves = std::mem::take(&mut self.head.leaves);
        let sent = self.send_parts(receiving, &leaves, out, tag);
        self.head.leaves = leaves;
        sent
    }

    fn send_parts(
        &mut self,
        receiving: &Receiving<'_>,
        leaves: &BTreeMap<[u8; 32], LeafPlace>,
        mut out: PartsWriter<impl io::Write>,
        tag: &str,
    ) -> Result<()> {
        let total: u64 = leaves.values().map(|leaf| u64::from(leaf.len)).sum();
        self.progress.begin(tag, total);
        let mut done = 0;
        let mut written = HashSet::new();
        for (id, leaf) in leaves {
            done += u64::from(leaf.len);
            self.progress.advance(done);
            self.beats.beat()?;
            if receiving.has_leaf(id)? {
                continue;
            }
            let key = leaf.pack.pack_key();
            let record = self.range(leaf.pack, leaf.offset, leaf.len)?;
            let (node, places) = decode_leaf(id, &record).map_err(|error| error.of(&key))?;
            self.leaf_pages(receiving, (&node, &places), &mut written, &mut out)?;
            out.node(&node.canonical)?;
        }
        let mut missing = false;
        for (level, canonical) in &self.head.nodes {
            let node = NodeParts::parse(canonical, *level).ok_or_else(|| {
                Malformed::Wrong("it holds a node that none writes").of(&self.head_key)
            })?;
            for (_, child) in &node.children {
                missing |= *level == 1 && !leaves.contains_key(child);
            }
            if !receiving.has_node(&node.id())? {
                out.node(canonical)?;
            }
        }
        if missing {
            let reason = "it refers to a leaf that it does not list";
            return Err(Malformed::Wrong(reason).of(&self.head_key).into());
        }
        Ok(out.finish(tag, &self.head.manifest)?)
    }

    /// The pages of a leaf that the store has not.
    fn leaf_pages(
        &mut self,
        receiving: &Receiving<'_>,
        (node, places): (&NodeParts, &[PagePlace]),
        written: &mut HashSet<[u8; 32]>,
        out: &mut PartsWriter<impl io::Write>,
    ) -> Result<()> {
        let mut wanted: HashMap<Name, Vec<([u8; 32], PagePlace)>> = HashMap::new();
        for ((_, id), place) in node.children.iter().zip(places) {
            if !written.contains(id) && !receiving.has_page(id)? {
                written.insert(*id);
                wanted.entry(place.pack).or_default().push((*id, *place));
            }
        }
        for (pack, mut pages) in wanted {
            pages.sort_by_key(|(_, place)| place.offset);
            let mut rest = &pages[..];
            while !rest.is_empty() {
                let (start, end, count) = read_together(rest, GAP_BYTES, MOST_AT_ONCE_BYTES);
                let bytes = self.range(pack, start, end - start)?;
                for (id, place) in &rest[..count] {
                    let from = (place.offset - start) as usize;
                    let stored = bytes.get(from..from + place.len as usize);
                    let page = stored.and_then(|stored| {
                        decode_page(id, place.encoding, stored, self.store.page_size())
                    });
                    let page = page.ok_or_else(|| {
                        let reason = "a page in it is not the one that its leaf names";
                        Malformed::Wrong(reason).of(&self.key(pack))
                    })?;
                    out.page(&page)?;
                    self.pages += 1;
                }
                rest = &rest[count..];
            }
        }
        Ok(())
    }

    fn key(&self, pack: Name) -> String {
        self.moved.get(&pack).unwrap_or(&pack).pack_key()
    }

    /// A part of a pack.
    fn range(&mut self, pack: Name, offset: u32, len: u32) -> Result<Vec<u8>> {
        let key = self.key(pack);
        if len > 2 * MOST_AT_ONCE_BYTES {
            let reason = "it names a place that is longer than any";
            return Err(Malformed::Wrong(reason).of(&self.head_key).into());
        }
        let bytes = self
            .remote
            .bucket
            .get(&key, Some((u64::from(offset), len as usize)))?;
        let bytes = bytes.ok_or_else(|| protocol::Error::Missing {
            key: key.clone(),
            needed_by: self.head_key.clone(),
        })?;
        if bytes.len() != len as usize {
            return Err(Malformed::Wrong("it is too short").of(&key).into());
        }
        self.bytes += u64::from(len);
        Ok(bytes)
    }
}

fn no_pipe(error: io::Error) -> crate::Error {
    crate::Error::Protocol(protocol::Error::Work(error.into()))
}
