//! `snapstore show --mount`

use std::path::Path;
use std::process::ExitCode;

use serde_json::json;
use snapstore_host::mount_use::{self, MountUse};

use crate::args::FormArgs;
use crate::commands::top::NEARLY_FULL;
use crate::context::Context;
use crate::form::Fields;
use crate::format::{count, size, table};

const FIELDS: Fields = Fields {
    rows: "files",
    of_row: &["name", "size_bytes", "data_bytes", "cached_bytes"],
    of_answer: &["dir", "store", "writable", "reads_large", "counters."],
};

pub fn run(context: &Context, dir: &Path, form: &FormArgs) -> anyhow::Result<ExitCode> {
    let context = &context.listing(form, &FIELDS)?;
    let used = mount_use::of(dir)?;
    context.answer(&json!(used), || describe(&used))?;
    Ok(ExitCode::SUCCESS)
}

fn describe(used: &MountUse) -> String {
    let counters = &used.counters;
    let rows: Vec<_> = used
        .files
        .iter()
        .map(|file| {
            vec![
                file.name.clone(),
                size(file.size_bytes),
                size(file.data_bytes),
                size(file.cached_bytes),
            ]
        })
        .collect();
    let kind = if used.writable { ", writable" } else { "" };
    let mut out = format!(
        "Mount      {}{kind}, of {}\nRead       {} in {} requests; {} of it in {} requests of more \
         than the read-ahead of {}\nGiven      {} pages of working sets, before anybody asked\n",
        used.dir.display(),
        used.store.display(),
        size(counters.read_bytes),
        count(counters.reads),
        size(counters.large_read_bytes),
        count(counters.large_reads),
        size(counters.read_ahead_bytes),
        count(counters.pushed_pages),
    );
    for one in &counters.elsewhere {
        out += &format!(
            "Remote     {} in {} requests, {} failed: {}\n",
            size(one.bytes),
            count(one.requests),
            count(one.failed_requests),
            one.cause.replace('_', " ")
        );
        if one.hedges > 0 {
            out += &format!(
                "           {} more for what was late, {} of them answered first\n",
                count(one.hedges),
                count(one.hedges_won)
            );
        }
    }
    if used.writable {
        out += &format!(
            "Written    {} in {} requests\n",
            size(counters.written_bytes),
            count(counters.writes)
        );
    }
    if let Some(overlays) = &counters.overlays {
        let limit = match (overlays.limit_bytes, overlays.fill()) {
            (Some(limit), Some(fill)) => format!(
                "; each clone may take {}, and the fullest has taken {:.0} % of it",
                size(limit),
                fill * 100.0
            ),
            _ => String::new(),
        };
        out += &format!("Overlay    {}{limit}\n", size(overlays.used_bytes));
        if overlays.is_nearly_full() {
            out += &format!("Warning    {NEARLY_FULL}\n");
        }
    }
    if used.reads_large {
        out += "Warning    most of it was not read lazily: a program that maps it advises huge pages \
                (MADV_HUGEPAGE)\n           or asks for what it has not touched, or reads files from \
                end to end. docs/monitors.md says\n           which option of each monitor avoids \
                that\n";
    }
    out + &table(&["FILE", "SIZE", "DATA", "IN MEMORY"], 1, &rows)
}
