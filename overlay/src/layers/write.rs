//! Writing: a block's first write since a freeze takes a slot, those after it go to the same.

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

use super::Overlay;
use crate::base::{BLOCK_BYTES, Under};
use crate::map::{Map, Place, Slot, TABLE_BLOCKS};
use crate::reader::{checked_end, piece};
use crate::step::step;

const NO_BYTES: &[u8] = &[0; BLOCK_BYTES as usize];

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
    /// Writes; a block whose write fails may hold what it held, or what was
    /// written, or a part of it.
    ///
    /// # Errors
    /// Past the end; `StorageFull`; the operating system's.
    pub fn write(&mut self, under: Under<'_>, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let end = checked_end(under.size_bytes, offset, bytes.len() as u64)?;
        let mut run = Run::default();
        let (mut at, mut start) = (offset, 0);
        while at < end {
            let (block, length) = piece(at, end);
            let part = start..start + usize::try_from(length).map_err(io::Error::other)?;
            let within = at % BLOCK_BYTES;
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

    /// Makes the bytes zeros, and gives their room back. Of very many short runs, those
    /// beyond a bound take room, as any other bytes do.
    ///
    /// # Errors
    /// As [`Overlay::write`].
    pub fn zero(&mut self, under: Under<'_>, offset: u64, length: u64) -> io::Result<()> {
        let end = checked_end(under.size_bytes, offset, length)?;
        let mut at = offset;
        let mut whole: Option<Range<u64>> = None;
        while at < end {
            let (block, length) = piece(at, end);
            if length == under.block_bytes(block) {
                // All up to the last block, of which there may be a part.
                let last = match end.is_multiple_of(BLOCK_BYTES) || end == under.size_bytes {
                    true => end.div_ceil(BLOCK_BYTES),
                    false => end / BLOCK_BYTES,
                };
                whole = Some(block..last);
                at = (last * BLOCK_BYTES).min(end);
            } else {
                let zeros = usize::try_from(length).map_err(io::Error::other)?;
                self.write(under, at, &NO_BYTES[..zeros])?;
                at += length;
            }
        }
        match whole {
            None => Ok(()),
            Some(blocks) if self.may_add_zeros() => self.zero_blocks(blocks),
            Some(blocks) => self.zero_tables(under, blocks),
        }
    }

    /// Whether there may be one more run of zeros.
    fn may_add_zeros(&mut self) -> bool {
        let most = self.zero_runs.most;
        if self.zero_runs.at_most >= most && !self.zero_runs.are_full {
            let runs = self.newest_first().map(Map::zero_runs).sum();
            self.zero_runs.at_most = runs;
            // With a little room, they would be counted for each of a few more.
            self.zero_runs.are_full = runs > most - most / 8;
        }
        self.zero_runs.at_most += u64::from(!self.zero_runs.are_full);
        !self.zero_runs.are_full
    }

    /// Only whole tables, of which there cannot be too many, become runs of zeros.
    fn zero_tables(&mut self, under: Under<'_>, blocks: Range<u64>) -> io::Result<()> {
        let first = blocks.start.next_multiple_of(TABLE_BLOCKS).min(blocks.end);
        let last = (blocks.end - blocks.end % TABLE_BLOCKS).max(first);
        self.fill_with_zeros(under, blocks.start..first)?;
        if first < last {
            self.zero_blocks(first..last)?;
        }
        self.fill_with_zeros(under, last..blocks.end)
    }

    fn fill_with_zeros(&mut self, under: Under<'_>, blocks: Range<u64>) -> io::Result<()> {
        for block in blocks {
            if self.current.get(block) != Some(Place::Zeros) {
                let zeros = usize::try_from(under.block_bytes(block)).map_err(io::Error::other)?;
                self.write(under, block * BLOCK_BYTES, &NO_BYTES[..zeros])?;
            }
        }
        Ok(())
    }

    fn zero_blocks(&mut self, blocks: Range<u64>) -> io::Result<()> {
        if let Some(journal) = &mut self.journal {
            journal.append_zeros(blocks.clone())?;
        }
        let mut freed = Vec::new();
        let mut block = blocks.start;
        while block < blocks.end {
            if block.is_multiple_of(TABLE_BLOCKS) && blocks.end - block >= TABLE_BLOCKS {
                self.current.zero_table(block, &mut freed);
                block += TABLE_BLOCKS;
                continue;
            }
            if let Some(Place::Slot(slot)) = self.current.set(block, Place::Zeros) {
                freed.push(slot);
            }
            block += 1;
        }
        // No freeze knows of a slot in the current map.
        self.give_back(freed);
        Ok(())
    }

    /// Gives a block, of which only a part is written, a slot with all of it.
    fn fill_block(
        &mut self,
        under: Under<'_>,
        block: u64,
        within: u64,
        part: &[u8],
    ) -> io::Result<()> {
        let mut whole = [0; BLOCK_BYTES as usize];
        let valid = usize::try_from(under.block_bytes(block)).map_err(io::Error::other)?;
        let within = usize::try_from(within).map_err(io::Error::other)?;
        self.read(under, block * BLOCK_BYTES, &mut whole[..valid])?;
        whole[within..within + part.len()].copy_from_slice(part);
        let slot = self.take_slot()?;
        step("write a block");
        let written = self.file.write_all_at(&whole, slot.offset());
        if let Err(error) = written.and_then(|()| self.enter(&[(block, slot)])) {
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
        part: &Range<usize>,
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
        step("write blocks");
        let written = self
            .file
            .write_all_at(&bytes[run.start..run.end], run.file_offset)
            .and_then(|()| self.enter(&run.new));
        if written.is_err() {
            self.abandon(run.new.iter().map(|(_, slot)| *slot));
            return written;
        }
        for (block, slot) in run.new {
            self.current.set(block, Place::Slot(slot));
        }
        Ok(())
    }

    fn enter(&mut self, new: &[(u64, Slot)]) -> io::Result<()> {
        match &mut self.journal {
            Some(journal) => journal.append_slots(new),
            None => Ok(()),
        }
    }

    /// Slots that no map and no entry names.
    fn abandon(&mut self, slots: impl IntoIterator<Item = Slot>) {
        self.slots
            .give_back(&self.file, slots.into_iter().collect());
    }
}
