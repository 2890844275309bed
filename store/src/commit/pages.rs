//! Committing one image: from an input file to a page tree.
//!
//! Leaves are taken in batches. All processors read, hash and compress a batch; each page is
//! read once, and what nobody has of it is compressed while it is still in the core's cache.
//! Then the batch gets its places, in the order of the image, and goes to the thread that
//! writes the pack, while the next one is read.

use rayon::prelude::*;

use crate::commit::chunk_writer::ChunkWriter;
use crate::commit::leaf_work::{Counts, Job, LeafWork};
use crate::commit::source::Source;
use crate::error::Result;
use crate::format::node::FAN_OUT;
use crate::manifest::Image;
use crate::progress::Progress;
use crate::sim;
use crate::tree::build::{HolePolicy, TreeBuilder};
use crate::tree::read::Tree;
use crate::tree::shape::Shape;

/// Input bytes per batch, which bounds the compressed bytes in memory.
const BATCH_BYTES: u64 = 32 << 20;

/// An image's new tree and what it took.
pub(crate) struct CommittedImage {
    pub tree: Tree,
    pub nonzero_pages: u64,
    pub changed_pages: u64,
}

/// What an image's tree is made from.
#[derive(Clone, Copy, Default)]
pub(crate) struct Before<'a> {
    /// Its predecessor: the parent's image, or what this commit has stored of this one.
    pub image: Option<&'a Image>,
    /// The parent's tree, of which changes are counted, where that is another.
    pub counted_from: Option<Option<Tree>>,
}

/// Stores the input as a page tree. With [`HolePolicy::Inherited`] its holes
/// are the parent's pages, else they are zero.
pub(crate) fn commit_image(
    sink: &mut ChunkWriter<'_>,
    source: &Source<'_>,
    before: Before<'_>,
    holes: HolePolicy,
    progress: &dyn Progress,
) -> Result<CommittedImage> {
    let old = before.image;
    let parent = old.map(Image::tree);
    let page_bytes = sink.chunks().page_size().bytes();
    let shape = Shape::of_pages(source.size_bytes().div_ceil(page_bytes));
    let job = Job {
        source,
        parent,
        counted_from: before.counted_from,
        holes,
        page_bytes,
        pages: shape.pages(),
    };
    let mut builder = TreeBuilder::new(shape, sink.chunks(), parent, holes);
    let mut counts = Counts::default();
    let mut feed = Feed {
        job: &job,
        position: 0,
    };
    let mut batch = feed.next_batch()?;
    prepare(sink, &job, &mut batch)?;
    while !batch.is_empty() {
        sink.check_cancelled()?;
        sink.roll_over()?;
        let position = feed.position;
        let mut next = feed.next_batch()?;
        let shared: &ChunkWriter<'_> = sink;
        let (stored, prepared) = rayon::join(
            || store(shared, &mut batch),
            || prepare(shared, &job, &mut next),
        );
        stored.and(prepared)?;
        for work in &batch {
            work.count(&mut counts);
            builder.put_leaf(work.index, work.result, sink)?;
        }
        progress.advance(position.min(source.size_bytes()));
        batch = next;
    }
    source.check_unchanged()?;
    let tree = builder.finish(sink)?;
    let old_nonzero = old.map_or(0, |image| image.nonzero_pages);
    let elsewhere = old_nonzero.saturating_sub(counts.old);
    // Of the leaves that were not taken up the predecessor has counted what changed.
    let counted = before.counted_from.and(old);
    let counted = counted.map_or(0, |image| image.changed_pages);
    let counted = counted.saturating_sub(counts.changed_before);
    Ok(match holes {
        HolePolicy::Inherited => CommittedImage {
            tree,
            nonzero_pages: elsewhere + counts.new,
            changed_pages: counted + counts.changed,
        },
        // What the parent has elsewhere is zero now.
        HolePolicy::Zero => CommittedImage {
            tree,
            nonzero_pages: counts.new,
            // What could not be read of the parent seems to be elsewhere.
            changed_pages: (counts.changed + elsewhere)
                .min(job.pages.max(old.map_or(0, Image::pages))),
        },
    })
}

/// Finds the leaves that have data, in order.
struct Feed<'a> {
    job: &'a Job<'a>,
    position: u64,
}

impl Feed<'_> {
    fn next_batch(&mut self) -> Result<Vec<LeafWork>> {
        let leaf_bytes = self.job.page_bytes * FAN_OUT as u64;
        let most = usize::try_from((BATCH_BYTES / leaf_bytes).max(1)).expect("small");
        // A pack of a simulated store is full sooner.
        let most = if sim::is_simulated() { 1 } else { most };
        let mut batch = Vec::with_capacity(most);
        while batch.len() < most {
            let Some(data) = self.job.source.next_data(self.position)? else {
                self.position = self.job.source.size_bytes();
                break;
            };
            let index = data.start / leaf_bytes;
            batch.push(LeafWork::new(index));
            self.position = (index + 1) * leaf_bytes;
        }
        Ok(batch)
    }
}

/// Reads a batch, finds out what is in the store, and compresses what is not.
fn prepare(sink: &ChunkWriter<'_>, job: &Job<'_>, batch: &mut [LeafWork]) -> Result<()> {
    batch
        .par_iter_mut()
        .try_for_each(|work| work.prepare(sink, job))
}

/// Gives every page and leaf that is not in the store its place, in order.
fn store(sink: &ChunkWriter<'_>, batch: &mut [LeafWork]) -> Result<()> {
    for work in &mut *batch {
        work.store_pages(sink)?;
    }
    // What a leaf says of where its pages are is known by now.
    let mut pending = 0;
    for work in &mut *batch {
        work.claim_leaf(sink, &mut pending)?;
    }
    batch
        .par_iter_mut()
        .try_for_each(|work| work.encode_leaf(sink))?;
    batch.iter_mut().try_for_each(|work| work.append_leaf(sink))
}
