//! Commits of running machines.
//!
//! The machine freezes a copy of itself and goes on; this process reads from the
//! copy what changed, and commits it onto the snapshot that the machine was made
//! from or last committed as. Only once that is durable does the machine hear of
//! it: if this process ends before, the machine's next commit holds it all.

mod disks;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, bail};
use snapstore_store::{
    CommitRequest, Committed, Extent, ImageRole, Input, InputData, InputKind, ParentChoice,
    Progress, SnapshotId, Store,
};
use snapstore_vmm::control::{CommitReport, FrozenMachine, Seconds};

use crate::error::NotFound;
use crate::runtime::VmDir;

/// What a machine is to be committed as.
pub struct Wanted {
    /// The tag to create.
    pub tag: String,
    /// Whether a tag that exists is moved.
    pub replace: bool,
    /// The labels of the snapshot.
    pub labels: BTreeMap<String, String>,
}

/// A commit of a machine, and what it took.
pub struct Done {
    /// The snapshot.
    pub committed: Committed,
    /// How long its parts took.
    pub timings: Seconds,
    /// What was read of the machine's memory.
    pub read_bytes: u64,
}

/// Commits a running machine.
pub fn commit(
    store: &Store,
    vm: &VmDir,
    wanted: &Wanted,
    progress: &dyn Progress,
) -> anyhow::Result<Done> {
    let began = Instant::now();
    // Before the machine is disturbed.
    store.check_tag_free(&wanted.tag, wanted.replace)?;
    let frozen = vm.connect()?.freeze()?;
    let request = request(wanted, &frozen)?;
    let read_bytes = frozen.written().iter().map(|r| r.end - r.start).sum();
    check_origin(store, &vm.name, &request)?;
    let mut committed = store.commit(&request, progress)?;
    let mut timings = frozen.timings().clone();
    timings.extend(stages(&committed));
    timings.insert("total".to_owned(), began.elapsed().as_secs_f64());
    let report = CommitReport {
        snapshot: committed.id.to_string(),
        tag: wanted.tag.clone(),
        timings: timings.clone(),
    };
    let pin = committed.pin.take().map(snapstore_store::Pin::into_fd);
    frozen.committed(report, pin).with_context(|| {
        format!(
            "{} is committed, but the machine {} could not be told; \
             its next commit will hold the same changes again",
            wanted.tag, vm.name
        )
    })?;
    Ok(Done {
        committed,
        timings,
        read_bytes,
    })
}

/// A machine can only be committed to the store that holds what it was made from.
fn check_origin(store: &Store, name: &str, request: &CommitRequest) -> anyhow::Result<()> {
    let ParentChoice::Pinned(id) = request.parent else {
        return Ok(());
    };
    if !store.has_snapshot(id)? {
        bail!(NotFound(format!(
            "{} does not hold snapshot {}, which {name} was made from; \
             name the store that does with --store",
            store.path().display(),
            id.short()
        )));
    }
    Ok(())
}

fn request(wanted: &Wanted, frozen: &FrozenMachine) -> anyhow::Result<CommitRequest> {
    let (parent, kind) = match &frozen.origin().snapshot {
        Some(id) => {
            let id = SnapshotId::from_hex(id).context("the machine names no snapshot id")?;
            (ParentChoice::Pinned(id), InputKind::Diff)
        }
        None => (ParentChoice::Nothing, InputKind::Full),
    };
    let memory = Input {
        name: "memory".to_owned(),
        role: ImageRole::Memory,
        data: InputData::Extents {
            files: vec![Arc::new(frozen.memory().try_clone()?)],
            label: "the machine's frozen memory".to_owned(),
            size_bytes: frozen.size_bytes(),
            extents: extents(frozen)?,
        },
        kind,
    };
    let state = Input {
        name: "vmstate".to_owned(),
        role: ImageRole::File,
        data: InputData::Bytes(frozen.state().into()),
        kind: InputKind::Full,
    };
    let mut inputs = vec![memory, state];
    let mut unchanging = Vec::new();
    for disk in frozen.disks() {
        unchanging.push(disks::unchanging(disk)?);
        inputs.push(disks::input(disk, kind)?);
    }
    Ok(CommitRequest {
        tag: wanted.tag.clone(),
        replace: wanted.replace,
        parent,
        inputs,
        labels: wanted.labels.clone(),
        keep: true,
        unchanging,
        ..CommitRequest::default()
    })
}

/// Where in the frozen process the written ranges are. A range lies in one slot
/// or goes over from one to the next.
fn extents(frozen: &FrozenMachine) -> anyhow::Result<Vec<Extent>> {
    let mut extents = Vec::new();
    for range in frozen.written() {
        let mut at = range.start;
        while at < range.end {
            let slot = frozen
                .slots()
                .iter()
                .find(|slot| (slot.image_offset..slot.image_offset + slot.length).contains(&at));
            let Some(slot) = slot else {
                bail!("the machine changed memory that it does not have");
            };
            let end = range.end.min(slot.image_offset + slot.length);
            extents.push(Extent {
                image_offset: at,
                file: 0,
                file_offset: slot.host_address + (at - slot.image_offset),
                length: end - at,
            });
            at = end;
        }
    }
    Ok(extents)
}

fn stages(committed: &Committed) -> Seconds {
    let timings = &committed.timings;
    [
        ("prepare", timings.prepare),
        ("hash_and_write", timings.pages),
        ("seal", timings.seal),
        ("publish", timings.publish),
    ]
    .into_iter()
    .map(|(name, duration)| (name.to_owned(), duration.as_secs_f64()))
    .collect()
}
