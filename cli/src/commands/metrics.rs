//! `snapstore metrics`

use std::process::ExitCode;

use anyhow::Context as _;
use snapstore_host::metrics::{machines, mounts};
use snapstore_store::Store;

use crate::args::MetricsArgs;
use crate::context::Context;
use crate::metrics::{self, Page};
use crate::replace::{check_outside, replace};

pub fn run(context: &Context, args: &MetricsArgs) -> anyhow::Result<ExitCode> {
    let context = &context.stopped_by_signals()?;
    let store = context.open()?;
    if let Some(path) = &args.output {
        check_outside(&store, path)?;
    }
    let page = collect(&store, args.full)?;
    match &args.output {
        None => context.answer(&page.json(), || page.text())?,
        Some(path) => {
            let text = match context.json() {
                true => format!("{}\n", page.json()),
                false => page.text(),
            };
            replace(path, text.as_bytes(), context.cancel())
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn collect(store: &Store, full: bool) -> anyhow::Result<Page> {
    let mut page = metrics::page();
    metrics::add_store(&mut page, store, &store.usage()?);
    if full {
        metrics::add_stats(&mut page, &store.stats()?);
    }
    metrics::add_mounts(&mut page, &mounts(store.path())?);
    metrics::add_machines(&mut page, &machines()?);
    Ok(page)
}
