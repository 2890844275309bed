//! How long a guest stands still for a commit.

use crate::Bench;
use crate::mounts::Mount;
use crate::stats::{Samples, alternate};
use crate::vm_frozen::Helper;
use crate::vm_rig::{FIRST, MIB_PAGES, MemoryFile, Talk, Touch, lab, mount, snapshot, stage, warm};
use snapstore_tests::vm::Lab;

/// What the guests have written since they were restored, in MiB.
const PRIVATE_MIB: [u32; 5] = [1, 8, 64, 256, 512];
/// What they write between two commits, in MiB.
const CHANGED_MIB: u32 = 1;
/// What a pause may take beyond fork(2), in seconds.
const BEYOND_FORK: f64 = 1e-3;
/// What the pause of a first commit may take, in seconds, however much is private.
const FIRST_PAUSE: f64 = 3e-3;
/// The private memory of the pauses that are compared, in MiB, and how much longer the one
/// may be.
const FIRST_OF: (u32, u32, f64) = (512, 64, 1.5);

const STAGES: [&str; 6] = ["pause", "stop", "state_save", "list", "copy", "fork"];

/// The pauses of two commits in a row, against fork(2) of a process with the same
/// private memory, and against copying that memory while the guest waits.
///
/// # Errors
/// If something fails.
pub fn pause(bench: &mut Bench) -> anyhow::Result<()> {
    let lab = lab("vm-pause")?;
    snapshot(&lab, "full", "1G", 768 * MIB_PAGES, false)?;
    let image = mount(&lab, "full")?;
    let mut first_pauses = Vec::new();
    for mib in PRIVATE_MIB {
        let done = alternate(
            bench.rounds,
            vec![
                Box::new(|_| commits(&lab, &image, mib)),
                Box::new(|_| forks(&image, mib)),
            ],
        )?;
        first_pauses.push((mib, done[0][0].clone()));
        for (number, which) in ["first commit", "next commit"].into_iter().enumerate() {
            let stages = &done[0][number * STAGES.len()..][..STAGES.len()];
            let (fork, copy) = (&done[1][2 * number], &done[1][2 * number + 1]);
            rows(
                bench,
                &format!("{which}, {mib} MiB private"),
                stages,
                fork,
                copy,
            );
        }
    }
    first(bench, &first_pauses);
    image.unmount()?;
    Ok(())
}

/// The pause of a first commit follows what is written again while it reads, and not
/// what is private.
fn first(bench: &mut Bench, pauses: &[(u32, Samples)]) {
    let (large, small, aim) = FIRST_OF;
    let of = |wanted| pauses.iter().find(|(mib, _)| *mib == wanted);
    let (Some((_, large_pause)), Some((_, small_pause))) = (of(large), of(small)) else {
        return;
    };
    let what = format!("pause, first commit, {large} MiB private");
    bench.compare(
        &what,
        large_pause,
        &format!("{small} MiB private"),
        small_pause,
        Some(aim),
    );
    let limit = Samples::constant(FIRST_PAUSE, bench.rounds);
    bench.compare(&what, large_pause, "3 ms", &limit, Some(1.0));
}

fn rows(bench: &mut Bench, which: &str, stages: &[Samples], fork: &Samples, copy: &Samples) {
    let [pause, stop, save, list, own_copy, own_fork] = stages else {
        unreachable!("one for each stage");
    };
    let rounds = bench.rounds;
    bench.compare(
        &format!("pause, {which}"),
        pause,
        "fork(2) alone",
        fork,
        None,
    );
    bench.compare(
        "its pause beyond fork(2)",
        &pause.minus(fork),
        "1 ms",
        &Samples::constant(BEYOND_FORK, rounds),
        Some(1.0),
    );
    bench.compare(
        "its pause",
        pause,
        "copying what this commit reads",
        copy,
        None,
    );
    let parts = [
        ("of it, stopping the vCPU", stop),
        ("of it, reading the state", save),
        ("of it, listing what was written", list),
        ("of it, copying what was written", own_copy),
        ("of it, fork(2)", own_fork),
    ];
    for (what, part) in parts {
        bench.compare(what, part, "the pause", pause, None);
    }
}

/// The stages of the first and of the next commit.
fn commits(lab: &Lab, image: &Mount, mib: u32) -> anyhow::Result<Vec<f64>> {
    warm(image)?;
    lab.restore("full", &["--name", "guest"])?;
    let mut guest = Talk::to(lab, "guest")?;
    let mut figures = Vec::new();
    for (written_mib, value) in [(mib, 1), (CHANGED_MIB, 2)] {
        guest.write(FIRST, written_mib * MIB_PAGES, value)?;
        let answer = lab
            .cli
            .json(&["commit", "next", "--replace", "--vm", "guest"])?;
        for name in STAGES {
            figures.push(stage(&answer, name)?);
        }
    }
    lab.stop("guest")?;
    Ok(figures)
}

/// The first fork and a copy of all private pages; the next fork and a copy of
/// those that changed.
fn forks(image: &Mount, mib: u32) -> anyhow::Result<Vec<f64>> {
    warm(image)?;
    let mut process = Helper::memory(&image.memory())?;
    let copy = MemoryFile::new();
    let mut figures = Vec::new();
    for (written_mib, value) in [(mib, 1), (CHANGED_MIB, 2)] {
        let count = written_mib * MIB_PAGES;
        process.ask(&format!("write {FIRST} {count} {value}"))?;
        figures.push(process.ask("fork")?);
        process.ask("thaw")?;
        figures.push(process.ask(&format!("copy {FIRST} {count} {}", copy.path()))?);
    }
    Ok(figures)
}
