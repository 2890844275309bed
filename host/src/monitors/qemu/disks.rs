//! The disks of a machine of QEMU: what they consist of, and what a commit reads of them.

use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, bail, ensure};
use rustix::fs::{major, minor};
use serde_json::{Value, json};
use snapstore_store::{
    Extent, ImageRole, Input, InputData, InputKind, SnapshotId, Store, Unchanging,
};

use super::description::Disk;
use crate::commit::data_ranges;
use crate::monitor::{MountedFile, snapshot_of};
use crate::monitors::adapter::{Budget, Taken};
use crate::monitors::memory::{copied, reflinked};
use crate::monitors::peer::Peer;
use crate::monitors::qcow2::{self, Content};
use crate::monitors::qmp::Qmp;

/// The most files that one disk may consist of.
const MOST_LAYERS: usize = 64;
/// The store's extents begin and end at multiples of this.
const GRAIN: u64 = 4096;

/// A disk that the guest writes to.
pub struct Listed {
    /// What QEMU calls it.
    pub device: String,
    /// What the snapshot calls it.
    pub image: String,
    /// Its files, the topmost first.
    pub layers: Vec<Layer>,
}

/// One file of a disk.
pub struct Layer {
    /// As QEMU names it.
    pub file: String,
    /// `raw` or `qcow2`.
    pub format: String,
}

impl Listed {
    /// What is written down of it.
    pub fn described(&self) -> Disk {
        Disk {
            image: self.image.clone(),
            device: self.device.clone(),
            files: self.layers.iter().map(|layer| layer.file.clone()).collect(),
        }
    }
}

/// The disks that the guest can write to.
pub fn list(qmp: &mut Qmp) -> anyhow::Result<Vec<Listed>> {
    let said = qmp.run("query-block", json!({}))?;
    let mut disks: Vec<Listed> = Vec::new();
    for block in said.as_array().map(Vec::as_slice).unwrap_or_default() {
        let inserted = &block["inserted"];
        if inserted.is_null() || inserted["ro"] == true {
            continue;
        }
        let names = [&block["device"], &block["qdev"], &inserted["node-name"]];
        let mut names = names.into_iter().filter_map(Value::as_str);
        let device = names
            .find(|name| !name.is_empty())
            .unwrap_or("?")
            .to_owned();
        let mut layers = Vec::new();
        let mut image = &inserted["image"];
        while !image.is_null() {
            let word = |name: &str| image[name].as_str().unwrap_or_default();
            let mut file = file_name(word("filename"));
            if layers.is_empty()
                && let Some(name) = inserted["file"].as_str()
            {
                file = file_name(name);
            }
            layers.push(Layer {
                file,
                format: word("format").to_owned(),
            });
            ensure!(
                layers.len() <= MOST_LAYERS,
                "the disk {device} consists of too many files"
            );
            image = &image["backing-image"];
        }
        ensure!(
            !layers.is_empty(),
            "QEMU does not say what the disk {device} is"
        );
        let image = format!("disk{}", disks.len());
        disks.push(Listed {
            device,
            image,
            layers,
        });
    }
    Ok(disks)
}

/// The file in QEMU's name of an image, which may be a description of it.
fn file_name(name: &str) -> String {
    let parsed = name
        .strip_prefix("json:")
        .and_then(|text| serde_json::from_str::<Value>(text).ok());
    let Some(mut node) = parsed.as_ref() else {
        return name.strip_prefix("file:").unwrap_or(name).to_owned();
    };
    while let Some(next) = node.get("file").filter(|next| next.is_object()) {
        node = next;
    }
    node["filename"].as_str().unwrap_or(name).to_owned()
}

/// Adds a disk to what is committed.
pub fn take(
    store: &Store,
    qmp: &mut Qmp,
    peer: &Peer,
    disk: &Listed,
    taken: &mut Taken,
    budget: &mut Budget,
) -> anyhow::Result<()> {
    let mut files: Vec<Arc<File>> = vec![Arc::new(File::open("/dev/zero")?)];
    let mut extents: Vec<Extent> = Vec::new();
    let mut size_bytes = 0;
    let mut kind = InputKind::Full;
    for (number, layer) in disk.layers.iter().enumerate() {
        let (file, path) = open(qmp, peer, &layer.file)?;
        let is_top = number == 0;
        let base = match is_top {
            true => None,
            false => shown(store, &file, &path)?,
        };
        // All below it is the parent's, as it is there.
        if base.is_some_and(|id| Some(id) == taken.parent)
            && path.file_name() == Some(format!("{}.img", disk.image).as_ref())
        {
            kind = InputKind::Diff;
            break;
        }
        let mut found = match layer.format.as_str() {
            "raw" => {
                let length = file.metadata()?.len();
                size_bytes = if is_top { length } else { size_bytes };
                raw_extents(&file, length)?
            }
            "qcow2" => {
                let image = qcow2::read(&file, &layer.file)?;
                size_bytes = if is_top { image.size_bytes } else { size_bytes };
                qcow2_extents(&image)?
            }
            other => bail!(
                "{} has the format {other}; those that can be committed: raw, qcow2",
                layer.file
            ),
        };
        let mut file = file;
        if is_top {
            // The guest writes to it as soon as it goes on.
            match hold_still(&file, &found, layer.format == "raw", budget)? {
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
        extents = filled(extents, &found, size_bytes);
    }
    taken.inputs.push(Input {
        name: disk.image.clone(),
        role: ImageRole::Disk,
        data: InputData::Extents {
            files,
            label: format!("the disk {}", disk.device),
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

/// The file that QEMU has open under this name, for reading, and its path.
fn open(qmp: &mut Qmp, peer: &Peer, name: &str) -> anyhow::Result<(File, PathBuf)> {
    let file = match name.strip_prefix("/dev/fdset/") {
        Some(number) => {
            let sets = qmp.run("query-fdsets", json!({}))?;
            let sets = sets.as_array().map(Vec::as_slice).unwrap_or_default();
            let number: Option<u64> = number.parse().ok();
            let set = sets.iter().find(|set| set["fdset-id"].as_u64() == number);
            let fd = set.and_then(|set| set["fds"][0]["fd"].as_u64());
            peer.descriptor(fd.with_context(|| format!("QEMU has no descriptors {name}"))?)?
        }
        None => peer.open_file(Path::new(name))?.with_context(|| {
            format!("QEMU has no file {name} open; only disks that are files can be committed")
        })?,
    };
    ensure!(
        file.metadata()?.is_file(),
        "{name} is no regular file; only disks that are files can be committed"
    );
    let path = std::fs::read_link(format!(
        "/proc/self/fd/{}",
        std::os::fd::AsRawFd::as_raw_fd(&file)
    ))?;
    Ok((file, path))
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

fn raw_extents(file: &File, size_bytes: u64) -> anyhow::Result<Vec<Extent>> {
    let ranges = data_ranges(file, size_bytes)?;
    Ok(ranges
        .into_iter()
        .map(|range| Extent {
            image_offset: range.start,
            file: 0,
            file_offset: range.start,
            length: range.end - range.start,
        })
        .collect())
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

/// What is above, and what is below where nothing is above: both in order, inside a disk of
/// this length.
fn filled(above: Vec<Extent>, below: &[Extent], size_bytes: u64) -> Vec<Extent> {
    let mut out = above.clone();
    for extent in below {
        let (start, mut at) = (extent.image_offset, extent.image_offset);
        let end = (extent.image_offset + extent.length).min(size_bytes);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_files_are_found() {
        assert_eq!(file_name("/a/root.img"), "/a/root.img");
        assert_eq!(file_name("file:/a/root.img"), "/a/root.img");
        let nested = r#"json:{"driver": "qcow2", "backing": {"driver": "raw", "file":
            {"driver": "file", "filename": "/base"}}, "file": {"driver": "file",
            "filename": "/var/tmp/vl.1"}}"#;
        assert_eq!(file_name(nested), "/var/tmp/vl.1");
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
