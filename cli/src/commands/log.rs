//! `snapstore log`

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;

use serde_json::json;
use snapstore_store::{Manifest, SnapshotId, Store, TaggedSnapshot};

use crate::args::LogArgs;
use crate::commands::tag::{tell_unreadable, unreadable};
use crate::context::Context;
use crate::form::Fields;
use crate::format::{count, size, time};

/// A snapshot with all its tags.
struct Line {
    id: SnapshotId,
    tags: Vec<String>,
    manifest: Manifest,
}

const FIELDS: Fields = Fields {
    rows: "snapshots",
    of_row: &[
        "id",
        "tags",
        "parent",
        "created_unix_seconds",
        "images.",
        "labels.",
        "added_bytes",
    ],
    of_answer: &["unreadable."],
};

pub fn run(context: &Context, args: &LogArgs) -> anyhow::Result<ExitCode> {
    let context = &context.listing(&args.form, &FIELDS)?;
    let store = context.open()?;
    let mut listing = store.listing()?;
    let mut lines = gather(std::mem::take(&mut listing.snapshots));
    if let Some(name) = &args.tag {
        let chain = chain(&store, store.resolve(name)?, &lines);
        lines.retain(|line| chain.contains(&line.id));
    }
    let value: Vec<_> = lines
        .iter()
        .map(|line| {
            json!({
                "id": line.id,
                "tags": line.tags,
                "parent": line.manifest.parent,
                "created_unix_seconds": line.manifest.created_unix_seconds,
                "images": line.manifest.images,
                "labels": line.manifest.labels,
                "added_bytes": line.manifest.added_bytes,
            })
        })
        .collect();
    let value = json!({"snapshots": value, "unreadable": unreadable(&listing.unreadable)});
    context.answer(&value, || {
        if args.graph {
            graph(&lines)
        } else {
            lines
                .iter()
                .rev()
                .map(|line| describe(line, &lines) + "\n")
                .collect()
        }
    })?;
    // Of one chain it may be none of.
    Ok(match args.tag {
        None => tell_unreadable(&listing.unreadable),
        Some(_) => ExitCode::SUCCESS,
    })
}

/// Oldest first, one line per snapshot however many tags it has.
fn gather(snapshots: Vec<TaggedSnapshot>) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for snapshot in snapshots {
        match lines.iter_mut().find(|line| line.id == snapshot.id) {
            Some(line) => line.tags.push(snapshot.tag),
            None => lines.push(Line {
                id: snapshot.id,
                tags: vec![snapshot.tag],
                manifest: snapshot.manifest,
            }),
        }
    }
    lines
}

/// The snapshot and its ancestors. Removed ones in between are passed over as
/// long as their manifests are still there.
fn chain(store: &Store, from: SnapshotId, lines: &[Line]) -> BTreeSet<SnapshotId> {
    let mut chain = BTreeSet::new();
    let mut next = Some(from);
    while let Some(id) = next.filter(|id| chain.insert(*id)) {
        let tagged = lines.iter().find(|line| line.id == id);
        next = match tagged {
            Some(line) => line.manifest.parent,
            None => store.manifest(id).ok().and_then(|manifest| manifest.parent),
        };
    }
    chain
}

fn describe(line: &Line, all: &[Line]) -> String {
    let manifest = &line.manifest;
    let changed: u64 = manifest
        .images
        .iter()
        .map(|image| image.changed_pages)
        .sum();
    let removed = manifest
        .parent
        .filter(|parent| all.iter().all(|other| other.id != *parent))
        .map_or_else(String::new, |parent| {
            format!("  (parent {} has no tag)", parent.short())
        });
    format!(
        "{}  {}  {}  {} pages changed, {} added{removed}",
        line.tags.join(", "),
        line.id.short(),
        time(manifest.created()),
        count(changed),
        size(manifest.added_bytes),
    )
}

/// Draws a forest, oldest on top. The last child of a snapshot goes on in its
/// column, the others branch off, so that a long chain stays narrow.
fn graph(lines: &[Line]) -> String {
    let known: BTreeSet<SnapshotId> = lines.iter().map(|line| line.id).collect();
    let mut children: BTreeMap<Option<SnapshotId>, Vec<&Line>> = BTreeMap::new();
    for line in lines {
        let parent = line.manifest.parent.filter(|parent| known.contains(parent));
        children.entry(parent).or_default().push(line);
    }
    let mut out = String::new();
    // A stack instead of recursion: chains may be very long.
    let roots = children.get(&None).cloned().unwrap_or_default();
    let mut stack: Vec<(String, &str, &Line)> = roots
        .into_iter()
        .rev()
        .map(|line| (String::new(), "", line))
        .collect();
    while let Some((prefix, joint, line)) = stack.pop() {
        let is_root = prefix.is_empty() && joint.is_empty();
        let continues = line
            .manifest
            .parent
            .is_some_and(|parent| known.contains(&parent));
        if continues && joint.is_empty() {
            out += &format!("{prefix}│\n");
        } else if is_root && !out.is_empty() {
            out.push('\n');
        }
        out += &format!("{prefix}{joint}● {}\n", describe(line, lines));
        let column = match joint {
            "" => prefix,
            _ => format!("{prefix}│ "),
        };
        let below = children.get(&Some(line.id)).cloned().unwrap_or_default();
        if let Some((last, branches)) = below.split_last() {
            stack.push((column.clone(), "", last));
            for branch in branches.iter().rev() {
                stack.push((column.clone(), "├─", branch));
            }
        }
    }
    out
}
