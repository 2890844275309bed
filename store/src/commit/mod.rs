//! Committing: input files become a snapshot.
//!
//! The way of a page: `source` reads it, `pages` hashes it and asks the index,
//! `sink` gives it a place and appends it to a pack; `tree::build` ties pages
//! to a root; the manifest holds the roots; the tag names the manifest.

pub(crate) mod pages;
pub(crate) mod parent;
pub(crate) mod sink;
pub(crate) mod source;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::durable;
use crate::error::{Error, Result};
use crate::id::SnapshotId;
use crate::manifest::{Image, ImageRole, MAX_IMAGES, MAX_LABELS, Manifest};
use crate::name;
use crate::progress::Progress;
use crate::store::Store;
use crate::tags;
use crate::tree::build::Unmentioned;
use pages::commit_image;
use sink::Sink;
use source::Source;

/// What holes of an input mean.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InputKind {
    /// The whole image: holes are zeros.
    Full,
    /// Changes to the parent's image of this name: holes are the parent's bytes.
    /// Data that is zero is zero.
    Diff,
}

/// One file to commit.
#[derive(Clone, Debug)]
pub struct Input {
    /// The image's name in the snapshot.
    pub name: String,
    /// What it is.
    pub role: ImageRole,
    /// Where it is now.
    pub path: PathBuf,
    /// What its holes mean.
    pub kind: InputKind,
}

/// Which snapshot a new one is made from.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum ParentChoice {
    /// The tag's present snapshot if there is one, else the recent snapshot
    /// that the memory is most like, if it is like any.
    #[default]
    Automatic,
    /// This tag or id.
    Named(String),
    /// None: the snapshot begins a chain.
    Nothing,
}

/// What to commit.
#[derive(Clone, Debug, Default)]
pub struct CommitRequest {
    /// The tag that will name the snapshot.
    pub tag: String,
    /// Whether an existing tag may be moved.
    pub replace: bool,
    /// What it is made from.
    pub parent: ParentChoice,
    /// Its images.
    pub inputs: Vec<Input>,
    /// Labels for people and programs.
    pub labels: BTreeMap<String, String>,
}

/// What a commit did.
#[derive(Clone, Debug)]
pub struct Committed {
    /// The new snapshot.
    pub id: SnapshotId,
    /// What it holds.
    pub manifest: Manifest,
}

impl Store {
    /// Commits files as a snapshot under a tag.
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
        check_request(request)?;
        self.check_tag_free(&request.tag, request.replace)?;
        let page_size = self.page_size();
        let sources = request
            .inputs
            .iter()
            .map(|input| Source::open(&input.path, input.role, page_size))
            .collect::<Result<Vec<_>>>()?;
        let mut sink = Sink::new(self)?;
        let parent = self.pin_parent(request, &sources, &mut sink)?;
        tracing::debug!(?parent, "began");
        let parent_manifest = parent.map(|id| self.manifest(id)).transpose()?;
        let mut images = Vec::new();
        for (input, source) in request.inputs.iter().zip(&sources) {
            let old = parent_manifest.as_ref().and_then(|m| m.image(&input.name));
            images.push(commit_input(&mut sink, input, source, old, progress)?);
        }
        tracing::debug!("stored images");
        inherit_images(&mut images, parent_manifest.as_ref(), request);
        images.sort_by(|a, b| a.name.cmp(&b.name));
        let manifest = Manifest {
            page_size,
            created_unix_seconds: now_unix_seconds(),
            parent,
            first_tag: request.tag.clone(),
            images,
            labels: request.labels.clone(),
            added_chunks: sink.added_chunks,
            added_bytes: sink.added_bytes,
        };
        self.publish(request, sink, manifest)
    }

    /// Makes a snapshot durable, then visible.
    ///
    /// Order: seal the pack, enter it into the index, set the tag. The tag is
    /// the acknowledgement; were it set earlier, a crash could leave a tag whose
    /// chunks are not there. Were the index entered before the pack is sealed,
    /// another commit could rely on chunks that a crash takes away.
    fn publish(
        &self,
        request: &CommitRequest,
        mut sink: Sink<'_>,
        manifest: Manifest,
    ) -> Result<Committed> {
        let encoded = manifest.encode();
        let id = SnapshotId::of_manifest(&encoded);
        sink.put(id.chunk(), &encoded, None)?;
        let sealed = sink.seal()?;
        tracing::debug!("sealed");
        let _publish = self.publish_lock()?;
        // Again, under the lock: another commit may have taken the name.
        self.check_tag_free(&request.tag, request.replace)?;
        if let Some(pack) = &sealed {
            sink.index_pack(pack)?;
        }
        tracing::debug!("indexed");
        // A store whose creator was killed may not be durable itself.
        durable::sync_dir(self.layout.root())?;
        tags::set(&self.layout, &request.tag, id)?;
        tracing::debug!(%id, chunks = manifest.added_chunks, "committed");
        Ok(Committed { id, manifest })
    }

    fn choose_parent(
        &self,
        request: &CommitRequest,
        sources: &[Source],
    ) -> Result<Option<SnapshotId>> {
        match &request.parent {
            ParentChoice::Nothing => Ok(None),
            ParentChoice::Named(name) => self.resolve_parent(name).map(Some),
            ParentChoice::Automatic => {
                if let Some(id) = tags::get(&self.layout, &request.tag)? {
                    return Ok(Some(id));
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
    ///
    /// The collector reads tags first, then pins: if the parent is still tagged
    /// after its pin is visible, one of the two shows it.
    fn pin_parent(
        &self,
        request: &CommitRequest,
        sources: &[Source],
        sink: &mut Sink<'_>,
    ) -> Result<Option<SnapshotId>> {
        let likely_tag = match &request.parent {
            ParentChoice::Named(name) => name,
            ParentChoice::Automatic | ParentChoice::Nothing => &request.tag,
        };
        loop {
            let chosen = self.choose_parent(request, sources)?;
            let Some(id) = chosen else { return Ok(None) };
            sink.pin(id)?;
            if self.is_tagged(id, likely_tag)? {
                return Ok(chosen);
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

    /// Whether a snapshot has a tag. Looks at `likely_tag` first, since a store
    /// may have very many.
    fn is_tagged(&self, id: SnapshotId, likely_tag: &str) -> Result<bool> {
        Ok(tags::get(&self.layout, likely_tag)? == Some(id)
            || self.tags()?.values().any(|tagged| *tagged == id))
    }
}

fn commit_input(
    sink: &mut Sink<'_>,
    input: &Input,
    source: &Source,
    old: Option<&Image>,
    progress: &dyn Progress,
) -> Result<Image> {
    progress.begin(&input.name, source.size_bytes());
    let unmentioned = match input.kind {
        InputKind::Full => Unmentioned::Zero,
        InputKind::Diff => {
            let old = old.ok_or_else(|| Error::NoParentImage {
                image: input.name.clone(),
            })?;
            if old.size_bytes != source.size_bytes() {
                return Err(Error::DiffSize {
                    path: source.path().to_owned(),
                    size_bytes: source.size_bytes(),
                    image: input.name.clone(),
                    parent_bytes: old.size_bytes,
                });
            }
            Unmentioned::Inherited
        }
    };
    let done = commit_image(sink, source, old, unmentioned, progress)?;
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

/// A diff says what changes in memory; the parent's disks go along with it.
fn inherit_images(images: &mut Vec<Image>, parent: Option<&Manifest>, request: &CommitRequest) {
    let only_diffs = request
        .inputs
        .iter()
        .any(|input| input.kind == InputKind::Diff);
    let Some(parent) = parent.filter(|_| only_diffs) else {
        return;
    };
    for old in &parent.images {
        let missing = images.iter().all(|image| image.name != old.name);
        if missing && old.role != ImageRole::File {
            images.push(Image {
                changed_pages: 0,
                ..old.clone()
            });
        }
    }
}

fn check_request(request: &CommitRequest) -> Result<()> {
    name::check_tag(&request.tag)?;
    let mut seen = BTreeSet::new();
    let mut shown = BTreeSet::from(["manifest.json".to_owned()]);
    for input in &request.inputs {
        name::check_image(&input.name)?;
        let file = match input.role {
            ImageRole::Memory => "memory.bin".to_owned(),
            ImageRole::Disk => format!("{}.img", input.name),
            ImageRole::File => input.name.clone(),
        };
        if !seen.insert(&input.name) || !shown.insert(file) {
            return Err(Error::DuplicateName {
                name: input.name.clone(),
            });
        }
    }
    for (key, value) in &request.labels {
        name::check_label(key, value)?;
    }
    if request.inputs.len() > MAX_IMAGES || request.labels.len() > MAX_LABELS {
        return Err(Error::BadName {
            name: request.tag.clone(),
            what: "a snapshot with so many images or labels",
            rule: "at most 256 images and 1024 labels",
        });
    }
    Ok(())
}

fn now_unix_seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
