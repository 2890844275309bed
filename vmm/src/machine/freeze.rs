//! Freezing: the state and memory of one instant, while the guest goes on.
//!
//! The guest is stopped only for: reading the state out of KVM, listing what was
//! written since the last commit, and keeping that: by fork(2), whose child is then
//! the frozen memory, or by a copy of those pages where they are few.
//!
//! Before that, memory can be read while the guest runs (`precopy`); then only what was
//! written again is left for the pause.
//!
//! What was written is only forgotten once a commit of it is known to be
//! durable; a freeze whose commit failed leaves its pages to the next.

use std::fs::File;
use std::ops::Range;
use std::time::{Duration, Instant};

use crate::devices::virtio::{Disk, FrozenDisk};
use crate::error::{Error, Result};
use crate::machine::{Control, Machine, PAUSE_PATIENCE};
use crate::memory::{
    CopyRoom, Frozen, FrozenFiles, HostSlot, PageCopy, ScanMethod, Tracker, private_ranges, ranges,
};
use crate::state::MachineState;

/// One instant of a machine.
pub struct Freeze {
    /// Memory; the guest's later writes do not show. It ends with this.
    pub memory: FrozenMemory,
    /// The disks in the order of their devices; the guest's later writes do not
    /// show.
    pub disks: Vec<FrozenDisk>,
    /// Everything else.
    pub state: MachineState,
    /// The image ranges (bytes) written since the last durable commit, or since the
    /// round [`Freeze::after`], a superset by pages that hold what they held; `None` if
    /// this kernel cannot tell, and then all private pages may have changed.
    pub changed: Option<Vec<Range<u64>>>,
    /// The round of [`Machine::precopy`] after which the list begins; `None` if it
    /// begins after the last durable commit.
    pub after: Option<u64>,
    /// What it took.
    pub timings: FreezeTimings,
    /// Which of the machine's freezes this is.
    number: u64,
}

impl Freeze {
    /// What may differ from the last durable commit: image ranges in bytes. Of a fork
    /// the process is asked, which takes a while.
    ///
    /// # Errors
    /// [`Error::MemoryGone`], or the kernel refuses.
    pub fn written(&self) -> Result<Vec<Range<u64>>> {
        let Some((_, pagemap)) = self.memory.process() else {
            return Ok(self.changed.clone().unwrap_or_default());
        };
        let slots = self.memory.slots();
        let private = private_ranges(pagemap, slots, ScanMethod::Automatic)?;
        Ok(match &self.changed {
            Some(changed) => ranges::intersect(&private, changed),
            None => private,
        })
    }
}

/// How long a freeze took, by stage.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct FreezeTimings {
    /// The guest stood still this long: all of the others.
    pub pause: Duration,
    /// Until every vCPU was out of the guest.
    pub stop: Duration,
    /// Reading the state out of KVM.
    pub save: Duration,
    /// Listing what was written, and freezing the disks.
    pub list: Duration,
    /// fork(2), or zero.
    pub fork: Duration,
    /// Copying what was written, or zero.
    pub copy: Duration,
}

/// Guest memory of one instant.
#[derive(Debug)]
pub enum FrozenMemory {
    /// All of it, in a process of its own.
    Forked(Frozen, FrozenFiles),
    /// Of it what was written since the last durable commit.
    Copied(PageCopy),
}

impl FrozenMemory {
    /// What it is read by; its positions are the host addresses of the slots.
    #[must_use]
    pub fn file(&self) -> &File {
        match self {
            Self::Forked(_, files) => &files.memory,
            Self::Copied(copy) => copy.file(),
        }
    }

    /// Where guest memory lies in the file.
    #[must_use]
    pub fn slots(&self) -> &[HostSlot] {
        match self {
            Self::Forked(process, _) => process.slots(),
            Self::Copied(copy) => copy.slots(),
        }
    }

    /// The process that has it, with its `/proc/PID/pagemap` open.
    #[must_use]
    pub fn process(&self) -> Option<(i32, &File)> {
        match self {
            Self::Forked(process, files) => Some((process.pid(), &files.pagemap)),
            Self::Copied(_) => None,
        }
    }
}

/// Guest memory of one instant, before its files are opened.
enum Kept {
    Forked(Frozen),
    Copied(PageCopy),
}

/// What is taken while the guest stands still.
type Instantly = (
    Kept,
    Vec<FrozenDisk>,
    MachineState,
    Option<Vec<Range<u64>>>,
    Option<u64>,
    FreezeTimings,
);

/// How a machine is to be frozen.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FreezeOptions {
    /// The last round of [`Machine::precopy`] of this commit, which has read what that
    /// listed. What is frozen may begin after the last commit nevertheless
    /// ([`Freeze::after`]).
    pub after: Option<u64>,
    /// All of the memory is frozen, by fork(2), however little was written.
    pub whole: bool,
}

impl Machine {
    /// Freezes the machine at this instant. A running guest goes on; a paused
    /// one stays paused.
    ///
    /// # Errors
    /// The machine has ended, it does not stop in time, the host has failed one of its
    /// devices, a disk is written in place, or KVM or the operating system refuses; the
    /// guest then goes on as before.
    pub fn freeze(&self) -> Result<Freeze> {
        self.freeze_with(FreezeOptions::default())
    }

    /// [`Machine::freeze`], after memory was read while the guest ran, or of all memory.
    ///
    /// # Errors
    /// As there.
    pub fn freeze_with(&self, options: FreezeOptions) -> Result<Freeze> {
        if let Some(disk) = self.disks().into_iter().find(|disk| !disk.can_freeze()) {
            return Err(Error::DiskInPlace {
                name: disk.name().to_owned(),
            });
        }
        let mut control = self.control(Instant::now() + PAUSE_PATIENCE)?;
        control.track(&self.memory().host_slots())?;
        control
            .since_round
            .take_if(|since| Some(since.round) != options.after);
        let all_is_new = control.freezes == 0 && control.since_round.is_none();
        let mut room = None;
        if let Some(tracker) = &mut control.tracker {
            tracker.prepare();
            if !all_is_new && !options.whole {
                room = Some(CopyRoom::new(self.memory())?);
            }
        }
        let began = Instant::now();
        let was_running = self.stop_vcpus(began + PAUSE_PATIENCE)?;
        let stopped = Instant::now();
        let frozen = self.freeze_paused(&mut control, room);
        self.let_run_again(&mut control, was_running)?;
        // A vCPU may have taken this thread's processor: then the pause was over before.
        let entered = self.shared.run_control.entered_after(stopped);
        let pause = entered.unwrap_or_else(Instant::now) - began;
        let (memory, disks, state, changed, after, mut timings) = frozen?;
        let number = control.freezes;
        timings.pause = pause;
        timings.stop = stopped - began;
        let memory = match memory {
            Kept::Forked(process) => {
                let files = process.open()?;
                FrozenMemory::Forked(process, files)
            }
            Kept::Copied(copy) => FrozenMemory::Copied(copy),
        };
        Ok(Freeze {
            memory,
            disks,
            state,
            changed,
            after,
            timings,
            number,
        })
    }

    fn freeze_paused(&self, control: &mut Control, room: Option<CopyRoom>) -> Result<Instantly> {
        let began = Instant::now();
        let state = self.save_paused(control)?;
        let saved = Instant::now();
        control.take_written()?;
        let disks = self.shared.devices.freeze_disks()?;
        // What was read in rounds is read once: a commit that fails begins anew.
        let since_round = control.since_round.take();
        let after = since_round.as_ref().map(|since| since.round);
        let written = since_round.map_or_else(|| control.uncommitted.clone(), |s| s.written);
        let few = match (&mut control.tracker, &room) {
            (Some(tracker), Some(room)) => few_pages(tracker, &written, room.limit_bytes())?,
            _ => None,
        };
        let listed = Instant::now();
        let copy = few.zip(room).and_then(|(pages, room)| {
            // Without memory for a copy there may still be some for a fork.
            let copied = room.copy(self.memory(), pages);
            copied
                .inspect_err(|error| tracing::warn!(%error, "forking instead"))
                .ok()
        });
        let copied = Instant::now();
        let memory = match copy {
            Some(copy) => Kept::Copied(copy),
            None => Kept::Forked(Frozen::fork(self.memory().host_slots())?),
        };
        let changed = match &memory {
            Kept::Copied(copy) => Some(copy.pages().to_vec()),
            Kept::Forked(_) => control.tracker.is_some().then_some(written),
        };
        let timings = FreezeTimings {
            save: saved - began,
            list: listed - saved,
            copy: copied - listed,
            fork: copied.elapsed(),
            ..FreezeTimings::default()
        };
        Ok((memory, disks, state, changed, after, timings))
    }

    /// A commit of this freeze is durable: its pages are no longer listed, unless
    /// the machine was frozen again since; then they stay listed, which costs the
    /// next commit time but loses nothing. What it listed of disks is not listed
    /// again in either case.
    pub fn committed(&self, freeze: Freeze) {
        let disks: Vec<u64> = freeze.disks.iter().map(FrozenDisk::number).collect();
        let number = freeze.number;
        // So that the disks' maps can be merged where they are.
        drop(freeze);
        let mut control = crate::machine::lock(&self.control);
        control.forget(number);
        for (disk, number) in self.disks().iter().zip(disks) {
            disk.committed(number);
        }
    }

    /// The disks, in the order of their devices.
    #[must_use]
    pub fn disks(&self) -> Vec<Disk> {
        self.shared.devices.disks()
    }
}

impl Control {
    /// Counts a freeze, and adds what was written to what no commit has.
    fn take_written(&mut self) -> Result<()> {
        // Before anything is taken: what a freeze that fails has taken is not of the
        // one before it.
        self.freezes += 1;
        self.take()
    }

    /// What was taken until this freeze is in a commit, if it is the last one.
    fn forget(&mut self, freeze: u64) {
        if self.freezes == freeze {
            self.uncommitted.clear();
        }
    }
}

/// The kernel is asked for one piece at a time, in about a microsecond; what lies between
/// pieces is looked through in less.
const MANY_PIECES: usize = 2048;

/// The pages of a list that are not only read, if they are no more than may be copied.
pub(super) fn few_pages(
    tracker: &mut Tracker,
    listed: &[Range<u64>],
    limit_bytes: u64,
) -> Result<Option<Vec<Range<u64>>>> {
    // What was only read is listed, too; looking through much of it takes too long.
    if ranges::total_bytes(listed) > 4 * limit_bytes {
        return Ok(None);
    }
    let private = tracker.private_of(&ranges::fewer(listed, MANY_PIECES))?;
    let pages = ranges::intersect(&private, listed);
    Ok((ranges::total_bytes(&pages) <= limit_bytes).then_some(pages))
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes as _, GuestAddress};

    use super::*;
    use crate::memory::{GuestMemory, MemoryLayout};

    const PAGE: u64 = 4096;

    fn memory() -> GuestMemory {
        GuestMemory::anonymous(MemoryLayout::new(16 << 20).unwrap()).unwrap()
    }

    fn tracker(memory: &GuestMemory) -> Option<Tracker> {
        let tracker = Tracker::new(&memory.host_slots()).unwrap();
        if tracker.is_none() {
            // A test's thread has its name.
            let test = std::thread::current();
            println!(
                "SKIPPED {}: this kernel cannot track writes",
                test.name().unwrap_or("vmm")
            );
        }
        tracker
    }

    #[test]
    fn a_commit_does_not_forget_what_a_later_freeze_that_failed_has_taken() {
        let memory = memory();
        let Some(tracker) = tracker(&memory) else {
            return;
        };
        let mut control = Control::new(None);
        control.tracker = Some(tracker);
        control.take_written().unwrap();
        let first = control.freezes;
        let written = 5 * PAGE..6 * PAGE;
        memory
            .ram()
            .write_obj(1_u8, GuestAddress(written.start))
            .unwrap();
        // This one ends here.
        control.take_written().unwrap();
        control.forget(first);
        assert_eq!(control.uncommitted, [written]);
        control.take_written().unwrap();
        control.forget(control.freezes);
        assert!(control.uncommitted.is_empty());
    }

    #[test]
    fn only_listed_pages_are_copied_however_many_pieces_they_are() {
        let layout = MemoryLayout::new(64 << 20).unwrap();
        let memory = GuestMemory::anonymous(layout).unwrap();
        let Some(mut tracker) = tracker(&memory) else {
            return;
        };
        let pieces = |count| -> Vec<_> {
            let starts = (0..count).map(|piece| piece * 2 * PAGE);
            starts.map(|start| start..start + PAGE).collect()
        };
        let limit = 64 << 20;
        let many = pieces(2 * MANY_PIECES as u64);
        let few = few_pages(&mut tracker, &many, limit).unwrap();
        assert_eq!(few, Some(Vec::new()), "nothing was written");
        for page in 0..4 * MANY_PIECES as u64 {
            let address = GuestAddress(page * PAGE);
            memory.ram().write_obj(1_u8, address).unwrap();
        }
        let few = few_pages(&mut tracker, &many, limit).unwrap();
        assert_eq!(few, Some(many.clone()));
        let limit = ranges::total_bytes(&many) - 1;
        assert_eq!(few_pages(&mut tracker, &many, limit).unwrap(), None);
        let long = 0..4 * limit + PAGE;
        let looked = few_pages(&mut tracker, std::slice::from_ref(&long), limit);
        assert_eq!(looked.unwrap(), None);
    }
}
