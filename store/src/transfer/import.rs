//! Into a store: what a stream holds and the store has not becomes chunks of its own.
//!
//! A stream comes from anywhere. Nothing in it is trusted: a chunk's id is computed
//! from its bytes, what a node or a manifest refers to has to be there already, and
//! before a tag is set the snapshot is walked as a reader would walk it.
//!
//! Order: chunks into packs, packs into the index, the walk, the tags. A tag is set
//! only once the end of the stream was seen, so a stream that was cut off or changed
//! leaves none. What was stored until then is there when the import is run again, if
//! its pack was full or its snapshot complete, and goes with a collection otherwise.

mod snapshots;

use std::collections::{BTreeMap, HashMap};
use std::io::Read;
use std::path::PathBuf;

use rayon::prelude::*;
use serde::Serialize;

use crate::commit::chunk_writer::{ChunkWriter, Claimed, EncodedRun, encode_into};
use crate::durable;
use crate::error::{Error, Result};
use crate::format::node::{self, Child, Node};
use crate::format::stream::{self, BadRecord, Record, Records, StreamReader};
use crate::gc::mark::Reachability;
use crate::id::{ChunkId, ChunkKind, SnapshotId};
use crate::pack::Location;
use crate::page::is_zero;
use crate::progress::Progress;
use crate::store::Store;
use crate::tags;

/// Places that are remembered, so that a node's children are not looked up again.
const MAX_RECENT: usize = 1 << 17;
/// The tree of an image of 16 TiB has nodes of these levels and below.
const MAX_LEVEL: u8 = 3;
/// With so much a pack is finished wherever the stream is: an import that is killed has
/// lost no more, when it is run again.
const PIECE_BYTES: u64 = 32 << 20;
const PAGES_PER_TASK: usize = 32;
/// How often the snapshots are looked at. Each time but the last one revives a condemned
/// pack, and who shares the store with collections that keep on condemning begins anew.
const WALKS_AT_MOST: u32 = 8;

/// How to import.
#[derive(Clone, Debug, Default)]
pub struct ImportRequest {
    /// Whether tags that name other snapshots may be moved.
    pub replace: bool,
    /// What errors call the stream, such as the name of a file.
    pub label: PathBuf,
    /// The length of the stream, for those who are told of the progress.
    pub stream_bytes: Option<u64>,
}

/// What an import did.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Imported {
    /// The snapshots, in the order of the stream: ancestors first.
    pub snapshots: Vec<ImportedSnapshot>,
    /// How many pages, tree nodes and manifests were in the stream.
    pub chunks: u64,
    /// How many the store did not have.
    pub added_chunks: u64,
    /// How many bytes of packs they take.
    pub added_bytes: u64,
}

/// A snapshot of a stream.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct ImportedSnapshot {
    /// The tags that name it.
    pub tags: Vec<String>,
    /// Its id in this store.
    pub id: SnapshotId,
    /// Its id in the stream. It is another one only where a store of format 1 took a
    /// snapshot of format 2: what has that id cannot be stored there.
    pub exported_as: SnapshotId,
}

impl Store {
    /// Stores the snapshots of a stream that [`Store::export`] wrote, under their tags.
    /// What is in the store already is not stored again, so one that was interrupted goes
    /// on when it is run again. Memory does not grow with the stream but by its tags,
    /// and a bit for each chunk.
    ///
    /// When this returns, the snapshots survive a crash; if it fails, no tag was set.
    ///
    /// # Errors
    /// [`crate::Damage::Stream`] if the stream is not what was exported, in whatever way;
    /// [`Error::NotAStream`]; [`Error::OtherPageSize`]; [`Error::NotImportable`];
    /// [`Error::TagExists`], without [`ImportRequest::replace`]; [`Error::Overtaken`] if
    /// meanwhile a repair or a collection took away what the stream refers to, and then it has
    /// to be given anew; otherwise as [`Store::commit`].
    pub fn import(
        &self,
        request: &ImportRequest,
        from: impl Read,
        progress: &dyn Progress,
    ) -> Result<Imported> {
        self.import_by(request, from, progress, || ChunkWriter::new(self))
    }

    /// The same with a writer that knows already what it may use.
    pub(crate) fn import_by<'a>(
        &'a self,
        request: &'a ImportRequest,
        from: impl Read,
        progress: &dyn Progress,
        sink: impl FnOnce() -> Result<ChunkWriter<'a>>,
    ) -> Result<Imported> {
        let span = tracing::debug_span!("import", label = ?request.label);
        let _entered = span.enter();
        let mut stream = StreamReader::new(from, &request.label)?;
        if stream.page_bytes != self.page_size().as_u32() {
            return Err(Error::OtherPageSize {
                path: request.label.clone(),
                stream_bytes: stream.page_bytes.into(),
                store_bytes: self.page_size().bytes(),
            });
        }
        progress.begin("import", request.stream_bytes.unwrap_or(0));
        let mut import = Import {
            store: self,
            request,
            sink: sink()?,
            recent: HashMap::new(),
            snapshots: Vec::new(),
            positions: HashMap::new(),
            tags: BTreeMap::new(),
            records: 0,
            chunks: 0,
        };
        loop {
            // Whoever was stopped may have made the stream end.
            let content = stream.next_block();
            import.sink.check_cancelled()?;
            if content.as_ref().is_err_and(stream::has_ended_early) {
                // The next attempt finds what has come.
                if let Err(error) = import.sink.finish_pack() {
                    tracing::debug!(%error, "what has come is not kept");
                }
            }
            let content = content?;
            match import.block(&content) {
                Ok(false) => {}
                Ok(true) => break,
                Err(Refused::Stream(reason)) => return Err(stream.damaged(reason)),
                Err(Refused::Other(error)) => return Err(error),
            }
            if import.sink.open_pack_bytes() >= PIECE_BYTES {
                import.sink.finish_pack()?;
            }
            progress.advance(stream.len_bytes);
        }
        stream.check_end()?;
        import.finish()
    }
}

/// Why an import ends.
enum Refused {
    /// What is wrong with the block.
    Stream(&'static str),
    Other(Error),
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

struct Import<'a> {
    store: &'a Store,
    request: &'a ImportRequest,
    sink: ChunkWriter<'a>,
    /// Where chunks are that were in the stream a moment ago.
    recent: HashMap<ChunkId, Location>,
    snapshots: Vec<ImportedSnapshot>,
    /// Where in that list a snapshot is that has this id in the stream.
    positions: HashMap<SnapshotId, usize>,
    /// Where in that list the snapshot of a tag is.
    tags: BTreeMap<String, usize>,
    records: u32,
    chunks: u64,
}

/// A page of the stream.
struct Page<'b> {
    base: Option<[u8; 32]>,
    bytes: &'b [u8],
}

impl Import<'_> {
    /// Takes a block's content. Returns whether it was the last one.
    fn block(&mut self, content: &[u8]) -> Result<bool, Refused> {
        let mut pages = Vec::new();
        let mut records = Records::new(content, self.store.page_size());
        while let Some(record) = records.next() {
            let record = match record {
                Ok(Record::Page { base, bytes }) => {
                    pages.push(Page { base, bytes });
                    continue;
                }
                Ok(record) => record,
                Err(BadRecord::Wrong) => return Err(Refused::Stream("it holds half a record")),
                Err(BadRecord::Newer { kind }) => {
                    let what = "a record of kind";
                    return Err(Error::newer(&self.request.label, what, kind.into()).into());
                }
            };
            self.pages(&std::mem::take(&mut pages))?;
            match record {
                Record::Page { .. } => {}
                Record::Node { base, canonical } => self.node(base, canonical)?,
                Record::Snapshot { tags, manifest } => self.snapshot(&tags, manifest)?,
                Record::End { snapshots, chunks } => {
                    if (snapshots, chunks) != (self.records, self.chunks)
                        || records.next().is_some()
                    {
                        return Err(Refused::Stream("its end tells of another stream"));
                    }
                    return Ok(true);
                }
            }
        }
        self.pages(&pages)?;
        Ok(false)
    }

    /// Stores the pages that are not in the store.
    fn pages(&mut self, pages: &[Page<'_>]) -> Result<(), Refused> {
        if pages.is_empty() {
            return Ok(());
        }
        self.chunks += pages.len() as u64;
        let identify = |page: &Page<'_>| {
            let id = ChunkKind::Page.hash(page.bytes);
            (!is_zero(page.bytes)).then_some(id)
        };
        let ids: Option<Vec<ChunkId>> = self.store.in_pool(|| {
            let pages = pages.par_iter().with_min_len(PAGES_PER_TASK);
            Ok(pages.map(identify).collect())
        })?;
        let ids = ids.ok_or(Refused::Stream("it holds a page of zeros"))?;
        let known = self.sink.known(&ids)?;
        let mut fresh = Vec::new();
        for ((id, page), known) in ids.iter().zip(pages).zip(known) {
            let at = match known {
                Some(at) => at,
                None => match self.sink.claim(*id, fresh.len())? {
                    Claimed::Already(at) => at,
                    Claimed::New(at) => {
                        fresh.push((*id, page));
                        at
                    }
                },
            };
            self.remember(*id, at);
        }
        let sink = &self.sink;
        let runs: Vec<EncodedRun> = self.store.in_pool(|| {
            let tasks = fresh.par_chunks(PAGES_PER_TASK);
            tasks
                .map(|pages| {
                    let mut run = EncodedRun::default();
                    for (id, page) in pages {
                        encode_into(sink, *id, page.bytes, page.base.map(child), &mut run)?;
                    }
                    Ok(run)
                })
                .collect::<Result<_>>()
        })?;
        for run in runs {
            self.sink.append(run)?;
        }
        Ok(self.sink.roll_over()?)
    }

    /// Stores a node, whose children are there.
    fn node(&mut self, base: Option<[u8; 32]>, canonical: &[u8]) -> Result<(), Refused> {
        self.chunks += 1;
        let level = canonical
            .first()
            .copied()
            .filter(|level| *level <= MAX_LEVEL);
        let level = level.ok_or(Refused::Stream("it holds a node that none writes"))?;
        let mut node = match Node::decode(canonical, level) {
            Ok(node) => node,
            Err(node::Malformed::Newer { version }) => {
                let what = "a tree node of version";
                return Err(Error::newer(&self.request.label, what, version).into());
            }
            Err(node::Malformed::Wrong) => {
                return Err(Refused::Stream("it holds a node that none writes"));
            }
        };
        if node::canonical_len(canonical) != Some(canonical.len()) {
            return Err(Refused::Stream("it holds a node that none writes"));
        }
        let children: Vec<(usize, Child)> = node.present().collect();
        let ids: Vec<ChunkId> = children
            .iter()
            .map(|(_, child)| node.child_id(*child))
            .collect();
        let places = self.places(&ids)?;
        for ((slot, child), hint) in children.into_iter().zip(places) {
            node.set_child(slot, Some(Child { hint, ..child }));
        }
        let id = node.id();
        let at = self.sink.put(id, &node.encode(), base.map(child))?;
        self.remember(id, at);
        Ok(())
    }

    /// Where chunks are that something refers to.
    fn places(&mut self, ids: &[ChunkId]) -> Result<Vec<Option<Location>>, Refused> {
        let place = |id: &ChunkId| self.recent.get(id).copied().or(self.sink.claimed(*id));
        let mut places: Vec<Option<Location>> = ids.iter().map(place).collect();
        let missing: Vec<ChunkId> = ids
            .iter()
            .zip(&places)
            .filter_map(|(id, at)| at.is_none().then_some(*id))
            .collect();
        let mut found = self.sink.known(&missing)?.into_iter();
        for at in places.iter_mut().filter(|at| at.is_none()) {
            *at = found.next().flatten();
            if at.is_none() {
                return Err(Refused::Stream(
                    "it refers to a chunk that is neither before it nor in the store",
                ));
            }
        }
        Ok(places)
    }

    fn remember(&mut self, id: ChunkId, at: Location) {
        if self.recent.len() >= MAX_RECENT {
            self.recent.clear();
        }
        self.recent.insert(id, at);
    }

    /// Makes sure that the snapshots are whole and stay so until they have their tags.
    ///
    /// They are looked at as a reader would: a stream can tie chunks together that are there,
    /// and make no tree, and it can refer to a leaf whose pages it does not hold. Such a page
    /// may be in a pack that was condemned before this took its lease, which nothing keeps: it
    /// is revived. Until then an optimisation could lead the index away from a base in it, so
    /// all is looked at once more afterwards. Were it done the other way round, what the walk
    /// found could be gone when the tag is set.
    fn look_at_snapshots(&mut self) -> Result<()> {
        for _ in 0..WALKS_AT_MOST {
            let mut reach = Reachability::new(&self.store.chunks)?;
            for snapshot in &self.snapshots {
                self.sink.check_cancelled()?;
                reach.add_snapshot(snapshot.id)?;
            }
            if !self.sink.keep(reach.into_marks().packs())? {
                return Ok(());
            }
        }
        Err(Error::Overtaken {
            path: self.store.layout.packs(),
        })
    }

    /// Makes sure that all is there, and sets the tags.
    fn finish(mut self) -> Result<Imported> {
        self.sink.finish_pack()?;
        self.look_at_snapshots()?;
        self.sink.check_cancelled()?;
        let _publish = self.store.publish_lock()?;
        // Again, under the lock: others may have taken names.
        for (tag, position) in &self.tags {
            self.check_tag_free(tag, self.snapshots[*position].id)?;
        }
        self.sink.publish_pack(None)?;
        durable::sync_dir(self.store.layout.root())?;
        for snapshot in &self.snapshots {
            for tag in &snapshot.tags {
                // Also one that names it: whoever set it may have been killed before it
                // was durable.
                tags::set(&self.store.layout, tag, snapshot.id)?;
            }
        }
        let added = self.sink.added();
        Ok(Imported {
            chunks: self.chunks + self.snapshots.len() as u64,
            added_chunks: added.chunks,
            added_bytes: added.bytes,
            snapshots: self.snapshots,
        })
    }
}

/// A chunk that another one is like, wherever it is.
fn child(hash: [u8; 32]) -> Child {
    Child { hash, hint: None }
}
