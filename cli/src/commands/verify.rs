//! `snapstore verify`

use std::process::ExitCode;

use snapstore_store::{Damage, Finding, NotChecked, VerifyReport};

use crate::args::VerifyArgs;
use crate::commands::ended;
use crate::context::Context;
use crate::exit;
use crate::form::Fields;
use crate::format::{count, counted, size};
use crate::hints;
use crate::known;
use crate::progress::{Bar, Unit};

/// Of a finding, in text.
const CHUNKS_SHOWN: usize = 8;

const FIELDS: Fields = Fields {
    rows: "findings",
    of_row: &[
        "damage.",
        "chunks",
        "snapshots",
        "read_all_the_same",
        "what_to_do",
    ],
    of_answer: &[
        "packs",
        "chunks_read",
        "bytes_read",
        "stale_index_entries",
        "not_checked.",
    ],
};

pub fn run(context: &Context, args: &VerifyArgs) -> anyhow::Result<ExitCode> {
    let context = &context.listing(&args.form, &FIELDS)?;
    let context = &context.stopped_by_signals()?;
    let store = context.open()?;
    let mut report = store.verify(args.read_data, &Bar::new(Unit::Items))?;
    report
        .findings
        .extend(known::damage(store.path())?.map(|damage| Finding {
            damage,
            chunks: Vec::new(),
            snapshots: Vec::new(),
            read_all_the_same: false,
        }));
    let mut value = serde_json::to_value(&report)?;
    for (number, finding) in report.findings.iter().enumerate() {
        value["findings"][number]["what_to_do"] = hints::about_finding(finding).into();
    }
    context.answer(&value, || describe(&report))?;
    Ok(if !report.findings.is_empty() {
        let findings = counted(report.findings.len() as u64, "finding");
        ended(exit::DAMAGED, &format!("{findings} of damage"))
    } else if !report.not_checked.is_empty() {
        let left = counted(report.not_checked.len() as u64, "thing");
        ended(exit::FAILED, &format!("{left} could not be checked"))
    } else {
        ExitCode::SUCCESS
    })
}

/// Which snapshots a finding concerns, and how.
fn touched(finding: &Finding, report: &VerifyReport) -> String {
    let tags = finding.snapshots.join(", ");
    let is_missing = |other: &Finding| matches!(other.damage, Damage::Missing { .. });
    match &finding.damage {
        Damage::Pack { .. } if tags.is_empty() && report.findings.iter().any(is_missing) => {
            "what snapshots miss of it is named by itself".to_owned()
        }
        Damage::Pack { .. } if !tags.is_empty() => {
            format!("parts of {tags} are there; those that cannot be read are named by themselves")
        }
        Damage::File { .. } if tags.is_empty() => "no snapshot lacks anything by it".to_owned(),
        _ if tags.is_empty() => "no snapshot needs it".to_owned(),
        _ if finding.read_all_the_same => format!("{tags} read whole all the same"),
        _ => format!("needed by {tags}"),
    }
}

fn describe(report: &VerifyReport) -> String {
    let read = if report.chunks_read > 0 {
        format!(
            ", {} ({}) read",
            counted(report.chunks_read, "chunk"),
            size(report.bytes_read)
        )
    } else {
        String::new()
    };
    let mut out = format!(
        "Checked {} and {}{read}.\n",
        counted(report.packs, "pack"),
        counted(report.snapshots, "snapshot")
    );
    for finding in &report.findings {
        let touched = touched(finding, report);
        let (damage, to_do) = (&finding.damage, hints::about_finding(finding));
        out += &format!("DAMAGED: {damage}; {to_do} [{touched}]\n");
        for chunk in finding.chunks.iter().take(CHUNKS_SHOWN) {
            out += &format!("  lost with it: {chunk}\n");
        }
        if finding.chunks.len() > CHUNKS_SHOWN {
            let more = count((finding.chunks.len() - CHUNKS_SHOWN) as u64);
            out += &format!("  and {more} more chunks (--json lists them)\n");
        }
    }
    for NotChecked { reason, snapshots } in &report.not_checked {
        let needed = match snapshots.is_empty() {
            true => String::new(),
            false => format!(" [needed by {}]", snapshots.join(", ")),
        };
        out += &format!("NOT CHECKED: {reason}{needed}\n");
    }
    if report.findings.is_empty() {
        out += match report.not_checked.is_empty() {
            true => "Nothing is damaged.\n",
            false => "Nothing that was checked is damaged.\n",
        };
    }
    out
}
