//! What a guest wrote to a disk whose base must not change.
//!
//! ```text
//! newest   current      blocks written since the last freeze: written in place
//!          frozen[..]   by freeze, not known to be in a durable commit
//!          committed    in a durable commit
//! oldest   base         the file under the overlay
//! ```
//!
//! These are maps; the blocks lie in slots of one file. A freeze turns the
//! current map into a frozen one and begins an empty one: nothing is copied, and
//! the guest's next write of a block takes a new slot. A commit merges maps. The
//! slots that a merge leaves without a reader are used again, once no
//! [`FrozenDisk`](super::FrozenDisk) is alive that may read them.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Weak};

use super::frozen::FrozenOverlay;
use super::map::{Map, Place, Slot, TABLE_BLOCKS};
use super::reader::{self, checked_end, piece};
use super::slots::Slots;
use super::under::{DISK_BLOCK_BYTES, Under};

/// Frozen maps beyond which the oldest are merged: commits that fail again and
/// again must not slow reading down.
const FROZEN_MAPS: usize = 8;
/// What a table of a map is about.
const TABLE_BYTES: u64 = TABLE_BLOCKS * DISK_BLOCK_BYTES;

pub(super) struct Overlay {
    file: Arc<File>,
    committed: Arc<Map>,
    /// With the numbers of their freezes, ascending.
    frozen: Vec<(u64, Arc<Map>)>,
    current: Map,
    slots: Slots,
    /// Without a reader but for frozen disks that live.
    replaced: Vec<Slot>,
    holds: Vec<Weak<()>>,
}

/// Bytes of a write that lie together in the overlay's file.
#[derive(Default)]
struct Run {
    file_offset: u64,
    /// Of the bytes to write.
    start: usize,
    end: usize,
    /// Blocks that get a slot once it is written.
    new: Vec<(u64, Slot)>,
}

impl Overlay {
    pub fn new(file: File, limit_bytes: Option<u64>) -> Self {
        Self {
            file: Arc::new(file),
            committed: Arc::default(),
            frozen: Vec::new(),
            current: Map::default(),
            slots: Slots::new(limit_bytes),
            replaced: Vec::new(),
            holds: Vec::new(),
        }
    }

    pub fn read(&self, under: &Under, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let mut newest_first = vec![&self.current];
        newest_first.extend(self.frozen.iter().rev().map(|(_, map)| &**map));
        newest_first.push(&*self.committed);
        let size = under.size_bytes;
        reader::read(&under.base, &newest_first, &self.file, size, offset, bytes)
    }

    /// Writes; a block whose write fails may hold what it held, or what was
    /// written, or a part of it.
    pub fn write(&mut self, under: &Under, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let end = checked_end(under.size_bytes, offset, bytes.len() as u64)?;
        let mut run = Run::default();
        let (mut at, mut start) = (offset, 0);
        while at < end {
            let (block, length) = piece(at, end);
            let part = start..start + usize::try_from(length).map_err(io::Error::other)?;
            let within = at % DISK_BLOCK_BYTES;
            match self.current.get(block) {
                Some(Place::Slot(slot)) => {
                    self.extend(&mut run, bytes, slot.offset() + within, &part)?;
                }
                _ if length == under.block_bytes(block) => {
                    let slot = match self.take_slot() {
                        Ok(slot) => slot,
                        Err(error) => {
                            self.finish(&mut run, bytes)?;
                            return Err(error);
                        }
                    };
                    if let Err(error) = self.extend(&mut run, bytes, slot.offset(), &part) {
                        self.abandon([slot]);
                        return Err(error);
                    }
                    run.new.push((block, slot));
                }
                _ => {
                    self.finish(&mut run, bytes)?;
                    self.fill_block(under, block, within, &bytes[part.clone()])?;
                }
            }
            (at, start) = (at + length, part.end);
        }
        self.finish(&mut run, bytes)
    }

    /// Makes the bytes zeros, and gives their room back.
    pub fn zero(&mut self, under: &Under, offset: u64, length: u64) -> io::Result<()> {
        const NO_BYTES: &[u8] = &[0; DISK_BLOCK_BYTES as usize];
        let end = checked_end(under.size_bytes, offset, length)?;
        let mut freed = Vec::new();
        let mut at = offset;
        let mut done = Ok(());
        while at < end && done.is_ok() {
            if at.is_multiple_of(TABLE_BYTES) && end - at >= TABLE_BYTES {
                // No freeze knows of a slot in the current map.
                self.current.zero_table(at / DISK_BLOCK_BYTES, &mut freed);
                at += TABLE_BYTES;
                continue;
            }
            let (block, length) = piece(at, end);
            if length == under.block_bytes(block) {
                if let Some(Place::Slot(slot)) = self.current.set(block, Place::Zeros) {
                    freed.push(slot);
                }
            } else {
                let zeros = usize::try_from(length).map_err(io::Error::other)?;
                done = self.write(under, at, &NO_BYTES[..zeros]);
            }
            at += length;
        }
        self.slots.give_back(&self.file, freed);
        done
    }

    /// What the disk holds now, for as long as the result lives.
    pub fn freeze(&mut self, number: u64) -> FrozenOverlay {
        if !self.current.is_empty() {
            let current = std::mem::take(&mut self.current);
            self.frozen.push((number, Arc::new(current)));
        }
        if self.frozen.len() > FROZEN_MAPS {
            // Under the newer one's number: with a commit of the older one alone
            // its blocks stay listed.
            let (_, oldest) = self.frozen.remove(0);
            let mut merged = Arc::unwrap_or_clone(oldest);
            merged.absorb(&self.frozen[0].1, &mut self.replaced);
            self.frozen[0].1 = Arc::new(merged);
        }
        // Before the new hold, which does not reach what was replaced.
        self.reuse();
        let hold = Arc::new(());
        self.holds.push(Arc::downgrade(&hold));
        FrozenOverlay {
            file: self.file.clone(),
            committed: self.committed.clone(),
            layers: self.frozen.iter().map(|(_, map)| map.clone()).collect(),
            _hold: hold,
        }
    }

    /// A commit of freeze `number` is durable.
    pub fn committed(&mut self, number: u64) {
        let count = self.frozen.partition_point(|(frozen, _)| *frozen <= number);
        if count > 0 {
            let committed = Arc::make_mut(&mut self.committed);
            for (_, map) in self.frozen.drain(..count) {
                committed.absorb(&map, &mut self.replaced);
            }
        }
        self.reuse();
    }

    /// Lets slots be used again that nobody can read.
    fn reuse(&mut self) {
        self.holds.retain(|hold| hold.strong_count() > 0);
        if self.holds.is_empty() && !self.replaced.is_empty() {
            let replaced = std::mem::take(&mut self.replaced);
            self.slots.give_back(&self.file, replaced);
        }
    }

    fn take_slot(&mut self) -> io::Result<Slot> {
        if self.slots.has_no_free() && !self.replaced.is_empty() {
            self.reuse();
        }
        self.slots.take(&self.file)
    }

    /// Gives a block, of which only a part is written, a slot with all of it.
    fn fill_block(
        &mut self,
        under: &Under,
        block: u64,
        within: u64,
        part: &[u8],
    ) -> io::Result<()> {
        let mut whole = [0; DISK_BLOCK_BYTES as usize];
        let valid = usize::try_from(under.block_bytes(block)).map_err(io::Error::other)?;
        let within = usize::try_from(within).map_err(io::Error::other)?;
        self.read(under, block * DISK_BLOCK_BYTES, &mut whole[..valid])?;
        whole[within..within + part.len()].copy_from_slice(part);
        let slot = self.take_slot()?;
        if let Err(error) = self.file.write_all_at(&whole, slot.offset()) {
            self.abandon([slot]);
            return Err(error);
        }
        self.current.set(block, Place::Slot(slot));
        Ok(())
    }

    /// Adds a part of the bytes to the run, or begins a new one with it where it
    /// does not lie behind the run.
    fn extend(
        &mut self,
        run: &mut Run,
        bytes: &[u8],
        file_offset: u64,
        part: &std::ops::Range<usize>,
    ) -> io::Result<()> {
        if run.file_offset + (run.end - run.start) as u64 != file_offset {
            self.finish(run, bytes)?;
        }
        if run.start == run.end {
            (run.file_offset, run.start) = (file_offset, part.start);
        }
        run.end = part.end;
        Ok(())
    }

    /// Writes the run's bytes, and lets its new blocks have their slots.
    fn finish(&mut self, run: &mut Run, bytes: &[u8]) -> io::Result<()> {
        let run = std::mem::take(run);
        let written = self
            .file
            .write_all_at(&bytes[run.start..run.end], run.file_offset);
        if written.is_err() {
            self.abandon(run.new.iter().map(|(_, slot)| *slot));
            return written;
        }
        for (block, slot) in run.new {
            self.current.set(block, Place::Slot(slot));
        }
        Ok(())
    }

    fn abandon(&mut self, slots: impl IntoIterator<Item = Slot>) {
        self.slots
            .give_back(&self.file, slots.into_iter().collect());
    }
}
