//! Commits of writable views: what was written to a mounted clone becomes a snapshot, whose
//! child the clone then is.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, bail};
use snapstore_fuse::{FrozenForCommit, Mountpoint, ViewClient};
use snapstore_store::{
    CommitRequest, Committed, Extent, Image, ImageRole, Input, InputData, InputKind, Manifest,
    ParentChoice, Progress, SnapshotId, Store, check_image,
};

use crate::discarded::discarded;
use crate::error::{Busy, Usage};
use crate::look;

/// The files of an image's input, by their places.
const OVERLAY: usize = 0;
const ZEROS: usize = 1;

/// What a commit of a view did.
pub struct ViewCommit {
    /// The snapshot.
    pub committed: Committed,
    /// What its user should know.
    pub notes: Vec<String>,
}

/// Commits what was written to the view at `dir`. The request names the tag, labels, and
/// whether a tag may be moved; its inputs may hold more files.
///
/// All that write(2) has returned from is in the snapshot, and all that was stored through
/// shared mappings before this was called. Writing goes on meanwhile, and is in the next.
pub fn commit(
    store: &Store,
    dir: &Path,
    mut request: CommitRequest,
    progress: &dyn Progress,
) -> anyhow::Result<ViewCommit> {
    store.check_tag_free(&request.tag, request.replace)?;
    // Who waits for a server that is stopped cannot even be killed.
    if look::state(dir) == look::State::Silent {
        bail!(Busy(format!(
            "the server of {} does not answer; if it is stopped, have it go on, or kill it: \
             `snapstore mount --rw --resume` then goes on with what was written",
            dir.display()
        )));
    }
    let mut view = ViewClient::connect(dir)?;
    let status = view.status()?;
    if fs::canonicalize(&status.store)? != fs::canonicalize(store.path())? {
        bail!(Usage(format!(
            "{} is a view of the store {}; name that with --store",
            dir.display(),
            status.store.display()
        )));
    }
    let frozen = match view.freeze() {
        Err(snapstore_fuse::Error::ViewRefused { message, busy, .. }) if busy => {
            bail!(Busy(message));
        }
        other => other?,
    };
    let base = SnapshotId::from_hex(&frozen.view.base).context("the view's base is no id")?;
    let manifest = store.manifest(base)?;
    let mut notes = Vec::new();
    let mut inputs = images(store, &frozen, &manifest)?;
    inputs.extend(files(store, &frozen, &manifest, &mut notes)?);
    for input in std::mem::take(&mut request.inputs) {
        // What is given replaces what is there.
        inputs.retain(|it| it.name != input.name);
        inputs.push(input);
    }
    request.inputs = inputs;
    request.parent = ParentChoice::Pinned(base);
    request.inherit = true;
    // The view takes over before anybody can remove the tag and collect the snapshot.
    request.keep = true;
    let committed = store.commit(&request, progress)?;
    if let Err(error) = view.committed(&committed.id.to_string()) {
        notes.push(format!(
            "the snapshot is whole, but the view has not taken note of it and counts all that \
             was written as uncommitted: {error}"
        ));
    }
    Ok(ViewCommit { committed, notes })
}

/// Clones of writable views that stand still, as long as this lives.
#[derive(Default)]
pub struct FrozenViews {
    clones: BTreeMap<PathBuf, Option<FrozenView>>,
}

struct FrozenView {
    base: SnapshotId,
    images: Vec<Input>,
    manifest: Manifest,
    /// In this order: what was frozen is let go of when nobody is connected any more.
    _frozen: FrozenForCommit,
    _view: ViewClient,
}

impl FrozenViews {
    /// What was written to an image of the clone at `dir`, a directory of the filesystem
    /// `device`, as changes to the parent. `None` if it is no clone of that, or its server does
    /// not let it be frozen.
    pub fn changes(
        &mut self,
        store: &Store,
        dir: &Path,
        device: (u32, u32),
        parent: SnapshotId,
        image: &str,
    ) -> anyhow::Result<Option<Input>> {
        if !self.clones.contains_key(dir) {
            let frozen = freeze(store, dir, device)?;
            self.clones.insert(dir.to_owned(), frozen);
        }
        let frozen = self.clones.get_mut(dir).and_then(Option::as_mut);
        let Some(frozen) = frozen.filter(|frozen| frozen.base == parent) else {
            return Ok(None);
        };
        if let Some(place) = frozen.images.iter().position(|it| it.name == image) {
            return Ok(Some(frozen.images.swap_remove(place)));
        }
        // Nothing was written to it.
        Ok(frozen.manifest.image(image).map(|image| Input {
            name: image.name.clone(),
            role: image.role,
            data: InputData::Extents {
                files: Vec::new(),
                label: image.file_name(),
                size_bytes: image.size_bytes,
                extents: Vec::new(),
            },
            kind: InputKind::DenseDiff,
        }))
    }
}

fn freeze(store: &Store, dir: &Path, device: (u32, u32)) -> anyhow::Result<Option<FrozenView>> {
    let mounts = Mountpoint::all()?;
    let is_ours = |mount: &Mountpoint| mount.device == device && mount.is_writable;
    if !mounts.iter().any(is_ours) || look::state(dir) != look::State::Serves {
        return Ok(None);
    }
    let Ok(mut view) = ViewClient::connect(dir) else {
        return Ok(None);
    };
    if fs::canonicalize(view.status()?.store)? != fs::canonicalize(store.path())? {
        return Ok(None);
    }
    let frozen = match view.freeze() {
        Err(snapstore_fuse::Error::ViewRefused { message, .. }) => {
            tracing::info!(message, "a view is read as files");
            return Ok(None);
        }
        other => other?,
    };
    let base = SnapshotId::from_hex(&frozen.view.base).context("the view's base is no id")?;
    let manifest = store.manifest(base)?;
    Ok(Some(FrozenView {
        images: images(store, &frozen, &manifest)?,
        base,
        manifest,
        _frozen: frozen,
        _view: view,
    }))
}

fn images(store: &Store, frozen: &FrozenForCommit, base: &Manifest) -> anyhow::Result<Vec<Input>> {
    let zeros = Arc::new(File::open("/dev/zero").context("cannot open /dev/zero")?);
    let mut inputs = Vec::new();
    for (image, overlay) in frozen.view.images.iter().zip(&frozen.overlays) {
        let old = base.image(&image.name);
        let old = old.with_context(|| format!("the base has no image {}", image.name))?;
        if image.extents.is_empty() {
            continue;
        }
        let before = store.image_reader(old);
        let mut extents = Vec::new();
        for (image_offset, length, place) in &image.extents {
            match place {
                Some(file_offset) => extents.push(Extent {
                    image_offset: *image_offset,
                    file: OVERLAY,
                    file_offset: *file_offset,
                    length: *length,
                }),
                None => discarded(
                    &before,
                    *image_offset..image_offset + length,
                    ZEROS,
                    &mut extents,
                )
                .with_context(|| format!("cannot read {} of the base", image.name))?,
            }
        }
        inputs.push(Input {
            name: image.name.clone(),
            role: old.role,
            data: InputData::Extents {
                files: vec![Arc::new(overlay.try_clone()?), zeros.clone()],
                label: format!("what was written to {}", image.file_name),
                size_bytes: image.size_bytes,
                extents,
            },
            kind: InputKind::DenseDiff,
        });
    }
    Ok(inputs)
}

fn files(
    store: &Store,
    frozen: &FrozenForCommit,
    base: &Manifest,
    notes: &mut Vec<String>,
) -> anyhow::Result<Vec<Input>> {
    let memory_changed = frozen.view.images.iter().any(|image| {
        let old = base.image(&image.name);
        !image.extents.is_empty() && old.is_some_and(|old| old.role == ImageRole::Memory)
    });
    let mut older = Vec::new();
    let mut own = frozen.files.iter();
    let mut inputs = Vec::new();
    for info in &frozen.view.files {
        let is_image = |image: &&Image| image.name == info.name && image.role != ImageRole::File;
        if base.images.iter().any(|image| is_image(&image)) {
            bail!(
                "{:?} is the name of an image; rename that file, and commit again",
                info.name
            );
        }
        let data = if info.is_base {
            let image = base.image(&info.name);
            let image = image.with_context(|| format!("the base has no file {}", info.name))?;
            InputData::Reader(Arc::new(store.image_reader(image)))
        } else {
            let file = own.next().context("a file's descriptor is missing")?;
            InputData::Extents {
                files: vec![Arc::new(file.try_clone()?)],
                label: info.name.clone(),
                size_bytes: info.size_bytes,
                extents: vec![Extent {
                    image_offset: 0,
                    file: 0,
                    file_offset: 0,
                    length: info.size_bytes,
                }],
            }
        };
        if info.size_bytes == 0 {
            notes.push(format!(
                "{} is empty, and not part of the snapshot",
                info.name
            ));
            continue;
        }
        if check_image(&info.name).is_err() {
            notes.push(format!(
                "{:?} is not part of the snapshot: it is no name that one can have",
                info.name
            ));
            continue;
        }
        older.push(info.name.as_str());
        inputs.push(Input {
            name: info.name.clone(),
            role: ImageRole::File,
            data,
            kind: InputKind::Full,
        });
    }
    let any_fresh = frozen.view.files.iter().any(|file| file.is_fresh);
    if memory_changed && !any_fresh && !older.is_empty() {
        notes.push(format!(
            "the memory was written since the last commit, and no file was: if the state of \
             the machine is in {}, it is older than its memory",
            older.join(", ")
        ));
    }
    Ok(inputs)
}
