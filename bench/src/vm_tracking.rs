//! What tracking its writes costs a guest.

use crate::Bench;
use crate::mounts::Mount;
use crate::stats::alternate;
use crate::vm_rig::{BareTouch, FIRST, MIB_PAGES, Talk, Touch, lab, mount, snapshot, warm};
use snapstore_tests::vm::Lab;

const MEMORY_BYTES: u64 = 512 << 20;
/// Of these a word each is stored: what it takes is faults.
const PAGES: u32 = 64 * MIB_PAGES;
/// These are filled whole.
const FILLED_PAGES: u32 = 4 * MIB_PAGES;
const FILLED_FIRST: u32 = FIRST + PAGES;
/// As many of these are read each time, none of them before.
const READ_PAGES: u32 = 8 * MIB_PAGES;
const READ_FIRST: u32 = FILLED_FIRST + FILLED_PAGES;
/// Of 0.99 of the bare machine's throughput.
const AIM: f64 = 1.0 / 0.99;

const WHATS: [(&str, &str); 4] = [
    ("after restore", "bare KVM, same mapping"),
    ("once more", "bare KVM, same mapping"),
    ("after a commit", "bare KVM, after fork(2)"),
    ("once more after that", "bare KVM, after fork(2)"),
];

/// A guest that fills pages: right after restore and again, then right after a
/// commit and again; against the same guest in a bare machine that nobody tracks.
///
/// # Errors
/// If something fails.
pub fn tracking(bench: &mut Bench) -> anyhow::Result<()> {
    let lab = lab("vm-tracking")?;
    snapshot(&lab, "full", "512M", 128 * MIB_PAGES, false)?;
    let image = mount(&lab, "full")?;
    let done = alternate(
        bench.rounds,
        vec![
            Box::new(|_| tracked(&lab, &image)),
            Box::new(|_| bare(&lab, &image)),
        ],
    )?;
    for (number, (what, against)) in WHATS.into_iter().enumerate() {
        let (ours, bare) = (&done[0], &done[1]);
        let words = format!("a word in {PAGES} pages, {what}");
        let (word, fill, read) = (3 * number, 3 * number + 1, 3 * number + 2);
        bench.compare(&words, &ours[word], against, &bare[word], Some(AIM));
        let whole = format!("{FILLED_PAGES} pages filled, {what}");
        bench.compare(&whole, &ours[fill], against, &bare[fill], Some(AIM));
        let first = format!("{READ_PAGES} other pages read, {what}");
        bench.compare(&first, &ours[read], against, &bare[read], Some(AIM));
    }
    image.unmount()?;
    Ok(())
}

fn tracked(lab: &Lab, image: &Mount) -> anyhow::Result<Vec<f64>> {
    warm(image)?;
    lab.restore("full", &["--name", "guest"])?;
    let mut guest = Talk::to(lab, "guest")?;
    let mut figures = Vec::new();
    for commits in 0..2 {
        for again in 0..2 {
            figures.push(guest.write(FIRST, PAGES, 1)?);
            figures.push(guest.fill(FILLED_FIRST, FILLED_PAGES, 1)?);
            let first = READ_FIRST + (2 * commits + again) * READ_PAGES;
            figures.push(guest.read(first, READ_PAGES, 0)?);
        }
        lab.cli
            .json(&["commit", "next", "--replace", "--vm", "guest"])?;
    }
    lab.stop("guest")?;
    Ok(figures)
}

fn bare(lab: &Lab, image: &Mount) -> anyhow::Result<Vec<f64>> {
    warm(image)?;
    let mut guest = BareTouch::start(lab, MEMORY_BYTES, image)?;
    let mut figures = Vec::new();
    for commits in 0..2 {
        for again in 0..2 {
            figures.push(guest.write(FIRST, PAGES, 1)?);
            figures.push(guest.fill(FILLED_FIRST, FILLED_PAGES, 1)?);
            let first = READ_FIRST + (2 * commits + again) * READ_PAGES;
            figures.push(guest.read(first, READ_PAGES, 0)?);
        }
        guest.fork_and_thaw()?;
    }
    Ok(figures)
}
