//! What a push uploads: the leaves that the bucket has not, with the pages that it has
//! not. `reuse` says what it has.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Instant;

use serde::Serialize;
use snapstore_store::{Parts, Progress, Root, Store};

use crate::error::{of_bucket, usable};
use crate::first::{Apart, Wanted, first};
use crate::head::{Head, PagePlace, Tree};
use crate::hooks::{self, Finding};
use crate::intact::Intact;
use crate::outgoing::{Outgoing, beat_at_times};
use crate::placed::Placed;
use crate::protocol::{
    Error, HeadSummary, Lease, Listing, Name, RefKey, Result, Stored, Work, put_surely,
};
use crate::remote::Remote;
use crate::reuse::There;
use crate::seen::Seen;

type Failed = Cell<Option<snapstore_store::Error>>;

/// What a push did.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Default)]
pub struct PushReport {
    /// The snapshot's id.
    pub id: String,
    /// Whether the tag named it already.
    pub already: bool,
    /// Pages that were uploaded.
    pub pages: u64,
    /// Pages that were there.
    pub reused_pages: u64,
    /// Of these, pages of snapshots that this one did not come from.
    pub found_pages: u64,
    /// Leaves that were there as they are.
    pub reused_leaves: u64,
    /// Pages of its working set, which was laid apart; all of them were uploaded.
    pub working_set_pages: u64,
    /// Bytes that were uploaded.
    pub bytes: u64,
}

/// The work of a push.
pub struct Upload<'a> {
    store: &'a Store,
    parts: &'a Parts<'a>,
    tag: &'a str,
    progress: &'a dyn Progress,
    report: &'a Mutex<PushReport>,
    failed: &'a Failed,
    /// What was looked at, of a push that finds what its tag names damaged.
    intact: Option<Intact>,
    wanted: Wanted,
    /// Where runs of hooks are kept.
    cache: PathBuf,
    seen: Option<Seen>,
}

/// A push under way.
struct Run<'a> {
    out: Outgoing<'a>,
    there: There,
    head: Head,
    uploaded: Placed,
    apart: Apart,
    nodes: BTreeSet<[u8; 32]>,
    done_pages: u64,
    /// Pages found by hooks since they were last counted.
    found: u64,
}

impl<'a> Upload<'a> {
    pub fn new(
        store: &'a Store,
        parts: &'a Parts<'a>,
        tag: &'a str,
        progress: &'a dyn Progress,
        report: &'a Mutex<PushReport>,
        failed: &'a Failed,
        cache: PathBuf,
    ) -> Self {
        Self {
            store,
            parts,
            tag,
            progress,
            report,
            failed,
            intact: None,
            wanted: Wanted::of(store, parts),
            cache,
            seen: None,
        }
    }

    /// The same of a bucket of which this was seen.
    pub fn with_seen(mut self, seen: Seen) -> Self {
        self.seen = Some(seen);
        self
    }

    /// Has all pages looked for.
    fn want(&self, finding: &mut Finding) -> Result<()> {
        let mut open: Vec<Root> = self.parts.roots().map(|(_, root)| root).collect();
        while let Some(root) = open.pop() {
            for (_, id) in &self.local(self.parts.node(root))?.children {
                match root.level.checked_sub(1) {
                    Some(level) => open.push(Root { id: *id, level }),
                    None => finding.want(id),
                }
            }
        }
        Ok(())
    }

    /// An error of the local store ends the push.
    fn local<T>(&self, result: snapstore_store::Result<T>) -> Result<T> {
        result.map_err(|error| {
            let text = error.to_string();
            self.failed.set(Some(error));
            Error::Work(text.into())
        })
    }

    fn count(&self, change: impl FnOnce(&mut PushReport)) {
        if let Ok(mut report) = self.report.lock() {
            change(&mut report);
        }
    }

    async fn node(
        &self,
        run: &mut Run<'_>,
        root: Root,
        image: &str,
        old: &BTreeMap<u64, [u8; 32]>,
        first: u64,
    ) -> Result<()> {
        if root.level == 0 {
            return self.leaf(run, root, old.get(&first), (image, first)).await;
        }
        let node = self.local(self.parts.node(root))?;
        let leaves = 512_u64.saturating_pow(u32::from(root.level) - 1);
        for (slot, id) in &node.children {
            let child = Root {
                id: *id,
                level: root.level - 1,
            };
            let first = first + *slot as u64 * leaves;
            Box::pin(self.node(run, child, image, old, first)).await?;
        }
        if run.nodes.insert(root.id) {
            run.head.nodes.push((root.level, node.canonical));
        }
        Ok(())
    }

    async fn leaf(
        &self,
        run: &mut Run<'_>,
        leaf: Root,
        old: Option<&[u8; 32]>,
        (image, number): (&str, u64),
    ) -> Result<()> {
        if run.head.leaves.contains_key(&leaf.id) || run.apart.has(&leaf.id) {
            return Ok(());
        }
        run.out.beat().await?;
        let is_there = run.there.leaf(&leaf.id);
        if let Some(slots) = self.wanted.slots(image, number) {
            let old = if is_there.is_some() {
                Some(&leaf.id)
            } else {
                old
            };
            return self.leaf_apart(run, leaf, old, slots).await;
        }
        if let Some(place) = is_there
            && run
                .there
                .may_use_all(run.out.remote, run.out.lease, &place)
                .await?
        {
            run.head.leaves.insert(leaf.id, place);
            self.count(|report| report.reused_leaves += 1);
            return Ok(());
        }
        let known = run.there.known(run.out.remote, old)?;
        let node = self.local(self.parts.node(leaf))?;
        let mut pages = Vec::with_capacity(node.children.len());
        let (mut new, mut reused) = (0, 0);
        for (_, id) in &node.children {
            let page = match run.place(&known, id).await? {
                Some(place) => {
                    reused += 1;
                    Ok(place)
                }
                None => {
                    new += 1;
                    let mut bytes = Vec::new();
                    let encoding = self.local(self.parts.encoded_page(id, &mut bytes))?;
                    Err((encoding, bytes))
                }
            };
            pages.push((*id, page));
        }
        let (place, places) = run.out.pack.add(&node.canonical, &pages);
        for ((_, id), place) in node.children.iter().zip(places) {
            run.uploaded.insert(id, place);
        }
        run.head.leaves.insert(leaf.id, place);
        self.done(run, new, reused).await
    }

    /// A leaf of the working set: its record, and those of its pages that are touched, go to
    /// a pack of their own.
    async fn leaf_apart(
        &self,
        run: &mut Run<'_>,
        leaf: Root,
        old: Option<&[u8; 32]>,
        slots: &BTreeMap<usize, usize>,
    ) -> Result<()> {
        let known = run.there.known(run.out.remote, old)?;
        let node = self.local(self.parts.node(leaf))?;
        let mut places = Vec::with_capacity(node.children.len());
        let (mut new, mut reused, mut apart) = (0, 0, 0);
        for (slot, id) in &node.children {
            if let Some(touched) = slots.get(slot) {
                let mut bytes = Vec::new();
                let encoding = self.local(self.parts.encoded_page(id, &mut bytes))?;
                run.apart.add_page(*touched, *id, encoding, bytes);
                places.push((*id, None));
                apart += 1;
                continue;
            }
            let place = match run.place(&known, id).await? {
                Some(place) => {
                    reused += 1;
                    place
                }
                None => {
                    let mut bytes = Vec::new();
                    let encoding = self.local(self.parts.encoded_page(id, &mut bytes))?;
                    new += 1;
                    let place = run.out.pack.add_page(*id, encoding, &bytes);
                    run.uploaded.insert(id, place);
                    place
                }
            };
            places.push((*id, Some(place)));
        }
        run.apart.add_leaf(leaf.id, node.canonical, places);
        self.count(|report| report.working_set_pages += apart);
        self.done(run, new + apart, reused).await
    }

    /// So many pages of a leaf were new, and so many were there.
    async fn done(&self, run: &mut Run<'_>, new: u64, reused: u64) -> Result<()> {
        run.done_pages += new + reused;
        let page_bytes = self.store.page_size().bytes();
        self.progress.advance(run.done_pages * page_bytes);
        self.count(|report| {
            report.pages += new;
            report.reused_pages += reused;
            report.found_pages += std::mem::take(&mut run.found);
        });
        if run.out.pack.is_full() {
            let bytes = run.out.finish_pack().await?;
            self.count(|report| report.bytes += bytes);
        }
        Ok(())
    }

    /// Uploads what was laid apart.
    async fn upload_apart(&self, run: &mut Run<'_>) -> Result<()> {
        let apart = std::mem::take(&mut run.apart);
        if apart.is_empty() {
            return Ok(());
        }
        let (pack, leaves) = apart.into_pack(run.out.lease.next_name());
        let mut first = first(&pack, &self.wanted);
        run.head.leaves.extend(leaves);
        let bytes = run.out.upload(pack).await?;
        self.count(|report| report.bytes += bytes);
        first.lengths.clone_from(&run.out.lengths);
        run.head.first = Some(first);
        Ok(())
    }
}

impl Work<Remote> for Upload<'_> {
    async fn store(&mut self, remote: &Remote, lease: &mut Lease) -> Result<Stored> {
        let there = There::look(remote, self.store, self.tag, self.parts.id()).await?;
        let mut there = there.with(self.intact.take());
        if !there.is_kin() {
            let mut last_beat = Instant::now();
            there.found = hooks::find(
                remote,
                Some(&self.cache),
                |finding| self.want(finding),
                async || beat_at_times(remote, lease, &mut last_beat).await,
            )
            .await?;
        }
        let mut run = Run {
            out: Outgoing::new(remote, lease),
            there,
            head: Head {
                manifest: self.parts.canonical_manifest().to_vec(),
                ..Head::default()
            },
            uploaded: Placed::default(),
            found: 0,
            apart: Apart::default(),
            nodes: BTreeSet::new(),
            done_pages: 0,
        };
        let images = &self.parts.manifest().images;
        let pages: u64 = images.iter().map(|image| image.nonzero_pages).sum();
        self.progress
            .begin(self.tag, pages * self.store.page_size().bytes());
        for (image, root) in self.parts.roots() {
            let old = run.there.leaves_of(image);
            self.node(&mut run, root, image, &old, 0).await?;
            run.head.trees.push(Tree {
                image: image.to_owned(),
                level: root.level,
                id: root.id,
            });
        }
        if !run.out.pack.is_empty() {
            let bytes = run.out.finish_pack().await?;
            self.count(|report| report.bytes += bytes);
        }
        self.upload_apart(&mut run).await?;
        let bytes = run.out.write_hooks().await?;
        self.count(|report| report.bytes += bytes);
        let snapshot = *self.parts.id().as_bytes();
        let head = run.out.lease.next_name();
        let key = head.head_key();
        let packs = run.head.packs();
        let summary = HeadSummary {
            version: run.head.version(),
            snapshot,
            packs: packs.clone(),
            moved: Vec::new(),
        };
        let bytes = summary.encode(&key, &run.head.encode(&packs));
        put_surely(remote, &key, &bytes).await?;
        self.count(|report| report.bytes += bytes.len() as u64);
        Ok(Stored {
            snapshot,
            head,
            relied: run.there.into_relied(),
        })
    }

    fn is_older(&self, listing: &Listing) -> Result<bool> {
        let seen = self.seen.as_ref();
        seen.map_or(Ok(false), |seen| {
            seen.is_older(self.tag, listing.shown(self.tag))
        })
    }

    fn above(&self) -> u64 {
        self.seen.as_ref().map_or(0, |seen| seen.highest(self.tag))
    }

    async fn is_whole(
        &mut self,
        remote: &Remote,
        lease: &mut Lease,
        record: &RefKey,
    ) -> Result<bool> {
        let mut intact = Intact::default();
        let opened = remote.open_head_of(record.head, &record.key());
        let opened = usable(opened.map_err(of_bucket))?;
        let opened = opened.filter(|opened| opened.snapshot == *self.parts.id().as_bytes());
        let mut is_whole = opened.is_some();
        let mut last_beat = Instant::now();
        if let Some(opened) = opened {
            intact.origins.learn(opened.moved);
            for pack in opened.packs {
                beat_at_times(remote, lease, &mut last_beat).await?;
                is_whole = is_whole && intact.is_whole(remote, pack).map_err(of_bucket)?;
            }
        }
        self.intact = Some(intact);
        Ok(is_whole)
    }
}

impl Run<'_> {
    /// Where a page is that is there already, and may be used.
    async fn place(
        &mut self,
        known: &HashMap<[u8; 32], PagePlace>,
        id: &[u8; 32],
    ) -> Result<Option<PagePlace>> {
        let places = [known.get(id).copied(), self.uploaded.get(id)];
        for place in places {
            if let Some(place) = place
                && self.may_use(place.pack).await?
            {
                return Ok(Some(place));
            }
        }
        let found = self.there.found.place(id);
        let Some(found) = found else { return Ok(None) };
        let may_use = self.may_use(found.pack).await?;
        self.found += u64::from(may_use);
        Ok(may_use.then_some(found))
    }

    async fn may_use(&mut self, pack: Name) -> Result<bool> {
        let out = &self.out;
        self.there.may_use(out.remote, out.lease, pack).await
    }
}
