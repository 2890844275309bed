//! `snapstore upgrade`

use std::process::ExitCode;

use snapstore_store::{Store, UpgradeReport};

use crate::args::UpgradeArgs;
use crate::context::Context;
use crate::format::{count, counted, size};
use crate::progress::{Bar, Unit};

pub fn run(context: &Context, args: &UpgradeArgs) -> anyhow::Result<ExitCode> {
    let path = context.store_path()?;
    let report = Store::upgrade(&path, args.dry_run, &Bar::new(Unit::Items))?;
    context.answer(&report, || describe(&report, args.dry_run))?;
    Ok(ExitCode::SUCCESS)
}

fn describe(report: &UpgradeReport, dry_run: bool) -> String {
    if report.nothing_to_do {
        return "The store is in format 2, the newest one.\n".to_owned();
    }
    let mut out = String::new();
    if report.resumed {
        out += "Goes on with an upgrade that was interrupted.\n";
    }
    let packs = format!(
        "{} ({})",
        counted(report.packs, "pack"),
        size(report.pack_bytes)
    );
    if dry_run {
        out += &format!(
            "Would rewrite {packs} in format 2; needs {} of free space.\n",
            size(report.needs_bytes)
        );
        for holder in &report.in_the_way {
            out += &format!("It cannot begin beside {holder}.\n");
        }
        return out;
    }
    out += &format!("Upgraded the store to format 2: rewrote {packs}.\n");
    if report.left_out_chunks > 0 {
        out += &format!(
            "Left out {} chunks that no snapshot needs and that could not be read.\n",
            count(report.left_out_chunks)
        );
    }
    out
}
