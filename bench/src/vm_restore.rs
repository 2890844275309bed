//! How long a restored guest waits for its first instruction.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use snapstore_guests::TOUCH;

use crate::Bench;
use crate::mounts::Mount;
use crate::stats::{Run, Samples, take_turns};
use crate::vm_frozen::Helper;
use crate::vm_rig::{FIRST, MIB_PAGES, Touch as _, boot, lab, mount, snapshot};
use snapstore_tests::vm::{Lab, eventually};

/// The longest chain, in commits after the first.
const DEPTH: u32 = 100;
/// What all guests have written before their first commit, in MiB.
const DATA_MIB: u32 = 64;
/// Until the kernel has freed what the machine before had.
const CALM: Duration = Duration::from_millis(100);
/// Restores of each in a round; the middle one counts.
const TRIES: usize = 3;

/// Restoring at several depths and sizes, against each other and against a bare
/// machine's start.
///
/// # Errors
/// If something fails.
pub fn restore(bench: &mut Bench) -> anyhow::Result<()> {
    let lab = lab("vm-restore")?;
    chain(&lab)?;
    snapshot(&lab, "big", "16G", DATA_MIB * MIB_PAGES, false)?;
    let deepest = format!("d{DEPTH}");
    let tags = ["d0", "d3", &deepest, "big"];
    let mounts: Vec<Mount> = tags
        .into_iter()
        .map(|tag| mount(&lab, tag))
        .collect::<Result<_, _>>()?;
    let kernel = lab.file("bare.kernel", TOUCH)?;
    let bare = |mib: u64| middle(|| bare_start(&kernel, mib << 20));
    let mut subjects: Vec<Run<'_>> = vec![Box::new(|_| bare(512))];
    for tag in tags {
        let lab = &lab;
        subjects.push(Box::new(move |_| middle(|| start(lab, tag))));
    }
    subjects.push(Box::new(|_| bare(16 << 10)));
    let done = take_turns(bench.rounds, subjects)?;
    let [bare, flat, third, deep, big, bare_big] = done.as_slice() else {
        unreachable!("one for each subject");
    };
    let whats = ["its stages to the first instruction", "the command"];
    for (number, what) in whats.into_iter().enumerate() {
        let mut compare =
            |which: &str, product: &[Samples], against: &str, base: &[Samples], aim| {
                let what = format!("{what}, {which}");
                bench.compare(&what, &product[number], against, &base[number], Some(aim));
            };
        compare("depth 3", third, "depth 0", flat, 1.02);
        compare("depth 100", deep, "depth 0", flat, 1.02);
        compare("16 GiB of RAM", big, "512 MiB", flat, 1.2);
        compare("depth 0", flat, "bare KVM", bare, 1.3);
        compare("16 GiB of RAM", big, "bare KVM, 16 GiB", bare_big, 1.3);
    }
    parts(bench, "depth 0", flat);
    parts(bench, "depth 100", deep);
    parts(bench, "16 GiB", big);
    for mount in mounts {
        mount.unmount()?;
    }
    Ok(())
}

/// d0, d1 and so on: each has a little more changed than the one before.
fn chain(lab: &Lab) -> anyhow::Result<()> {
    let mut guest = boot(lab, "chain", "512M")?;
    guest.write(FIRST, DATA_MIB * MIB_PAGES, 0)?;
    lab.commit("d0", "chain")?;
    for depth in 1..=DEPTH {
        guest.write(FIRST + depth * 100, 64, depth)?;
        lab.commit(&format!("d{depth}"), "chain")?;
    }
    lab.stop("chain")
}

const STAGES: [&str; 5] = ["open", "map", "create", "load", "first_entry"];

/// The stages' sum, the whole command, then each stage.
fn start(lab: &Lab, tag: &str) -> anyhow::Result<Vec<f64>> {
    sleep(CALM);
    let begin = Instant::now();
    lab.restore(tag, &["--name", "guest"])?;
    let command = begin.elapsed().as_secs_f64();
    let stages = eventually("the guest runs", || {
        let seen = lab.ps("guest")?;
        let stages = STAGES.map(|name| seen["start"][name].as_f64());
        Ok(stages.iter().copied().collect::<Option<Vec<f64>>>())
    })?;
    lab.stop("guest")?;
    Ok([vec![stages.iter().sum(), command], stages].concat())
}

/// The same of a bare machine: inside its process, and from outside.
fn bare_start(kernel: &str, memory_bytes: u64) -> anyhow::Result<Vec<f64>> {
    sleep(CALM);
    let begin = Instant::now();
    let bytes = memory_bytes.to_string();
    let mut helper = Helper::start(&["bare-vm", "1", &bytes, "1", kernel])?;
    let line = helper.line()?;
    let outside = begin.elapsed().as_secs_f64();
    let inside = line.rsplit(' ').next().unwrap_or_default().parse();
    Ok(vec![inside.with_context(|| line.clone())?, outside])
}

/// The middle one of several, figure by figure.
fn middle(mut once: impl FnMut() -> anyhow::Result<Vec<f64>>) -> anyhow::Result<Vec<f64>> {
    let tries: Vec<Vec<f64>> = (0..TRIES).map(|_| once()).collect::<Result<_, _>>()?;
    Ok((0..tries[0].len())
        .map(|number| {
            let figures = tries.iter().map(|figures| figures[number]).collect();
            Samples::new(figures).spread().median
        })
        .collect())
}

fn parts(bench: &mut Bench, which: &str, started: &[Samples]) {
    for (name, part) in STAGES.iter().zip(&started[2..]) {
        let what = format!("of the stages at {which}, {}", name.replace('_', " "));
        bench.compare(&what, part, "their sum", &started[0], None);
    }
}
