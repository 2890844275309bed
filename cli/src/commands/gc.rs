//! `snapstore gc`

use std::process::ExitCode;

use snapstore_store::{Decision, ErrorClass, GcOptions, GcReport};

use crate::args::GcArgs;
use crate::context::Context;
use crate::format::{count, size, table};
use crate::hints;
use crate::progress::{Bar, Unit};

pub fn run(context: &Context, args: &GcArgs) -> anyhow::Result<ExitCode> {
    let context = &context.stopped_by_signals()?;
    let store = context.open()?;
    let options = GcOptions {
        dry_run: args.dry_run,
        keep_percent: args.keep_percent,
    };
    let report = store.gc(options, &Bar::new(Unit::Items));
    let report = report.map_err(|error| match error.class() {
        ErrorClass::Damaged => {
            anyhow::Error::from(error).context("nothing can be freed as long as this is so")
        }
        _ => error.into(),
    })?;
    context.answer(&report, || describe(&report, args.dry_run))?;
    Ok(ExitCode::SUCCESS)
}

fn describe(report: &GcReport, dry_run: bool) -> String {
    let rows: Vec<_> = report
        .plan
        .packs
        .iter()
        .filter(|pack| pack.decision != Decision::Keep)
        .map(|pack| {
            vec![
                pack.pack.clone(),
                match pack.decision {
                    Decision::Keep => "keep",
                    Decision::Repack => "repack",
                    Decision::Delete => "delete",
                }
                .to_owned(),
                size(pack.file_bytes),
                size(pack.live_bytes),
                format!("{}/{}", count(pack.live_chunks), count(pack.chunks)),
            ]
        })
        .collect();
    let kept = report.plan.packs.len() - rows.len();
    let mut out = String::new();
    if !rows.is_empty() {
        out += &table(
            &["PACK", "PLAN", "SIZE", "NEEDED", "CHUNKS NEEDED"],
            2,
            &rows,
        );
    }
    if dry_run {
        return out
            + &format!(
                "Would free {}; {kept} packs stay as they are.\n",
                size(report.plan.freed_bytes())
            );
    }
    out += &format!(
        "Freed {}; {kept} packs stay as they are.\n",
        size(u64::try_from(report.freed_bytes).unwrap_or(0))
    );
    if report.waiting_packs > 0 {
        out += &format!(
            "{} packs go at a later gc, when these commits have ended: {}.\n",
            report.waiting_packs,
            report.waiting_for.join(", ")
        );
    }
    for damage in report.plan.damaged.iter().chain(&report.not_copied) {
        out += &format!("Its pack stays as it is: {}\n", hints::told_damage(damage));
    }
    if report.out_of_room {
        out += "The disk is too full to repack the rest; run gc again when there is some room.\n";
    }
    out
}
