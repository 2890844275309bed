//! `snapstore commit --qmp` and the like: a machine of another monitor.

use std::path::Path;
use std::process::ExitCode;

use serde_json::json;
use snapstore_host::monitors::{Kind, MonitorCommit, MonitorCommitted, commit};
use snapstore_store::Store;

use crate::args::CommitArgs;
use crate::commands::commit::labels;
use crate::committed::{Told, timings};
use crate::context::Context;
use crate::format::{millis, size};
use crate::progress::{Bar, Unit};

/// The monitor that the arguments name, and its socket.
pub fn named(args: &CommitArgs) -> Option<(Kind, &Path)> {
    let sockets = [
        (Kind::Qemu, &args.qmp),
        (Kind::Firecracker, &args.firecracker),
        (Kind::CloudHypervisor, &args.cloud_hypervisor),
    ];
    let mut named = sockets.into_iter();
    named.find_map(|(kind, socket)| Some((kind, socket.as_deref()?)))
}

pub fn run(
    context: &Context,
    args: &CommitArgs,
    kind: Kind,
    socket: &Path,
) -> anyhow::Result<ExitCode> {
    let context = &context.stopped_by_signals()?;
    let wanted = MonitorCommit {
        kind,
        socket: socket.to_owned(),
        tag: args.tag.clone(),
        replace: args.replace,
        labels: labels(args)?,
    };
    let store = context.open_or_create_default()?;
    let done = commit(&store, &wanted, &Bar::new(Unit::Bytes))?;
    answer(context, &args.tag, &store, &done)?;
    store.tidy_index();
    Ok(ExitCode::SUCCESS)
}

fn answer(
    context: &Context,
    tag: &str,
    store: &Store,
    done: &MonitorCommitted,
) -> anyhow::Result<()> {
    let committed = &done.committed;
    let pause = done.pause.length;
    let stood = match pause {
        Some(pause) => format!("stood still for {}", millis(pause.as_secs_f64())),
        None => "was paused before, and still is".to_owned(),
    };
    let told = Told {
        tag,
        parent: None,
        remarks: &done.remarks,
        timings: timings(&committed.timings),
        more: json!({
            "monitor": done.monitor,
            "read_bytes": done.read_bytes,
            "pause_seconds": pause.map(|pause| pause.as_secs_f64()),
        }),
        more_text: format!(
            "  the guest of {} {stood}; {} of it were read\n",
            done.monitor,
            size(done.read_bytes)
        ),
    };
    told.answer(context, store, committed)
}
