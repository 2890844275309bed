//! Who else has the pages of an image: the data of a picture of memory.
//!
//! Each page of an image is of one kind ([`PageKind`]). To tell pages that other snapshots
//! have from those that none has, every tree node of the other snapshots is looked at once,
//! however many of them share it: time in proportion to the distinct nodes of the store, a
//! 512th of its pages. No page is read. What is kept in memory is eight bytes for each page
//! that the parent does not have at its place, and the runs of the answer.
//!
//! Pages are compared by the first eight bytes of their ids. Whoever makes two pages that agree
//! in these, which takes 2^32 tries, makes one of them look shared in a picture; nothing else
//! goes by it.

mod candidates;
mod kinds;
mod runs;

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::sync::Arc;

use crate::chunks::Chunks;
use crate::error::{Error, Result};
use crate::format::node::Child;
use crate::id::SnapshotId;
use crate::manifest::{Image, Manifest};
use crate::snapshots::TaggedSnapshot;
use crate::store::Store;
use crate::tree::diff::changed_pages;
use crate::tree::read::Tree;
use crate::tree::shape::pages_per_child;
use candidates::Candidates;
pub use kinds::{PageKind, PageRun};
use runs::{Changed, Runs};

/// Who has the pages of one image.
#[derive(Clone, Debug)]
pub struct PageMap {
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// The image's name.
    pub image: String,
    /// The image's length.
    pub size_bytes: u64,
    /// The parent that it was compared with: one that has a tag and an image of this name.
    pub parent: Option<SnapshotId>,
    /// Whether a working set was recorded, and can be read.
    pub has_working_set: bool,
    /// All pages of the image, in their order.
    pub runs: Vec<PageRun>,
}

impl PageMap {
    /// How many pages are of this kind.
    #[must_use]
    pub fn pages_of(&self, kind: PageKind) -> u64 {
        let runs = self.runs.iter().filter(|run| run.kind == kind);
        runs.map(|run| run.pages).sum()
    }

    /// How many pages are in the working set.
    #[must_use]
    pub fn working_set_pages(&self) -> u64 {
        let runs = self.runs.iter().filter(|run| run.in_working_set);
        runs.map(|run| run.pages).sum()
    }
}

/// What [`Store::page_maps`] found.
#[derive(Debug)]
pub struct PageMaps {
    /// A map for each image that was asked for, in that order; an error for one whose own
    /// tree cannot be read.
    pub maps: Vec<Result<PageMap>>,
    /// Tags of other snapshots that cannot be read whole: pages that they have, too, may count
    /// as [`PageKind::Own`].
    pub unreadable: Vec<(String, Arc<Error>)>,
}

impl Store {
    /// Who has each page of these images, which are named by their snapshots and their
    /// names. Takes time in proportion to the distinct tree nodes of all tagged snapshots.
    ///
    /// ```
    /// # use snapstore_store::{CommitRequest, ImageRole, Input, InputData, InputKind};
    /// use snapstore_store::{PageKind, PageSize, Silent, Store};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let store = Store::create(&dir.path().join("store"), PageSize::default())?;
    /// # let input = Input {
    /// #     name: "memory".to_owned(),
    /// #     role: ImageRole::Memory,
    /// #     data: InputData::Bytes([vec![7; 4096], vec![0; 4096]].concat().into()),
    /// #     kind: InputKind::Full,
    /// # };
    /// # let inputs = vec![input];
    /// # store.commit(&CommitRequest { tag: "base".to_owned(), inputs, ..Default::default() }, &Silent)?;
    /// let id = store.resolve("base")?;
    /// let found = store.page_maps(&[(id, "memory")])?;
    /// let map = found.maps[0].as_ref().expect("it can be read");
    /// assert_eq!(map.pages_of(PageKind::Own), 1);
    /// assert_eq!(map.pages_of(PageKind::Zero), 1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::NotFound`] for an image that a snapshot does not have; I/O errors. What is
    /// damaged is told in the answer.
    pub fn page_maps(&self, images: &[(SnapshotId, &str)]) -> Result<PageMaps> {
        // A collection moves chunks while they are looked at.
        let _collect = self.collect_lock_to_read()?;
        let listing = self.listing()?;
        let unreadable = listing.unreadable.into_iter();
        let mut unreadable: Vec<_> = unreadable
            .map(|(tag, error)| (tag, Arc::new(error)))
            .collect();
        let mut targets = Vec::new();
        for (id, name) in images {
            targets.push(stored(Target::new(self, *id, name, &listing.snapshots))?);
        }
        self.look_for(&mut targets, &listing.snapshots, &mut unreadable)?;
        let maps = targets.into_iter();
        let maps = maps.map(|target| stored(target.and_then(|it| it.map(self))));
        Ok(PageMaps {
            maps: maps.collect::<Result<_>>()?,
            unreadable,
        })
    }

    /// Looks at each node of each other snapshot, and notes what it has of the targets.
    fn look_for(
        &self,
        targets: &mut [Result<Target>],
        snapshots: &[TaggedSnapshot],
        unreadable: &mut Vec<(String, Arc<Error>)>,
    ) -> Result<()> {
        let mut targets: Vec<_> = targets.iter_mut().flatten().collect();
        // Which targets a node was looked at for: a snapshot is no other one for itself.
        let mut seen: HashSet<(usize, [u8; 32], u8)> = HashSet::new();
        let mut walked: HashSet<SnapshotId> = HashSet::new();
        for snapshot in snapshots.iter().filter(|it| walked.insert(it.id)) {
            let others = targets.iter().enumerate();
            let others: Vec<usize> = others
                .filter(|(_, target)| target.snapshot != snapshot.id)
                .map(|(number, _)| number)
                .collect();
            let mut walk = |image: &Image| {
                let tree = image.tree();
                let Some(root) = tree.root() else {
                    return Ok(());
                };
                let level = tree.shape().root_level();
                look(self, &mut targets, &others, &mut seen, root, level)
            };
            match snapshot.manifest.images.iter().try_for_each(&mut walk) {
                Err(error) if error.is_of_what_is_stored() => {
                    unreadable.push((snapshot.tag.clone(), Arc::new(error)));
                }
                other => other?,
            }
        }
        Ok(())
    }
}

/// What is damaged is an answer, all else is an error.
fn stored<T>(found: Result<T>) -> Result<Result<T>> {
    match found {
        Err(error) if !error.is_of_what_is_stored() => Err(error),
        found => Ok(found),
    }
}

/// Looks at a node for those targets that it was not yet looked at for.
fn look(
    store: &Store,
    targets: &mut [&mut Target],
    others: &[usize],
    seen: &mut HashSet<(usize, [u8; 32], u8)>,
    child: Child,
    level: u8,
) -> Result<()> {
    let is_new = |target: &&usize| !seen.contains(&(**target, child.hash, level));
    let others: Vec<usize> = others.iter().filter(is_new).copied().collect();
    if others.is_empty() {
        return Ok(());
    }
    store.cancel.check()?;
    let node = store.chunks.node(child, level)?;
    for (_, below) in node.present() {
        if level > 0 {
            look(store, targets, &others, seen, below, level - 1)?;
            continue;
        }
        for target in &others {
            targets[*target].candidates.note(&below.hash);
        }
    }
    // Only now: what lacks something is to fail each time.
    seen.extend(others.iter().map(|target| (*target, child.hash, level)));
    Ok(())
}

/// An image that is to be mapped.
struct Target {
    snapshot: SnapshotId,
    image: Image,
    parent: Option<SnapshotId>,
    /// Pages that are not what the parent has at their places.
    changed: Changed,
    /// Those of them that are not zero.
    candidates: Candidates,
}

impl Target {
    fn new(store: &Store, id: SnapshotId, name: &str, tagged: &[TaggedSnapshot]) -> Result<Self> {
        let manifest = store.manifest(id)?;
        let image = image_of(&manifest, id, name)?.clone();
        let parent = manifest
            .parent
            .and_then(|parent| tagged.iter().find(|other| other.id == parent));
        let parent = parent.and_then(|parent| Some((parent.id, parent.manifest.image(name)?)));
        let tree = image.tree();
        let mut parent = parent.map(|(id, image)| (id, image.tree()));
        let mut changed = match &parent {
            None => all_of(&store.chunks, &tree),
            Some((_, before)) => changed_since(&store.chunks, before, &tree),
        };
        if parent.is_some() && matches!(&changed, Err(error) if error.is_of_what_is_stored()) {
            // A parent that cannot be read is as good as none.
            parent = None;
            changed = all_of(&store.chunks, &tree);
        }
        let mut changed = changed?;
        let mut candidates = Candidates::default();
        each_page(&store.chunks, &tree, &mut |page, child| {
            if changed.has(page) {
                candidates.add(&child.hash);
            }
        })?;
        candidates.settle();
        changed.rewind();
        Ok(Self {
            snapshot: id,
            parent: parent.map(|(id, _)| id),
            image,
            changed,
            candidates,
        })
    }

    fn map(mut self, store: &Store) -> Result<PageMap> {
        // One that cannot be read is as good as none.
        let recorded = store.working_set(self.snapshot, &self.image.name);
        let recorded = recorded.ok().flatten();
        let mut working_set: Vec<u32> = recorded.iter().flat_map(|set| set.pages()).collect();
        working_set.sort_unstable();
        let mut runs = Runs::new(self.image.pages(), working_set);
        each_page(&store.chunks, &self.image.tree(), &mut |page, child| {
            let kind = match self.changed.has(page) {
                false => PageKind::Parent,
                true if self.candidates.is_noted(&child.hash) => PageKind::Shared,
                true => PageKind::Own,
            };
            runs.page(page, kind);
        })?;
        Ok(PageMap {
            snapshot: self.snapshot,
            image: self.image.name,
            size_bytes: self.image.size_bytes,
            parent: self.parent,
            has_working_set: recorded.is_some(),
            runs: runs.finish(),
        })
    }
}

fn changed_since(chunks: &Chunks, before: &Tree, tree: &Tree) -> Result<Changed> {
    let mut changed = Changed::default();
    let _ = changed_pages(chunks, before, tree, &mut |page| {
        changed.add(page);
        ControlFlow::Continue(())
    })?;
    Ok(changed)
}

fn all_of(chunks: &Chunks, tree: &Tree) -> Result<Changed> {
    changed_since(chunks, &Tree::new(tree.shape(), None), tree)
}

fn image_of<'a>(manifest: &'a Manifest, id: SnapshotId, name: &str) -> Result<&'a Image> {
    manifest.image(name).ok_or_else(|| Error::NotFound {
        name: format!("{name} of snapshot {}", id.short()),
    })
}

/// Calls `page` with each page that is not zero, in their order.
fn each_page(chunks: &Chunks, tree: &Tree, page: &mut dyn FnMut(u64, Child)) -> Result<()> {
    match tree.root() {
        Some(root) => each_below(chunks, root, tree.shape().root_level(), 0, page),
        None => Ok(()),
    }
}

fn each_below(
    chunks: &Chunks,
    child: Child,
    level: u8,
    first_page: u64,
    page: &mut dyn FnMut(u64, Child),
) -> Result<()> {
    let node = chunks.node(child, level)?;
    for (slot, below) in node.present() {
        let first_page = first_page + slot as u64 * pages_per_child(level);
        if level == 0 {
            page(first_page, below);
        } else {
            each_below(chunks, below, level - 1, first_page, page)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
