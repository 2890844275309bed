//! How long commits take.

use std::fs::{self, File};
use std::io::Write as _;
use std::process::Command;
use std::time::Instant;

use snapstore_store::Store;
use snapstore_tests::scale::usage;

use crate::deep::{DEPTH, EDITS, commit_file, timed_commit};
use crate::guest::{PAGE, distinct_pages};
use crate::stats::{Random, Run, Samples, alternate};
use crate::tools::{figure, find, settle, timed};
use crate::{Bench, utf8};

/// What a new page may take of the processors.
const NEW_PAGE_SECONDS: f64 = 8e-6;
/// What any commit may take of memory (`tests/tests/cli/chains.rs` holds it to that).
const PEAK_BYTES: f64 = 256.0 * 1024.0 * 1024.0;

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
    costs_of_base(bench)
}

/// What that takes of the processors and of memory.
fn costs_of_base(bench: &mut Bench) -> anyhow::Result<()> {
    let image = bench.images.path("base");
    let new_pages = distinct_pages(&bench.images.read("base")?).len();
    let (mut cpu, mut peak) = (Vec::new(), Vec::new());
    for round in 0..bench.rounds {
        let cli = bench.new_store(&format!("commit-costs-{round}"))?;
        settle(&[&image])?;
        let memory = utf8(&image)?;
        let used = usage(&cli.command(&["commit", "base", "--memory", memory])?)?;
        cpu.push(used.cpu_seconds / figure(new_pages as u64));
        peak.push(figure(used.peak_bytes));
        fs::remove_dir_all(cli.store())?;
    }
    let limit = |limit| Samples::constant(limit, bench.rounds);
    let (cpu_limit, peak_limit) = (limit(NEW_PAGE_SECONDS), limit(PEAK_BYTES));
    let what = "processors' time for each new page of it";
    bench.compare(what, &Samples::new(cpu), "8 µs", &cpu_limit, Some(1.0));
    let peak = Samples::new(peak);
    let what = "peak memory of it";
    bench.compare_bytes((what, &peak), ("256 MiB", &peak_limit), Some(1.0));
    Ok(())
}

/// Committing one page, against the least that puts it into a file that survives a power cut.
///
/// # Errors
/// If something fails.
pub fn one_page(bench: &mut Bench) -> anyhow::Result<()> {
    const TIMES: usize = 20;
    let cli = bench.new_store("commit-one")?;
    let store = Store::open(cli.store())?;
    let dir = bench.path("one-page");
    fs::create_dir_all(&dir)?;
    let (input, temporary, file) = (dir.join("input"), dir.join("new"), dir.join("file"));
    let page = |number: usize| [number as u64; PAGE / 8].map(u64::to_le_bytes).concat();
    let subjects: Vec<Run<'_>> = vec![
        Box::new(|round| {
            settle(&[])?;
            let mut seconds = 0.0;
            for time in 0..TIMES {
                fs::write(&input, page(1 + round * TIMES + time))?;
                let start = Instant::now();
                commit_file(&store, &format!("t{round}-{time}"), &input, None)?;
                seconds += start.elapsed().as_secs_f64();
            }
            Ok(vec![seconds / TIMES as f64])
        }),
        Box::new(|round| {
            settle(&[])?;
            let start = Instant::now();
            for time in 0..TIMES {
                let mut written = File::create(&temporary)?;
                written.write_all(&page(round * TIMES + time))?;
                written.sync_all()?;
                fs::rename(&temporary, &file)?;
                File::open(&dir)?.sync_all()?;
            }
            Ok(vec![start.elapsed().as_secs_f64() / TIMES as f64])
        }),
    ];
    let done = alternate(bench.rounds, subjects)?;
    let against = "write a file, fsync, rename, fsync the directory";
    let what = "commit one page, store is open";
    bench.compare(what, &done[0][0], against, &done[1][0], Some(4.0));
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
