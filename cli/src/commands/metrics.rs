//! `snapstore metrics`

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use snapstore_host::metrics::{machines, mounts};

use crate::args::MetricsArgs;
use crate::context::Context;
use crate::metrics::{self, Page};

pub fn run(context: &Context, args: &MetricsArgs) -> anyhow::Result<ExitCode> {
    let page = collect(context, args.full)?;
    match &args.output {
        None => context.answer(&page.json(), || page.text())?,
        Some(path) => {
            let text = match context.json() {
                true => format!("{}\n", page.json()),
                false => page.text(),
            };
            replace(path, &text).with_context(|| format!("cannot write {}", path.display()))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn collect(context: &Context, full: bool) -> anyhow::Result<Page> {
    let context = &context.stopped_by_signals()?;
    let store = context.open()?;
    let mut page = metrics::page();
    metrics::add_store(&mut page, &store, &store.usage()?);
    if full {
        metrics::add_stats(&mut page, &store.stats()?);
    }
    metrics::add_mounts(&mut page, &mounts(store.path())?);
    metrics::add_machines(&mut page, &machines()?);
    Ok(page)
}

/// Whoever reads the file at any time finds all of a page. Nobody needs it after a crash.
fn replace(path: &Path, text: &str) -> std::io::Result<()> {
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(format!(".{}.part", std::process::id()));
    let written = File::create(&unfinished)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .and_then(|()| fs::rename(&unfinished, path));
    if written.is_err() {
        let _ = fs::remove_file(&unfinished);
    }
    written
}
