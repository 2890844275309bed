//! `snapstore restore`

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::bail;
use snapstore_host::runtime::Runtime;
use snapstore_host::start::{borrowed, free_names};
use snapstore_host::{Overlays, Spec, Usage, What, mounts, networks};
use snapstore_store::SnapshotId;
use snapstore_vmm::control::Origin;

use crate::args::RestoreArgs;
use crate::commands::start::start;
use crate::context::Context;
use crate::logging::say;

pub fn run(context: &Context, args: &RestoreArgs) -> anyhow::Result<ExitCode> {
    if args.count > 1 && !args.start.detach {
        bail!(Usage(
            "only one machine can be attached; use --detach with -n".to_owned()
        ));
    }
    let began = Instant::now();
    let store = context.open()?;
    // Held by the machines: their next commits are made from this snapshot.
    let (id, pin) = store.pin(&args.snapshot)?;
    if let Some(why) = pin.not_pinned() {
        say!("warning: {why}");
    }
    let runtime = Runtime::open()?;
    let base = args.name.as_deref().unwrap_or(&args.snapshot);
    let (names, _reserved) = free_names(&runtime, base, args.name.is_some(), args.count.into())?;
    let nets = networks::of_machines(&args.nets, &names)?;
    let mounted = mounts::find_or_start(&runtime, &store, id)?;
    check_restorable(&args.snapshot, &mounted.dir)?;
    tracing::debug!(seconds = began.elapsed().as_secs_f64(), dir = %mounted.dir.display(), "mounted");
    let overlays = Overlays::new(args.start.overlay_dir.as_deref(), args.start.overlay_limit)?;
    let spec = Spec {
        overlays,
        names,
        what: What::Restore {
            dir: mounted.dir.clone(),
        },
        nets,
        origin: origin(id, &args.snapshot),
        run: !args.start.paused,
        run_on_word: false,
        kept: Vec::new(),
        confine: true,
        require_reseed: args.require_reseed,
        share_layout: args.share_layout,
        stop_at_ready: false,
    };
    let pin = pin.into_fd();
    let mut kept = borrowed([&pin]);
    kept.extend(borrowed(&mounted.users_lock));
    start(context, &runtime, &args.start, spec, &kept, None)
}

fn origin(id: SnapshotId, name: &str) -> Origin {
    Origin {
        snapshot: Some(id.to_string()),
        tag: Some(name.to_owned()),
    }
}

/// Looks at the mounted files: the store's index need not be opened for it.
fn check_restorable(name: &str, dir: &Path) -> anyhow::Result<()> {
    for needed in ["memory.bin", "vmstate"] {
        if !dir.join(needed).exists() {
            bail!(
                "{name} has no {needed}: it was not committed from a running machine \
                 (`snapstore commit TAG --vm NAME`); `snapstore show {name}` lists what it has"
            );
        }
    }
    Ok(())
}
