//! What the program has to say beside its answer. Nothing of it can fail or end
//! anything: standard error may be closed, full or nobody's, a log's disk too.

use std::fmt::Arguments;
use std::io::{self, IsTerminal as _, Write};
use std::sync::OnceLock;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::bounded_log::{BoundedLog, Sink};
use crate::log_format::LogFormat;

/// The bounded log of this process, if it has one.
static BOUNDED: OnceLock<BoundedLog> = OnceLock::new();

/// Says a line to the user, as `eprintln!` does, which panics if it cannot.
macro_rules! say {
    ($($text:tt)*) => { $crate::logging::line(format_args!($($text)*)) };
}
pub(crate) use say;

/// What [`say!`] calls.
pub fn line(text: Arguments<'_>) {
    // One write: lines of several threads and processes stay whole.
    let line = LogFormat::chosen().line(&text.to_string());
    let _ = io::stderr().write_all(line.as_bytes());
}

/// Logs to standard error. Whoever is slow to read that holds this process up.
pub fn to_stderr(verbose: u8) {
    start(verbose, wants_colours(), || Quiet(io::stderr()));
}

/// As [`to_stderr`] for a process whose standard error becomes a machine's log later, of
/// bounded length.
pub fn to_file_at_stderr(verbose: u8) {
    start(verbose, false, || snapstore_host::capped_log::CappedStderr);
}

/// Logs to a sink of bounded length, through a thread: nobody waits for it.
pub fn to_bounded(verbose: u8, sink: Sink) {
    let colours = matches!(sink, Sink::Stderr) && wants_colours();
    // Without a thread there is no log. What needs more threads says so.
    let log = BoundedLog::start(sink).ok();
    if let Some(log) = &log {
        let _ = BOUNDED.set(log.clone());
        std::panic::set_hook(Box::new(|panic| tracing::error!("{panic}")));
    }
    start(verbose, colours, move || Quiet(log.clone()));
}

/// Before the process ends: lets a bounded log write its last lines.
pub fn finish() {
    if let Some(log) = BOUNDED.get() {
        log.flush();
    }
}

/// Warnings by default, more with each `-v`; `RUST_LOG` overrides.
fn start<W>(verbose: u8, colours: bool, writer: W)
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    // Of every crate of ours: a target is compared with the beginning of a name.
    let level = match verbose {
        0 => "warn",
        1 => "snapstore=info,warn",
        _ => "snapstore=debug,info",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .with_ansi(colours)
        .with_target(false)
        // It would tell of lines that cannot be written with `eprintln!`.
        .log_internal_errors(false);
    // It is set up once.
    let _ = match LogFormat::chosen() {
        LogFormat::Text => log.compact().try_init(),
        LogFormat::Json => log.json().try_init(),
    };
}

/// Only on a terminal, and not if the user wants none.
fn wants_colours() -> bool {
    io::stderr().is_terminal() && !colours_refused() && LogFormat::chosen() == LogFormat::Text
}

/// Whether the user wants no colours (no-color.org).
pub fn colours_refused() -> bool {
    std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
}

/// A writer that has always written.
struct Quiet<W>(W);

impl Write for Quiet<io::Stderr> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = self.0.write_all(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Write for Quiet<Option<BoundedLog>> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(log) = &self.0 {
            log.line(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
