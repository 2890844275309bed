//! `snapstore restore`

use std::process::ExitCode;
use std::time::Instant;

use anyhow::bail;
use snapstore_host::restore::{RestoreRequest, prepare};
use snapstore_host::runtime::Runtime;
use snapstore_host::start::borrowed;
use snapstore_host::starter::Starter;
use snapstore_host::{ErrorClass, Overlays, Usage, class, message};

use crate::args::RestoreArgs;
use crate::commands::lazy;
use crate::commands::start::start;
use crate::context::Context;
use crate::logging::say;

pub fn run(context: &Context, args: &RestoreArgs) -> anyhow::Result<ExitCode> {
    if args.count > 1 && !args.start.detach {
        bail!(Usage(
            "only one machine can be attached; use --detach with -n".to_owned()
        ));
    }
    let runtime = Runtime::open()?;
    for _ in 0..RETRIES {
        match once(context, args, &runtime) {
            Err(error) if class(&error) == ErrorClass::Unmounted => {
                tracing::debug!(error = message(&error), "once more");
            }
            done => return done,
        }
    }
    once(context, args, &runtime)
}

/// How often a restore begins anew whose mount was undone before its machines had it open.
const RETRIES: usize = 5;

fn once(context: &Context, args: &RestoreArgs, runtime: &Runtime) -> anyhow::Result<ExitCode> {
    let began = Instant::now();
    // It gets ready while this process opens the store.
    let mut starter = Starter::launch(runtime)?;
    let store = context.open()?;
    let (snapshot, elsewhere) = lazy::find(&store, &args.snapshot, &args.reading, !args.no_fill)?;
    let request = RestoreRequest {
        snapshot: &snapshot,
        elsewhere,
        name: args.name.as_deref(),
        count: args.count.into(),
        nets: &args.nets,
        overlays: Overlays::new(args.start.overlay_dir.as_deref(), args.start.overlay_limit)?,
        share_layout: args.share_layout,
        prefetch: !args.no_prefetch,
        common: !args.no_common_memory,
    };
    let mut restoration = prepare(runtime, &store, &mut starter, request)?;
    if let Some(why) = &restoration.not_pinned {
        say!("warning: {why}");
    }
    tracing::debug!(seconds = began.elapsed().as_secs_f64(), "mounted");
    restoration.spec.run = !args.start.paused;
    restoration.spec.require_reseed = args.require_reseed;
    let kept = borrowed(&restoration.kept);
    start(
        context,
        (runtime, starter),
        &args.start,
        restoration.spec,
        &kept,
        restoration.reserved,
        None,
    )
}
