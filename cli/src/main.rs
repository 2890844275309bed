//! The `snapstore` command.

#![forbid(unsafe_code)]

mod args;
mod bounded_log;
mod commands;
mod committed;
mod completions;
mod context;
mod exit;
mod form;
mod format;
mod hints;
mod interrupt;
mod known;
mod log_format;
mod logging;
mod map;
mod metrics;
mod pager;
mod progress;
mod replace;
mod report;
mod stoppable;
mod terminal;

use std::process::ExitCode;

use clap::Parser as _;

use args::{Cli, Command};
use bounded_log::Sink;
use context::{Context, variable};
use log_format::LogFormat;

fn main() -> ExitCode {
    if let Err(error) = snapstore_host::tidy() {
        return exit::report(&error);
    }
    // Parsing leaves a heap in pieces, and every machine's process would fill
    // those anew.
    let log_format = told_format();
    let prepare = || {
        if let Some(format) = log_format {
            format.choose();
        }
        logging::to_file_at_stderr(0);
    };
    if let Some(done) = snapstore_host::run_if_hidden(prepare) {
        return done.map_or_else(|error| exit::report(&error), ExitCode::from);
    }
    completions::answer_shell();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(answer) => return exit::usage(&answer),
    };
    if let Some(format) = cli.log_format.or(log_format) {
        format.choose();
        snapstore_host::set_log_format(format.name());
    }
    let code = start_logging(&cli).and_then(|()| run(cli));
    let code = code.unwrap_or_else(|error| exit::report(&error));
    logging::finish();
    code
}

/// The format of the log that the environment asks for.
fn told_format() -> Option<LogFormat> {
    LogFormat::named(variable(snapstore_host::LOG_FORMAT)?.to_str()?)
}

/// A server of a mount lives long: its log is bounded, and nobody waits for it.
fn start_logging(cli: &Cli) -> anyhow::Result<()> {
    match &cli.command {
        Command::Mount(args) if args.announce => {
            snapstore_host::detach()?;
            let store = Context::new(cli.store.clone(), false, None).store_path()?;
            let log = snapstore_host::mount_server::log_path(&store);
            logging::to_bounded(cli.verbose, Sink::File(log));
        }
        Command::Mount(args) if args.foreground => logging::to_bounded(cli.verbose, Sink::Stderr),
        // Its server, which is forked off, logs for itself.
        Command::Mount(_) => {}
        _ => logging::to_stderr(cli.verbose),
    }
    Ok(())
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let context = Context::new(cli.store, cli.json, cli.lock_timeout).with_pager(!cli.no_pager);
    match cli.command {
        Command::Init(args) => commands::init::run(&context, &args),
        Command::Commit(args) => match (&args.vm, commands::commit_monitor::named(&args)) {
            (Some(name), _) => commands::commit_vm::run(&context, &args, name),
            (None, Some((kind, socket))) => {
                commands::commit_monitor::run(&context, &args, kind, socket)
            }
            (None, None) => commands::commit::run(&context, &args),
        },
        Command::Mount(args) => commands::mount::run(&context, &args),
        Command::Warm(args) => commands::warm::run(&context, &args),
        Command::Umount(args) => commands::umount::run(&context, &args),
        Command::Run(args) => commands::run::run(&context, &args),
        Command::Restore(args) => match args.with {
            Some(kind) => commands::restore_with::run(&context, &args, kind),
            None => commands::restore::run(&context, &args),
        },
        Command::Ps(args) => commands::ps::run(&context, &args),
        Command::Pause(args) => commands::control::pause(&context, &args),
        Command::Resume(args) => commands::control::resume(&context, &args),
        Command::Stop(args) => commands::control::stop(&context, &args),
        Command::Console(args) => commands::control::console(&args),
        Command::Exec(args) => commands::exec::run(&context, &args),
        Command::Cp(args) => commands::cp::run(&context, &args),
        Command::Tag(args) => commands::tag::set(&context, &args),
        Command::Tags(args) => commands::tag::list(&context, &args),
        Command::Rm(args) => commands::tag::remove(&context, &args),
        Command::Forget(args) => commands::forget::run(&context, &args),
        Command::Log(args) => commands::log::run(&context, &args),
        Command::Show(args) => commands::show::run(&context, &args),
        Command::Diff(args) => commands::diff::run(&context, &args),
        Command::Map(args) => commands::map::run(&context, &args),
        Command::Report(args) => commands::report::run(&context, &args),
        Command::Export(args) => commands::export::run(&context, &args),
        Command::Import(args) => commands::import::run(&context, &args),
        Command::Copy(args) => commands::copy::run(&context, &args),
        Command::Remote(args) => commands::remote::run(&context, &args),
        Command::Push(args) => commands::remote::push(&context, &args),
        Command::Pull(args) => commands::remote::pull(&context, &args),
        Command::Gc(args) => commands::gc::run(&context, &args),
        Command::Verify(args) => commands::verify::run(&context, &args),
        Command::Upgrade(args) => commands::upgrade::run(&context, &args),
        Command::Repair => commands::repair::run(&context),
        Command::Stats(args) => commands::stats::run(&context, &args),
        Command::Completions(args) => commands::completions::run(&args),
        Command::Generate(args) => commands::generate::run(&args),
        Command::Metrics(args) => commands::metrics::run(&context, &args),
        Command::Top(args) => commands::top::run(&context, &args),
        Command::Doctor(args) => commands::doctor::run(&context, &args),
    }
}
