//! `snapstore stats`

use std::process::ExitCode;

use snapstore_store::StoreStats;

use crate::args::StatsArgs;
use crate::commands::tag;
use crate::context::Context;
use crate::form::Fields;
use crate::format::{counted, size, table};

const FIELDS: Fields = Fields {
    rows: "per_snapshot",
    of_row: &[
        "tag",
        "logical_bytes",
        "nonzero_bytes",
        "exclusive_stored_bytes",
    ],
    of_answer: &[
        "snapshots",
        "logical_bytes",
        "nonzero_bytes",
        "distinct_pages",
        "distinct_bytes",
        "page_stored_bytes",
        "metadata_stored_bytes",
        "unreferenced_bytes",
        "pack_bytes",
        "packs",
        "index_bytes",
        "total_bytes",
        "unreadable.",
    ],
};

pub fn run(context: &Context, args: &StatsArgs) -> anyhow::Result<ExitCode> {
    let context = &context.listing(&args.form, &FIELDS)?;
    let context = &context.stopped_by_signals()?;
    let stats = context.open()?.stats()?;
    let mut value = serde_json::to_value(&stats)?;
    value["unreadable"] = tag::unreadable(&stats.unreadable).into();
    context.answer(&value, || describe(&stats))?;
    Ok(tag::tell_unreadable(&stats.unreadable))
}

fn describe(stats: &StoreStats) -> String {
    let ratio = |part: u64| match part {
        0 => "-".to_owned(),
        part => format!("{:.1}x smaller", stats.logical_bytes as f64 / part as f64),
    };
    let rows = [
        ("images, as they are", stats.logical_bytes, String::new()),
        (
            "pages that are not zero",
            stats.nonzero_bytes,
            ratio(stats.nonzero_bytes),
        ),
        (
            "distinct pages",
            stats.distinct_bytes,
            ratio(stats.distinct_bytes),
        ),
        (
            "those pages as stored",
            stats.page_stored_bytes,
            ratio(stats.page_stored_bytes),
        ),
        (
            "tree nodes and manifests",
            stats.metadata_stored_bytes,
            String::new(),
        ),
        (
            "not needed by any tag",
            stats.unreferenced_bytes,
            String::new(),
        ),
        ("index (rebuildable)", stats.index_bytes, String::new()),
        (
            "the whole store on disk",
            stats.total_bytes,
            ratio(stats.total_bytes),
        ),
    ]
    .map(|(what, bytes, note)| vec![what.to_owned(), size(bytes), note]);
    let mut out = format!(
        "{}, {}, {}\n",
        counted(stats.snapshots, "snapshot"),
        counted(stats.distinct_pages, "distinct page"),
        counted(stats.packs, "pack")
    );
    out += &table(&["", "BYTES", ""], 1, &rows);
    let rows: Vec<_> = stats
        .per_snapshot
        .iter()
        .map(|snapshot| {
            vec![
                snapshot.tag.clone(),
                size(snapshot.logical_bytes),
                size(snapshot.nonzero_bytes),
                size(snapshot.exclusive_stored_bytes),
            ]
        })
        .collect();
    out + "\n"
        + &table(
            &["TAG", "SIZE", "NOT ZERO", "FREED IF REMOVED ALONE"],
            1,
            &rows,
        )
}
