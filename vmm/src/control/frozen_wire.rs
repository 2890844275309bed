//! What a machine hands over to its committer: a reply, and descriptors in a fixed order.
//!
//! With `frozen`:
//!
//! ```text
//! memory                  read at the host addresses of the slots
//! pagemap                 if there is a `pid`: that process's
//! state                   the machine state
//! changed ranges          if `lists_changes`
//! for each of `disks`:
//!   base                  the file under the overlay
//!   overlay               if it `has_overlay`
//!   extents               what differs from the origin, or without one from the base
//! ```
//!
//! With `live`: memory, and changed ranges. A list is a file of little-endian u64, in
//! ascending order: two a range (start and end, in bytes of the image), four an extent (offset
//! on the disk, length, 1 for bytes of the overlay or 0 for zeros, offset in the overlay).
//!
//! Neither end trusts the other: what is read here is bounded, ordered, and within the disk.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::ops::Range;
use std::os::fd::OwnedFd;

use crate::control::protocol::{DiskInfo, Origin, Reply, Seconds};
use crate::devices::virtio::{Content, Extent};
use crate::memory::HostSlot;

/// The longest list of changed ranges that is taken, in bytes: one for every
/// second page of a TiB would be more than any commit could write.
const MAX_LIST_BYTES: u64 = 1 << 31;

/// A machine at one instant.
pub(super) struct FrozenRecord {
    /// To be read at the slots' host addresses.
    pub memory: File,
    /// The process that has it, and its pagemap; none if what changed was copied.
    pub process: Option<(i32, File)>,
    /// Where guest memory lies.
    pub slots: Vec<HostSlot>,
    /// The encoded machine state.
    pub state: Vec<u8>,
    /// The image ranges that changed, if that is known.
    pub changed: Option<Vec<Range<u64>>>,
    /// The round of `precopy` that the list begins after.
    pub after: Option<u64>,
    /// The disks.
    pub disks: Vec<FrozenDisk>,
    /// The snapshot that it differs from.
    pub origin: Origin,
    /// Stages and their seconds.
    pub timings: Seconds,
}

/// A disk at one instant.
pub struct FrozenDisk {
    /// Its name.
    pub name: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// The file under the overlay.
    pub base: File,
    /// When that had last been changed when the machine began, in seconds and
    /// nanoseconds since 1970; `None` of what is not a regular file.
    pub base_modified: Option<(i64, i64)>,
    /// What the guest wrote; `None` for a disk that it can only read.
    pub overlay: Option<File>,
    /// What differs from the origin, or without one from the base; ascending.
    pub extents: Vec<Extent>,
}

/// Some of a running guest's memory, to be read now.
pub struct LiveMemory {
    /// To be read at the slots' host addresses.
    pub memory: File,
    /// Where guest memory lies in it.
    pub slots: Vec<HostSlot>,
    /// What may differ from the origin, or from what the round before has read: image
    /// ranges in bytes.
    pub written: Vec<Range<u64>>,
    /// The snapshot that the rest of the memory is of; without one it is zero.
    pub origin: Origin,
}

/// Why what was handed over cannot be used.
#[derive(Debug)]
pub(super) enum Malformed {
    /// It is another reply, or descriptors are missing.
    Unexpected,
    /// What came is no list, or cannot be read.
    Io(io::Error),
}

impl From<io::Error> for Malformed {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl FrozenRecord {
    /// As it is sent.
    pub fn encode(self) -> io::Result<(Reply, Vec<OwnedFd>)> {
        let mut fds: Vec<OwnedFd> = vec![self.memory.into()];
        let mut pid = None;
        if let Some((process, pagemap)) = self.process {
            pid = Some(process);
            fds.push(pagemap.into());
        }
        fds.push(memory_file("machine state", &self.state)?);
        if let Some(changed) = &self.changed {
            fds.push(memory_file("changed ranges", &range_bytes(changed))?);
        }
        let mut disks = Vec::new();
        for disk in self.disks {
            disks.push(DiskInfo {
                name: disk.name,
                size_bytes: disk.size_bytes,
                base_modified: disk.base_modified,
                has_overlay: disk.overlay.is_some(),
            });
            fds.push(disk.base.into());
            fds.extend(disk.overlay.map(OwnedFd::from));
            fds.push(memory_file("disk extents", &extent_bytes(&disk.extents))?);
        }
        let reply = Reply::Frozen {
            pid,
            slots: self.slots,
            lists_changes: self.changed.is_some(),
            after: self.after,
            disks,
            origin: self.origin,
            timings: self.timings,
        };
        Ok((reply, fds))
    }

    /// From a reply, and the descriptors that came with it in their order.
    pub fn decode(
        reply: Reply,
        mut next: impl FnMut() -> Option<OwnedFd>,
    ) -> Result<Self, Malformed> {
        let Reply::Frozen {
            pid,
            slots,
            lists_changes,
            after,
            disks: infos,
            origin,
            timings,
        } = reply
        else {
            return Err(Malformed::Unexpected);
        };
        let mut file = || next().map(File::from).ok_or(Malformed::Unexpected);
        let memory = file()?;
        let process = match pid {
            Some(pid) => Some((pid, file()?)),
            None => None,
        };
        let mut state = Vec::new();
        read_from_start(&mut file()?, &mut state, crate::state::MAX_STATE_BYTES)?;
        let changed = match lists_changes {
            true => Some(read_ranges(&mut file()?)?),
            false => None,
        };
        let mut disks = Vec::new();
        for info in infos {
            let base = file()?;
            let overlay = match info.has_overlay {
                true => Some(file()?),
                false => None,
            };
            let extents = read_extents(&mut file()?, &info)?;
            disks.push(FrozenDisk {
                name: info.name,
                size_bytes: info.size_bytes,
                base,
                base_modified: info.base_modified,
                overlay,
                extents,
            });
        }
        Ok(Self {
            memory,
            process,
            slots,
            state,
            changed,
            after,
            disks,
            origin,
            timings,
        })
    }
}

impl LiveMemory {
    /// As it is sent, with the number of its round.
    pub(super) fn encode(self, round: u64) -> io::Result<(Reply, Vec<OwnedFd>)> {
        let list = memory_file("written ranges", &range_bytes(&self.written))?;
        let reply = Reply::Live {
            slots: self.slots,
            round,
            origin: self.origin,
        };
        Ok((reply, vec![self.memory.into(), list]))
    }

    /// From a reply and its descriptors, with the number of its round.
    pub(super) fn decode(
        reply: Reply,
        mut next: impl FnMut() -> Option<OwnedFd>,
    ) -> Result<(Self, u64), Malformed> {
        let Reply::Live {
            slots,
            round,
            origin,
        } = reply
        else {
            return Err(Malformed::Unexpected);
        };
        let mut file = || next().map(File::from).ok_or(Malformed::Unexpected);
        let memory = file()?;
        let written = read_ranges(&mut file()?)?;
        let live = Self {
            memory,
            slots,
            written,
            origin,
        };
        Ok((live, round))
    }
}

/// What a list of image ranges looks like.
fn range_bytes(ranges: &[Range<u64>]) -> Vec<u8> {
    let ends = ranges
        .iter()
        .flat_map(|range| [range.start.to_le_bytes(), range.end.to_le_bytes()]);
    ends.flatten().collect()
}

/// What the list of a disk's extents looks like.
fn extent_bytes(extents: &[Extent]) -> Vec<u8> {
    let numbers = extents.iter().flat_map(|extent| {
        let (kind, file_offset) = match extent.content {
            Content::Zeros => (0, 0),
            Content::Overlay { file_offset } => (1, file_offset),
        };
        [extent.image_offset, extent.length, kind, file_offset]
    });
    numbers.flat_map(u64::to_le_bytes).collect()
}

/// An anonymous file with this content.
fn memory_file(name: &str, bytes: &[u8]) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut file = File::from(fd);
    file.write_all(bytes)?;
    Ok(file.into())
}

fn read_from_start(file: &mut File, out: &mut Vec<u8>, limit_bytes: u64) -> io::Result<()> {
    io::Seek::rewind(file)?;
    file.take(limit_bytes + 1).read_to_end(out)?;
    if out.len() as u64 > limit_bytes {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "it sent more than it may",
        ));
    }
    Ok(())
}

fn read_extents(file: &mut File, disk: &DiskInfo) -> io::Result<Vec<Extent>> {
    let mut bytes = Vec::new();
    read_from_start(file, &mut bytes, MAX_LIST_BYTES)?;
    let (records, rest) = bytes.as_chunks::<32>();
    let mut end = 0;
    let mut extents = Vec::new();
    for record in records {
        let [image_offset, length, kind, file_offset] = numbers(record);
        let content = match (kind, disk.has_overlay) {
            (0, _) => Content::Zeros,
            (1, true) => Content::Overlay { file_offset },
            _ => return Err(io::ErrorKind::InvalidData.into()),
        };
        let stop = image_offset.checked_add(length);
        if image_offset < end || length == 0 || stop.is_none_or(|stop| stop > disk.size_bytes) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        end = image_offset + length;
        extents.push(Extent {
            image_offset,
            length,
            content,
        });
    }
    match rest {
        [] => Ok(extents),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// The little-endian numbers of a record.
fn numbers(record: &[u8; 32]) -> [u64; 4] {
    let (numbers, _) = record.as_chunks::<8>();
    [0, 1, 2, 3].map(|at| u64::from_le_bytes(numbers[at]))
}

fn read_ranges(file: &mut File) -> io::Result<Vec<Range<u64>>> {
    let mut bytes = Vec::new();
    read_from_start(file, &mut bytes, MAX_LIST_BYTES)?;
    let (pairs, rest) = bytes.as_chunks::<16>();
    let mut end = 0;
    let mut ranges = Vec::new();
    for pair in pairs {
        let (start, stop) = pair.split_at(8);
        let number = |half: &[u8]| half.try_into().map(u64::from_le_bytes);
        let range = match (number(start), number(stop)) {
            (Ok(start), Ok(stop)) if end <= start && start < stop => start..stop,
            _ => return Err(io::ErrorKind::InvalidData.into()),
        };
        end = range.end;
        ranges.push(range);
    }
    if rest.is_empty() {
        Ok(ranges)
    } else {
        Err(io::ErrorKind::InvalidData.into())
    }
}

#[cfg(test)]
mod tests;
