//! `snapstore commit --vm`: a running machine.

use std::process::ExitCode;

use serde_json::json;
use snapstore_host::commit::{CommitTarget, VmCommit, commit};
use snapstore_host::runtime::Runtime;
use snapstore_store::Store;

use crate::args::CommitArgs;
use crate::commands::commit::labels;
use crate::committed::Told;
use crate::context::Context;
use crate::format::millis;
use crate::progress::{Bar, Unit};

pub fn run(context: &Context, args: &CommitArgs, name: &str) -> anyhow::Result<ExitCode> {
    let context = &context.stopped_by_signals()?;
    let vm = Runtime::open()?.running(name)?;
    let store = context.open_or_create_default()?;
    let wanted = CommitTarget {
        tag: args.tag.clone(),
        replace: args.replace,
        labels: labels(args)?,
    };
    let done = commit(&store, &vm, &wanted, &Bar::new(Unit::Bytes))?;
    answer(context, &args.tag, name, &store, &done)?;
    store.tidy_index();
    Ok(ExitCode::SUCCESS)
}

fn answer(
    context: &Context,
    tag: &str,
    name: &str,
    store: &Store,
    done: &VmCommit,
) -> anyhow::Result<()> {
    let VmCommit {
        committed,
        timings,
        read_bytes,
    } = done;
    let stage = |name: &str| millis(timings.get(name).copied().unwrap_or(0.0));
    let told = Told {
        tag,
        parent: None,
        remarks: &[],
        timings: json!(timings),
        more: json!({ "vm": name, "read_bytes": read_bytes }),
        more_text: format!(
            "  {name} stood still for {}, of {} in all\n",
            stage("pause"),
            stage("total")
        ),
    };
    told.answer(context, store, committed)
}
