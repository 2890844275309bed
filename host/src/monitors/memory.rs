//! A guest's memory in the process of its monitor, read while the guest stands still.
//!
//! What the guest wrote to a private mapping of a snapshot's memory are pages of the
//! process's own: the kernel tells which (`/proc/PID/pagemap`). So the changes are exact,
//! whatever the monitor logs, and they can only be changes to what is mapped. Of any other
//! mapping of a file what the file has is read, and its holes are not: to read a hole of
//! shared memory through the process that maps it would give it pages.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use rustix::fs::{MemfdFlags, memfd_create};
use snapstore_store::{Extent, ImageRole, Input, InputData, InputKind, SnapshotId, Store};
use snapstore_vmm::memory::ranges::coalesce;
use snapstore_vmm::memory::{HostSlot, ScanMethod, private_ranges};

use super::adapter::{Budget, Taken};
use super::peer::Peer;
use super::record::Record;
use crate::commit::{data_ranges, extents};
use crate::error::NotFound;
use crate::mappings::Mapped;
use crate::monitor::{MountedFile, memory_of_paused, refused, snapshot_of};

/// How much is copied at once.
const CHUNK_BYTES: usize = 1 << 20;
/// What the image is called in the snapshot.
pub const NAME: &str = "memory";

/// Where a process has its guest's memory, as one piece.
#[derive(Clone, Copy, Debug)]
pub struct GuestMemory {
    /// Where it begins in the process.
    pub host_address: u64,
    /// Its length in bytes.
    pub size_bytes: u64,
}

/// What is read of a guest's memory.
pub struct ReadMemory {
    /// The snapshot that it is given as changes to; none if it is given whole.
    pub parent: Option<SnapshotId>,
    /// Its bytes.
    pub input: Input,
    /// How many of them are read.
    pub read_bytes: u64,
    /// Whether they are read from the process itself, which must stand still until then.
    pub is_held: bool,
}

/// Reads it, or finds where it has to be read. The guest stands still.
pub fn read(
    store: &Store,
    peer: &Peer,
    memory: GuestMemory,
    budget: &mut Budget,
) -> anyhow::Result<ReadMemory> {
    let table = fs::read_to_string(peer.proc("maps")).map_err(|error| refused(peer.pid, error))?;
    let mapped = covering(&table, memory)?;
    let parent = parent(store, peer, &mapped)?;
    let pagemap = File::open(peer.proc("pagemap")).map_err(|error| refused(peer.pid, error))?;
    let from = File::open(peer.proc("mem")).map_err(|error| refused(peer.pid, error))?;
    let slots: Vec<HostSlot> = mapped
        .iter()
        .map(|it| HostSlot {
            guest_address: 0,
            image_offset: match parent {
                Some(_) => it.offset,
                None => it.start - memory.host_address,
            },
            length: it.end - it.start,
            host_address: it.start,
        })
        .collect();
    let ranges = match parent.is_some() {
        true => private_ranges(&pagemap, &slots, ScanMethod::Automatic)?,
        false => filled(peer, &pagemap, &mapped, &slots)?,
    };
    let extents = extents(&slots, &ranges)?;
    let read_bytes = extents.iter().map(|extent| extent.length).sum();
    let is_held = !budget.take(read_bytes);
    let (file, extents) = match is_held {
        true => (from, extents),
        false => copied(&from, &extents).map_err(|error| {
            error.context(format!("while reading the memory of process {}", peer.pid))
        })?,
    };
    Ok(ReadMemory {
        parent,
        read_bytes,
        is_held,
        input: Input {
            name: NAME.to_owned(),
            role: ImageRole::Memory,
            data: InputData::Extents {
                files: vec![Arc::new(file)],
                label: format!("the memory of process {}", peer.pid),
                size_bytes: memory.size_bytes,
                extents,
            },
            kind: match parent {
                Some(_) => InputKind::Diff,
                None => InputKind::Full,
            },
        },
    })
}

/// What is not zero for certain, as ranges of the image: pages that are the process's own, and
/// data of files, which it need not have touched.
fn filled(
    peer: &Peer,
    pagemap: &File,
    mapped: &[Mapped],
    slots: &[HostSlot],
) -> anyhow::Result<Vec<Range<u64>>> {
    let private: Vec<HostSlot> = (mapped.iter().zip(slots))
        .filter(|(it, _)| it.is_private)
        .map(|(_, slot)| *slot)
        .collect();
    let mut ranges = private_ranges(pagemap, &private, ScanMethod::Automatic)?;
    let mut files: BTreeMap<_, Vec<Range<u64>>> = BTreeMap::new();
    for (it, slot) in mapped.iter().zip(slots).filter(|(it, _)| it.inode != 0) {
        let data = match files.entry((it.device, it.inode)) {
            Entry::Occupied(found) => found.into_mut(),
            Entry::Vacant(unknown) => unknown.insert(match opened(peer, it) {
                Some(file) => data_ranges(&file, file.metadata()?.len())?,
                // What cannot be looked at may be data.
                None => std::iter::once(0..u64::MAX).collect(),
            }),
        };
        let end = it.offset + slot.length;
        let first = data.partition_point(|range| range.end <= it.offset);
        for range in data[first..].iter().take_while(|range| range.start < end) {
            let in_slot = |at: u64| at.clamp(it.offset, end) - it.offset + slot.image_offset;
            ranges.push(in_slot(range.start)..in_slot(range.end));
        }
    }
    Ok(coalesce(ranges))
}

/// The file of a mapping, if the process has it open.
fn opened(peer: &Peer, mapped: &Mapped) -> Option<File> {
    let is_it = |path: &Path| {
        fs::metadata(path).is_ok_and(|found| {
            let device = (
                rustix::fs::major(found.dev()),
                rustix::fs::minor(found.dev()),
            );
            found.is_file() && (device, found.ino()) == (mapped.device, mapped.inode)
        })
    };
    let entries = fs::read_dir(peer.proc("fd")).ok()?;
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    paths
        .filter(|path| is_it(path))
        .find_map(|path| File::open(path).ok())
}

/// The mappings that the guest's memory consists of, cut to it.
fn covering(table: &str, memory: GuestMemory) -> anyhow::Result<Vec<Mapped>> {
    let (start, end) = (memory.host_address, memory.host_address + memory.size_bytes);
    let mut found = Vec::new();
    let mut at = start;
    for mut mapped in table.lines().filter_map(Mapped::parse) {
        if mapped.end <= at || at >= end {
            continue;
        }
        ensure!(
            mapped.start <= at,
            "the process has not mapped all of its guest's memory"
        );
        if mapped.inode != 0 {
            mapped.offset += at - mapped.start;
        }
        mapped.start = at;
        mapped.end = mapped.end.min(end);
        at = mapped.end;
        found.push(mapped);
    }
    ensure!(
        at >= end,
        "the process has not mapped all of its guest's memory; is it the monitor itself that \
         listens at the socket?"
    );
    Ok(found)
}

/// The snapshot whose memory these are private mappings of, byte for byte from its
/// beginning.
fn parent(store: &Store, peer: &Peer, mapped: &[Mapped]) -> anyhow::Result<Option<SnapshotId>> {
    let first = &mapped[0];
    let alike = mapped.iter().all(|it| {
        (it.device, it.inode) == (first.device, first.inode)
            && it.is_private
            && it.offset == it.start - first.start
    });
    if !alike || first.inode == 0 {
        return Ok(None);
    }
    if let Some(record) = Record::of_process(peer.pid, peer.since)?
        && record.shared_memory == Some((first.device, first.inode))
    {
        let id = SnapshotId::from_hex(&record.snapshot).context("a machine's record is damaged")?;
        return Ok(store.has_snapshot(id)?.then_some(id));
    }
    let mounts = snapstore_store::mount_table().context("cannot read the table of mounts")?;
    let file = MountedFile {
        device: first.device,
        inode: first.inode,
        path: &first.path,
    };
    match first.path.file_name() {
        Some(name) if name == "memory.bin" => snapshot_of(store, &mounts, file),
        _ => Ok(None),
    }
}

/// A copy of the extents in memory, and where they are in it.
pub fn copied(from: &File, extents: &[Extent]) -> anyhow::Result<(File, Vec<Extent>)> {
    let into = File::from(memfd_create("snapstore-commit", MemfdFlags::CLOEXEC)?);
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut moved = Vec::with_capacity(extents.len());
    let mut to = 0;
    for extent in extents {
        moved.push(Extent {
            file: 0,
            file_offset: to,
            ..*extent
        });
        let mut done = 0;
        while done < extent.length {
            let left = usize::try_from(extent.length - done).unwrap_or(CHUNK_BYTES);
            let part = &mut buffer[..left.min(CHUNK_BYTES)];
            from.read_exact_at(part, extent.file_offset + done)
                .context("cannot read what is to be committed")?;
            into.write_all_at(part, to)
                .context("cannot keep a copy of what is to be committed")?;
            done += part.len() as u64;
            to += part.len() as u64;
        }
    }
    Ok((into, moved))
}

/// Adds what the process of a paused monitor changed of a mounted snapshot's memory; the
/// answer is whether it has mapped any.
pub fn add_changed(
    store: &Store,
    peer: &Peer,
    taken: &mut Taken,
    budget: &mut Budget,
) -> anyhow::Result<bool> {
    let mapped = match memory_of_paused(store, peer.pid) {
        Err(error) if error.is::<NotFound>() => return Ok(false),
        mapped => mapped?,
    };
    let (input, is_held) = kept(mapped.input, budget)?;
    taken.parent = Some(mapped.parent);
    taken.read_bytes += mapped.changed_bytes;
    taken.is_held |= is_held;
    taken.inputs.push(input);
    Ok(true)
}

/// A copy of what an input has of its first file, if there is room for it; else that must
/// stand still.
fn kept(input: Input, budget: &mut Budget) -> anyhow::Result<(Input, bool)> {
    let InputData::Extents {
        files,
        label,
        size_bytes,
        extents,
    } = &input.data
    else {
        return Ok((input, true));
    };
    let (first, mut others): (Vec<Extent>, Vec<Extent>) =
        extents.iter().partition(|extent| extent.file == 0);
    if !budget.take(first.iter().map(|extent| extent.length).sum()) {
        return Ok((input, true));
    }
    let (file, mut extents) = copied(&files[0], &first)?;
    extents.append(&mut others);
    extents.sort_unstable_by_key(|extent| extent.image_offset);
    let data = InputData::Extents {
        files: [Arc::new(file)]
            .into_iter()
            .chain(files[1..].iter().cloned())
            .collect(),
        label: label.clone(),
        size_bytes: *size_bytes,
        extents,
    };
    Ok((Input { data, ..input }, false))
}

/// Adds the whole memory, as a monitor has written it into a file.
pub fn add_whole(file: File, label: &str, taken: &mut Taken) -> anyhow::Result<()> {
    let size_bytes = file.metadata()?.len();
    let extents = data(&file, size_bytes)?;
    taken.read_bytes += extents.iter().map(|extent| extent.length).sum::<u64>();
    taken.inputs.push(Input {
        name: NAME.to_owned(),
        role: ImageRole::Memory,
        data: InputData::Extents {
            files: vec![Arc::new(file)],
            label: label.to_owned(),
            size_bytes,
            extents,
        },
        kind: InputKind::Full,
    });
    Ok(())
}

/// The data of a file, as extents of the image that it is.
pub fn data(file: &File, length: u64) -> anyhow::Result<Vec<Extent>> {
    Ok(data_ranges(file, length)?
        .into_iter()
        .map(|range| Extent {
            image_offset: range.start,
            file: 0,
            file_offset: range.start,
            length: range.end - range.start,
        })
        .collect())
}

/// A file without a name that shares the blocks of this one, where its filesystem can do that.
pub fn reflinked(file: &File) -> Option<File> {
    use rustix::fs::{Mode, OFlags};
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file));
    let path = std::fs::read_link(path).ok()?;
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let clone = rustix::fs::open(path.parent()?, flags, Mode::RUSR | Mode::WUSR).ok()?;
    rustix::fs::ioctl_ficlone(&clone, file).ok()?;
    Some(clone.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
7f0000000000-7f0000100000 rw-p 00000000 00:00 0
7f0000100000-7f0000200000 rw-p 00000000 00:4a 5  /mnt/memory.bin
7f0000200000-7f0000400000 rw-p 00100000 00:4a 5  /mnt/memory.bin
7f0000500000-7f0000600000 rw-s 00000000 00:01 9  /memfd:ram (deleted)
";

    fn of(host_address: u64, size_bytes: u64) -> anyhow::Result<Vec<Mapped>> {
        let memory = GuestMemory {
            host_address,
            size_bytes,
        };
        covering(TABLE, memory)
    }

    #[test]
    fn the_mappings_of_a_guest_are_cut_to_it() {
        let found = of(0x7f00_0010_0000, 2 << 20).unwrap();
        let places: Vec<_> = found
            .iter()
            .map(|it| (it.offset, it.end - it.start))
            .collect();
        assert_eq!(places, [(0, 1 << 20), (1 << 20, 1 << 20)]);
        let found = of(0x7f00_0028_0000, 1 << 20).unwrap();
        assert_eq!(
            (found[0].offset, found[0].start),
            (0x18_0000, 0x7f00_0028_0000)
        );
        // It does not go on behind, or there is a gap, or there is nothing.
        assert!(of(0x7f00_0030_0000, 2 << 20).is_err());
        assert!(of(0x7f00_0050_0000, 2 << 20).is_err());
        assert!(of(0x6f00_0000_0000, 1 << 20).is_err());
    }
}
