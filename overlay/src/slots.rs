//! Room for blocks in an overlay's file.

use std::fs::File;
use std::io;

use rustix::fs::{FallocateFlags, fallocate, fstatvfs};

use crate::base::BLOCK_BYTES;
use crate::budget::Budget;
use crate::map::{LAST_SLOT, Slot};
use crate::step::step;

/// How many blocks may be written before the filesystem is nearly full.
fn room(file: &File) -> io::Result<u64> {
    let now = fstatvfs(file)?;
    let reserved = (now.f_blocks.saturating_mul(now.f_frsize) / RESERVED_PART).min(RESERVED_BYTES);
    let free = now.f_bavail.saturating_mul(now.f_frsize);
    Ok(free.saturating_sub(reserved) / BLOCK_BYTES)
}

/// Which slots are in use.
pub(crate) struct Slots {
    /// Slots from here on were never used.
    next: u32,
    free: Vec<Slot>,
    /// So many are taken before it is looked again how much room there is.
    unseen: u64,
    budget: Budget,
}

/// Slots that are taken between two looks at the room that the filesystem has, at most:
/// 4 MiB. A quarter of the room is, where there is less: others take of it, too.
const LOOK_EVERY: u64 = 1024;
/// What is left free of the filesystem: a part of it,
const RESERVED_PART: u64 = 20;
/// but not more bytes than these. What is written to an overlay must not fill up its host.
const RESERVED_BYTES: u64 = 1 << 30;

impl Slot {
    /// Where the slot is in the overlay's file, in bytes.
    pub fn offset(self) -> u64 {
        u64::from(self.0) * BLOCK_BYTES
    }
}

impl Slots {
    /// No slots, and as many as the budget has room for.
    pub fn new(budget: Budget) -> Self {
        Self {
            next: 0,
            free: Vec::new(),
            unseen: 0,
            budget,
        }
    }

    /// All slots below the largest of these are free, but for these.
    pub fn in_use(budget: Budget, mut used: Vec<Slot>) -> Self {
        used.sort_unstable();
        used.dedup();
        budget.take_anyway(used.len() as u64 * BLOCK_BYTES);
        let next = used.last().map_or(0, |last| last.0 + 1);
        let mut used = used.into_iter().peekable();
        let mut free: Vec<Slot> = (0..next)
            .map(Slot)
            .filter(|slot| used.next_if_eq(slot).is_none())
            .collect();
        free.reverse();
        Self {
            next,
            free,
            unseen: 0,
            budget,
        }
    }

    /// A slot for a block that was not yet written. What is in it is not zeros.
    pub fn take(&mut self, file: &File) -> io::Result<Slot> {
        self.budget.take(BLOCK_BYTES)?;
        let taken = self.find(file);
        if taken.is_err() {
            self.budget.give_back(BLOCK_BYTES);
        }
        taken
    }

    fn find(&mut self, file: &File) -> io::Result<Slot> {
        let full = |why: &'static str| Err(io::Error::new(io::ErrorKind::StorageFull, why));
        if self.unseen == 0 {
            let room = room(file)?;
            if room == 0 {
                return full("the filesystem of its overlay is nearly full (--overlay-dir)");
            }
            self.unseen = (room / 4).clamp(1, LOOK_EVERY);
        }
        // One that was used takes room anew: that was given back.
        if let Some(slot) = self.free.pop() {
            self.unseen -= 1;
            return Ok(slot);
        }
        if self.next >= LAST_SLOT {
            return full("its overlay has no more slots");
        }
        self.unseen -= 1;
        let slot = Slot(self.next);
        self.next += 1;
        Ok(slot)
    }

    /// Whether only new slots are left.
    pub fn has_no_free(&self) -> bool {
        self.free.is_empty()
    }

    /// Takes slots back that nobody reads any more, and their room in the file.
    pub fn give_back(&mut self, file: &File, mut slots: Vec<Slot>) {
        slots.sort_unstable();
        self.budget.give_back(slots.len() as u64 * BLOCK_BYTES);
        let runs = slots.chunk_by(|slot, next| slot.0 + 1 == next.0);
        for run in runs {
            step("give a block's room back");
            let (start, length) = (run[0].offset(), run.len() as u64 * BLOCK_BYTES);
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            if let Err(error) = fallocate(file, flags, start, length) {
                // The room stays taken until the slots are used again.
                tracing::debug!(%error, "an overlay's room is not given back");
            }
        }
        // The lowest first, so that what is written together lies together.
        self.free.extend(slots.iter().rev());
    }
}

impl Drop for Slots {
    fn drop(&mut self) {
        let used = u64::from(self.next).saturating_sub(self.free.len() as u64);
        self.budget.give_back(used * BLOCK_BYTES);
    }
}
