//! What a journal said, once its writer has ended.

use std::io;

use super::segment::{Entry, MARK, SLOTS, Segment, SegmentPath, ZEROS, read_segment};
use crate::base::BLOCK_BYTES;
use crate::map::{LAST_SLOT, Map, Place, Slot};

/// What has survived of an overlay.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Survived {
    /// All that was written: only a process has ended.
    Everything,
    /// What was synced: the whole system has ended.
    OnlySynced,
}

/// What a journal said.
pub struct Replayed {
    pub(crate) map: Map,
    pub(super) entries: u64,
    pub(super) next_segment: u64,
    pub(super) first_segment: u64,
}

impl Segment {
    /// Whether the entry that ends it was there as a whole.
    fn is_damaged(&self, survived: Survived) -> bool {
        match survived {
            Survived::Everything => self.whole_after > 0,
            Survived::OnlySynced => self.synced_after > self.next,
        }
    }
}

impl Replayed {
    /// Reads the segments from `first_segment` on, of an image of so many blocks. A segment
    /// that is missing, or torn, ends the journal there.
    ///
    /// # Errors
    /// A segment cannot be read, or is damaged ([`io::ErrorKind::InvalidData`]).
    pub fn read(
        path: &SegmentPath,
        first_segment: u64,
        blocks: u64,
        survived: Survived,
    ) -> io::Result<Self> {
        let mut entries: Vec<Entry> = Vec::new();
        let mut segment = first_segment;
        let mut number = None;
        while let Some(read) = read_segment(&path.of(segment), segment, number)? {
            if read.is_damaged(survived) {
                let path = path.of(segment);
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!(
                        "{} is damaged: what was written after that is lost",
                        path.display()
                    ),
                ));
            }
            number = Some(read.next);
            entries.extend(read.entries);
            segment += 1;
        }
        // Segments behind a gap, or behind one that was torn, are not this journal's.
        if survived == Survived::OnlySynced {
            let marks = entries.iter().filter(|entry| entry.kind == MARK);
            let synced = marks.map(|mark| mark.block).max().unwrap_or(0);
            entries.retain(|entry| entry.number < synced);
        }
        let mut map = Map::default();
        for entry in &entries {
            apply(&mut map, entry, blocks)?;
        }
        Ok(Self {
            map,
            entries: number.unwrap_or(0),
            next_segment: segment.max(first_segment),
            first_segment,
        })
    }

    /// That it has as many entries as were counted when its server ended: less is damage,
    /// however it ends.
    ///
    /// # Errors
    /// It has fewer ([`io::ErrorKind::InvalidData`]).
    pub fn has_at_least(&self, entries: u64, path: &SegmentPath) -> io::Result<()> {
        if self.entries >= entries {
            return Ok(());
        }
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!(
                "the journal {}/{}.*.journal is damaged: of {entries} entries {} are there",
                path.dir.display(),
                path.name,
                self.entries
            ),
        ))
    }

    /// Whether there is not even the first segment.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        self.next_segment == self.first_segment
    }

    /// How long the overlay's file has to be for what an image of this size has in its slots;
    /// zero if there is nothing.
    #[must_use]
    pub fn file_bytes(&self, size_bytes: u64) -> u64 {
        let ends = self.map.iter().filter_map(|(block, place)| match place {
            // Of an image's last block there may be a part.
            Place::Slot(slot) => {
                let rest = size_bytes.saturating_sub(block * BLOCK_BYTES);
                Some(slot.offset() + rest.min(BLOCK_BYTES))
            }
            Place::Zeros => None,
        });
        ends.max().unwrap_or(0)
    }
}

fn apply(map: &mut Map, entry: &Entry, blocks: u64) -> io::Result<()> {
    let end = entry.block.checked_add(entry.count.into());
    let last_slot = entry.slot.checked_add(entry.count);
    let fits = end.is_some_and(|end| end <= blocks) && last_slot.is_some_and(|it| it <= LAST_SLOT);
    match entry.kind {
        MARK => return Ok(()),
        SLOTS | ZEROS if fits => {}
        _ => {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "an overlay's journal has an entry that this version does not know",
            ));
        }
    }
    for at in 0..entry.count {
        let place = match entry.kind {
            SLOTS => Place::Slot(Slot(entry.slot + at)),
            _ => Place::Zeros,
        };
        map.set(entry.block + u64::from(at), place);
    }
    Ok(())
}
