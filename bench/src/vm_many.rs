//! Many machines at once: how long they take to start, and what each adds to the
//! host's memory.

use std::collections::BTreeMap;
use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use snapstore_guests::HALT;

use crate::Bench;
use crate::stats::{Samples, alternate};
use crate::tools::figure;
use crate::vm_frozen::Helper;
use crate::vm_rig::{MIB_PAGES, lab, mount, snapshot};
use snapstore_tests::vm::Lab;

const COUNT: usize = 100;
/// What a machine may take beyond a bare one, in bytes: 0.12 MiB.
const BEYOND_BARE_BYTES: f64 = 0.12 * 1024.0 * 1024.0;
/// Until the kernel has freed what the last machines had.
const CALM: Duration = Duration::from_millis(1500);
/// Lines of /proc/meminfo that tell what the kernel took; the first counts down.
const KERNEL: [&str; 6] = [
    "MemAvailable",
    "AnonPages",
    "Slab",
    "PageTables",
    "KernelStack",
    "VmallocUsed",
];

/// A hundred machines whose guests have halted, against a hundred bare ones.
///
/// # Errors
/// If something fails.
pub fn many(bench: &mut Bench) -> anyhow::Result<()> {
    let lab = lab("vm-many")?;
    snapshot(&lab, "halted", "512M", 64 * MIB_PAGES, true)?;
    let image = mount(&lab, "halted")?;
    let kernel = lab.file("halt.kernel", HALT)?;
    let done = alternate(
        bench.rounds,
        vec![
            Box::new(|_| ours(&lab, &["--share-layout"])),
            Box::new(|_| ours(&lab, &[])),
            Box::new(|_| bare(&kernel)),
        ],
    )?;
    let [forked, executed, bare] = done.as_slice() else {
        unreachable!("one for each subject");
    };
    // As they share most, from one process; and as they are by default.
    compare(bench, "", forked, bare);
    compare(bench, ", by default", executed, bare);
    image.unmount()?;
    Ok(())
}

fn compare(bench: &mut Bench, which: &str, ours: &[Samples], bare: &[Samples]) {
    let what = format!("start {COUNT} machines{which}");
    bench.compare(&what, &ours[0], "bare KVM", &bare[0], Some(1.3));
    let mut names = vec!["PSS", "private memory"];
    names.extend(KERNEL);
    for (number, name) in names.into_iter().enumerate() {
        let (ours, bare) = (&ours[number + 1], &bare[number + 1]);
        let what = match name {
            "MemAvailable" => format!("each machine's part of all memory taken{which}"),
            other => format!("each machine's {other}{which}"),
        };
        bench.compare_bytes((&what, ours), ("bare KVM", bare), None);
        if ["PSS", "MemAvailable"].contains(&name) {
            let limit = Samples::constant(BEYOND_BARE_BYTES, bench.rounds);
            let what = format!("{what}, beyond bare KVM");
            let beyond = ours.minus(bare);
            bench.compare_bytes((&what, &beyond), ("0.12 MiB", &limit), Some(1.0));
        }
    }
}

/// The seconds, then bytes per machine: PSS, private memory, each of [`KERNEL`].
fn ours(lab: &Lab, more: &[&str]) -> anyhow::Result<Vec<f64>> {
    let before = settled()?;
    let count = COUNT.to_string();
    let begin = Instant::now();
    let names = lab.restore("halted", &[&["-n", &count], more].concat())?;
    let seconds = begin.elapsed().as_secs_f64();
    let listed = lab.machines()?;
    anyhow::ensure!(
        names.len() == COUNT && listed.len() == COUNT,
        "some are missing"
    );
    let pids = listed.iter().filter_map(|machine| machine["pid"].as_u64());
    let figures = usage(seconds, &before, pids)?;
    keep_maps(listed[COUNT / 2]["pid"].as_u64());
    lab.cli.ok(&["stop", "--all"])?;
    Ok(figures)
}

fn bare(kernel: &str) -> anyhow::Result<Vec<f64>> {
    let before = settled()?;
    let bytes = (512_u64 << 20).to_string();
    let begin = Instant::now();
    let mut helper = Helper::start(&["bare-vm", &COUNT.to_string(), &bytes, "1", kernel])?;
    let mut pids = Vec::new();
    while pids.len() < COUNT {
        let line = helper.line()?;
        if let Some(rest) = line.strip_prefix("entered ") {
            let pid = rest.split(' ').next().unwrap_or_default();
            pids.push(pid.parse().with_context(|| line.clone())?);
        }
    }
    let seconds = begin.elapsed().as_secs_f64();
    let figures = usage(seconds, &before, pids.iter().copied());
    keep_maps(pids.get(COUNT / 2).copied());
    drop(helper);
    figures
}

fn settled() -> anyhow::Result<BTreeMap<String, f64>> {
    sleep(CALM);
    meminfo()
}

fn usage(
    seconds: f64,
    before: &BTreeMap<String, f64>,
    pids: impl Iterator<Item = u64>,
) -> anyhow::Result<Vec<f64>> {
    sleep(CALM);
    let after = meminfo()?;
    let (mut pss, mut private) = (0.0, 0.0);
    for pid in pids {
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        pss += bytes_of(&rollup, "Pss:").context("no Pss")?;
        for name in ["Private_Dirty:", "Private_Clean:"] {
            private += bytes_of(&rollup, name).with_context(|| format!("no {name}"))?;
        }
    }
    let count = figure(COUNT as u64);
    let mut figures = vec![seconds, pss / count, private / count];
    for name in KERNEL {
        let grown = after[name] - before[name];
        let taken = if name == "MemAvailable" {
            -grown
        } else {
            grown
        };
        figures.push(taken / count);
    }
    Ok(figures)
}

/// The mappings of one machine, for who wants to know: `$SNAPSTORE_BENCH_MAPS`.
fn keep_maps(pid: Option<u64>) {
    if let (Some(dir), Some(pid)) = (std::env::var_os("SNAPSTORE_BENCH_MAPS"), pid) {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        let to = std::path::Path::new(&dir).join(format!("{}.smaps", name.trim()));
        let _ = fs::copy(format!("/proc/{pid}/smaps"), to);
    }
}

fn meminfo() -> anyhow::Result<BTreeMap<String, f64>> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let found = KERNEL.iter().map(|name| {
        let bytes = bytes_of(&text, &format!("{name}:"));
        Ok((
            (*name).to_owned(),
            bytes.with_context(|| format!("no {name}"))?,
        ))
    });
    found.collect()
}

/// A line such as `Pss:   12 kB`.
fn bytes_of(text: &str, name: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(figure(kib * 1024))
}
