//! How long commits take.

use std::fs;
use std::process::Command;

use crate::deep::{DEPTH, EDITS, timed_commit};
use crate::stats::{Random, Run, alternate};
use crate::tools::{find, settle, timed};
use crate::{Bench, utf8};

/// Committing an image that is in the store already, against hashing its file.
///
/// # Errors
/// If something fails.
pub fn known(bench: &mut Bench) -> anyhow::Result<()> {
    let cli = bench.base_store()?.clone();
    let image = bench.images.path("base");
    let Some(b3sum) = find("b3sum") else {
        bench.report.skip("commit-known", "b3sum is not installed");
        return Ok(());
    };
    let subjects: Vec<Run<'_>> = vec![
        Box::new(|round| {
            settle(&[&image, cli.store()])?;
            let (tag, memory) = (format!("again-{round}"), utf8(&image)?);
            Ok(vec![timed(
                &mut cli.command(&["commit", &tag, "--memory", memory])?,
            )?])
        }),
        Box::new(|_| {
            settle(&[&image])?;
            Ok(vec![timed(Command::new(&b3sum).arg(&image))?])
        }),
    ];
    let done = alternate(bench.rounds, subjects)?;
    let what = "commit of a known image";
    bench.compare(what, &done[0][0], "b3sum FILE", &done[1][0], Some(1.3));
    Ok(())
}

/// Committing a first image, against compressing its file.
///
/// # Errors
/// If something fails.
pub fn base(bench: &mut Bench) -> anyhow::Result<()> {
    let image = bench.images.path("base");
    let copy = bench.path("copy");
    let zstd = find("zstd");
    let this = &*bench;
    let mut subjects: Vec<Run<'_>> = vec![
        Box::new(|round| {
            let cli = this.new_store(&format!("commit-base-{round}"))?;
            settle(&[&image])?;
            let memory = utf8(&image)?;
            let seconds = timed(&mut cli.command(&["commit", "base", "--memory", memory])?)?;
            fs::remove_dir_all(cli.store())?;
            Ok(vec![seconds])
        }),
        Box::new(|_| {
            settle(&[&image])?;
            let seconds = timed(
                Command::new("cp")
                    .arg("--sparse=never")
                    .args([&image, &copy]),
            )?;
            fs::remove_file(&copy)?;
            Ok(vec![seconds])
        }),
    ];
    let (image, copy) = (&image, &copy);
    if let Some(zstd) = &zstd {
        subjects.push(Box::new(move |_| {
            settle(&[image])?;
            let mut command = Command::new(zstd);
            command
                .args(["-1", "-T2", "-q", "-f"])
                .arg(image)
                .arg("-o")
                .arg(copy);
            let seconds = timed(&mut command)?;
            fs::remove_file(copy)?;
            Ok(vec![seconds])
        }));
    }
    let done = alternate(bench.rounds, subjects)?;
    let what = "commit into an empty store";
    match done.get(2) {
        Some(zstd) => bench.compare(what, &done[0][0], "zstd -1 -T2", &zstd[0], Some(0.6)),
        None => bench.report.skip("commit-base", "zstd is not installed"),
    }
    bench.compare(what, &done[0][0], "cp (does not sync)", &done[1][0], None);
    Ok(())
}

/// Committing small changes to the end of a long chain, against a short one.
///
/// # Errors
/// If something fails.
pub fn diff_depth(bench: &mut Bench) -> anyhow::Result<()> {
    let (diff_1, diff_end, diff_short) = (
        bench.path("diff-1"),
        bench.path("diff-end"),
        bench.path("diff-short"),
    );
    let end = format!("d{DEPTH}");
    let deep = bench.deep()?;
    // The same pages change at the same places in each round's three commits.
    let step = |guest: &crate::guest::Guest, round: usize| {
        let mut guest = guest.clone();
        let step = guest.run(&mut Random::new(1000 + round as u64), EDITS, 0);
        (guest, step)
    };
    let subjects: Vec<Run<'_>> = vec![
        Box::new(|round| {
            let (guest, step) = step(&deep.guest_at_end, round);
            let tag = format!("end-{round}");
            let commit = timed_commit(&deep.long, (&guest, &step), &end, &tag, &diff_end)?;
            Ok(vec![commit])
        }),
        Box::new(|round| {
            let (guest, step) = step(&deep.guest_at_1, round);
            let tag = format!("one-{round}");
            let commit = timed_commit(&deep.long, (&guest, &step), "d1", &tag, &diff_1)?;
            Ok(vec![commit])
        }),
        Box::new(|round| {
            let (guest, step) = step(&deep.guest_at_1, round);
            let tag = format!("one-{round}");
            let commit = timed_commit(&deep.short, (&guest, &step), "d1", &tag, &diff_short)?;
            Ok(vec![commit])
        }),
    ];
    let done = alternate(bench.rounds, subjects)?;
    let what = format!("commit of {EDITS} changed pages at depth {DEPTH}");
    bench.compare(
        &what,
        &done[0][0],
        "depth 1, same store",
        &done[1][0],
        Some(1.05),
    );
    let short = "depth 1, store of 2 snapshots";
    bench.compare(&what, &done[0][0], short, &done[2][0], None);
    Ok(())
}
