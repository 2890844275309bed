//! Room for blocks in an overlay's file.

use std::fs::File;
use std::io;

use rustix::fs::{FallocateFlags, fallocate};

use super::DISK_BLOCK_BYTES;
use super::map::{LAST_SLOT, Slot};

/// Which slots are in use.
#[derive(Default)]
pub(super) struct Slots {
    /// Slots from here on were never used.
    next: u32,
    free: Vec<Slot>,
}

impl Slot {
    /// Where the slot is in the overlay's file, in bytes.
    pub fn offset(self) -> u64 {
        u64::from(self.0) * DISK_BLOCK_BYTES
    }
}

impl Slots {
    /// A slot for a block that was not yet written. What is in it is not zeros.
    pub fn take(&mut self) -> io::Result<Slot> {
        if let Some(slot) = self.free.pop() {
            return Ok(slot);
        }
        if self.next > LAST_SLOT {
            return Err(io::ErrorKind::StorageFull.into());
        }
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
        let runs = slots.chunk_by(|slot, next| slot.0 + 1 == next.0);
        for run in runs {
            let (start, length) = (run[0].offset(), run.len() as u64 * DISK_BLOCK_BYTES);
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
