//! `snapstore commit --vm`: a running machine.

use std::process::ExitCode;

use serde_json::json;
use snapstore_host::commit::{CommitTarget, VmCommit, commit};
use snapstore_host::runtime::Runtime;
use snapstore_store::Store;

use crate::args::CommitArgs;
use crate::commands::commit::labels;
use crate::commands::lazy::complete;
use crate::committed::Told;
use crate::context::Context;
use crate::format::millis;
use crate::progress::{Bar, Unit};

pub fn run(context: &Context, args: &CommitArgs, name: &str) -> anyhow::Result<ExitCode> {
    let context = &context.stopped_by_signals()?;
    let wanted = CommitTarget {
        tag: args.tag.clone(),
        replace: args.replace,
        labels: labels(args)?,
    };
    let vm = Runtime::open()?.running(name)?;
    let store = context.open_or_create_default()?;
    store.check_tag_free(&wanted.tag, wanted.replace)?;
    // One that does not answer is told of by the commit.
    let status = vm.connect().and_then(|mut client| Ok(client.status()?));
    let pulled = match status {
        Ok(status) => complete(context, &store, &status.origin, &wanted.tag)?,
        Err(_) => None,
    };
    let done = commit(&store, &vm, &wanted, &Bar::new(Unit::Bytes))?;
    answer(context, &args.tag, name, &store, &done, pulled.as_deref())?;
    store.tidy_index();
    Ok(ExitCode::SUCCESS)
}

fn answer(
    context: &Context,
    tag: &str,
    name: &str,
    store: &Store,
    done: &VmCommit,
    pulled: Option<&str>,
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
        more: json!({ "vm": name, "read_bytes": read_bytes, "pulled_as": pulled }),
        more_text: format!(
            "  {name} stood still for {}, of {} in all\n",
            stage("pause"),
            stage("total")
        ),
    };
    told.answer(context, store, committed)
}
