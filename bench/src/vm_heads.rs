//! Machines of several heads of a chain, which hold what these have in common once.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use snapstore_guests::TouchCommand;

use crate::Bench;
use crate::guest::PAGE;
use crate::report::{Comparison, Unit};
use crate::stats::{Run, alternate, take_turns};
use crate::vm_rig::{FIRST, MIB_PAGES, Talk, Touch as _, boot, lab};
use crate::vm_warm::{self, forget_packs};
use snapstore_tests::vm::{Lab, eventually};

const HEADS: u32 = 10;
/// What all guests have written before the first commit, in MiB.
const DATA_MIB: u32 = 64;
/// What each machine reads once it runs, in MiB; all heads have the same there.
const READ_MIB: u32 = 32;
/// What a guest writes between two commits, in pages.
const STEP_PAGES: u32 = 256;
/// What a head has of its own that is read from its own mount, in pages, and in which
/// order: a prime, so that pages that follow each other are far apart.
const OWN_PAGES: u32 = 32 * MIB_PAGES;
const STRIDE: u32 = 4099;
/// Until the kernel has freed what the last machines had.
const CALM: Duration = Duration::from_millis(1000);

/// Ten machines of ten heads against ten of one head, and against ten of ten heads that
/// share nothing.
///
/// # Errors
/// If something fails.
pub fn heads(bench: &mut Bench) -> anyhow::Result<()> {
    let lab = lab("vm-heads")?;
    let mut guest = boot(&lab, "chain", "512M")?;
    guest.write(FIRST, DATA_MIB * MIB_PAGES, 0)?;
    for head in 0..HEADS {
        let first = FIRST + (READ_MIB + 1 + head) * MIB_PAGES;
        guest.write(first, STEP_PAGES, head)?;
        lab.commit(&format!("head{head}"), "chain")?;
    }
    lab.stop("chain")?;
    let lab = &lab;
    let done = take_turns(
        bench.rounds,
        vec![
            Box::new(|_| measure(lab, |head| format!("head{head}"), &[])),
            Box::new(|_| measure(lab, |_| format!("head{}", HEADS - 1), &[])),
            Box::new(|_| measure(lab, |head| format!("head{head}"), &["--no-common-memory"])),
        ],
    )?;
    let [ours, one, apart] = done.as_slice() else {
        anyhow::bail!("one for each subject");
    };
    let whats = [
        ("restore 10 machines of 10 heads", Unit::Seconds, 1.1),
        ("their PSS, once each has read 32 MiB", Unit::Bytes, 1.25),
    ];
    for (number, (what, unit, aim)) in whats.into_iter().enumerate() {
        for (against, other, aim) in [
            ("10 of one head", one, Some(aim)),
            ("--no-common-memory", apart, None),
        ] {
            bench.report.add(&Comparison {
                what: what.to_owned(),
                unit,
                product: ours[number].clone(),
                against: against.to_owned(),
                baseline: other[number].clone(),
                aim,
            });
        }
    }
    own(bench, lab)
}

/// A second head beside the first, until it has read what is its own: pages of a real guest, as
/// all that both have.
fn own(bench: &mut Bench, lab: &Lab) -> anyhow::Result<()> {
    let sum = commit_two(bench, lab)?;
    lab.restore("first", &["--name", "first"])?;
    halt(lab, "first")?;
    let id = lab.cli.json(&["show", "second"])?;
    let id = id["id"].as_str().context("an id")?;
    let dir = lab.runtime().join("mounts").join(id);
    let path = lab.cli.store().join(format!("working-sets/{id}.memory"));
    let restore = |more: &[&str]| -> anyhow::Result<f64> {
        eventually("its mount is gone", || Ok((!dir.exists()).then_some(())))?;
        forget_packs(lab.cli.store())?;
        let began = Instant::now();
        lab.restore("second", &[&["--name", "second"], more].concat())?;
        let read = TouchCommand::ReadScattered {
            count: OWN_PAGES,
            first: vm_warm::FIRST,
            stride: STRIDE,
            mask: OWN_PAGES - 1,
        };
        let answer = format!("s{sum:08x}");
        Talk::to(lab, "second")?.obey(read, &answer)?;
        let taken = began.elapsed().as_secs_f64();
        lab.stop("second")?;
        Ok(taken)
    };
    restore(&[])?;
    let recorded = eventually("its part is recorded", || {
        Ok(fs::read(&path).ok().filter(|_| !dir.exists()))
    })?;
    let (restore, path, recorded, dir) = (&restore, &path, &recorded, &dir);
    let subject = |more: &'static [&str]| -> Run<'_> {
        Box::new(move |_| {
            eventually("its mount is gone", || Ok((!dir.exists()).then_some(())))?;
            fs::write(path, recorded)?;
            Ok(vec![restore(more)?])
        })
    };
    let subjects = vec![subject(&[]), subject(&["--no-prefetch"])];
    let done = alternate(bench.rounds, subjects)?;
    let what = "restore a second head until 32 MiB of its own are read";
    bench.compare(what, &done[0][0], "--no-prefetch", &done[1][0], Some(0.4));
    lab.stop("first")
}

/// Commits a guest as `first`, and as `second` with other pages in a part of its memory. Returns
/// the sum of their first words.
fn commit_two(bench: &Bench, lab: &Lab) -> anyhow::Result<u32> {
    let (mut memory, state) = vm_warm::with_real_pages(bench, lab, "512M")?;
    let (file, state) = (bench.path("vm-heads-memory"), crate::utf8(&state)?);
    let input = ["--memory", crate::utf8(&file)?, "--vmstate", state];
    fs::write(&file, &memory)?;
    lab.cli.ok(&[&["commit", "first"], &input[..]].concat())?;
    let start = vm_warm::FIRST as usize * PAGE;
    let own = &mut memory[start..start + OWN_PAGES as usize * PAGE];
    // What another page has, with a number that none has.
    own.rotate_left(PAGE);
    let mut sum = 0_u32;
    for (page, number) in own.chunks_mut(PAGE).zip(1 << 24..) {
        page[..4].copy_from_slice(&u32::to_le_bytes(number));
        sum = sum.wrapping_add(number);
    }
    fs::write(&file, &memory)?;
    let second = ["commit", "second", "--parent", "first"];
    lab.cli.ok(&[&second[..], &input].concat())?;
    fs::remove_file(&file)?;
    Ok(sum)
}

/// Has a guest wait without a processor: others are measured beside it.
fn halt(lab: &Lab, name: &str) -> anyhow::Result<()> {
    Talk::to(lab, name)?.send(TouchCommand::Halt)?;
    eventually("the guest halts", || {
        Ok((lab.ps(name)?["state"] == "halted").then_some(()))
    })
}

/// The seconds of all commands, and the sum of PSS in bytes.
fn measure(lab: &Lab, tag: impl Fn(u32) -> String, more: &[&str]) -> anyhow::Result<Vec<f64>> {
    sleep(CALM);
    let mut seconds = 0.0;
    for machine in 0..HEADS {
        let name = format!("machine{machine}");
        let begin = Instant::now();
        lab.restore(&tag(machine), &[&["--name", &name], more].concat())?;
        seconds += begin.elapsed().as_secs_f64();
        Talk::to(lab, &name)?.read(FIRST, READ_MIB * MIB_PAGES, 0)?;
        halt(lab, &name)?;
    }
    let mut pss = 0.0;
    for machine in lab.machines()? {
        let pid = machine["pid"].as_u64().context("no process")?;
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"));
        let kib = line.and_then(|line| line.split_whitespace().next());
        pss += kib.context("no Pss")?.parse::<f64>()? * 1024.0;
    }
    lab.cli.ok(&["stop", "--all"])?;
    Ok(vec![seconds, pss])
}
