//! What confining machines costs, and executing each anew: start, memory, pause, commit.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Context as _;

use crate::Bench;
use crate::report::{Comparison, Unit};
use crate::stats::{Run, take_turns};
use crate::vm_rig::{MIB_PAGES, lab, mount, snapshot};
use snapstore_tests::vm::Lab;

const COUNT: usize = 100;
/// Machines that are started one at a time, in a round; the middle one counts.
const TRIES: usize = 5;
/// Until the kernel has freed what the last machines had.
const CALM: Duration = Duration::from_millis(1000);

const WHATS: [(&str, Unit); 5] = [
    ("start 1 machine", Unit::Seconds),
    ("start 100 machines", Unit::Seconds),
    ("each of 100 machines' PSS", Unit::Bytes),
    ("pause", Unit::Seconds),
    ("a commit's pause", Unit::Seconds),
];

/// The default against machines that are forked, not confined, or both.
///
/// # Errors
/// If something fails.
pub fn confine(bench: &mut Bench) -> anyhow::Result<()> {
    let lab = lab("vm-confine")?;
    snapshot(&lab, "halted", "512M", 16 * MIB_PAGES, true)?;
    let image = mount(&lab, "halted")?;
    let against: [(&str, &[&str]); 3] = [
        ("--share-layout", &["--share-layout"]),
        ("--no-confine", &["--no-confine"]),
        (
            "--no-confine --share-layout",
            &["--no-confine", "--share-layout"],
        ),
    ];
    let lab = &lab;
    let mut subjects: Vec<Run<'_>> = vec![Box::new(|_| measure(lab, &[]))];
    for (_, more) in &against {
        subjects.push(Box::new(move |_| measure(lab, more)));
    }
    let done = take_turns(bench.rounds, subjects)?;
    let (ours, others) = done.split_first().context("nothing was measured")?;
    for ((name, _), other) in against.iter().zip(others) {
        for (number, (what, unit)) in WHATS.iter().enumerate() {
            bench.report.add(&Comparison {
                what: format!("{what}, by default"),
                unit: *unit,
                product: ours[number].clone(),
                against: (*name).to_owned(),
                baseline: other[number].clone(),
                aim: None,
            });
        }
    }
    image.unmount()?;
    Ok(())
}

/// In the order of [`WHATS`].
fn measure(lab: &Lab, more: &[&str]) -> anyhow::Result<Vec<f64>> {
    sleep(CALM);
    let mut one = Vec::new();
    for _ in 0..TRIES {
        one.push(restored(lab, 1, more)?);
        lab.cli.ok(&["stop", "--all"])?;
    }
    one.sort_by(f64::total_cmp);
    sleep(CALM);
    let many = restored(lab, COUNT, more)?;
    let listed = lab.machines()?;
    anyhow::ensure!(listed.len() == COUNT, "some are missing");
    let pss = listed
        .iter()
        .filter_map(|machine| machine["pss_bytes"].as_f64());
    let pss = pss.sum::<f64>() / COUNT as f64;
    let mut control = lab.connect("halted.1")?;
    let begin = Instant::now();
    control.ask(&serde_json::json!({"request": "pause"}))?;
    let pause = begin.elapsed().as_secs_f64();
    let committed = lab
        .cli
        .json(&["commit", "again", "--replace", "--vm", "halted.2"])?;
    let stood_still = committed["timings"]["pause"].as_f64().context("no pause")?;
    lab.cli.ok(&["stop", "--all"])?;
    Ok(vec![one[TRIES / 2], many, pss, pause, stood_still])
}

/// The seconds that the command takes.
fn restored(lab: &Lab, count: usize, more: &[&str]) -> anyhow::Result<f64> {
    let count = count.to_string();
    let begin = Instant::now();
    lab.restore("halted", &[&["-n", &count], more].concat())?;
    Ok(begin.elapsed().as_secs_f64())
}
