//! What was written over a base that does not change.
//!
//! ```text
//! newest   current      blocks written since the last freeze: written in place
//!          frozen[..]   by freeze, not known to be in a durable commit
//!          committed    in a durable commit
//! oldest   base         what is under the overlay
//! ```
//!
//! These are maps; the blocks lie in slots of one file. A freeze turns the
//! current map into a frozen one and begins an empty one: nothing is copied, and
//! the next write of a block takes a new slot. A commit merges maps, or, where the base
//! becomes what was committed, drops them. The slots that this leaves without a reader are
//! used again, once no [`Frozen`] is alive that may read them.
//!
//! Where there is a journal, a block's data is written before its entry, and its entry
//! before the map knows it: what a reader has seen is found again. A slot that is free is
//! used again only once the entry that freed it is on the disk: after a power cut the
//! journal may end before that entry, and what is then found is what was there.

mod write;

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Weak};

use crate::base::{BLOCK_BYTES, Under};
use crate::budget::Budget;
use crate::frozen::Frozen;
use crate::journal::{Journal, Replayed};
use crate::map::{Map, Place, Slot, TABLE_BLOCKS};
use crate::reader;
use crate::slots::Slots;
use crate::sync::{Lost, SyncPoint, check_lost};

/// The longest image, in bytes: every block of it can have a slot, and as many
/// again that commits still read.
pub const MAX_IMAGE_BYTES: u64 = 8 << 40;
/// Frozen maps beyond which the oldest are merged: commits that fail again and
/// again must not slow reading down.
const FROZEN_MAPS: usize = 8;
/// How many times an image's length its overlay's file may have: each map can name a slot
/// for every block. They are what is committed, what is frozen, and the current one.
pub const MOST_LAYERS: u64 = FROZEN_MAPS as u64 + 2;
/// Runs of zeros beyond which less than a table of blocks is not kept as such: each takes
/// memory, and room in the lists of commits, and none in the overlay's file.
const MOST_ZERO_RUNS: u64 = 1 << 22;
/// Free slots that wait for their entries to be on the disk: with more, nobody waits for
/// whoever asks for that.
const MOST_WAITING: usize = 4096;

/// What was written over an image.
pub struct Overlay {
    file: Arc<File>,
    size_bytes: u64,
    committed: Arc<Map>,
    /// With the numbers of their freezes, ascending.
    frozen: Vec<Layer>,
    current: Map,
    slots: Slots,
    /// Without a reader but for what is frozen and lives.
    replaced: Vec<Slot>,
    holds: Vec<Weak<()>>,
    journal: Option<Journal>,
    /// Free once the journal's entries up to a number are on the disk.
    waiting: VecDeque<(u64, Vec<Slot>)>,
    lost: Lost,
    zero_runs: ZeroRuns,
}

/// How many runs of zeros the maps have.
struct ZeroRuns {
    /// No more than these.
    at_most: u64,
    /// Nearly as many as there may be: they are counted anew once a commit is durable.
    are_full: bool,
    most: u64,
}

/// What one freeze froze.
struct Layer {
    number: u64,
    map: Arc<Map>,
    /// The journal's segment that began with the freeze.
    next_segment: u64,
}

impl Overlay {
    /// An overlay of which nothing outlives this process.
    #[must_use]
    pub fn new(file: File, size_bytes: u64, budget: Budget) -> Self {
        Self::build(file, size_bytes, Slots::new(budget), None)
    }

    /// An overlay that begins with this journal.
    #[must_use]
    pub fn journaled(file: File, size_bytes: u64, budget: Budget, journal: Journal) -> Self {
        Self::build(file, size_bytes, Slots::new(budget), Some(journal))
    }

    /// An overlay that is found again, and goes on with this journal.
    #[must_use]
    pub fn found_again(
        file: File,
        size_bytes: u64,
        budget: Budget,
        replayed: Replayed,
        journal: Journal,
    ) -> Self {
        let slots = Slots::in_use(budget, replayed.map.slots().collect());
        let mut found = Self::build(file, size_bytes, slots, Some(journal));
        found.zero_runs.at_most = replayed.map.zero_runs();
        found.current = replayed.map;
        found
    }

    fn build(file: File, size_bytes: u64, slots: Slots, journal: Option<Journal>) -> Self {
        Self {
            file: Arc::new(file),
            size_bytes,
            committed: Arc::default(),
            frozen: Vec::new(),
            current: Map::default(),
            slots,
            replaced: Vec::new(),
            holds: Vec::new(),
            journal,
            waiting: VecDeque::new(),
            lost: Lost::default(),
            zero_runs: ZeroRuns {
                at_most: 0,
                are_full: false,
                most: MOST_ZERO_RUNS,
            },
        }
    }

    /// Of a test, which has no time for so many.
    #[cfg(test)]
    pub(crate) fn with_most_zero_runs(mut self, most: u64) -> Self {
        self.zero_runs.most = most;
        self
    }

    /// Reads through the overlay.
    ///
    /// # Errors
    /// Past the end, or the files cannot be read.
    pub fn read(&self, under: Under<'_>, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let mut from_base = |run: &mut [u8], at| under.base.read_exact_at(run, at);
        self.read_with(offset, bytes, &mut from_base)
    }

    /// Fills in what the overlay holds, and tells which runs of `bytes` are the base's, so
    /// that these can be read while the overlay is used by others.
    ///
    /// # Errors
    /// As [`Overlay::read`].
    pub fn read_held(&self, offset: u64, bytes: &mut [u8]) -> io::Result<Vec<Range<u64>>> {
        let mut below = Vec::new();
        let mut from_base = |run: &mut [u8], at| {
            below.push(at..at + run.len() as u64);
            Ok(())
        };
        self.read_with(offset, bytes, &mut from_base)?;
        Ok(below)
    }

    fn read_with(
        &self,
        offset: u64,
        bytes: &mut [u8],
        from_base: &mut dyn FnMut(&mut [u8], u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let newest_first: Vec<&Map> = self.newest_first().collect();
        let size = self.size_bytes;
        reader::read(&newest_first, &self.file, size, offset, bytes, from_base)
    }

    fn newest_first(&self) -> impl Iterator<Item = &Map> {
        let frozen = self.frozen.iter().rev().map(|layer| &*layer.map);
        std::iter::once(&self.current)
            .chain(frozen)
            .chain([&*self.committed])
    }

    /// What the overlay says of the block at `offset`: whether it is data, if it says
    /// anything; and where the run of such blocks ends.
    #[must_use]
    pub fn run_at(&self, offset: u64) -> (Option<bool>, u64) {
        let newest_first: Vec<&Map> = self.newest_first().collect();
        let said = |block| {
            let place = newest_first.iter().find_map(|map| map.get(block));
            place.map(|place| matches!(place, Place::Slot(_)))
        };
        let mut block = offset / BLOCK_BYTES;
        let first = said(block);
        let end = self.size_bytes.div_ceil(BLOCK_BYTES);
        while block < end && said(block) == first {
            let unknown = newest_first.iter().all(|map| !map.has_table(block));
            block += match unknown {
                true => TABLE_BLOCKS - block % TABLE_BLOCKS,
                false => 1,
            };
        }
        (first, (block * BLOCK_BYTES).min(self.size_bytes))
    }

    /// What the image holds now, for as long as the result lives. `number` is larger with
    /// each freeze.
    ///
    /// # Errors
    /// The journal cannot be written, or something was lost when it was synced; then nothing
    /// is frozen.
    pub fn freeze(&mut self, number: u64) -> io::Result<Frozen> {
        drop(check_lost(&self.lost)?);
        if !self.current.is_empty() {
            let next_segment = match &mut self.journal {
                Some(journal) => journal.next_segment()?,
                None => 0,
            };
            let map = Arc::new(std::mem::take(&mut self.current));
            self.frozen.push(Layer {
                number,
                map,
                next_segment,
            });
        }
        if self.frozen.len() > FROZEN_MAPS {
            // Under the newer one's number: with a commit of the older one alone
            // its blocks stay listed.
            let mut merged = Arc::unwrap_or_clone(self.frozen.remove(0).map);
            merged.absorb(&self.frozen[0].map, &mut self.replaced);
            self.frozen[0].map = Arc::new(merged);
        }
        // Before the new hold, which does not reach what was replaced.
        self.reuse();
        let hold = Arc::new(());
        self.holds.push(Arc::downgrade(&hold));
        Ok(Frozen {
            file: self.file.clone(),
            size_bytes: self.size_bytes,
            committed: self.committed.clone(),
            layers: self.frozen.iter().map(|layer| layer.map.clone()).collect(),
            _hold: hold,
        })
    }

    /// A commit of freeze `number` is durable, and the base stays what it was.
    pub fn committed(&mut self, number: u64) {
        let layers = self.take_frozen(number);
        if !layers.is_empty() {
            let committed = Arc::make_mut(&mut self.committed);
            for layer in layers {
                committed.absorb(&layer.map, &mut self.replaced);
            }
        }
        self.zero_runs.are_full = false;
        self.reuse();
    }

    /// The first of the journal's segments that is needed once the base is what freeze
    /// `number` froze.
    #[must_use]
    pub fn first_segment_after(&self, number: u64) -> u64 {
        let known = self.journal.as_ref().map_or(0, Journal::first_segment);
        let layers = self.frozen.iter().take_while(|it| it.number <= number);
        layers.last().map_or(known, |layer| layer.next_segment)
    }

    /// The base is now what freeze `number` froze: what that froze is given up. Whoever
    /// looks for the journal has been told to begin with [`Overlay::first_segment_after`].
    pub fn rebased(&mut self, number: u64) {
        let first = self.first_segment_after(number);
        for layer in self.take_frozen(number) {
            self.replaced.extend(layer.map.slots());
        }
        if let Some(journal) = &mut self.journal {
            journal.forget_before(first);
        }
        self.zero_runs.are_full = false;
        self.reuse();
    }

    /// How many entries the journal has, of all its segments: what
    /// [`Replayed::has_at_least`] is to find again.
    #[must_use]
    pub fn journal_entries(&self) -> u64 {
        self.journal.as_ref().map_or(0, Journal::entries)
    }

    /// Whoever looks for the journal has been told to begin with its present segment.
    pub fn begins_here(&mut self) {
        if let Some(journal) = &mut self.journal {
            journal.begins_here();
        }
    }

    fn take_frozen(&mut self, number: u64) -> Vec<Layer> {
        let count = self.frozen.partition_point(|it| it.number <= number);
        self.frozen.drain(..count).collect()
    }

    /// How many bytes are written and in no commit; blocks that are zeros count none.
    #[must_use]
    pub fn uncommitted_bytes(&self) -> u64 {
        let frozen = self.frozen.iter().map(|layer| layer.map.slots().count());
        let slots = frozen.sum::<usize>() + self.current.slots().count();
        slots as u64 * BLOCK_BYTES
    }

    /// Whether something is written and in no commit.
    #[must_use]
    pub fn is_changed(&self) -> bool {
        !self.current.is_empty() || !self.frozen.is_empty()
    }

    /// What has to be synced for all that is written by now to be on the disk.
    #[must_use]
    pub fn sync_point(&self) -> SyncPoint {
        SyncPoint::new(self.file.clone(), self.journal.as_ref(), self.lost.clone())
    }

    /// Enters into the journal that what a point has synced is on the disk.
    ///
    /// # Errors
    /// The journal cannot be written.
    pub fn mark(&mut self, point: &mut SyncPoint) -> io::Result<()> {
        match &mut self.journal {
            Some(journal) => point.mark(journal),
            None => Ok(()),
        }
    }

    /// The mark of a point is on the disk.
    pub fn synced(&mut self, point: &SyncPoint) {
        if let Some(journal) = &mut self.journal {
            point.synced(journal);
        }
        while let Some((entry, _)) = self.waiting.front()
            && *entry <= point.entries
            && let Some((_, slots)) = self.waiting.pop_front()
        {
            self.slots.give_back(&self.file, slots);
        }
    }

    fn sync_now(&mut self) -> io::Result<()> {
        let mut point = self.sync_point();
        point.sync_data()?;
        self.mark(&mut point)?;
        point.sync_journal()?;
        self.synced(&point);
        Ok(())
    }

    /// Lets slots be used again that nobody can read.
    fn reuse(&mut self) {
        self.holds.retain(|hold| hold.strong_count() > 0);
        if self.holds.is_empty() && !self.replaced.is_empty() {
            let replaced = std::mem::take(&mut self.replaced);
            self.give_back(replaced);
        }
    }

    /// Slots that no map names any more.
    fn give_back(&mut self, slots: Vec<Slot>) {
        match &self.journal {
            _ if slots.is_empty() => {}
            Some(journal) => self.waiting.push_back((journal.entries(), slots)),
            None => self.slots.give_back(&self.file, slots),
        }
    }

    fn take_slot(&mut self) -> io::Result<Slot> {
        if self.slots.has_no_free() && !self.replaced.is_empty() {
            self.reuse();
        }
        let waiting: usize = self.waiting.iter().map(|(_, slots)| slots.len()).sum();
        if self.slots.has_no_free() && waiting > MOST_WAITING {
            self.sync_now()?;
        }
        match self.slots.take(&self.file) {
            Err(error) if error.kind() == io::ErrorKind::StorageFull && waiting > 0 => {
                self.sync_now()?;
                self.slots.take(&self.file)
            }
            taken => taken,
        }
    }
}
