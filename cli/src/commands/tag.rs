//! `snapstore tag`, `tags` and `rm`

use std::borrow::Borrow;
use std::process::ExitCode;

use serde_json::json;
use snapstore_store::{Error, ErrorClass, Store};

use crate::args::{RmArgs, TagArgs, TagsArgs};
use crate::commands::each_once;
use crate::context::Context;
use crate::exit;
use crate::form::Fields;
use crate::format::{count, size, table, time};
use crate::hints;
use crate::logging::say;

pub fn set(context: &Context, args: &TagArgs) -> anyhow::Result<ExitCode> {
    let context = &context.stopped_by_signals()?;
    let store = context.open()?;
    let Some(tag) = &args.tag else {
        return protect(context, &store, &args.source, args.protect);
    };
    let id = store.resolve(&args.source)?;
    store.set_tag(tag, id, args.replace)?;
    if args.protect {
        store.protect_tag(tag, true)?;
    }
    let value = json!({"tag": tag, "id": id, "protected": args.protect});
    context.answer(&value, || match args.protect {
        true => format!("{tag} is {}, and protected.", id.short()),
        false => format!("{tag} is {}.", id.short()),
    })?;
    Ok(ExitCode::SUCCESS)
}

fn protect(
    context: &Context,
    store: &Store,
    tag: &str,
    protected: bool,
) -> anyhow::Result<ExitCode> {
    store.protect_tag(tag, protected)?;
    context.answer(
        &json!({"tag": tag, "protected": protected}),
        || match protected {
            true => format!("{tag} is protected: it is neither removed nor moved."),
            false => format!("{tag} is not protected any more."),
        },
    )?;
    Ok(ExitCode::SUCCESS)
}

const FIELDS: Fields = Fields {
    rows: "tags",
    of_row: &[
        "tag",
        "id",
        "parent",
        "created_unix_seconds",
        "logical_bytes",
        "labels.",
        "protected",
    ],
    of_answer: &["unreadable."],
};

pub fn list(context: &Context, args: &TagsArgs) -> anyhow::Result<ExitCode> {
    let context = &context.listing(&args.form, &FIELDS)?;
    let store = context.open()?;
    let listing = store.listing()?;
    let protected = store.protected_tags()?;
    let snapshots = &listing.snapshots;
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
                "protected": protected.contains(&snapshot.tag),
            })
        })
        .collect();
    let value = json!({"tags": value, "unreadable": unreadable(&listing.unreadable)});
    context.answer(&value, || {
        if args.quiet {
            let tags: Vec<_> = snapshots.iter().map(|it| it.tag.as_str()).collect();
            return tags.join("\n");
        }
        if snapshots.is_empty() && listing.unreadable.is_empty() {
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
                    match protected.contains(&snapshot.tag) {
                        true => "  protected".to_owned(),
                        false => String::new(),
                    },
                ]
            })
            .collect();
        table(
            &["TAG", "ID", "COMMITTED (UTC)", "SIZE", "PAGES", "ADDED", ""],
            3,
            &rows,
        )
    })?;
    Ok(tell_unreadable(&listing.unreadable))
}

/// Tags that lead to nothing that can be read, for programs.
pub fn unreadable<E: Borrow<Error>>(unreadable: &[(String, E)]) -> Vec<serde_json::Value> {
    let unreadable = unreadable.iter();
    unreadable
        .map(|(tag, error)| json!({"tag": tag, "error": hints::told(error.borrow())}))
        .collect()
}

/// Says which tags were left out of a list, and why. Damage is a failure of the list,
/// and so is what may not be read: what a newer version made is in order.
pub fn tell_unreadable<E: Borrow<Error>>(unreadable: &[(String, E)]) -> ExitCode {
    let mut worst = 0;
    for (tag, error) in unreadable {
        say!("{tag} cannot be read: {}", hints::told(error.borrow()));
        worst = worst.max(match error.borrow().class() {
            ErrorClass::Damaged => exit::DAMAGED,
            ErrorClass::Newer => 0,
            _ => exit::FAILED,
        });
    }
    ExitCode::from(worst)
}

pub fn remove(context: &Context, args: &RmArgs) -> anyhow::Result<ExitCode> {
    let context = &context.stopped_by_signals()?;
    each_once(&args.tags)?;
    let store = context.open()?;
    let tags = &args.tags;
    if args.dry_run {
        for tag in tags {
            store
                .tag(tag)?
                .ok_or_else(|| Error::NotFound { name: tag.clone() })?;
        }
        let stats = store.stats()?;
        let freed: u64 = stats
            .per_snapshot
            .iter()
            .filter(|snapshot| tags.contains(&snapshot.tag))
            .map(|snapshot| snapshot.exclusive_stored_bytes)
            .sum();
        let value = json!({"would_remove": tags, "frees_at_least_bytes": freed});
        context.answer(&value, || {
            format!(
                "Would remove {}; `gc` could then free at least {}.",
                tags.join(", "),
                size(freed)
            )
        })?;
        return Ok(ExitCode::SUCCESS);
    }
    store.remove_tags(tags)?;
    context.answer(&json!({"removed": tags}), || {
        format!(
            "Removed {}; `snapstore gc` frees the space.",
            tags.join(", ")
        )
    })?;
    Ok(ExitCode::SUCCESS)
}
