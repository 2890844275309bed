//! What a process has mapped, and where a guest's memory is in it.
//!
//! A monitor may put memory without a file in the place of a part of a mapped image: one
//! that takes pages back from its guest (a balloon) does, so that they are zero when the
//! guest uses them again. What is in such a part is the process's alone. Were it passed
//! over, a commit would give those pages the bytes of the snapshot that is mapped around them.

use std::path::PathBuf;

use anyhow::{bail, ensure};
use snapstore_vmm::memory::HostSlot;

/// A mapping, as `/proc/PID/maps` tells (proc(5)).
#[derive(Clone, Debug)]
pub struct Mapped {
    pub start: u64,
    pub end: u64,
    /// Where it begins in its file.
    pub offset: u64,
    /// Of its file's filesystem; zeros if it has no file.
    pub device: (u32, u32),
    /// Zero if it has no file.
    pub inode: u64,
    pub path: PathBuf,
    pub is_private: bool,
    pub is_writable: bool,
}

impl Mapped {
    /// `None` for what is no line of the table.
    pub fn parse(line: &str) -> Option<Self> {
        let mut words = line.splitn(6, ' ');
        let (start, end) = words.next()?.split_once('-')?;
        let allowed = words.next()?;
        let offset = words.next()?;
        let (major, minor) = words.next()?.split_once(':')?;
        let inode = words.next()?;
        let path = PathBuf::from(words.next().unwrap_or_default().trim_start());
        let hexadecimal = |text| u64::from_str_radix(text, 16).ok();
        let device = (
            u32::from_str_radix(major, 16).ok()?,
            u32::from_str_radix(minor, 16).ok()?,
        );
        Some(Self {
            start: hexadecimal(start)?,
            end: hexadecimal(end)?,
            offset: hexadecimal(offset)?,
            device,
            inode: inode.parse().ok()?,
            path,
            is_private: allowed.ends_with('p'),
            is_writable: allowed.contains('w'),
        })
    }

    /// Whether it is memory that a guest can have instead of a part of its image.
    fn is_plain_memory(&self) -> bool {
        self.inode == 0 && self.is_private && self.is_writable
    }
}

/// Where an image is in a process.
#[derive(Debug)]
pub struct Parts {
    /// Mappings of its file: what the process did not change is as in the file.
    pub mapped: Vec<HostSlot>,
    /// Memory in the place of the file: what the process did not touch is zero.
    pub replaced: Vec<HostSlot>,
}

/// Finds each part of an image of this length once, given all mappings of a process in their
/// order, and which of them are of the image's file.
pub fn parts(
    all: &[Mapped],
    is_image: impl Fn(&Mapped) -> bool,
    size_bytes: u64,
) -> anyhow::Result<Parts> {
    let mut mapped: Vec<HostSlot> = all
        .iter()
        .filter(|it| is_image(it) && it.offset < size_bytes)
        .map(|it| {
            slot(
                it.offset,
                it.start,
                (it.end - it.start).min(size_bytes - it.offset),
            )
        })
        .collect();
    mapped.sort_by_key(|slot| slot.image_offset);
    let mut replaced = Vec::new();
    let mut before: Option<&HostSlot> = None;
    for after in mapped.iter().map(Some).chain([None]) {
        let from = before.map_or(0, |it| it.image_offset + it.length);
        let to = after.map_or(size_bytes, |it| it.image_offset);
        ensure!(
            from <= to,
            "the process has mapped a part of memory.bin twice, and which one its guest writes \
             to is not known"
        );
        if from < to {
            let host_address = in_its_place(all, before, after, to - from)?;
            replaced.push(slot(from, host_address, to - from));
        }
        before = after;
    }
    Ok(Parts { mapped, replaced })
}

fn slot(image_offset: u64, host_address: u64, length: u64) -> HostSlot {
    HostSlot {
        guest_address: 0,
        image_offset,
        length,
        host_address,
    }
}

/// Where the memory between two neighbours in the image is. It goes on where one ends or
/// ends where the other begins: a guest's memory may consist of several pieces.
fn in_its_place(
    all: &[Mapped],
    before: Option<&HostSlot>,
    after: Option<&HostSlot>,
    length: u64,
) -> anyhow::Result<u64> {
    let behind = before.map(|it| it.host_address + it.length);
    let ahead = after.and_then(|it| it.host_address.checked_sub(length));
    let mut places: Vec<u64> = [behind, ahead].into_iter().flatten().collect();
    places.dedup();
    places.retain(|start| is_memory(all, *start, *start + length));
    match places.as_slice() {
        [place] => Ok(*place),
        [] => bail!(
            "the process has not mapped all of memory.bin, and where its guest has the rest is not \
             known"
        ),
        _ => bail!(
            "the process has memory of its own instead of a part of memory.bin, and which of two \
             places its guest uses is not known; take the guest's balloon back and try again"
        ),
    }
}

/// Whether all of this is memory without a file.
fn is_memory(all: &[Mapped], start: u64, end: u64) -> bool {
    let mut at = start;
    for mapping in all.iter().filter(|it| it.is_plain_memory()) {
        if mapping.start <= at && at < mapping.end {
            at = mapping.end;
        }
    }
    at >= end
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn of_file(start: u64, offset: u64, length: u64) -> Mapped {
        Mapped {
            start,
            end: start + length,
            offset,
            device: (0, 1),
            inode: 1,
            path: "/mnt/memory.bin".into(),
            is_private: true,
            is_writable: true,
        }
    }

    fn memory(start: u64, length: u64) -> Mapped {
        Mapped {
            inode: 0,
            device: (0, 0),
            path: PathBuf::new(),
            ..of_file(start, 0, length)
        }
    }

    fn found(all: &[Mapped], size_bytes: u64) -> anyhow::Result<Parts> {
        parts(all, |it| it.inode == 1, size_bytes)
    }

    fn places(slots: &[HostSlot]) -> Vec<(u64, u64, u64)> {
        let place = |it: &HostSlot| (it.image_offset, it.host_address, it.length);
        slots.iter().map(place).collect()
    }

    #[test]
    fn each_part_is_found_once() {
        let (low, high) = (1 << 30, 1 << 31);
        let apart = [of_file(low, 0, MIB), of_file(high, MIB, MIB)];
        let parts = found(&apart, 3 << 19).unwrap();
        assert_eq!(places(&parts.mapped), [(0, low, MIB), (MIB, high, MIB / 2)]);
        assert!(parts.replaced.is_empty());
        let twice = [of_file(low, 0, MIB), of_file(high, 4096, MIB)];
        assert!(found(&twice, 2 * MIB).is_err());
    }

    #[test]
    fn memory_in_the_place_of_a_part_is_found() {
        let at = 1 << 30;
        // In the middle, in two mappings.
        let all = [
            of_file(at, 0, MIB),
            memory(at + MIB, MIB),
            memory(at + 2 * MIB, MIB),
            of_file(at + 3 * MIB, 3 * MIB, MIB),
        ];
        let parts = found(&all, 4 * MIB).unwrap();
        assert_eq!(places(&parts.replaced), [(MIB, at + MIB, 2 * MIB)]);
        // At the beginning and at the end, beside memory that is no guest's.
        let all = [
            memory(at, 2 * MIB),
            of_file(at + 2 * MIB, MIB, MIB),
            memory(at + 3 * MIB, 9 * MIB),
        ];
        let parts = found(&all, 3 * MIB).unwrap();
        let expected = [(0, at + MIB, MIB), (2 * MIB, at + 3 * MIB, MIB)];
        assert_eq!(places(&parts.replaced), expected);
    }

    #[test]
    fn a_part_that_may_be_in_two_places_is_refused() {
        let (low, high) = (1 << 30, 1 << 31);
        let two = [
            of_file(low, 0, MIB),
            memory(low + MIB, MIB),
            of_file(high, 2 * MIB, MIB),
        ];
        assert_eq!(
            places(&found(&two, 3 * MIB).unwrap().replaced),
            [(MIB, low + MIB, MIB)]
        );
        let mut unclear = two.to_vec();
        unclear.push(memory(high - MIB, MIB));
        assert!(found(&unclear, 3 * MIB).is_err());
        // A guard page is no memory, nor is what is not mapped.
        let mut guarded = two.to_vec();
        guarded[1].is_writable = false;
        assert!(found(&guarded, 3 * MIB).is_err());
        assert!(found(&two[..1], 3 * MIB).is_err());
    }
}
