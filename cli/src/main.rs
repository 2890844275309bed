//! The `snapstore` command.

#![forbid(unsafe_code)]

mod args;
mod background;
mod commands;
mod context;
mod exit;
mod format;
mod progress;
mod vms;

use std::process::ExitCode;

use clap::Parser as _;

use args::{Cli, Command};
use context::Context;

fn main() -> ExitCode {
    if let Err(error) = background::tidy() {
        return exit::report(&error);
    }
    // Parsing leaves a heap in pieces, and every machine's process would fill
    // those anew.
    if std::env::args_os().skip(1).eq([vms::host::COMMAND]) {
        start_logging(0);
        return vms::host::run().unwrap_or_else(|error| exit::report(&error));
    }
    let cli = Cli::parse();
    start_logging(cli.verbose);
    match run(cli) {
        Ok(code) => code,
        Err(error) => exit::report(&error),
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let context = Context::new(cli.store, cli.json, cli.lock_timeout);
    match cli.command {
        Command::Init(args) => commands::init::run(&context, &args),
        Command::Commit(args) => commands::commit::run(&context, &args),
        Command::Mount(args) => commands::mount::run(&context, &args),
        Command::Umount(args) => commands::umount::run(&context, &args),
        Command::Run(args) => commands::run::run(&context, &args),
        Command::Restore(args) => commands::restore::run(&context, &args),
        Command::Ps(args) => commands::ps::run(&context, &args),
        Command::Pause(args) => commands::control::pause(&context, &args),
        Command::Resume(args) => commands::control::resume(&context, &args),
        Command::Stop(args) => commands::control::stop(&context, &args),
        Command::Console(args) => commands::control::console(&args),
        Command::Exec(args) => commands::exec::run(&context, &args),
        Command::Tag(args) => commands::tag::set(&context, &args),
        Command::Tags => commands::tag::list(&context),
        Command::Rm(args) => commands::tag::remove(&context, &args),
        Command::Log(args) => commands::log::run(&context, &args),
        Command::Show(args) => commands::show::run(&context, &args),
        Command::Diff(args) => commands::diff::run(&context, &args),
        Command::Gc(args) => commands::gc::run(&context, &args),
        Command::Verify(args) => commands::verify::run(&context, &args),
        Command::Repair => commands::repair::run(&context),
        Command::Stats => commands::stats::run(&context),
        Command::Demo(args) => commands::demo::run(&context, &args),
    }
}

/// Warnings by default, more with each `-v`; `RUST_LOG` overrides.
fn start_logging(verbose: u8) {
    let level = match verbose {
        0 => "warn",
        1 => "snapstore=info,snapstore_store=info,snapstore_fuse=info,snapstore_vmm=info,warn",
        _ => "snapstore=debug,snapstore_store=debug,snapstore_fuse=debug,snapstore_vmm=debug,info",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .compact()
        .init();
}
