//! `snapstore commit --vm`: a running machine.

use std::process::ExitCode;

use serde_json::json;
use snapstore_host::commit::{CommitTarget, VmCommit, commit};
use snapstore_host::runtime::Runtime;
use snapstore_store::Store;

use crate::args::CommitArgs;
use crate::commands::commit::{describe, labels, left_out, parent_name, warn, warnings};
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
    let parent = parent_name(store, committed, None);
    warn(committed);
    let value = json!({
        "tag": tag,
        "vm": name,
        "id": committed.id,
        "parent": committed.manifest.parent,
        "parent_tag": parent,
        "images": committed.manifest.images,
        "inherited": committed.inherited,
        "left_out": left_out(committed),
        "added_chunks": committed.manifest.added_chunks,
        "added_bytes": committed.manifest.added_bytes,
        "read_bytes": read_bytes,
        "warnings": warnings(committed),
        "timings": timings,
    });
    context.answer(&value, || {
        let stage = |name: &str| millis(timings.get(name).copied().unwrap_or(0.0));
        describe(tag, committed, parent.as_deref())
            + &format!(
                "  {name} stood still for {}, of {} in all\n",
                stage("pause"),
                stage("total")
            )
    })
}
