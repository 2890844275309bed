//! Machines from a snapshot: what they are made of, and what keeps it.

use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::bail;
use snapstore_store::{NotPinned, SnapshotId, Store};
use snapstore_vmm::control::Origin;

use crate::build::{MachineSource, Overlays};
use crate::common;
use crate::error::Usage;
use crate::monitors::DESCRIPTION;
use crate::mount_server::{Reading, RemoteReading};
use crate::mounts::{self, Shown};
use crate::networks::{self, NetSpec};
use crate::runtime::{Reservation, Runtime};
use crate::snapshot_files::SnapshotFiles;
use crate::spec::Spec;
use crate::start::free_names;
use crate::starter::Starter;

/// What is to be restored.
pub struct RestoreRequest<'a> {
    /// A tag, the beginning of a snapshot id, or a tag of a remote.
    pub snapshot: &'a str,
    /// What a tag of a remote names, if it is one, and how that is read.
    pub elsewhere: Option<(SnapshotId, RemoteReading)>,
    /// What to call the machine; several get numbers. The tag without it.
    pub name: Option<&'a str>,
    /// How many machines.
    pub count: usize,
    /// The taps of the snapshot's network interfaces, in their order.
    pub nets: &'a [NetSpec],
    /// Where what guests write to their disks is kept.
    pub overlays: Overlays,
    /// Whether the machines' processes are forked and not executed.
    pub share_layout: bool,
    /// Whether pages that are likely to be touched are read before they are, if the
    /// snapshot has to be mounted.
    pub prefetch: bool,
    /// Whether memory that is equal to that of other snapshots' machines is mapped from their
    /// mount.
    pub common: bool,
}

/// Machines that can be started: with [`start`](crate::start::start), as long as this lives.
pub struct Restoration {
    /// What to start. The machines run at once, unless it is changed.
    pub spec: Spec,
    /// What the machines inherit: a pin of the snapshot, and a lock that keeps its mount.
    pub kept: Vec<OwnedFd>,
    /// Why the snapshot may be collected under the machines, if it may.
    pub not_pinned: Option<NotPinned>,
    /// The names, until the machines hold them themselves.
    pub reserved: Vec<Reservation>,
}

/// Pins the snapshot, takes names, and mounts it unless it is mounted. Who will start the
/// machines looks at mounts meanwhile.
pub fn prepare(
    runtime: &Runtime,
    store: &Store,
    starter: &mut Starter,
    request: RestoreRequest<'_>,
) -> anyhow::Result<Restoration> {
    let snapshot = request.snapshot;
    // Held by the machines: their next commits are made from this snapshot.
    let (shown, pin) = match &request.elsewhere {
        None => {
            let (id, pin) = store.pin(snapshot)?;
            (Shown::here(id), Some(pin))
        }
        // Its mount keeps it.
        Some((id, reading)) => {
            let elsewhere = Some((snapshot, reading));
            (Shown { id: *id, elsewhere }, None)
        }
    };
    let id = shown.id;
    let not_pinned = pin.as_ref().and_then(snapstore_store::Pin::not_pinned);
    // Of a remote's tag what is behind the remote's name.
    let tag = snapshot.rsplit('/').next().unwrap_or(snapshot);
    let base = request.name.unwrap_or(tag);
    let (names, reserved) = free_names(runtime, base, request.name.is_some(), request.count)?;
    let nets = networks::of_machines(request.nets, &names)?;
    let common = (request.common && request.elsewhere.is_none())
        .then(|| common::find(runtime, store, id, starter))
        .flatten();
    let (common, common_lock) = common.unzip();
    let reading = Reading {
        ahead: request.prefetch,
        part: common.as_ref().map(|common| common.differs.clone()),
    };
    let mounted = mounts::find_or_start(runtime, store, &shown, reading, Some(starter))?;
    check_restorable(snapshot, &mounted.dir, &id.to_string())?;
    let mut kept: Vec<OwnedFd> = pin.map(snapstore_store::Pin::into_fd).into_iter().collect();
    kept.extend(
        mounted
            .users_lock
            .into_iter()
            .chain(common_lock)
            .map(OwnedFd::from),
    );
    Ok(Restoration {
        spec: Spec {
            overlays: request.overlays,
            names,
            what: MachineSource::Restore {
                dir: mounted.dir,
                snapshot: id.to_string(),
                common,
                holes: None,
            },
            nets,
            origin: Origin {
                snapshot: Some(id.to_string()),
                tag: Some(snapshot.to_owned()),
            },
            run: true,
            run_on_word: false,
            kept: Vec::new(),
            confine: true,
            require_reseed: false,
            share_layout: request.share_layout,
            stop_at_ready: false,
        },
        kept,
        not_pinned,
        reserved,
    })
}

/// Looks at the mounted files: the store's index need not be opened for it.
fn check_restorable(name: &str, dir: &Path, id: &str) -> anyhow::Result<()> {
    let files = SnapshotFiles::hold(dir, id)?;
    if files.has(DESCRIPTION) {
        bail!(Usage(format!(
            "{name} was committed from another monitor, whose state only that can load; restore \
             it with --with (`snapstore show {name}` tells which one it is)"
        )));
    }
    for needed in ["memory.bin", "vmstate"] {
        if !files.has(needed) {
            bail!(
                "{name} has no {needed}: it was not committed from a running machine \
                 (`snapstore commit TAG --vm NAME`); `snapstore show {name}` lists what it has"
            );
        }
    }
    Ok(())
}
