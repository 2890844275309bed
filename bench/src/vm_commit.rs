//! How long commits of running machines take.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::time::Instant;

use crate::Bench;
use crate::guest::PAGE;
use crate::stats::alternate;
use crate::tools::settle;
use crate::vm_rig::{FIRST, MIB_PAGES, Talk, Touch, lab, mount, snapshot, stage};
use snapstore_tests::vm::Lab;

const MEMORY_BYTES: u64 = 512 << 20;
const CHANGED_MIB: [u32; 3] = [1, 8, 64];

const STAGES: [&str; 6] = [
    "pause",
    "scan",
    "prepare",
    "hash_and_write",
    "seal",
    "publish",
];

/// A commit of what a running guest changed, against a commit of a file with as
/// many changed pages of the same kind.
///
/// # Errors
/// If something fails.
pub fn commit(bench: &mut Bench) -> anyhow::Result<()> {
    let lab = lab("vm-commit")?;
    snapshot(&lab, "full", "512M", 128 * MIB_PAGES, false)?;
    let image = mount(&lab, "full")?;
    for mib in CHANGED_MIB {
        lab.restore("full", &["--name", "guest"])?;
        let mut guest = Talk::to(&lab, "guest")?;
        let this = &*bench;
        let done = alternate(
            bench.rounds,
            vec![
                Box::new(|round| of_machine(&lab, &mut guest, mib, round)),
                Box::new(|round| of_file(this, &lab, mib, round)),
            ],
        )?;
        lab.stop("guest")?;
        let what = format!("commit of a running VM, {mib} MiB changed");
        let (machine, file) = (&done[0], &done[1]);
        bench.compare(
            &what,
            &machine[0],
            "commit --diff of a file",
            &file[0],
            None,
        );
        for (name, part) in STAGES.iter().zip(&machine[1..]) {
            let what = format!("of it, {}", name.replace('_', " "));
            bench.compare(&what, part, "the whole", &machine[0], None);
        }
    }
    image.unmount()?;
    Ok(())
}

/// What tells a round's pages from all others.
fn value(round: usize, of_file: bool) -> u32 {
    let number = u32::try_from(2 * round).unwrap_or(0) + u32::from(of_file);
    (number + 1) << 20
}

fn of_machine(lab: &Lab, guest: &mut Talk, mib: u32, round: usize) -> anyhow::Result<Vec<f64>> {
    guest.write(FIRST, mib * MIB_PAGES, value(round, false) + mib)?;
    settle(&[lab.cli.store()])?;
    let start = Instant::now();
    let answer = lab
        .cli
        .json(&["commit", "vm", "--replace", "--vm", "guest"])?;
    let mut figures = vec![start.elapsed().as_secs_f64()];
    for name in STAGES {
        figures.push(stage(&answer, name)?);
    }
    Ok(figures)
}

fn of_file(bench: &Bench, lab: &Lab, mib: u32, round: usize) -> anyhow::Result<Vec<f64>> {
    let path = bench.path("vm-commit.diff");
    let file = File::create(&path)?;
    file.set_len(MEMORY_BYTES)?;
    let mut page = vec![0; PAGE];
    for number in FIRST..FIRST + mib * MIB_PAGES {
        let word = number.wrapping_add(value(round, true) + mib);
        page[..4].copy_from_slice(&word.to_le_bytes());
        file.write_all_at(&page, u64::from(number) * PAGE as u64)?;
    }
    settle(&[&path, lab.cli.store()])?;
    let memory = super::utf8(&path)?;
    let parent = if round == 0 { "full" } else { "file" };
    let arguments = [
        "commit",
        "file",
        "--replace",
        "--memory",
        memory,
        "--diff",
        "--parent",
        parent,
    ];
    let start = Instant::now();
    lab.cli.json(&arguments)?;
    Ok(vec![start.elapsed().as_secs_f64()])
}
