//! Reading memory while the guest runs, so that a commit's pause has little left to keep.
//!
//! Each round lists what was written since the one before, marks it as not written, and
//! hands it out to be read where it is. Marking comes first: a page that is written while
//! it is read, or after, is in the next round's list. So what was read of a page that is
//! in no later list, nor in that of the freeze, is what it holds at the freeze.
//!
//! The rounds of one commit are numbered. A freeze that names the last number lists only
//! what was written since; any other one lists all that no commit has.

use std::fs::File;
use std::ops::Range;
use std::time::Instant;

use super::freeze::few_pages;
use super::{Control, Machine, PAUSE_PATIENCE};
use crate::error::{OsContext as _, Result};
use crate::memory::{HostSlot, PAGE_BYTES, Tracker, limit_bytes, private_pages, ranges};
use crate::proc;

/// With less private memory than this the pause is short anyhow, and a commit is done
/// sooner if all is read at once.
const WORTHWHILE_BYTES: u64 = 16 << 20;

/// Some of a running guest's memory.
#[derive(Debug)]
pub struct LiveMemory {
    /// `/proc/self/mem` of the machine's process, read-only: its positions are the host
    /// addresses of the slots.
    pub memory: File,
    /// Where guest memory lies.
    pub slots: Vec<HostSlot>,
    /// What is to be read: image ranges in bytes.
    pub pages: Vec<Range<u64>>,
    /// Which round this is, for the freeze.
    pub round: u64,
}

/// What was written since the last round.
pub(super) struct SinceRound {
    pub(super) round: u64,
    pub(super) written: Vec<Range<u64>>,
}

impl Machine {
    /// What a commit may read before it freezes the machine. `after` is the last round of
    /// that commit, if there was one; what it listed has been read.
    ///
    /// `None` if nothing is to be gained: the guest stands still anyhow, so little is left
    /// that it can be copied in the pause, or this kernel does not tell what is written.
    ///
    /// # Errors
    /// The machine is held up by another, or the kernel refuses. A freeze without `after`
    /// is right in any case.
    pub fn precopy(&self, after: Option<u64>) -> Result<Option<LiveMemory>> {
        let mut control = self.control(Instant::now() + PAUSE_PATIENCE)?;
        let slots = self.memory().host_slots();
        if !self.is_running() || control.ending_rounds(after) {
            return Ok(None);
        }
        let private = private_pages()?;
        if private * PAGE_BYTES < WORTHWHILE_BYTES {
            return Ok(None);
        }
        control.track(&slots)?;
        let Some(pages) = control.next_round(limit_bytes(private))? else {
            return Ok(None);
        };
        Ok(Some(LiveMemory {
            memory: proc::open("self/mem").os("open the guest's memory")?,
            slots,
            pages,
            round: control.round,
        }))
    }
}

impl Control {
    /// From here on the kernel tells what is written, if it can.
    pub(super) fn track(&mut self, slots: &[HostSlot]) -> Result<()> {
        if self.tracker.is_none() {
            // All private pages are new to the first commit anyhow.
            self.tracker = Tracker::new(slots)?;
        }
        Ok(())
    }

    /// Forgets rounds that are not those of this commit. Returns whether it has asked to go
    /// on with one that is not the last: what it has read is of no use then.
    fn ending_rounds(&mut self, after: Option<u64>) -> bool {
        self.since_round.take_if(|since| Some(since.round) != after);
        after.is_some() && self.since_round.is_none()
    }

    /// What is to be read in another round, unless it is so little that it can be copied
    /// in the pause.
    fn next_round(&mut self, limit_bytes: u64) -> Result<Option<Vec<Range<u64>>>> {
        let unread = self.unread().to_vec();
        let Some(tracker) = &mut self.tracker else {
            return Ok(None);
        };
        let left = ranges::union(&unread, &tracker.look()?);
        if few_pages(tracker, &left, limit_bytes)?.is_some() {
            return Ok(None);
        }
        self.take()?;
        // After it was taken: what is not private yet is listed when it is written.
        let private = self.tracker.as_mut().map(Tracker::private).transpose()?;
        let pages = ranges::intersect(&private.unwrap_or_default(), self.unread());
        self.round += 1;
        self.since_round = Some(SinceRound {
            round: self.round,
            written: Vec::new(),
        });
        Ok(Some(pages))
    }

    /// What was taken that neither a commit nor a round has.
    fn unread(&self) -> &[Range<u64>] {
        match &self.since_round {
            Some(since) => &since.written,
            None => &self.uncommitted,
        }
    }

    /// Adds what was written to what no commit and no round has.
    pub(super) fn take(&mut self) -> Result<()> {
        let Some(tracker) = &mut self.tracker else {
            return Ok(());
        };
        let written = tracker.take()?;
        self.uncommitted = ranges::union(&self.uncommitted, &written);
        if let Some(since) = &mut self.since_round {
            since.written = ranges::union(&since.written, &written);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use vm_memory::{Bytes as _, GuestAddress};

    use super::*;
    use crate::memory::{GuestMemory, MemoryLayout};

    const PAGES: u64 = 4096;
    const SIZE: u64 = PAGES * PAGE_BYTES;

    fn memory() -> GuestMemory {
        GuestMemory::anonymous(MemoryLayout::new(SIZE).unwrap()).unwrap()
    }

    fn control(memory: &GuestMemory) -> Option<Control> {
        let mut control = Control::new(None);
        control.track(&memory.host_slots()).unwrap();
        if control.tracker.is_none() {
            // A test's thread has its name.
            let test = std::thread::current();
            println!(
                "SKIPPED {}: this kernel cannot track writes",
                test.name().unwrap_or("vmm")
            );
            return None;
        }
        Some(control)
    }

    fn write(memory: &GuestMemory, page: u64, value: u64) {
        let last = (page + 1) * PAGE_BYTES - 8;
        memory.ram().write_obj(value, GuestAddress(last)).unwrap();
    }

    /// Reads these pages of the memory, as it is now, into an image.
    fn read(memory: &GuestMemory, pages: &[Range<u64>], image: &mut [u8]) {
        for range in pages {
            let part = &mut image[range.start as usize..range.end as usize];
            let address = GuestAddress(range.start);
            memory.ram().read_slice(part, address).unwrap();
        }
    }

    /// A writer that never rests, and never writes the same twice.
    fn scribble(memory: &GuestMemory, over: &AtomicBool) {
        let mut state = 0x2545_f491_u64;
        for number in 1.. {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            write(memory, state % PAGES, number);
            if over.load(Ordering::Relaxed) {
                return;
            }
        }
    }

    /// Stops the writer, also when a test fails.
    struct Stop<'a>(&'a AtomicBool);

    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    #[test]
    fn what_rounds_and_the_freeze_read_is_the_memory_at_the_freeze() {
        let memory = memory();
        let Some(mut control) = control(&memory) else {
            return;
        };
        for page in 0..PAGES {
            write(&memory, page, page);
        }
        let over = AtomicBool::new(false);
        let mut image = vec![0; SIZE as usize];
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| scribble(&memory, &over));
            let stop = Stop(&over);
            let mut rounds = 0;
            while rounds < 20 {
                // None if the writer has not come to write since.
                let Some(pages) = control.next_round(0).unwrap() else {
                    std::thread::yield_now();
                    continue;
                };
                read(&memory, &pages, &mut image);
                rounds += 1;
            }
            drop(stop);
            writer.join().unwrap();
        });
        // The freeze.
        control.take().unwrap();
        read(&memory, control.unread(), &mut image);
        let mut now = vec![0; SIZE as usize];
        let whole = 0..SIZE;
        read(&memory, std::slice::from_ref(&whole), &mut now);
        let wrong = (0..PAGES as usize).filter(|page| {
            let at = page * PAGE_BYTES as usize;
            image[at..at + PAGE_BYTES as usize] != now[at..at + PAGE_BYTES as usize]
        });
        assert_eq!(wrong.count(), 0);
        assert_eq!(ranges::total_bytes(&control.uncommitted), SIZE);
    }

    #[test]
    fn a_round_that_is_not_the_last_is_of_no_use() {
        let memory = memory();
        let Some(mut control) = control(&memory) else {
            return;
        };
        (0..9).for_each(|page| write(&memory, page, 1));
        assert!(!control.ending_rounds(None));
        let first = control.next_round(0).unwrap().unwrap();
        assert_eq!(first, vec![0..9 * PAGE_BYTES]);
        write(&memory, 7, 2);
        assert!(!control.ending_rounds(Some(1)));
        let second = control.next_round(0).unwrap().unwrap();
        assert_eq!(second, vec![7 * PAGE_BYTES..8 * PAGE_BYTES]);
        // Another commit begins: it is told all that no commit has.
        assert!(!control.ending_rounds(None));
        let all = control.next_round(0).unwrap().unwrap();
        assert_eq!(all, first);
        assert!(control.ending_rounds(Some(2)));
        assert!(control.since_round.is_none());
    }

    #[test]
    fn little_is_left_to_the_pause() {
        let memory = memory();
        let Some(mut control) = control(&memory) else {
            return;
        };
        (0..100).for_each(|page| write(&memory, page, 1));
        let limit = 100 * PAGE_BYTES;
        assert!(control.next_round(limit).unwrap().is_none());
        assert!(control.next_round(limit - 1).unwrap().is_some());
        (50..60).for_each(|page| write(&memory, page, 2));
        assert!(control.next_round(10 * PAGE_BYTES).unwrap().is_none());
        assert!(control.next_round(10 * PAGE_BYTES - 1).unwrap().is_some());
    }
}
