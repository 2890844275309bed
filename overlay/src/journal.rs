//! Which blocks of an overlay are in which slots, as a list of what was entered.
//!
//! A journal is cut into segments, one file each: a freeze begins a new one, so that what
//! was committed is given up by removing files.
//!
//! Its bytes are in `segment`; `replayed` finds again what it says.

mod replayed;
mod segment;

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;

pub use self::replayed::{Replayed, Survived};
pub use self::segment::SegmentPath;
use self::segment::{ENTRY_BYTES, Entry, HEADER_BYTES, MARK, SLOTS, ZEROS, begin_segment};
use crate::disk::sync_file;
use crate::map::{Place, Slot};
use crate::step::step;

/// The journal of an overlay that is in use.
pub struct Journal {
    path: SegmentPath,
    file: Arc<File>,
    key: [u8; 32],
    /// Where the next entry goes in the file.
    end: u64,
    entries: u64,
    segment: u64,
    first_segment: u64,
    /// Segments that may have something that is not on the disk.
    unsynced: Vec<Arc<File>>,
    /// Whether it has entries behind its end that could not be removed.
    is_broken: bool,
    /// Whether the name of a segment may not be on the disk.
    has_new_name: bool,
    /// So many entries are on the disk, each with a mark that says so or being one.
    clean: Option<u64>,
}

impl Journal {
    /// The first segment of a new journal.
    ///
    /// # Errors
    /// The operating system's; there is such a segment.
    pub fn create(path: SegmentPath) -> io::Result<Self> {
        Self::begin(path, 0, 0, 0)
    }

    /// Goes on where a journal ended, in a segment that says all that is known, of an
    /// overlay in the file `data`; both are on the disk when this returns. The segments
    /// before it are needed until [`Journal::begins_here`].
    ///
    /// # Errors
    /// The operating system's.
    pub fn go_on(path: SegmentPath, after: &Replayed, data: &File) -> io::Result<Self> {
        sync_file(data)?;
        let (segment, first) = (after.next_segment, after.first_segment);
        path.remove_after(segment)?;
        // One number is left out: who reads on from the segments before this one, because
        // nobody was told of it yet, must not take what it says to be on the disk for theirs.
        let mut journal = Self::begin(path, segment, after.entries + 1, first)?;
        let mut run: Vec<(u64, Slot)> = Vec::new();
        for (block, place) in after.map.iter() {
            match place {
                Place::Slot(slot) => run.push((block, slot)),
                Place::Zeros => journal.append_zeros(block..block + 1)?,
            }
        }
        journal.append_slots(&run)?;
        sync_file(&journal.file)?;
        // Those that hold the marks of the segments before are removed.
        journal.append_mark(journal.entries)?;
        sync_file(&journal.file)?;
        Ok(journal)
    }

    /// The segment that is written to.
    #[must_use]
    pub fn segment(&self) -> u64 {
        self.segment
    }

    /// Whoever looks for the journal has been told to begin with the present segment.
    pub fn begins_here(&mut self) {
        self.forget_before(self.segment);
    }

    fn begin(path: SegmentPath, segment: u64, entries: u64, first: u64) -> io::Result<Self> {
        let (file, key) = begin_segment(&path, segment, entries)?;
        Ok(Self {
            path,
            unsynced: vec![file.clone()],
            is_broken: false,
            has_new_name: true,
            clean: None,
            file,
            key,
            end: HEADER_BYTES as u64,
            entries,
            segment,
            first_segment: first,
        })
    }

    /// Begins the next segment; returns its number.
    pub(crate) fn next_segment(&mut self) -> io::Result<u64> {
        let segment = self.segment + 1;
        let (file, key) = begin_segment(&self.path, segment, self.entries)?;
        self.unsynced.push(file.clone());
        (self.has_new_name, self.clean) = (true, None);
        (self.file, self.key, self.segment) = (file, key, segment);
        self.end = HEADER_BYTES as u64;
        Ok(segment)
    }

    /// How many entries there are, marks included.
    pub(crate) fn entries(&self) -> u64 {
        self.entries
    }

    /// The first segment that is needed.
    pub(crate) fn first_segment(&self) -> u64 {
        self.first_segment
    }

    pub(crate) fn unsynced(&self) -> Vec<Arc<File>> {
        self.unsynced.clone()
    }

    /// Whether all that it says is on the disk.
    pub(crate) fn is_clean(&self) -> bool {
        self.clean == Some(self.entries)
    }

    /// The directory, if the name of a segment in it may not be on the disk.
    pub(crate) fn new_segment_in(&self) -> Option<PathBuf> {
        self.has_new_name.then(|| self.path.dir.clone())
    }

    /// These files are on the disk, with their names and up to a mark, which makes it
    /// `marked` entries if it vouches for all of them.
    pub(crate) fn synced(&mut self, files: &[Arc<File>], marked: Option<u64>) {
        // What is written to goes on to be.
        let is_done = |one: &Arc<File>| files.iter().any(|it| Arc::ptr_eq(it, one));
        let current = self.file.clone();
        self.unsynced
            .retain(|one| Arc::ptr_eq(one, &current) || !is_done(one));
        if is_done(&current) {
            self.has_new_name = false;
            self.clean = self.clean.max(marked);
        }
    }

    /// Removes segments that nobody looks for any more.
    pub(crate) fn forget_before(&mut self, first: u64) {
        for segment in self.first_segment..first {
            step("remove a segment of a journal");
            let path = self.path.of(segment);
            if let Err(error) = fs::remove_file(&path)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(%error, path = %path.display(), "a journal's old segment stays");
            }
        }
        self.first_segment = self.first_segment.max(first);
    }

    pub(crate) fn append_slots(&mut self, new: &[(u64, Slot)]) -> io::Result<()> {
        let follows = |a: &(u64, Slot), b: &(u64, Slot)| a.0 + 1 == b.0 && a.1.0 + 1 == b.1.0;
        let runs = new.chunk_by(follows);
        let entries = runs.map(|run| {
            let (block, slot) = run[0];
            (block, slot.0, run.len() as u64, SLOTS)
        });
        self.append(entries.collect())
    }

    pub(crate) fn append_zeros(&mut self, blocks: Range<u64>) -> io::Result<()> {
        let mut entries = Vec::new();
        let mut block = blocks.start;
        while block < blocks.end {
            let count = (blocks.end - block).min(u64::from(u32::MAX));
            entries.push((block, 0, count, ZEROS));
            block += count;
        }
        self.append(entries)
    }

    pub(crate) fn append_mark(&mut self, entries: u64) -> io::Result<()> {
        self.append(vec![(entries, 0, 0, MARK)])
    }

    fn append(&mut self, entries: Vec<(u64, u32, u64, u8)>) -> io::Result<()> {
        if entries.is_empty() {
            return Ok(());
        }
        let mut bytes = Vec::with_capacity(entries.len() * ENTRY_BYTES);
        for (number, (block, slot, count, kind)) in (self.entries..).zip(&entries) {
            let entry = Entry {
                number,
                block: *block,
                slot: *slot,
                count: u32::try_from(*count).map_err(io::Error::other)?,
                kind: *kind,
            };
            bytes.extend_from_slice(&entry.encode(&self.key));
        }
        step("enter into a journal");
        if self.is_broken {
            return Err(io::Error::other(
                "the journal has an entry that is not to be",
            ));
        }
        if let Err(error) = self.file.write_all_at(&bytes, self.end) {
            // Some may be there as a whole, though their slots are given up.
            self.is_broken = self.file.set_len(self.end).is_err();
            return Err(error);
        }
        self.end += bytes.len() as u64;
        self.entries += entries.len() as u64;
        Ok(())
    }
}
