//! `snapstore pause`, `resume`, `stop` and `console`

use std::process::ExitCode;

use serde_json::json;
use snapstore_host::runtime::{Runtime, VmDir};
use snapstore_host::start::{end, for_each};
use snapstore_vmm::control::Request;

use crate::args::{ConsoleArgs, StopArgs, VmArgs};
use crate::commands::each_once;
use crate::context::Context;
use crate::exit;
use crate::logging::say;
use crate::terminal::{self, Attach};

pub fn pause(context: &Context, args: &VmArgs) -> anyhow::Result<ExitCode> {
    order(context, &args.name, &Request::Pause, "paused")
}

pub fn resume(context: &Context, args: &VmArgs) -> anyhow::Result<ExitCode> {
    order(context, &args.name, &Request::Resume, "running")
}

fn order(
    context: &Context,
    name: &str,
    request: &Request,
    state: &str,
) -> anyhow::Result<ExitCode> {
    let vm = Runtime::open()?.running(name)?;
    vm.connect()?.order(request)?;
    context.answer(&json!({"name": name, "state": state}), || {
        format!("{name} is {state}.")
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Ends what can be ended, whatever is the matter with the others: whoever names several
/// wants each of them gone.
pub fn stop(context: &Context, args: &StopArgs) -> anyhow::Result<ExitCode> {
    each_once(&args.names)?;
    let runtime = Runtime::open()?;
    let (mut vms, mut failed) = (Vec::new(), Vec::new());
    if args.all {
        vms = runtime.vms()?;
    }
    for name in &args.names {
        match known(&runtime, name) {
            Ok(vm) => vms.push(vm),
            Err(error) => failed.push(error),
        }
    }
    let ended = for_each(&vms, |vm| Ok(end(vm)))?;
    let mut stopped: Vec<&str> = Vec::new();
    for (vm, ended) in vms.iter().zip(ended) {
        match ended {
            Ok(()) => stopped.push(&vm.name),
            Err(error) => failed.push(error),
        }
    }
    if failed.is_empty() || !stopped.is_empty() {
        context.answer(&json!({"stopped": stopped}), || match stopped.len() {
            0 => "No machine runs.".to_owned(),
            1 => format!("Stopped {}.", stopped[0]),
            count => format!("Stopped {count} machines."),
        })?;
    }
    let mut failed = failed.into_iter();
    let Some(first) = failed.next() else {
        return Ok(ExitCode::SUCCESS);
    };
    for error in failed {
        say!("error: {}", exit::message(&error));
    }
    Err(first)
}

/// A machine that runs, or has left word of its end.
fn known(runtime: &Runtime, name: &str) -> anyhow::Result<VmDir> {
    let vm = runtime.vm(name)?;
    if vm.ending().is_some() {
        return Ok(vm);
    }
    runtime.running(name)
}

pub fn console(args: &ConsoleArgs) -> anyhow::Result<ExitCode> {
    let vm = Runtime::open()?.running(&args.name)?;
    if args.print {
        terminal::print_kept(&vm)?;
        return Ok(ExitCode::SUCCESS);
    }
    Ok(terminal::attach(&vm, Attach::AsVisitor)?.exit_code())
}
