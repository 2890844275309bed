//! `snapstore report`

use std::io::{self, IsTerminal as _, Write as _};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use serde_json::json;
use snapstore_host::Usage;

use crate::args::ReportArgs;
use crate::commands::export::{STANDARD, snapshots};
use crate::commands::tag::{tell_unreadable, unreadable};
use crate::context::Context;
use crate::exit;
use crate::format::size;
use crate::replace::{check_outside, replace};
use crate::report;

pub fn run(context: &Context, args: &ReportArgs) -> anyhow::Result<ExitCode> {
    let context = &context.stopped_by_signals()?;
    let to_standard = args.output == Path::new(STANDARD);
    if to_standard && context.json() {
        bail!(Usage(
            "standard output cannot have both the page and the JSON object; name a file with -o"
                .to_owned()
        ));
    }
    if to_standard && io::stdout().is_terminal() {
        bail!(Usage(
            "standard output is a terminal; redirect it, or name a file with -o".to_owned()
        ));
    }
    let store = context.open()?;
    if !to_standard {
        check_outside(&store, &args.output)?;
    }
    let report = report::gather(&store, args.snapshot.as_deref())?;
    let page = report::page(&report.value)?;
    if to_standard {
        let mut out = io::stdout().lock();
        exit::output(out.write_all(page.as_bytes()).and_then(|()| out.flush()))?;
        return Ok(tell_unreadable(&report.unreadable));
    }
    let file = args.output.display();
    replace(&args.output, page.as_bytes(), context.cancel())
        .with_context(|| format!("cannot write {file}"))?;
    let value = json!({
        "file": args.output.to_string_lossy(),
        "bytes": page.len(),
        "snapshots": report.snapshots,
        "maps": report.maps,
        "unreadable": unreadable(&report.unreadable),
    });
    context.answer(&value, || {
        let snapshots = snapshots(report.snapshots);
        let bytes = size(page.len() as u64);
        format!("Wrote {file}, {bytes}: {snapshots}. Open it in a browser; it loads nothing else.")
    })?;
    Ok(tell_unreadable(&report.unreadable))
}
