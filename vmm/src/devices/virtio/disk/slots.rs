//! Room for blocks in an overlay's file.

use std::fs::File;
use std::io;

use rustix::fs::{FallocateFlags, fallocate, fstatvfs};

use super::map::{LAST_SLOT, Slot};
use super::under::DISK_BLOCK_BYTES;

fn is_nearly_full(file: &File) -> io::Result<bool> {
    let now = fstatvfs(file)?;
    let reserved = (now.f_blocks.saturating_mul(now.f_frsize) / RESERVED_PART).min(RESERVED_BYTES);
    Ok(now.f_bavail.saturating_mul(now.f_frsize) < reserved)
}

/// Which slots are in use.
pub(super) struct Slots {
    /// Slots from here on were never used.
    next: u32,
    free: Vec<Slot>,
    /// The most slots there may be.
    most: u32,
}

/// New slots between two looks at the room that the filesystem has: 4 MiB.
const LOOK_EVERY: u32 = 1024;
/// What is left free of the filesystem: a part of it,
const RESERVED_PART: u64 = 20;
/// but not more bytes than these. A guest must not fill up its host.
const RESERVED_BYTES: u64 = 1 << 30;

impl Slot {
    /// Where the slot is in the overlay's file, in bytes.
    pub fn offset(self) -> u64 {
        u64::from(self.0) * DISK_BLOCK_BYTES
    }
}

impl Slots {
    /// No slots, and at most so many bytes of them.
    pub fn new(limit_bytes: Option<u64>) -> Self {
        let most = limit_bytes.map_or(u64::MAX, |bytes| bytes / DISK_BLOCK_BYTES);
        Self {
            next: 0,
            free: Vec::new(),
            most: u32::try_from(most).unwrap_or(u32::MAX).min(LAST_SLOT),
        }
    }

    /// A slot for a block that was not yet written. What is in it is not zeros.
    pub fn take(&mut self, file: &File) -> io::Result<Slot> {
        if let Some(slot) = self.free.pop() {
            return Ok(slot);
        }
        if self.next >= self.most {
            return Err(io::Error::new(
                io::ErrorKind::StorageFull,
                "its overlay is as large as it may be (--overlay-limit)",
            ));
        }
        if self.next.is_multiple_of(LOOK_EVERY) && is_nearly_full(file)? {
            return Err(io::Error::new(
                io::ErrorKind::StorageFull,
                "the filesystem of its overlay is nearly full (--overlay-dir)",
            ));
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
