//! Committing: inputs become a snapshot.
//!
//! The way of a page: `source` reads it, `pages` hashes it and asks the index,
//! `chunk_writer` gives it a place and appends it to a pack; `tree::build` ties pages
//! to a root; the manifest holds the roots; the tag names the manifest.

pub(crate) mod chunk_writer;
mod encoded_pages;
mod grain;
mod holes;
pub(crate) mod input;
mod leaf_work;
pub(crate) mod pages;
pub(crate) mod parent;
mod precopy;
pub(crate) mod read_at;
mod request;
pub(crate) mod source;
pub(crate) mod unchanging;

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::durable;
use crate::error::{Error, Result, readable};
use crate::id::SnapshotId;
use crate::lease::{self, LeaseTerms};
use crate::manifest::{Image, ImageRole, MAX_CREATED_UNIX_SECONDS, Manifest};
use crate::pack::writer::SealedPack;
use crate::pin::Pin;
use crate::progress::Progress;
use crate::sim::{self, Fault};
use crate::store::Store;
use crate::tags;
use crate::tree::build::HolePolicy;
use chunk_writer::ChunkWriter;
use input::{Input, InputKind};
use pages::{Before, commit_image};
pub use precopy::Precopy;
pub use request::{CommitRequest, ParentChoice};
use source::Source;
use unchanging::Unchanging;

/// How often a commit is made anew when a repair or a collection took away what
/// it relied on.
const ATTEMPTS: u32 = 3;

/// How long the stages of a commit took, one after the other.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CommitTimings {
    /// Checking the request, opening the inputs, finding and pinning the parent.
    pub prepare: Duration,
    /// Reading, hashing, looking up, compressing and writing, all at the same
    /// time; also finishing full packs of a commit that fills more than one.
    pub pages: Duration,
    /// Making the last pack durable.
    pub seal: Duration,
    /// Waiting for the publish lock, the index, and the tag.
    pub publish: Duration,
}

impl CommitTimings {
    /// The whole commit.
    #[must_use]
    pub fn total(&self) -> Duration {
        self.prepare + self.pages + self.seal + self.publish
    }
}

/// What a commit did.
#[derive(Debug)]
pub struct Committed {
    /// The new snapshot.
    pub id: SnapshotId,
    /// What it holds.
    pub manifest: Manifest,
    /// Images that are the parent's, unchanged.
    pub inherited: Vec<String>,
    /// Images of the parent that are not in this snapshot.
    pub left_out: Vec<Image>,
    /// What could not be read and was not needed: parts of the parent, and packs
    /// that hold chunks of this snapshot, which were stored anew. The snapshot is
    /// whole. At most 16 of them.
    pub warnings: Vec<Error>,
    /// Keeps the snapshot whole, if that was asked for with
    /// [`CommitRequest::keep`].
    pub pin: Option<Pin>,
    /// Where the time went.
    pub timings: CommitTimings,
}

/// Measures one stage after the other.
struct Stages(Instant);

impl Stages {
    fn end_of_stage(&mut self) -> Duration {
        let now = Instant::now();
        now - std::mem::replace(&mut self.0, now)
    }
}

impl Store {
    /// Commits inputs as a snapshot under a tag.
    ///
    /// When this returns, the snapshot survives a crash; if it fails or the
    /// machine stops before, the store is as if it had not been called. Memory:
    /// 64 MiB of buffers and about 64 bytes per new chunk of a pack (at most
    /// 16 MiB), besides the caches of index and tree nodes (32 and 20 MiB).
    ///
    /// # Errors
    /// Invalid names, inputs or parents, each with a variant of its own;
    /// [`Error::TagExists`]; [`Error::Busy`]; I/O errors such as a full disk.
    pub fn commit(&self, request: &CommitRequest, progress: &dyn Progress) -> Result<Committed> {
        let span = tracing::debug_span!("commit", tag = %request.tag);
        let _entered = span.enter();
        let mut attempts = ATTEMPTS;
        loop {
            attempts -= 1;
            match self.in_pool(|| self.try_commit(request, None, progress)) {
                Err(error @ Error::Overtaken { .. }) if attempts > 0 => {
                    tracing::debug!(%error, "commits again");
                    self.chunks.packs().reopen_all();
                }
                other => return other,
            }
        }
    }

    /// Commits inputs of which one has been read before, while it changed.
    ///
    /// That one, of the image's name, is a diff to what was read last: it has data
    /// wherever the image may have changed since. All else is as with [`Store::commit`];
    /// the parent is the one that the reading began with.
    ///
    /// # Errors
    /// As [`Store::commit`]; [`Error::Overtaken`] if meanwhile a repair took away what was
    /// stored, and then all has to be read anew.
    pub fn commit_after(
        &self,
        precopy: Precopy<'_>,
        request: &CommitRequest,
        progress: &dyn Progress,
    ) -> Result<Committed> {
        let done = self.in_pool(|| self.try_commit(request, Some(precopy), progress));
        if let Err(Error::Overtaken { .. }) = &done {
            self.chunks.packs().reopen_all();
        }
        done
    }

    fn try_commit(
        &self,
        request: &CommitRequest,
        precopy: Option<Precopy<'_>>,
        progress: &dyn Progress,
    ) -> Result<Committed> {
        let mut stages = Stages(Instant::now());
        let mut timings = CommitTimings::default();
        request.check()?;
        self.check_tag_free(&request.tag, request.replace)?;
        let page_size = self.page_size();
        let sources = request
            .inputs
            .iter()
            .map(|input| Source::open(input, page_size))
            .collect::<Result<Vec<_>>>()?;
        // What cannot be read of the parent is needed for what holes stand for, and
        // for nothing else.
        let needs_parent =
            request.inherit || request.inputs.iter().any(|input| input.kind.is_diff());
        let (mut sink, parent, read) = match precopy {
            Some(precopy) => (precopy.sink, precopy.parent, precopy.image),
            None => {
                let mut sink = ChunkWriter::new(self)?;
                let parent = match self.pin_parent(request, &sources, &mut sink) {
                    Err(error) if error.is_lost() && !needs_parent => {
                        sink.note(error);
                        None
                    }
                    other => other?,
                };
                (sink, parent, None)
            }
        };
        tracing::debug!(?parent, "began");
        let parent_manifest = match parent.map(|id| self.manifest(id)).transpose() {
            Err(error) if error.is_lost() && !needs_parent => {
                sink.note(error);
                None
            }
            other => other?,
        };
        timings.prepare = stages.end_of_stage();
        let mut images = Vec::new();
        for (input, source) in request.inputs.iter().zip(&sources) {
            let old = parent_manifest.as_ref().and_then(|m| m.image(&input.name));
            let read = read.as_ref().filter(|read| read.name == input.name);
            let image = match read {
                Some(read) => precopy::commit_rest(&mut sink, source, read, old, progress)?,
                None => commit_input(&mut sink, input, source, old, progress)?,
            };
            images.push(image);
        }
        timings.pages = stages.end_of_stage();
        tracing::debug!("stored images");
        let inherited = request::inherit(&mut images, parent_manifest.as_ref(), request)?;
        let left_out = request::left_out(&images, parent_manifest.as_ref());
        images.sort_by(|a, b| a.name.cmp(&b.name));
        let added = sink.added();
        let manifest = Manifest {
            page_size,
            created_unix_seconds: now_unix_seconds(),
            parent,
            first_tag: request.tag.clone(),
            images,
            labels: request.labels.clone(),
            added_chunks: added.chunks,
            added_bytes: added.bytes,
            ..Manifest::blank(page_size)
        };
        let encoded = request::encode(&manifest, self.format())?;
        let id = SnapshotId::of_manifest(&encoded);
        sink.put(id.chunk(), &encoded, None)?;
        let sealed = sink.seal()?;
        tracing::debug!("sealed");
        timings.seal = stages.end_of_stage();
        request.unchanging.iter().try_for_each(Unchanging::check)?;
        let warnings = sink.take_notes();
        self.cancel.check()?;
        let pin = self.publish(request, sink, sealed, id)?;
        timings.publish = stages.end_of_stage();
        tracing::debug!(%id, chunks = manifest.added_chunks, ?timings, "committed");
        Ok(Committed {
            id,
            manifest,
            inherited,
            left_out,
            warnings,
            pin,
            timings,
        })
    }

    /// Makes a snapshot visible whose pack is sealed.
    ///
    /// Order: seal the pack, enter it into the index, pin, set the tag. The tag is
    /// the acknowledgement; were it set earlier, a crash could leave a tag whose
    /// chunks are not there. Were the index entered before the pack is sealed,
    /// another commit could rely on chunks that a crash takes away. Were the
    /// snapshot pinned before its index entries are there, a collection would
    /// find a root that is not whole; were it pinned after its tag is set, the tag could be
    /// removed and the snapshot collected in between.
    fn publish(
        &self,
        request: &CommitRequest,
        sink: ChunkWriter<'_>,
        sealed: Option<SealedPack>,
        id: SnapshotId,
    ) -> Result<Option<Pin>> {
        if sim::on(Fault::RevivedWithoutLock) {
            sink.publish_pack(None)?;
        }
        self.check_tag_free(&request.tag, request.replace)?;
        let small = sink.enter_if_large(sealed.as_ref())?;
        let _publish = self.publish_lock()?;
        // Again, under the lock: another commit may have taken the name.
        self.check_tag_free(&request.tag, request.replace)?;
        if sim::on(Fault::TagBeforeIndex) {
            tags::set(&self.layout, &request.tag, id)?;
        }
        sink.publish_pack(small)?;
        tracing::debug!("indexed");
        // A store whose creator was killed may not be durable itself.
        durable::sync_dir(self.layout.root())?;
        let lease = sink.into_lease();
        if request.keep {
            // No writer's lease any more: from here to the tag, the publish lock
            // stops deletions, and then the snapshot is a root.
            lease.set(&LeaseTerms::viewer(vec![id]))?;
        }
        tags::set(&self.layout, &request.tag, id)?;
        Ok(request.keep.then(|| Pin::new(lease, vec![id])))
    }

    /// The parent, and a tag that it is likely to have.
    fn choose_parent(
        &self,
        request: &CommitRequest,
        sources: &[Source<'_>],
    ) -> Result<Option<parent::Tagged>> {
        match &request.parent {
            ParentChoice::Nothing => Ok(None),
            ParentChoice::Named(name) => Ok(Some((self.resolve_parent(name)?, name.clone()))),
            ParentChoice::Pinned(id) => Ok(Some((*id, request.tag.clone()))),
            ParentChoice::Automatic => {
                if let Some(id) = readable(tags::get(&self.layout, &request.tag))?.flatten()
                    && readable(self.manifest(id))?.is_some()
                {
                    return Ok(Some((id, request.tag.clone())));
                }
                let largest = request
                    .inputs
                    .iter()
                    .zip(sources)
                    .filter(|(input, _)| input.kind == InputKind::Full)
                    .max_by_key(|(input, source)| {
                        (input.role == ImageRole::Memory, source.size_bytes())
                    });
                match largest {
                    Some((input, source)) => parent::find(self, &input.name, source),
                    None => Ok(None),
                }
            }
        }
    }

    /// Chooses the parent and makes it a root for as long as this commit lives.
    /// It is one already, see `lease`.
    fn pin_parent(
        &self,
        request: &CommitRequest,
        sources: &[Source<'_>],
        sink: &mut ChunkWriter<'_>,
    ) -> Result<Option<SnapshotId>> {
        loop {
            let Some((id, likely_tag)) = self.choose_parent(request, sources)? else {
                return Ok(None);
            };
            let pinned_parent = matches!(request.parent, ParentChoice::Pinned(_));
            let is_root = sink.pin_if(id, |allocate| {
                Ok(pinned_parent && lease::viewed(&self.layout, id, allocate)?
                    || self.is_tagged(id, &likely_tag)?)
            })?;
            if is_root {
                return Ok(Some(id));
            }
            if pinned_parent {
                return Err(Error::NotFound {
                    name: id.to_string(),
                });
            }
        }
    }

    /// A parent must be tagged: an untagged snapshot may be half collected.
    fn resolve_parent(&self, name: &str) -> Result<SnapshotId> {
        let id = self.resolve(name)?;
        if self.is_tagged(id, name)? {
            return Ok(id);
        }
        Err(Error::NotFound {
            name: name.to_owned(),
        })
    }
}

fn commit_input(
    sink: &mut ChunkWriter<'_>,
    input: &Input,
    source: &Source<'_>,
    old: Option<&Image>,
    progress: &dyn Progress,
) -> Result<Image> {
    progress.begin(&input.name, source.size_bytes());
    let holes = match input.kind {
        InputKind::Full => HolePolicy::Zero,
        InputKind::Diff | InputKind::DenseDiff => {
            let old = old.filter(|old| old.role == input.role);
            let old = old.ok_or_else(|| Error::NoParentImage {
                image: input.name.clone(),
            })?;
            same_size(source, old)?;
            HolePolicy::Inherited
        }
    };
    let before = Before {
        image: old,
        counted_from: None,
    };
    let done = commit_image(sink, source, before, holes, progress)?;
    Ok(Image {
        name: input.name.clone(),
        role: input.role,
        size_bytes: source.size_bytes(),
        nonzero_pages: done.nonzero_pages,
        changed_pages: done.changed_pages,
        root: done.tree.root(),
        page_size: sink.chunks().page_size(),
    })
}

/// A diff is as long as what it differs from.
fn same_size(source: &Source<'_>, old: &Image) -> Result<()> {
    if old.size_bytes == source.size_bytes() {
        return Ok(());
    }
    Err(Error::DiffSize {
        path: source.path().to_owned(),
        size_bytes: source.size_bytes(),
        image: old.name.clone(),
        parent_bytes: old.size_bytes,
    })
}

fn now_unix_seconds() -> u64 {
    sim::now_unix_seconds().unwrap_or_else(|| {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs().min(MAX_CREATED_UNIX_SECONDS))
    })
}
