//! Freezing: the state and memory of one instant, while the guest goes on.
//!
//! The guest is stopped only for: reading the state out of KVM, listing what was
//! written since the last commit, and fork(2). The child is the frozen memory.
//!
//! What was written is only forgotten once a commit of it is known to be
//! durable; a freeze whose commit failed leaves its pages to the next.

use std::ops::Range;
use std::time::{Duration, Instant};

use crate::devices::virtio::{Disk, FrozenDisk};
use crate::error::{Error, Result};
use crate::machine::{Control, Machine};
use crate::memory::{Frozen, FrozenFiles, Tracker, ranges};
use crate::state::MachineState;

/// One instant of a machine.
pub struct Freeze {
    /// Memory; the guest's later writes do not show. It ends with this.
    pub memory: Frozen,
    /// What the memory is read by.
    pub files: FrozenFiles,
    /// The disks in the order of their devices; the guest's later writes do not
    /// show.
    pub disks: Vec<FrozenDisk>,
    /// Everything else.
    pub state: MachineState,
    /// The image ranges (bytes) written since the last durable commit, a
    /// superset by pages that hold what they held; `None` if this kernel cannot
    /// tell, and then all private pages may have changed.
    pub changed: Option<Vec<Range<u64>>>,
    /// What it took.
    pub timings: FreezeTimings,
    /// Which of the machine's freezes this is.
    number: u64,
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
    /// fork(2).
    pub fork: Duration,
}

/// What is taken while the guest stands still.
type Instantly = (
    Frozen,
    Vec<FrozenDisk>,
    MachineState,
    Option<Vec<Range<u64>>>,
    FreezeTimings,
);

impl Machine {
    /// Freezes the machine at this instant. A running guest goes on; a paused
    /// one stays paused.
    ///
    /// # Errors
    /// The machine has ended, a disk is written in place, or KVM or the operating
    /// system refuses; the guest then goes on as before.
    pub fn freeze(&self) -> Result<Freeze> {
        if let Some(disk) = self.disks().into_iter().find(|disk| !disk.can_freeze()) {
            return Err(Error::DiskInPlace {
                name: disk.name().to_owned(),
            });
        }
        let mut control = self.control();
        if control.tracker.is_none() {
            // All private pages are of the first freeze anyhow.
            control.tracker = Tracker::new(&self.memory().host_slots())?;
        }
        if let Some(tracker) = &mut control.tracker {
            tracker.prepare();
        }
        let was_running = self.is_running();
        let began = Instant::now();
        self.close_gate()?;
        let stopped = Instant::now();
        let frozen = self.freeze_paused(&mut control);
        if was_running {
            self.open_gate()?;
        }
        let pause = began.elapsed();
        let (memory, disks, state, changed, mut timings) = frozen?;
        let number = control.freezes;
        timings.pause = pause;
        timings.stop = stopped - began;
        Ok(Freeze {
            files: memory.open()?,
            memory,
            disks,
            state,
            changed,
            timings,
            number,
        })
    }

    fn freeze_paused(&self, control: &mut Control) -> Result<Instantly> {
        let began = Instant::now();
        let state = self.save_paused()?;
        let saved = Instant::now();
        if let Some(tracker) = &mut control.tracker {
            let written = tracker.take()?;
            control.uncommitted = ranges::union(&control.uncommitted, &written);
        }
        let disks = self.shared.devices.freeze_disks()?;
        let listed = Instant::now();
        let memory = Frozen::fork(self.memory().host_slots())?;
        control.freezes += 1;
        let changed = control
            .tracker
            .is_some()
            .then(|| control.uncommitted.clone());
        let timings = FreezeTimings {
            save: saved - began,
            list: listed - saved,
            fork: listed.elapsed(),
            ..FreezeTimings::default()
        };
        Ok((memory, disks, state, changed, timings))
    }

    /// A commit of this freeze is durable: its pages are no longer listed, unless
    /// the machine was frozen again since; then they stay listed, which costs the
    /// next commit time but loses nothing. What it listed of disks is not listed
    /// again in either case.
    pub fn committed(&self, freeze: &Freeze) {
        let mut control = self.control();
        if control.freezes == freeze.number {
            control.uncommitted.clear();
        }
        for (disk, frozen) in self.disks().iter().zip(&freeze.disks) {
            disk.committed(frozen);
        }
    }

    /// The disks, in the order of their devices.
    #[must_use]
    pub fn disks(&self) -> Vec<Disk> {
        self.shared.devices.disks()
    }
}
