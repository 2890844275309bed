//! Reading an image while it changes, so that little is left to read when it stands still.
//!
//! What is read is stored at once, in the packs of the commit that will name it, so no
//! second copy of the image is held. A page that changes afterwards is read and stored
//! again; what it was before is then in no snapshot, and goes with a collection. Who
//! reads knows which pages those are: here nothing is found out about that, and a page
//! that was missed would be wrong in the snapshot.
//!
//! Each reading ends with a tree, the predecessor of the next one. Its pack is sealed
//! and indexed then, as a commit does with each pack that is full: no snapshot leads to
//! it, and the lease of this commit keeps it.

use crate::commit::chunk_writer::ChunkWriter;
use crate::commit::input::Input;
use crate::commit::pages::{Before, commit_image};
use crate::commit::source::Source;
use crate::commit::{CommitRequest, ParentChoice, commit_input};
use crate::error::Result;
use crate::id::SnapshotId;
use crate::manifest::Image;
use crate::name;
use crate::progress::Progress;
use crate::store::Store;
use crate::tree::build::HolePolicy;

/// A commit that has begun with an image that still changes. Dropped, nothing of it stays
/// but what a collection removes.
pub struct Precopy<'a> {
    store: &'a Store,
    pub(super) sink: ChunkWriter<'a>,
    pub(super) parent: Option<SnapshotId>,
    pub(super) image: Option<Image>,
}

impl Store {
    /// Begins a commit with what still changes. `tag` is the one it will have.
    ///
    /// # Errors
    /// As [`Store::commit`], of the parent.
    pub fn precopy(&self, parent: &ParentChoice, tag: &str) -> Result<Precopy<'_>> {
        let request = CommitRequest {
            tag: tag.to_owned(),
            parent: parent.clone(),
            ..CommitRequest::default()
        };
        let mut sink = ChunkWriter::new(self)?;
        let parent = self.pin_parent(&request, &[], &mut sink)?;
        Ok(Precopy {
            store: self,
            sink,
            parent,
            image: None,
        })
    }
}

impl Precopy<'_> {
    /// Reads an image that changes meanwhile. The first time it is an input like any
    /// other, a diff to the parent's image if it is one; from then on it has data
    /// wherever the image may have changed since the reading before *began*. Each page
    /// is read once, but it may be torn: whoever wrote it meanwhile must be asked about it
    /// again, the next time or in [`Store::commit_after`].
    ///
    /// # Errors
    /// As [`Store::commit`]. What was read before stays valid only if this succeeds.
    pub fn read(&mut self, input: &Input, progress: &dyn Progress) -> Result<()> {
        let store = self.store;
        store.in_pool(|| self.read_here(input, progress))
    }

    fn read_here(&mut self, input: &Input, progress: &dyn Progress) -> Result<()> {
        name::check_image(&input.name)?;
        let source = Source::open(input, self.store.page_size())?;
        let parent = self.parent.map(|id| self.store.manifest(id)).transpose()?;
        let old = parent.as_ref().and_then(|m| m.image(&input.name));
        let image = match self.image.take() {
            None => commit_input(&mut self.sink, input, &source, old, progress)?,
            Some(read) => commit_rest(&mut self.sink, &source, &read, old, progress)?,
        };
        self.sink.finish_pack()?;
        self.image = Some(image);
        Ok(())
    }
}

/// Commits what has changed of an image since it was last read.
pub(super) fn commit_rest(
    sink: &mut ChunkWriter<'_>,
    source: &Source<'_>,
    read: &Image,
    old: Option<&Image>,
    progress: &dyn Progress,
) -> Result<Image> {
    super::same_size(source, read)?;
    progress.begin(&read.name, source.size_bytes());
    let before = Before {
        image: Some(read),
        counted_from: Some(old.map(Image::tree)),
    };
    let done = commit_image(sink, source, before, HolePolicy::Inherited, progress)?;
    Ok(Image {
        nonzero_pages: done.nonzero_pages,
        changed_pages: done.changed_pages,
        root: done.tree.root(),
        ..read.clone()
    })
}
