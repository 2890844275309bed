//! `snapstore repair`

use std::process::ExitCode;

use snapstore_store::{RepairOptions, RepairReport, Store};

use crate::commands::ended;
use crate::context::Context;
use crate::exit;
use crate::format::{count, counted};
use crate::known;
use crate::progress::{Bar, Unit};

pub fn run(context: &Context) -> anyhow::Result<ExitCode> {
    let context = &context.stopped_by_signals()?;
    let mut options = RepairOptions {
        cancel: context.cancel().clone(),
        ..RepairOptions::default()
    };
    options.lock_timeout = context.lock_timeout().unwrap_or(options.lock_timeout);
    let path = context.store_path()?;
    let mut report = Store::repair_with(&path, &options, &Bar::new(Unit::Items))?;
    let remotes = known::set_aside(&path)?;
    let lost_remotes = remotes.is_some();
    report.remaining.extend(remotes);
    context.answer(&report, || {
        let mut out = describe(&report);
        if lost_remotes {
            out += "The store knows no remotes now; `snapstore remote add NAME URL` makes each \
                    known again.\n";
        }
        out
    })?;
    Ok(
        if !report.lost_tags.is_empty() || !report.broken_snapshots.is_empty() {
            let found = [
                (report.lost_tags.len(), "lost tag"),
                (report.broken_snapshots.len(), "broken snapshot"),
            ];
            let found = found.into_iter().filter(|(number, _)| *number > 0);
            let found: Vec<_> = found
                .map(|(number, what)| counted(number as u64, what))
                .collect();
            ended(exit::DAMAGED, &found.join(", "))
        } else if !report.left_alone.is_empty() {
            let left = counted(report.left_alone.len() as u64, "tag");
            ended(exit::FAILED, &format!("{left} left as before"))
        } else {
            ExitCode::SUCCESS
        },
    )
}

fn describe(report: &RepairReport) -> String {
    let mut out = format!(
        "Rebuilt the index: {} chunks.\n",
        count(report.indexed_chunks)
    );
    for file in &report.rebuilt_files {
        out += &format!("Rebuilt {file}.\n");
    }
    for (tag, id) in &report.recovered_tags {
        out += &format!("Recovered tag {tag}: {}.\n", id.short());
    }
    for damage in &report.remaining {
        out += &format!("SET ASIDE in damaged/: {damage}\n");
    }
    for reason in &report.left_alone {
        out += &format!("LEFT AS IT IS: {reason}\n");
    }
    for tag in &report.lost_tags {
        out += &format!(
            "LOST: tag {tag} is damaged and no snapshot was first committed under it; `snapstore rm {tag}` removes it.\n"
        );
    }
    for tag in &report.broken_snapshots {
        out += &match report.lost_manifests.contains(tag) {
            true => format!(
                "BROKEN: snapshot {tag} has lost its manifest, which says what it holds, and no commit brings that back; \
                 commit its images under another tag, and `snapstore rm {tag}` removes it.\n"
            ),
            false => format!(
                "BROKEN: snapshot {tag} lacks chunks; commit its images again, under any tag, to store them anew, \
                 or `snapstore rm {tag}` removes it.\n"
            ),
        };
    }
    out
}
