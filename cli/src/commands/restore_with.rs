//! `snapstore restore --with`: machines of another monitor.

use std::process::ExitCode;

use serde_json::json;
use snapstore_host::Overlays;
use snapstore_host::monitors::{Kind, MonitorRestore, RestoredMachine, restore};
use snapstore_host::runtime::Runtime;

use crate::args::RestoreArgs;
use crate::commands::lazy::{self, RemoteTagName};
use crate::context::Context;
use crate::logging::say;

pub fn run(context: &Context, args: &RestoreArgs, kind: Kind) -> anyhow::Result<ExitCode> {
    if let Some(name) = RemoteTagName::parse(&args.snapshot)? {
        return Err(lazy::not_with("--with", &name));
    }
    let store = context.open()?;
    let runtime = Runtime::open()?;
    let wanted = MonitorRestore {
        snapshot: &args.snapshot,
        kind,
        program: args.exec.as_deref(),
        name: args.name.as_deref(),
        count: args.count.into(),
        nets: &args.nets,
        overlays: Overlays::new(args.start.overlay_dir.as_deref(), None)?,
        run: !args.start.paused,
        prefetch: !args.no_prefetch,
    };
    let restored = restore(&runtime, &store, &wanted, |remark| {
        say!("warning: {remark}")
    })?;
    if let Some(why) = &restored.not_pinned {
        say!("warning: {why}");
    }
    let value = json!({
        "machines": restored.machines,
        "warnings": restored.remarks,
    });
    context.answer(&value, || {
        restored.machines.iter().map(describe).collect::<String>()
    })?;
    Ok(ExitCode::SUCCESS)
}

fn describe(machine: &RestoredMachine) -> String {
    let mut out = format!(
        "{} runs in process {}, {} {}\n  {:<14} {}\n",
        machine.name,
        machine.pid,
        machine.monitor,
        machine.version,
        "api",
        machine.api.display()
    );
    for (name, path) in &machine.paths {
        out += &format!("  {name:<14} {}\n", path.display());
    }
    out
}
