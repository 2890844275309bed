//! Another build of the program, such as an earlier one, beside this one.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::ensure;
use snapstore_tests::harness::{Cli, program};

use crate::mounts::Mount;
use crate::read::read_timed;
use crate::report::{Comparison, Unit};
use crate::stats::{Run, take_turns};
use crate::tools::{bytes_under, figure, hash, settle, timed};
use crate::{Bench, utf8};

/// The variable with the other program's path.
const BEFORE: &str = "BEFORE";
/// No slower than before, but for noise.
const AIM: f64 = 1.1;
/// What is measured, in the order of [`day`]'s figures.
const WHAT: [(&str, Unit); 10] = [
    ("start: print the version", Unit::Seconds),
    ("commit into an empty store", Unit::Seconds),
    ("commit of the same image again", Unit::Seconds),
    ("commits of three children", Unit::Seconds),
    ("bytes of the five images", Unit::Bytes),
    ("verify --read-data", Unit::Seconds),
    ("mount until it can be read", Unit::Seconds),
    (
        "read all of the newest image through it, cold",
        Unit::Seconds,
    ),
    ("umount", Unit::Seconds),
    ("gc after a tag was removed", Unit::Seconds),
];

/// One day of a store with this program and with the one that `BEFORE` names, each with a
/// store of its own.
///
/// # Errors
/// If something fails.
pub fn before(bench: &mut Bench) -> anyhow::Result<()> {
    let Some(other) = env::var_os(BEFORE).map(PathBuf::from) else {
        bench
            .report
            .skip("before", "BEFORE=PATH names no other program");
        return Ok(());
    };
    let this = &*bench;
    let programs = [program()?, other];
    let subjects: Vec<Run<'_>> = programs
        .iter()
        .map(|program| -> Run<'_> { Box::new(|round| day(this, program, round)) })
        .collect();
    let done = take_turns(bench.rounds, subjects)?;
    for (number, (what, unit)) in WHAT.into_iter().enumerate() {
        bench.report.add(&Comparison {
            what: what.to_owned(),
            unit,
            product: done[0][number].clone(),
            against: "the program before".to_owned(),
            baseline: done[1][number].clone(),
            aim: Some(AIM),
        });
    }
    Ok(())
}

/// The figures of a store from its first commit to its first collection.
fn day(bench: &Bench, program: &Path, round: usize) -> anyhow::Result<Vec<f64>> {
    let cli = Cli::new(&bench.path(&format!("day-{round}"))).with_program(program);
    let dir = bench.path("day-mount");
    let names = ["base", "base+1", "base+2", "base+3", "other"];
    let images = names.map(|name| bench.images.path(name));
    for image in &images {
        settle(&[image])?;
    }
    let commit = |tag: &str, image: &Path, parent: &[&str]| -> anyhow::Result<f64> {
        let arguments = ["commit", tag, "--memory", utf8(image)?];
        timed(&mut cli.command(&[&arguments, parent].concat())?)
    };
    cli.ok(&["init"])?;
    let mut figures = vec![timed(Command::new(program).arg("--version"))?];
    figures.push(commit("base", &images[0], &["--no-parent"])?);
    figures.push(commit("again", &images[0], &["--no-parent"])?);
    let mut children = 0.0;
    for number in 1..4 {
        let parent = ["--parent", names[number - 1]];
        children += commit(names[number], &images[number], &parent)?;
    }
    figures.push(children);
    commit("other", &images[4], &["--no-parent"])?;
    figures.push(figure(bytes_under(cli.store())?));
    figures.push(timed(&mut cli.command(&["verify", "--read-data"])?)?);
    settle(&[cli.store()])?;
    let start = Instant::now();
    let mount = Mount::product(&cli, "base+3", &dir, &[])?;
    figures.push(start.elapsed().as_secs_f64());
    figures.push(read_timed(&mount.memory())?);
    ensure!(
        hash(&mount.memory())? == hash(&images[3])?,
        "{} shows other bytes",
        program.display()
    );
    figures.push(mount.unmount()?);
    cli.ok(&["rm", "base+1"])?;
    figures.push(timed(&mut cli.command(&["gc"])?)?);
    fs::remove_dir_all(cli.store())?;
    Ok(figures)
}
