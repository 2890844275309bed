//! `snapstore import`

use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use snapstore_store::{Cancel, ImportRequest, Imported};

use super::export::{STANDARD, snapshots};
use crate::args::ImportArgs;
use crate::context::Context;
use crate::format::{count, size};
use crate::progress::{Bar, Unit};
use crate::stoppable::Stoppable;

pub fn run(context: &Context, args: &ImportArgs) -> anyhow::Result<ExitCode> {
    let context = &context.stopped_by_signals()?;
    let (from, label) = open(&args.input, context.cancel())?;
    let found = from.file().metadata().ok().filter(|found| found.is_file());
    let request = ImportRequest {
        replace: args.replace,
        label,
        stream_bytes: found.map(|found| found.len()),
    };
    let store = context.open_or_create_default()?;
    let imported = store.import(&request, from, &Bar::new(Unit::Bytes))?;
    context.answer(&imported, || describe(&imported))?;
    store.tidy_index();
    Ok(ExitCode::SUCCESS)
}

fn open(path: &Path, cancel: &Cancel) -> anyhow::Result<(Stoppable, PathBuf)> {
    if path == Path::new(STANDARD) {
        let stdin = io::stdin().as_fd().try_clone_to_owned();
        let stdin = stdin.context("cannot use standard input")?;
        let stdin = Stoppable::new(stdin.into(), cancel.clone());
        return Ok((stdin, PathBuf::from("standard input")));
    }
    let file = Stoppable::reads(path, cancel.clone());
    let file = file.with_context(|| format!("cannot open {}", path.display()))?;
    Ok((file, path.to_owned()))
}

pub fn describe(imported: &Imported) -> String {
    let mut out = String::new();
    for snapshot in &imported.snapshots {
        out += &format!("  {} {}", snapshot.tags.join(", "), snapshot.id.short());
        if snapshot.id != snapshot.exported_as {
            out += &format!(
                ", which was {}: a store of format 1 cannot hold that id",
                snapshot.exported_as.short()
            );
        }
        out += "\n";
    }
    out + &format!(
        "Imported {}: stored {} new chunks of {} in {}.\n",
        snapshots(imported.snapshots.len()),
        count(imported.added_chunks),
        count(imported.chunks),
        size(imported.added_bytes),
    )
}
