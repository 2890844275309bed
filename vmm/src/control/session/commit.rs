//! A client that commits the machine: what it may read while the guest runs, what it froze,
//! and that it is still there.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use crate::control::error_kind::ErrorKind;
use crate::control::frozen_wire::{FrozenDisk, FrozenRecord, LiveMemory};
use crate::control::protocol::{CommitReport, Origin, Reply, seconds};
use crate::control::session::{Session, failure, invalid};
use crate::control::wire::Connection;
use crate::error::{Error, Result};
use crate::machine::{Freeze, FreezeOptions};

/// How long a client that has frozen the machine may say nothing: it says that it is
/// alive more often than that, and one that was stopped does not.
const COMMIT_PATIENCE: Duration = Duration::from_secs(60);

impl Session<'_> {
    /// Makes this client the one that commits. If another does, what it hears.
    fn begin_commit(&mut self) -> Option<Reply> {
        if self.commits {
            return None;
        }
        let peer = self.connection.as_ref().and_then(Connection::peer_pid);
        let mut record = self.vm.record();
        if let Some(pid) = record.committer {
            return Some(Reply::Error {
                kind: ErrorKind::Busy,
                message: format!("process {pid} is committing this machine; try again later"),
            });
        }
        record.committer = Some(peer.unwrap_or(0));
        drop(record);
        self.commits = true;
        self.set_patience(Some(COMMIT_PATIENCE));
        None
    }

    fn end_commit(&mut self) {
        if std::mem::take(&mut self.commits) {
            self.vm.record().committer = None;
            self.set_patience(None);
        }
    }

    pub(super) fn precopy(&mut self, after: Option<u64>) -> (Reply, Vec<OwnedFd>) {
        if self.freeze.is_some() {
            return (invalid("this connection has frozen already"), Vec::new());
        }
        if let Some(busy) = self.begin_commit() {
            return (busy, Vec::new());
        }
        self.live(after).unwrap_or_else(|error| {
            self.end_commit();
            (failure(&error), Vec::new())
        })
    }

    fn live(&self, after: Option<u64>) -> Result<(Reply, Vec<OwnedFd>)> {
        let Some(live) = self.vm.machine.precopy(after)? else {
            return Ok((Reply::Done, Vec::new()));
        };
        let (slots, round) = (live.slots, live.round);
        let record = LiveMemory {
            memory: live.memory,
            slots,
            written: live.pages,
            origin: self.vm.record().origin.clone(),
        };
        record.encode(round).map_err(|source| Error::Os {
            action: "hand over what was written",
            source,
        })
    }

    pub(super) fn freeze(&mut self, options: FreezeOptions) -> (Reply, Vec<OwnedFd>) {
        if self.freeze.is_some() {
            return (invalid("this connection has frozen already"), Vec::new());
        }
        if let Some(busy) = self.begin_commit() {
            return (busy, Vec::new());
        }
        self.frozen(options).unwrap_or_else(|error| {
            self.thaw();
            (failure(&error), Vec::new())
        })
    }

    fn frozen(&mut self, options: FreezeOptions) -> Result<(Reply, Vec<OwnedFd>)> {
        let freeze = self.vm.machine.freeze_with(options)?;
        {
            let totals = &mut self.vm.record().totals;
            totals.freezes += 1;
            totals.freeze_pause_seconds += freeze.timings.pause.as_secs_f64();
        }
        let record = frozen_record(&freeze, self.vm.record().origin.clone());
        let sent = record
            .and_then(FrozenRecord::encode)
            .map_err(|source| Error::Os {
                action: "hand over the frozen copy",
                source,
            })?;
        self.freeze = Some(freeze);
        Ok(sent)
    }

    pub(super) fn committed(&mut self, report: CommitReport) -> Reply {
        let Some(freeze) = self.freeze.take() else {
            return self.nothing_frozen();
        };
        let fd = self.connection.as_mut().and_then(Connection::take_fd);
        {
            let mut record = self.vm.record();
            record.origin = Origin {
                snapshot: Some(report.snapshot.clone()),
                tag: Some(report.tag.clone()),
            };
            record.last_commit = Some(report);
            record.totals.commits += 1;
            record.pin = fd;
        }
        // Before the copy goes, so that whoever sees that it is gone can commit: at
        // worst that lists again what this one has committed.
        self.end_commit();
        self.vm.machine.committed(freeze);
        Reply::Done
    }

    pub(super) fn nothing_frozen(&self) -> Reply {
        if !self.gave_up {
            return invalid("this connection has frozen nothing");
        }
        invalid(
            "the frozen copy has been given up, since its client said nothing for a minute; \
             commit the machine again",
        )
    }

    fn set_patience(&self, patience: Option<Duration>) {
        if let Some(connection) = &self.connection
            && let Err(error) = connection.set_patience(patience)
        {
            tracing::debug!(%error, "a client is waited for without end");
        }
    }

    /// The client has been stopped, or hangs: others may commit. Its copy of the memory
    /// ends, and reading it fails. Of disks what it may still read is kept, since a
    /// commit of anything else would be wrong.
    pub(super) fn give_up_freeze(&mut self) {
        self.end_commit();
        self.gave_up = true;
        if let Some(freeze) = self.freeze.take() {
            let Freeze { memory, disks, .. } = freeze;
            self.lost = disks;
            drop(memory);
        }
    }

    /// Ends the frozen copy, if this client has one.
    pub(super) fn thaw(&mut self) {
        // First, so that whoever sees that the copy is gone can commit.
        self.end_commit();
        self.freeze = None;
    }
}

fn frozen_record(freeze: &Freeze, origin: Origin) -> io::Result<FrozenRecord> {
    let process = match freeze.memory.process() {
        Some((pid, pagemap)) => Some((pid, pagemap.try_clone()?)),
        None => None,
    };
    let mut disks = Vec::new();
    for disk in &freeze.disks {
        disks.push(FrozenDisk {
            name: disk.name().to_owned(),
            size_bytes: disk.size_bytes(),
            base: disk.base().try_clone()?,
            base_modified: disk.base_modified(),
            overlay: disk.overlay().map(File::try_clone).transpose()?,
            extents: match origin.snapshot {
                Some(_) => disk.changed(),
                None => disk.overlaid(),
            },
        });
    }
    let timings = &freeze.timings;
    Ok(FrozenRecord {
        memory: freeze.memory.file().try_clone()?,
        process,
        slots: freeze.memory.slots().to_vec(),
        state: freeze.state.encode(),
        changed: freeze.changed.clone(),
        after: freeze.after,
        disks,
        origin,
        timings: seconds([
            ("pause", timings.pause),
            ("stop", timings.stop),
            ("state_save", timings.save),
            ("list", timings.list),
            ("copy", timings.copy),
            ("fork", timings.fork),
        ]),
    })
}
