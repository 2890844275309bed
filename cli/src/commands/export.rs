//! `snapstore export`

use std::fs::{self, File};
use std::io::{self, BufWriter, IsTerminal as _, Write};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use serde_json::json;
use snapstore_host::Usage;
use snapstore_store::{ExportRequest, Exported, Store};

use crate::args::ExportArgs;
use crate::commands::each_once;
use crate::context::Context;
use crate::format::{count, counted, size};
use crate::logging::say;
use crate::progress::{Bar, Unit};
use crate::replace::check_outside;
use crate::stoppable::Stoppable;

/// What stands for standard input or output.
pub const STANDARD: &str = "-";
const BUFFER_BYTES: usize = 256 << 10;

pub fn run(context: &Context, args: &ExportArgs) -> anyhow::Result<ExitCode> {
    let context = &context.stopped_by_signals()?;
    let to_standard = args.output == Path::new(STANDARD);
    if to_standard && context.json() {
        bail!(Usage(
            "standard output cannot have both the snapshots and the JSON object; name a file with \
             -o"
            .to_owned()
        ));
    }
    if to_standard && io::stdout().is_terminal() {
        bail!(Usage(
            "standard output is a terminal; redirect it, or name a file with -o".to_owned()
        ));
    }
    each_once(&args.snapshots)?;
    let store = context.open()?;
    if !to_standard {
        check_outside(&store, &args.output)?;
    }
    let label = match to_standard {
        true => PathBuf::from("standard output"),
        false => args.output.clone(),
    };
    let request = ExportRequest {
        snapshots: args.snapshots.clone(),
        chain: args.chain,
        label,
    };
    if to_standard {
        let stdout = io::stdout().as_fd().try_clone_to_owned();
        let stdout = File::from(stdout.context("cannot use standard output")?);
        let exported = export(
            &store,
            &request,
            Stoppable::new(stdout, context.cancel().clone()),
        )?;
        say!("{}", describe(&exported, "standard output").trim_end());
        return Ok(ExitCode::SUCCESS);
    }
    let exported = to_file(context, &store, &request)?;
    let value = json!({
        "file": args.output.to_string_lossy(),
        "snapshots": exported.snapshots,
        "left_out": exported.left_out,
        "chunks": exported.chunks,
        "stream_bytes": exported.stream_bytes,
    });
    let file = args.output.display().to_string();
    context.answer(&value, || describe(&exported, &file))?;
    Ok(ExitCode::SUCCESS)
}

fn export(store: &Store, request: &ExportRequest, out: impl Write) -> anyhow::Result<Exported> {
    let out = BufWriter::with_capacity(BUFFER_BYTES, out);
    Ok(store.export(request, out, &Bar::new(Unit::Bytes))?)
}

/// Writes a file that appears once it is whole and durable. What is there and is no
/// regular file, such as a pipe, is written to.
fn to_file(context: &Context, store: &Store, request: &ExportRequest) -> anyhow::Result<Exported> {
    let path = &request.label;
    let cannot = |what: &str, path: &Path| format!("cannot {what} {}", path.display());
    if fs::metadata(path).is_ok_and(|found| !found.is_file()) {
        let to = Stoppable::writes(path, context.cancel().clone());
        return export(store, request, to.with_context(|| cannot("write", path))?);
    }
    let mut part = path.clone().into_os_string();
    part.push(format!(".{}.part", std::process::id()));
    let part = Part(PathBuf::from(part));
    // A new file: in a directory that others may write to, the name could be a link of theirs.
    let file = File::create_new(&part.0).with_context(|| cannot("create", &part.0))?;
    let exported = export(store, request, &file)?;
    file.sync_all().with_context(|| cannot("flush", &part.0))?;
    fs::rename(&part.0, path).with_context(|| cannot("write", path))?;
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
    let dir = dir.unwrap_or(Path::new("."));
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .with_context(|| cannot("flush", dir))?;
    Ok(exported)
}

/// A file that is not whole yet; it goes when this is dropped, unless it was renamed.
pub struct Part(pub PathBuf);

impl Drop for Part {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn describe(exported: &Exported, file: &str) -> String {
    let mut out = String::new();
    for snapshot in &exported.snapshots {
        out += &format!("  {} {}\n", snapshot.tags.join(", "), snapshot.id.short());
    }
    out += &left_out(exported);
    out + &format!(
        "Exported {} to {file}: {} chunks in {}.\n",
        snapshots(exported.snapshots.len()),
        count(exported.chunks),
        size(exported.stream_bytes),
    )
}

/// What does not go along.
pub fn left_out(exported: &Exported) -> String {
    if exported.left_out.is_empty() {
        return String::new();
    }
    let ids: Vec<String> = exported.left_out.iter().map(|id| id.short()).collect();
    format!("  left out, since no tag names them: {}\n", ids.join(", "))
}

pub fn snapshots(number: usize) -> String {
    counted(number as u64, "snapshot")
}
