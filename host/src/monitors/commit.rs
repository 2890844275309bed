//! Committing a machine of another monitor where it runs.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use snapstore_store::{
    CommitRequest, Committed, MAX_IMAGES, MAX_LABELS, ParentChoice, Progress, Store,
};

use super::adapter::{Budget, CPU, Kind, MONITOR, VERSION};
use super::cpu;
use super::known::connect;
use super::pause::{Pause, Paused};
use super::turn::Turn;
use crate::error::Usage;

/// What a machine of another monitor is to be committed as.
pub struct MonitorCommit {
    /// Its monitor.
    pub kind: Kind,
    /// Where that listens.
    pub socket: PathBuf,
    /// The tag to create.
    pub tag: String,
    /// Whether a tag that exists is moved.
    pub replace: bool,
    /// The labels of the snapshot; those of the monitor are added.
    pub labels: BTreeMap<String, String>,
}

/// A commit of such a machine.
pub struct MonitorCommitted {
    /// The snapshot.
    pub committed: Committed,
    /// The monitor's name and version.
    pub monitor: String,
    /// How long the guest stood still.
    pub pause: Pause,
    /// How much was read of the process.
    pub read_bytes: u64,
    /// What the user should know.
    pub remarks: Vec<String>,
}

/// That a snapshot can have so many of them: said before the guest is paused.
fn check_counts(inputs: usize, labels: usize) -> anyhow::Result<()> {
    if inputs > MAX_IMAGES {
        anyhow::bail!(Usage(format!(
            "the machine's snapshot would consist of {inputs} files, and a snapshot has at most \
             {MAX_IMAGES}: it has too many disks"
        )));
    }
    if labels > MAX_LABELS {
        anyhow::bail!(Usage(format!(
            "there would be {labels} labels with those of the monitor, and a snapshot has at most \
             {MAX_LABELS}"
        )));
    }
    Ok(())
}

/// Commits a machine of another monitor, which goes on.
pub fn commit(
    store: &Store,
    wanted: &MonitorCommit,
    progress: &dyn Progress,
) -> anyhow::Result<MonitorCommitted> {
    store.check_tag_free(&wanted.tag, wanted.replace)?;
    let mut labels = wanted.labels.clone();
    // Before anything is connected: a monitor may serve one at a time.
    let turn = Turn::take(&wanted.socket)?;
    let mut monitor = connect(wanted.kind, &wanted.socket)?;
    let version = monitor.version();
    let own = [
        (MONITOR, wanted.kind.name().to_owned()),
        (VERSION, version.clone()),
        (CPU, cpu::name()),
    ];
    for (key, value) in own {
        if labels.insert(key.to_owned(), value).is_some() {
            anyhow::bail!(Usage(format!(
                "the label {key} is set by the commit; leave --label {key}= out"
            )));
        }
    }
    check_counts(monitor.check(store)?, labels.len())?;
    let mut budget = Budget::of_host();
    let mut paused = Paused::new(monitor.as_mut(), turn)?;
    let began = Instant::now();
    let taken = paused.monitor().take(store, &mut budget)?;
    tracing::debug!(seconds = began.elapsed().as_secs_f64(), "read the machine");
    let request = CommitRequest {
        tag: wanted.tag.clone(),
        replace: wanted.replace,
        parent: match taken.parent {
            Some(id) => ParentChoice::Pinned(id),
            None => ParentChoice::Automatic,
        },
        inputs: taken.inputs,
        labels,
        unchanging: taken.unchanging,
        ..CommitRequest::default()
    };
    let mut remarks = taken.remarks;
    let (committed, pause) = if taken.is_held {
        let committed = store.commit(&request, progress)?;
        // The snapshot is there, whatever becomes of the guest.
        let so_far = paused.so_far();
        let pause = paused.resume().unwrap_or_else(|error| {
            remarks.push(crate::error::message(&error));
            so_far
        });
        (committed, pause)
    } else {
        let pause = paused.resume()?;
        (store.commit(&request, progress)?, pause)
    };
    Ok(MonitorCommitted {
        committed,
        monitor: format!("{} {version}", wanted.kind),
        pause,
        read_bytes: taken.read_bytes,
        remarks,
    })
}
