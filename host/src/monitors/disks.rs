//! Disks of machines of other monitors: what a commit reads of their files.

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use rustix::fs::{major, minor};
use snapstore_store::{
    Extent, ImageRole, Input, InputData, InputKind, SnapshotId, Store, Unchanging,
};

use super::adapter::{Budget, Started, Taken};
use super::memory::{copied, data, reflinked};
use super::qcow2::{self, Content};
use crate::look;
use crate::monitor::{MountedFile, snapshot_of};

/// The store's extents begin and end at multiples of this.
const GRAIN: u64 = 4096;

/// One file of a disk.
pub struct OpenLayer {
    /// The file itself.
    pub file: File,
    /// Where it is, as the kernel tells.
    pub path: PathBuf,
    /// Whether it is a qcow2 image; else it is raw.
    pub is_qcow2: bool,
}

/// Adds a disk to what is committed: its layers, the topmost first, of which the guest
/// writes to that alone.
pub fn add(
    store: &Store,
    image: &str,
    layers: Vec<OpenLayer>,
    taken: &mut Taken,
    budget: &mut Budget,
) -> anyhow::Result<()> {
    let mut files: Vec<Arc<File>> = vec![Arc::new(File::open("/dev/zero")?)];
    let mut extents: Vec<Extent> = Vec::new();
    let mut size_bytes = 0;
    // Beyond its end a layer shows zeros, whatever is below it there.
    let mut shortest_bytes = u64::MAX;
    let mut kind = InputKind::Full;
    for (number, layer) in layers.into_iter().enumerate() {
        let OpenLayer {
            mut file,
            path,
            is_qcow2,
        } = layer;
        let is_top = number == 0;
        let base = match is_top {
            true => None,
            false => shown(store, &file, &path)?,
        };
        // All below it is the parent's, as it is there.
        if base.is_some_and(|id| Some(id) == taken.parent)
            && shortest_bytes == size_bytes
            && file.metadata()?.len() == size_bytes
            && path.file_name() == Some(format!("{image}.img").as_ref())
        {
            kind = InputKind::Diff;
            break;
        }
        let (length, mut found) = match is_qcow2 {
            false => {
                let length = file.metadata()?.len();
                (length, data(&file, length)?)
            }
            true => {
                let read = qcow2::read(&file, &path.display().to_string())?;
                (read.size_bytes, qcow2_extents(&read)?)
            }
        };
        if is_top {
            size_bytes = length;
        }
        if is_top {
            // The guest writes to it as soon as it goes on.
            match hold_still(&file, &found, !is_qcow2, budget)? {
                Held::Copied(copy, moved) => (file, found) = (copy, moved),
                Held::Cloned(clone) => file = clone,
                Held::Not => taken.is_held = true,
            }
            taken.read_bytes += found.iter().map(|it| it.length).sum::<u64>();
        } else {
            let file = Arc::new(file.try_clone()?);
            taken.unchanging.push(Unchanging::now(file, path)?);
        }
        let place = files.len();
        files.push(Arc::new(file));
        for extent in &mut found {
            extent.file = if extent.file == ZEROS { 0 } else { place };
        }
        shortest_bytes = shortest_bytes.min(length);
        extents = filled(extents, &found, shortest_bytes);
    }
    taken.inputs.push(Input {
        name: image.to_owned(),
        role: ImageRole::Disk,
        data: InputData::Extents {
            files,
            label: format!("the disk {image}"),
            size_bytes,
            extents,
        },
        kind,
    });
    Ok(())
}

/// Marks an extent without bytes in its layer's file.
const ZEROS: usize = usize::MAX;

/// What keeps the topmost file of a disk as it is at this instant.
enum Held {
    /// A copy of what counts in it.
    Copied(File, Vec<Extent>),
    /// A copy that shares its blocks.
    Cloned(File),
    /// Nothing but that the guest stands still.
    Not,
}

fn hold_still(
    file: &File,
    extents: &[Extent],
    is_raw: bool,
    budget: &mut Budget,
) -> anyhow::Result<Held> {
    if let Some(clone) = reflinked(file) {
        return Ok(Held::Cloned(clone));
    }
    // To read a whole disk takes as long as to store it: then nothing is gained.
    if is_raw {
        return Ok(Held::Not);
    }
    let (zeros, data): (Vec<Extent>, Vec<Extent>) =
        extents.iter().partition(|extent| extent.file == ZEROS);
    if !budget.take(data.iter().map(|it| it.length).sum()) {
        return Ok(Held::Not);
    }
    let (copy, mut moved) = copied(file, &data)?;
    moved.extend(zeros);
    moved.sort_by_key(|extent| extent.image_offset);
    Ok(Held::Copied(copy, moved))
}

/// The snapshot that the file is a mount's image of.
fn shown(store: &Store, file: &File, path: &Path) -> anyhow::Result<Option<SnapshotId>> {
    let found = file.metadata()?;
    let mounts = snapstore_store::mount_table().context("cannot read the table of mounts")?;
    let device = (major(found.dev()), minor(found.dev()));
    let file = MountedFile {
        device,
        inode: found.ino(),
        path,
    };
    snapshot_of(store, &mounts, file)
}

fn qcow2_extents(image: &qcow2::Layer) -> anyhow::Result<Vec<Extent>> {
    let end = image.size_bytes;
    let extents = image.parts.iter().map(|part| {
        let (file, file_offset) = match part.content {
            Content::Zeros => (ZEROS, 0),
            Content::At(offset) => (0, offset),
        };
        let stop = part.disk_offset + part.length;
        ensure!(
            part.disk_offset % GRAIN == 0 && (stop % GRAIN == 0 || stop == end),
            "its clusters are smaller than {GRAIN} bytes; make another of it with qemu-img convert"
        );
        Ok(Extent {
            image_offset: part.disk_offset,
            file,
            file_offset,
            length: part.length,
        })
    });
    extents.collect()
}

/// What is above, and what is below where nothing is above: both in order. Of what is below,
/// so many bytes are seen.
fn filled(above: Vec<Extent>, below: &[Extent], seen_bytes: u64) -> Vec<Extent> {
    let mut out = above.clone();
    for extent in below {
        let (start, mut at) = (extent.image_offset, extent.image_offset);
        let end = (extent.image_offset + extent.length).min(seen_bytes);
        let mut over = above
            .iter()
            .filter(|it| it.image_offset + it.length > start && it.image_offset < end);
        while at < end {
            let next = over.next();
            let stop = next.map_or(end, |it| it.image_offset.clamp(at, end));
            if stop > at {
                let into = at - extent.image_offset;
                out.push(Extent {
                    image_offset: at,
                    file: extent.file,
                    file_offset: match extent.file {
                        0 => 0,
                        _ => extent.file_offset + into,
                    },
                    length: stop - at,
                });
            }
            at = next.map_or(end, |it| it.image_offset + it.length);
        }
    }
    out.sort_by_key(|extent| extent.image_offset);
    out
}

/// The clone's own disk: a file of a writable view.
pub fn own_disk(started: &Started<'_>, image: &str) -> anyhow::Result<PathBuf> {
    let view = started
        .view
        .context("there is no view with the clone's disks")?;
    let path = view.join(format!("{image}.img"));
    ensure!(path.is_file(), "the snapshot has no disk {image}");
    Ok(path)
}

/// What the guest wrote to a disk in a writable view, as changes to the parent's, if the
/// view is of that.
pub fn of_view(
    store: &Store,
    image: &str,
    file: &File,
    taken: &mut Taken,
) -> anyhow::Result<Option<Input>> {
    let Some(parent) = taken.parent else {
        return Ok(None);
    };
    let path = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    if path.file_name() != Some(format!("{image}.img").as_ref()) {
        return Ok(None);
    }
    let found = file.metadata()?;
    let device = (major(found.dev()), minor(found.dev()));
    let Some(dir) = clone_of(&path, device, found.ino())? else {
        return Ok(None);
    };
    let changes = taken.views.changes(store, &dir, device, parent, image)?;
    if let Some(Input {
        data: InputData::Extents { extents, .. },
        ..
    }) = &changes
    {
        taken.read_bytes += extents.iter().map(|extent| extent.length).sum::<u64>();
    }
    Ok(changes)
}

/// Where the clone of a view is, as this process sees it, that has this file at `path`, as its
/// monitor may see it: that can be in a chroot, or see the clone alone.
fn clone_of(path: &Path, device: (u32, u32), inode: u64) -> anyhow::Result<Option<PathBuf>> {
    let Some((parent, name)) = path.parent().zip(path.file_name()) else {
        return Ok(None);
    };
    let is_there = |dir: &Path| {
        let found = std::fs::metadata(dir.join(name));
        found.is_ok_and(|it| (major(it.dev()), minor(it.dev())) == device && it.ino() == inode)
    };
    let mounts = snapstore_store::mount_table().context("cannot read the table of mounts")?;
    let is_shown = |mount: &&snapstore_store::MountEntry| {
        mount.device == device && mount.filesystem == "fuse.snapstore"
    };
    let mut views = mounts.iter().filter(is_shown);
    if views.clone().any(|mount| parent.starts_with(&mount.dir)) {
        return Ok(Some(parent.to_owned()));
    }
    // Who waits for a server that is stopped cannot even be killed.
    while let Some(mount) = views.find(|it| look::state(&it.dir) == look::State::Serves) {
        if is_there(&mount.dir) {
            return Ok(Some(mount.dir.clone()));
        }
        let clones = std::fs::read_dir(&mount.dir)?.filter_map(|it| Some(it.ok()?.path()));
        let mut clones = clones.filter(|dir| is_there(dir));
        if let Some(dir) = clones.next() {
            return Ok(Some(dir));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use snapstore_store::{PageSize, ParentChoice};

    use super::*;

    /// The middle one of three files is the shortest: a monitor reads zeros beyond its end.
    #[test]
    fn a_layer_shows_nothing_of_what_is_below_beyond_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::create(&dir.path().join("store"), PageSize::default()).unwrap();
        let path = |name: &str| dir.path().join(name);
        let base = [7; 8 * 4096];
        std::fs::write(path("base"), base).unwrap();
        for (name, pages, under) in [("middle", 2, "base"), ("top", 8, "middle")] {
            let file = File::create_new(path(name)).unwrap();
            qcow2::write_empty(&file, pages * 4096, &path(under)).unwrap();
        }
        let layer = |name: &str, is_qcow2| OpenLayer {
            file: File::open(path(name)).unwrap(),
            path: path(name),
            is_qcow2,
        };
        let layers = vec![
            layer("top", true),
            layer("middle", true),
            layer("base", false),
        ];
        let mut taken = Taken::default();
        add(&store, "disk0", layers, &mut taken, &mut Budget::of_host()).unwrap();
        let request = snapstore_store::CommitRequest {
            tag: "t".to_owned(),
            parent: ParentChoice::Nothing,
            inputs: taken.inputs,
            ..Default::default()
        };
        store.commit(&request, &snapstore_store::Silent).unwrap();
        let snapshot = store.snapshot("t").unwrap();
        let mut read = vec![1; 8 * 4096];
        let disk = snapshot.image("disk0").unwrap();
        disk.read_at(&mut read, 0).unwrap();
        assert!(read[..2 * 4096].iter().all(|byte| *byte == 7));
        assert!(read[2 * 4096..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn what_is_below_shows_through_gaps() {
        let extent = |page: u64, pages: u64, file: usize, from: u64| Extent {
            image_offset: page * 4096,
            file,
            file_offset: from * 4096,
            length: pages * 4096,
        };
        let above = vec![extent(2, 1, 1, 0), extent(4, 2, 1, 1)];
        let below = [extent(0, 5, 2, 10), extent(6, 9, 0, 0)];
        assert_eq!(
            filled(above, &below, 8 * 4096),
            [
                extent(0, 2, 2, 10),
                extent(2, 1, 1, 0),
                extent(3, 1, 2, 13),
                extent(4, 2, 1, 1),
                extent(6, 2, 0, 0),
            ]
        );
        assert_eq!(filled(Vec::new(), &below[..1], 8192), [extent(0, 2, 2, 10)]);
    }
}
