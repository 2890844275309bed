//! A machine at one instant, as its committer has it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};

use crate::control::client::{Client, lock};
use crate::control::frozen_wire::FrozenDisk;
use crate::control::protocol::{CommitReport, Origin, Reply, Request, Seconds};
use crate::error::Result;
use crate::memory::HostSlot;

/// A machine at one instant, to be committed by this process. The frozen copy
/// ends with it.
pub struct FrozenMachine {
    pub(super) client: Arc<Mutex<Client>>,
    /// Ends the thread that says that this is alive.
    pub(super) _alive: Sender<()>,
    pub(super) memory: File,
    pub(super) slots: Vec<HostSlot>,
    pub(super) state: Vec<u8>,
    pub(super) disks: Vec<FrozenDisk>,
    pub(super) written: Vec<Range<u64>>,
    pub(super) after_rounds: bool,
    pub(super) origin: Origin,
    pub(super) timings: Seconds,
}

impl FrozenMachine {
    /// Whether what was written is what was written since the last round of
    /// [`crate::control::Committer::next_round`]; else it is since the last commit, and what the rounds
    /// have read is of no use.
    #[must_use]
    pub fn after_rounds(&self) -> bool {
        self.after_rounds
    }

    /// The frozen memory, to be read at the slots' host addresses. If what was written was
    /// copied it holds nothing else.
    #[must_use]
    pub fn memory(&self) -> &File {
        &self.memory
    }

    /// Where guest memory lies in it.
    #[must_use]
    pub fn slots(&self) -> &[HostSlot] {
        &self.slots
    }

    /// The guest's memory in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.slots.iter().map(|slot| slot.length).sum()
    }

    /// The encoded machine state.
    #[must_use]
    pub fn state(&self) -> &[u8] {
        &self.state
    }

    /// The disks.
    #[must_use]
    pub fn disks(&self) -> &[FrozenDisk] {
        &self.disks
    }

    /// What may differ from the origin: image ranges in bytes.
    #[must_use]
    pub fn written(&self) -> &[Range<u64>] {
        &self.written
    }

    /// The snapshot that the rest of the memory is of; without one it is zero.
    #[must_use]
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Stages so far, and their seconds.
    #[must_use]
    pub fn timings(&self) -> &Seconds {
        &self.timings
    }

    /// Fills `out` with guest memory from image offset `offset` on; both are
    /// whole pages, and of what was written.
    ///
    /// # Errors
    /// The frozen copy is gone, or the range is not in the image.
    pub fn read_exact_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        let slot = self
            .slots
            .iter()
            .find(|slot| (slot.image_offset..slot.image_offset + slot.length).contains(&offset))
            .ok_or(io::ErrorKind::InvalidInput)?;
        self.memory
            .read_exact_at(out, slot.host_address + (offset - slot.image_offset))
    }

    /// Tells the machine that all this is durable; `pin` keeps the snapshot for
    /// it. The frozen copy ends.
    ///
    /// # Errors
    /// As [`Client::request`]: the machine then takes its older snapshot for its
    /// origin and will commit the same pages once more.
    pub fn committed(self, report: CommitReport, pin: Option<OwnedFd>) -> Result<()> {
        let fds: Vec<_> = pin.iter().map(|fd| fd.as_fd()).collect();
        let mut client = lock(&self.client);
        match client.request_with(&Request::Committed(report), &fds)? {
            Reply::Done => Ok(()),
            _ => Client::unexpected(),
        }
    }
}
