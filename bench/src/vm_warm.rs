//! How long a restored guest takes for its working set.
//!
//! The guest reads a word of each page of a set that lies scattered over its memory,
//! whose pages are those of a real guest. Both the store and the pages are cold, but for
//! the baseline, where all pages are in the kernel's cache already.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, ensure};
use memmap2::Advice;
use rustix::fs::fadvise;
use snapstore_guests::TouchCommand;

use crate::Bench;
use crate::guest::{PAGE, distinct_pages};
use crate::mounts::Mount;
use crate::stats::{Run, alternate};
use crate::touch::{Other, others_between};
use crate::vm_rig::{Talk, Touch, boot, lab, mount};
use snapstore_tests::vm::{Lab, eventually};

/// Where the sets lie, in pages: 512 MiB, behind the guest itself.
pub const FIRST: u32 = 1024;
const MASK: u32 = (1 << 17) - 1;
const MEMORY: &str = "640M";
/// The golden ratio of the mask, odd: pages that follow each other are far apart.
const STRIDE: u32 = 81_007;
const SIZES_MIB: [u32; 3] = [4, 16, 64];
/// Times the mask: where another set lies, between the pages of the first.
const BETWEEN: u32 = 3;

/// Restores with and without a push of the set, against pages that are there already; and
/// with one that is wrong, of which half is touched, or that is not there.
///
/// # Errors
/// If something fails.
pub fn warm(bench: &mut Bench) -> anyhow::Result<()> {
    let lab = lab("vm-warm")?;
    let truth = bench.path("vm-warm-memory");
    commit(bench, &lab, &truth)?;
    let all_there = mount(&lab, "there")?;
    for mib in SIZES_MIB {
        let set = Set::new(mib * 256, FIRST, &truth)?;
        let wrong = Set::new(mib * 256, FIRST + BETWEEN, &truth)?;
        // Half of it is what is touched still.
        let of_half = |first| Set::new(mib * 128, first, &truth);
        let old = [of_half(FIRST)?, of_half(FIRST + BETWEEN)?];
        let recorded = record(&lab, &[&set])?;
        let recorded_wrong = record(&lab, &[&wrong])?;
        let recorded_old = record(&lab, &old.each_ref())?;
        let missing = (recorded.0.clone(), Vec::new());
        let (lab, set) = (&lab, &set);
        let cold = |(path, bytes): (PathBuf, Vec<u8>), more: &'static [&str]| -> Run<'_> {
            Box::new(move |_| {
                cool(lab)?;
                match bytes.is_empty() {
                    true => drop(fs::remove_file(&path)),
                    false => fs::write(&path, &bytes)?,
                }
                let taken = restore(lab, "cold", set, more)?;
                Ok(vec![taken])
            })
        };
        let subjects: Vec<Run<'_>> = vec![
            cold(recorded.clone(), &[]),
            cold(recorded, &["--no-prefetch"]),
            Box::new(|_| Ok(vec![restore(lab, "there", set, &[])?])),
            cold(recorded_wrong, &[]),
            cold(recorded_old, &[]),
            cold(missing, &[]),
        ];
        let done = alternate(bench.rounds, subjects)?;
        let what = format!("restore until {mib} MiB are read");
        let (pushed, not) = (&done[0][0], &done[1][0]);
        bench.compare(&what, pushed, "--no-prefetch", not, Some(0.4));
        bench.compare(
            &what,
            pushed,
            "all pages are in memory",
            &done[2][0],
            Some(1.2),
        );
        for (which, taken) in ["wrong", "old", "missing"].into_iter().zip(&done[3..]) {
            let what = format!("{what}, {which} set");
            bench.compare(&what, &taken[0], "--no-prefetch", not, Some(1.05));
        }
    }
    all_there.unmount()?;
    beside(bench, &lab, &truth)
}

/// Faults outside the set while it is pushed.
fn beside(bench: &mut Bench, lab: &Lab, truth: &Path) -> anyhow::Result<()> {
    let set = Set::new(64 * 256, FIRST, truth)?;
    let (path, bytes) = record(lab, &[&set])?;
    let dir = bench.path("vm-warm-mount");
    let others = (0..2000_u32).map(|at| set.page(at * 7) + u64::from(BETWEEN));
    let others: Vec<u64> = others.collect();
    let faults = |more: &'static [&str]| -> Run<'_> {
        let (path, bytes, dir, others, set) = (&path, &bytes, &dir, &others, &set);
        Box::new(move |_| {
            cool(lab)?;
            fs::write(path, bytes)?;
            let mount = Mount::product(&lab.cli, "cold", dir, more)?;
            let pages = others.iter().zip((0..).map(|at| set.page(at * 7)));
            let pages: Vec<Other> = pages
                .map(|(other, between)| Other {
                    measured: *other,
                    between,
                })
                .collect();
            let taken = others_between(&mount.memory(), Advice::Normal, &pages)?;
            mount.unmount()?;
            Ok(vec![taken.mean, taken.p99])
        })
    };
    let done = alternate(bench.rounds, vec![faults(&[]), faults(&["--no-prefetch"])])?;
    for (number, statistic) in ["mean", "p99"].into_iter().enumerate() {
        let what = format!("a fault outside the set while it is pushed, {statistic}");
        let aim = (number == 1).then_some(1.2);
        let (with, without) = (&done[0][number], &done[1][number]);
        bench.compare(&what, with, "--no-prefetch", without, aim);
    }
    Ok(())
}

/// A guest that waits for commands, with the pages of a real one behind it, as `cold`
/// and once more as `there`.
fn commit(bench: &Bench, lab: &Lab, truth: &Path) -> anyhow::Result<()> {
    let (memory, state) = with_real_pages(bench, lab, MEMORY)?;
    fs::write(truth, &memory)?;
    for tag in ["cold", "there"] {
        let (memory, state) = (crate::utf8(truth)?, crate::utf8(&state)?);
        lab.cli
            .ok(&["commit", tag, "--memory", memory, "--vmstate", state])?;
    }
    Ok(())
}

/// The memory of a guest that waits for commands, with the pages of a real one from the page
/// [`FIRST`] on, and the file of its state. Each of these pages begins with its number.
///
/// # Errors
/// If something fails.
pub fn with_real_pages(
    bench: &Bench,
    lab: &Lab,
    memory: &str,
) -> anyhow::Result<(Vec<u8>, PathBuf)> {
    boot(lab, "guest", memory)?;
    lab.commit("waiting", "guest")?;
    lab.stop("guest")?;
    let dir = bench.path("waiting");
    let mount = Mount::product(&lab.cli, "waiting", &dir, &[])?;
    let state = bench.path("waiting-state");
    fs::copy(dir.join("vmstate"), &state)?;
    let mut memory = fs::read(mount.memory())?;
    mount.unmount()?;
    let real = bench.images.read("base")?;
    let real = distinct_pages(&real);
    let pages = memory.chunks_mut(PAGE).zip(0_u32..).skip(FIRST as usize);
    for ((page, number), real) in pages.zip(real.iter().cycle()) {
        page.copy_from_slice(real);
        // Each page is stored for itself.
        page[..4].copy_from_slice(&number.to_le_bytes());
    }
    Ok((memory, state))
}

struct Set {
    count: u32,
    first: u32,
    sum: u32,
}

impl Set {
    fn new(count: u32, first: u32, truth: &Path) -> anyhow::Result<Self> {
        let truth = File::open(truth)?;
        let mut set = Self {
            count,
            first,
            sum: 0,
        };
        let mut word = [0; 4];
        for at in 0..count {
            truth.read_exact_at(&mut word, set.page(at) * PAGE as u64)?;
            set.sum = set.sum.wrapping_add(u32::from_le_bytes(word));
        }
        Ok(set)
    }

    fn page(&self, at: u32) -> u64 {
        u64::from(self.first + (at.wrapping_mul(STRIDE) & MASK))
    }

    fn read(&self, guest: &mut Talk) -> anyhow::Result<()> {
        let command = TouchCommand::ReadScattered {
            count: self.count,
            first: self.first,
            stride: STRIDE,
            mask: MASK,
        };
        let answer = format!("s{:08x}", self.sum);
        guest.obey(command, &answer).map(drop)
    }
}

/// The seconds from the restore's beginning until the guest has read the set.
fn restore(lab: &Lab, tag: &str, set: &Set, more: &[&str]) -> anyhow::Result<f64> {
    let began = Instant::now();
    lab.restore(tag, &[&["--name", "guest"], more].concat())?;
    set.read(&mut Talk::to(lab, "guest")?)?;
    let taken = began.elapsed().as_secs_f64();
    lab.stop("guest")?;
    Ok(taken)
}

/// What a restore that reads these sets records, and where that is kept.
fn record(lab: &Lab, sets: &[&Set]) -> anyhow::Result<(PathBuf, Vec<u8>)> {
    cool(lab)?;
    let dir = lab.cli.store().join("working-sets");
    if dir.exists() {
        for file in fs::read_dir(&dir)? {
            fs::remove_file(file?.path())?;
        }
    }
    let id = lab.cli.json(&["show", "cold"])?;
    let id = id["id"].as_str().context("an id")?.to_owned();
    let path = dir.join(format!("{id}.memory"));
    lab.restore("cold", &["--name", "guest"])?;
    let mut guest = Talk::to(lab, "guest")?;
    sets.iter().try_for_each(|set| set.read(&mut guest))?;
    lab.stop("guest")?;
    let bytes = eventually("the set is recorded", || Ok(fs::read(&path).ok()))?;
    cool(lab)?;
    let shown = lab.cli.json(&["show", "cold"])?;
    let pages = shown["working_sets"][0]["pages"].as_u64();
    let pages = pages.context("a number of pages")?;
    // On a busy machine not all of it is read in the time that is recorded.
    let count: u32 = sets.iter().map(|set| set.count).sum();
    ensure!(2 * pages >= count.into(), "{pages} pages are recorded");
    Ok((path, bytes))
}

/// Waits until the last machine's mount is gone, and has the kernel drop what it holds
/// of the store.
fn cool(lab: &Lab) -> anyhow::Result<()> {
    eventually("the mount is gone", || {
        let mounts = snapstore_tests::vm::names(&lab.runtime().join("mounts"));
        Ok(mounts.is_empty().then_some(()))
    })?;
    forget_packs(lab.cli.store())
}

/// Has the kernel drop what it holds of a store's packs.
///
/// # Errors
/// If that fails.
pub fn forget_packs(store: &Path) -> anyhow::Result<()> {
    rustix::fs::sync();
    for file in fs::read_dir(store.join("packs"))? {
        fadvise(
            File::open(file?.path())?,
            0,
            None,
            rustix::fs::Advice::DontNeed,
        )?;
    }
    Ok(())
}
