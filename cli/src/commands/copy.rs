//! `snapstore copy`

use std::process::ExitCode;

use anyhow::Context as _;
use serde_json::json;
use snapstore_store::{ExportRequest, ImportRequest, Store};

use super::{each_once, export, import};
use crate::args::CopyArgs;
use crate::context::Context;
use crate::progress::{Bar, Unit};

pub fn run(context: &Context, args: &CopyArgs) -> anyhow::Result<ExitCode> {
    let context = &context.stopped_by_signals()?;
    each_once(&args.snapshots)?;
    let from = context.configure(Store::open(&args.from)?);
    for snapshot in &args.snapshots {
        from.resolve(snapshot)
            .with_context(|| format!("nothing is copied from {}", args.from.display()))?;
    }
    let store = context.open_or_create_default()?;
    let request = ExportRequest {
        snapshots: args.snapshots.clone(),
        chain: args.chain,
        label: args.from.clone(),
    };
    let how = ImportRequest {
        replace: args.replace,
        label: args.from.clone(),
        stream_bytes: None,
    };
    let (exported, imported) = store.copy_from(&from, &request, &how, &Bar::new(Unit::Bytes))?;
    let value = json!({
        "from": args.from.to_string_lossy(),
        "snapshots": imported.snapshots,
        "left_out": exported.left_out,
        "chunks": imported.chunks,
        "added_chunks": imported.added_chunks,
        "added_bytes": imported.added_bytes,
    });
    context.answer(&value, || {
        export::left_out(&exported) + &import::describe(&imported)
    })?;
    store.tidy_index();
    Ok(ExitCode::SUCCESS)
}
