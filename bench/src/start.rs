//! How long the program takes to start.

use std::process::Command;

use crate::Bench;
use crate::stats::{Run, Samples, alternate};
use crate::tools::timed;
use snapstore_tests::harness::program;

/// What the program's own start may take.
const START_SECONDS: f64 = 0.002;
/// Starts in a round.
const TIMES: usize = 50;

/// Printing the version, against a program that does nothing.
///
/// # Errors
/// If something fails.
pub fn start(bench: &mut Bench) -> anyhow::Result<()> {
    let program = program()?;
    let start = |command: Command| -> Run<'_> {
        let mut command = command;
        Box::new(move |_| {
            let mut seconds = Vec::with_capacity(TIMES);
            for _ in 0..TIMES {
                seconds.push(timed(&mut command)?);
            }
            Ok(vec![Samples::new(seconds).spread().median])
        })
    };
    let mut version = Command::new(program);
    version.arg("--version");
    let subjects = vec![start(version), start(Command::new("true"))];
    let done = alternate(bench.rounds, subjects)?;
    let (version, nothing) = (&done[0][0], &done[1][0]);
    bench.compare("print the version", version, "true", nothing, None);
    let limit = Samples::constant(START_SECONDS, bench.rounds);
    let own = version.minus(nothing);
    bench.compare("its own part of that", &own, "2 ms", &limit, Some(1.0));
    Ok(())
}
