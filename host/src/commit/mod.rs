//! Commits of running machines.
//!
//! This process reads what changed while the guest runs, where that is much. Then the
//! machine freezes a copy of itself and goes on; of the copy is read what has changed
//! since. All of it is committed onto the snapshot that the machine was made
//! from or last committed as. Only once that is durable does the machine hear of
//! it: if this process ends before, the machine's next commit holds it all.

mod check;
mod disks;
mod precopy;

pub(crate) use disks::data_ranges;
pub(crate) use precopy::extents;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use snapstore_store::{
    CommitRequest, Committed, ImageRole, Input, InputData, InputKind, ParentChoice, Progress,
    SnapshotId, Store,
};
use snapstore_vmm::control::{CommitReport, Committer, FrozenMachine, Origin, Seconds};

use crate::error::NotFound;
use crate::runtime::VmDir;

/// How long a machine may take to see that whoever committed it does so no more.
const LEAVING: Duration = Duration::from_secs(5);
const LEAVING_RETRY: Duration = Duration::from_millis(20);

/// What a machine is to be committed as.
pub struct CommitTarget {
    /// The tag to create.
    pub tag: String,
    /// Whether a tag that exists is moved.
    pub replace: bool,
    /// The labels of the snapshot.
    pub labels: BTreeMap<String, String>,
}

/// A commit of a machine, and what it took.
pub struct VmCommit {
    /// The snapshot.
    pub committed: Committed,
    /// How long its parts took.
    pub timings: Seconds,
    /// What was read of the machine's memory.
    pub read_bytes: u64,
}

/// Commits a running machine. If a repair takes away what the commit relies on, all is read
/// once more: the machine still lists it.
pub fn commit(
    store: &Store,
    vm: &VmDir,
    wanted: &CommitTarget,
    progress: &dyn Progress,
) -> anyhow::Result<VmCommit> {
    let began = Instant::now();
    match try_commit(store, vm, wanted, progress, began) {
        Err(error) if is_overtaken(&error) => {
            tracing::info!(%error, "the machine is read once more");
            let until = Instant::now() + LEAVING;
            loop {
                match try_commit(store, vm, wanted, progress, began) {
                    Err(error) if is_busy(&error) && Instant::now() < until => {
                        std::thread::sleep(LEAVING_RETRY);
                    }
                    done => return done,
                }
            }
        }
        done => done,
    }
}

fn is_overtaken(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<snapstore_store::Error>();
    matches!(error, Some(snapstore_store::Error::Overtaken { .. }))
}

fn is_busy(error: &anyhow::Error) -> bool {
    use snapstore_vmm::control::ErrorKind::Busy;
    let error = error.downcast_ref::<snapstore_vmm::Error>();
    matches!(
        error,
        Some(snapstore_vmm::Error::Refused { kind: Busy, .. })
    )
}

fn try_commit(
    store: &Store,
    vm: &VmDir,
    wanted: &CommitTarget,
    progress: &dyn Progress,
    began: Instant,
) -> anyhow::Result<VmCommit> {
    // Before the machine is disturbed.
    store.check_tag_free(&wanted.tag, wanted.replace)?;
    let mut committer = Committer::new(vm.connect()?);
    let read = precopy::read(store, vm, wanted, &mut committer, progress)?;
    let read_seconds = began.elapsed().as_secs_f64();
    let frozen = committer.freeze(check::is_wanted())?;
    // Else it lists all again.
    let read = read.filter(|_| frozen.after_rounds());
    let base = Base::of(frozen.origin())?;
    // Before anything is read of what it was made from.
    base.check(store, &vm.name)?;
    let request = request(store, wanted, &base, &frozen)?;
    let mut read_bytes = frozen.written().iter().map(|r| r.end - r.start).sum();
    let mut timings = frozen.timings().clone();
    let mut committed = match read {
        Some(read) => {
            timings.insert("precopy".to_owned(), read_seconds);
            read_bytes += read.bytes;
            store.commit_after(read.precopy, &request, progress)?
        }
        None => store.commit(&request, progress)?,
    };
    if check::is_wanted() {
        check::check(store, &committed.manifest, &frozen)?;
    }
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
    Ok(VmCommit {
        committed,
        timings,
        read_bytes,
    })
}

/// What a machine's commit is made from.
struct Base {
    parent: ParentChoice,
    kind: InputKind,
}

impl Base {
    fn of(origin: &Origin) -> anyhow::Result<Self> {
        let (parent, kind) = match &origin.snapshot {
            Some(id) => {
                let id = SnapshotId::from_hex(id).context("the machine names no snapshot id")?;
                (ParentChoice::Pinned(id), InputKind::Diff)
            }
            None => (ParentChoice::Nothing, InputKind::Full),
        };
        Ok(Self { parent, kind })
    }

    /// A machine can only be committed to the store that holds what it was made from.
    fn check(&self, store: &Store, name: &str) -> anyhow::Result<()> {
        let ParentChoice::Pinned(id) = self.parent else {
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
}

fn request(
    store: &Store,
    wanted: &CommitTarget,
    base: &Base,
    frozen: &FrozenMachine,
) -> anyhow::Result<CommitRequest> {
    let Base { parent, kind } = base;
    let memory = Input {
        name: "memory".to_owned(),
        role: ImageRole::Memory,
        data: InputData::Extents {
            files: vec![Arc::new(frozen.memory().try_clone()?)],
            label: "the machine's frozen memory".to_owned(),
            size_bytes: frozen.size_bytes(),
            extents: precopy::extents(frozen.slots(), frozen.written())?,
        },
        kind: *kind,
    };
    let state = Input {
        name: "vmstate".to_owned(),
        role: ImageRole::File,
        data: InputData::Bytes(frozen.state().into()),
        kind: InputKind::Full,
    };
    let mut inputs = vec![memory, state];
    let mut unchanging = Vec::new();
    let before = match parent {
        ParentChoice::Pinned(id) if !frozen.disks().is_empty() => Some(store.manifest(*id)?),
        _ => None,
    };
    for disk in frozen.disks() {
        unchanging.push(disks::unchanging(disk)?);
        let before = before.as_ref().and_then(|it| it.image(&disk.name));
        let before = before.map(|image| store.image_reader(image));
        inputs.push(disks::input(disk, *kind, before.as_ref())?);
    }
    Ok(CommitRequest {
        tag: wanted.tag.clone(),
        replace: wanted.replace,
        parent: parent.clone(),
        inputs,
        labels: wanted.labels.clone(),
        keep: true,
        unchanging,
        ..CommitRequest::default()
    })
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
