//! `snapstore verify`

use std::process::ExitCode;

use snapstore_store::VerifyReport;

use crate::args::VerifyArgs;
use crate::context::Context;
use crate::exit;
use crate::format::{count, size};
use crate::progress::{Bar, Unit};

pub fn run(context: &Context, args: &VerifyArgs) -> anyhow::Result<ExitCode> {
    let store = context.open()?;
    let report = store.verify(args.read_data, &Bar::new(Unit::Items))?;
    context.answer(&report, || describe(&report))?;
    Ok(if !report.findings.is_empty() {
        ExitCode::from(exit::DAMAGED)
    } else if !report.newer.is_empty() {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn describe(report: &VerifyReport) -> String {
    let read = if report.chunks_read > 0 {
        format!(
            ", {} chunks ({}) read",
            count(report.chunks_read),
            size(report.bytes_read)
        )
    } else {
        String::new()
    };
    let mut out = format!(
        "Checked {} packs and {} snapshots{read}.\n",
        report.packs, report.snapshots
    );
    for finding in &report.findings {
        let touched = if finding.snapshots.is_empty() {
            "no tagged snapshot needs it".to_owned()
        } else {
            format!("needed by {}", finding.snapshots.join(", "))
        };
        out += &format!("DAMAGED: {} [{touched}]\n", finding.damage);
    }
    for newer in &report.newer {
        out += &format!("NOT CHECKED: {newer}\n");
    }
    if report.findings.is_empty() {
        out += "Nothing is damaged.\n";
    }
    out
}
