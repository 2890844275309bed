//! `snapstore show`

use std::process::ExitCode;

use serde_json::json;
use snapstore_store::{Manifest, SnapshotId};

use crate::args::ShowArgs;
use crate::context::Context;
use crate::format::{count, size, table, time};

pub fn run(context: &Context, args: &ShowArgs) -> anyhow::Result<ExitCode> {
    let store = context.open()?;
    let id = store.resolve(&args.snapshot)?;
    let manifest = store.manifest(id)?;
    let tags = store.tags_of(id)?;
    let value = json!({"id": id, "tags": tags, "manifest": manifest});
    context.answer(&value, || describe(id, &tags, &manifest))?;
    Ok(ExitCode::SUCCESS)
}

fn describe(id: SnapshotId, tags: &[String], manifest: &Manifest) -> String {
    let parent = manifest
        .parent
        .map_or_else(|| "none".to_owned(), |parent| parent.to_string());
    let mut out = format!(
        "Snapshot   {id}\nTags       {}\nParent     {parent}\nCommitted  {} UTC, adding {} chunks in {}\n",
        tags.join(", "),
        time(manifest.created()),
        count(manifest.added_chunks),
        size(manifest.added_bytes),
    );
    for (key, value) in &manifest.labels {
        out += &format!("Label      {key}={value}\n");
    }
    let rows: Vec<_> = manifest
        .images
        .iter()
        .map(|image| {
            vec![
                image.file_name(),
                size(image.size_bytes),
                count(image.nonzero_pages),
                count(image.changed_pages),
            ]
        })
        .collect();
    out + &table(&["FILE", "SIZE", "PAGES IN USE", "CHANGED"], 1, &rows)
}
