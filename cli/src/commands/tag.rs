//! `snapstore tag`, `tags` and `rm`

use std::process::ExitCode;

use serde_json::json;

use crate::args::{RmArgs, TagArgs};
use crate::context::Context;
use crate::format::{count, size, table, time};

pub fn set(context: &Context, args: &TagArgs) -> anyhow::Result<ExitCode> {
    let store = context.open()?;
    let id = store.resolve(&args.source)?;
    store.set_tag(&args.tag, id, args.replace)?;
    context.answer(&json!({"tag": args.tag, "id": id}), || {
        format!("{} is {}.", args.tag, id.short())
    })?;
    Ok(ExitCode::SUCCESS)
}

pub fn list(context: &Context) -> anyhow::Result<ExitCode> {
    let snapshots = context.open()?.snapshots()?;
    let value: Vec<_> = snapshots
        .iter()
        .map(|snapshot| {
            json!({
                "tag": snapshot.tag,
                "id": snapshot.id,
                "parent": snapshot.manifest.parent,
                "created_unix_seconds": snapshot.manifest.created_unix_seconds,
                "logical_bytes": snapshot.manifest.images.iter().map(|i| i.size_bytes).sum::<u64>(),
                "labels": snapshot.manifest.labels,
            })
        })
        .collect();
    context.answer(&json!({"tags": value}), || {
        if snapshots.is_empty() {
            return "No snapshots yet; `snapstore commit TAG --memory FILE` makes one.".to_owned();
        }
        let rows: Vec<_> = snapshots
            .iter()
            .map(|snapshot| {
                let manifest = &snapshot.manifest;
                let bytes = manifest.images.iter().map(|image| image.size_bytes).sum();
                let pages = manifest
                    .images
                    .iter()
                    .map(|image| image.nonzero_pages)
                    .sum();
                vec![
                    snapshot.tag.clone(),
                    snapshot.id.short(),
                    time(manifest.created()),
                    size(bytes),
                    count(pages),
                    size(manifest.added_bytes),
                ]
            })
            .collect();
        table(
            &["TAG", "ID", "COMMITTED (UTC)", "SIZE", "PAGES", "ADDED"],
            3,
            &rows,
        )
    })?;
    Ok(ExitCode::SUCCESS)
}

pub fn remove(context: &Context, args: &RmArgs) -> anyhow::Result<ExitCode> {
    let store = context.open()?;
    if args.dry_run {
        for tag in &args.tags {
            store.resolve(tag)?;
        }
        let stats = store.stats()?;
        let freed: u64 = stats
            .per_snapshot
            .iter()
            .filter(|snapshot| args.tags.contains(&snapshot.tag))
            .map(|snapshot| snapshot.exclusive_stored_bytes)
            .sum();
        let value = json!({"would_remove": args.tags, "frees_at_least_bytes": freed});
        context.answer(&value, || {
            format!(
                "Would remove {}; `gc` could then free at least {}.",
                args.tags.join(", "),
                size(freed)
            )
        })?;
        return Ok(ExitCode::SUCCESS);
    }
    store.remove_tags(&args.tags)?;
    context.answer(&json!({"removed": args.tags}), || {
        format!(
            "Removed {}; `snapstore gc` frees the space.",
            args.tags.join(", ")
        )
    })?;
    Ok(ExitCode::SUCCESS)
}
