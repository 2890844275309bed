//! Page faults, one by one.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Instant;

use anyhow::ensure;
use memmap2::{Advice, Mmap};

use crate::guest::PAGE;
use crate::stats::percentile;

/// How long faults took, in seconds.
#[derive(Clone, Copy, Debug)]
pub struct Faults {
    /// On average.
    pub mean: f64,
    /// All but the slowest percent took no longer.
    pub p99: f64,
}

/// Maps a file and reads a byte of each of these pages in this order; then, not
/// timed, compares all bytes of these pages with another file's.
///
/// # Errors
/// If a file cannot be read, or the bytes differ.
pub fn faults(path: &Path, advice: Advice, pages: &[u64], truth: &Path) -> anyhow::Result<Faults> {
    let map = map(path)?;
    map.advise(advice)?;
    let mut seconds = Vec::with_capacity(pages.len());
    let mut last = Instant::now();
    for &number in pages {
        std::hint::black_box(page(&map, number)[0]);
        let now = Instant::now();
        seconds.push((now - last).as_secs_f64());
        last = now;
    }
    let truth = File::open(truth)?;
    let mut wanted = vec![0; PAGE];
    for &number in pages {
        truth.read_exact_at(&mut wanted, number * PAGE as u64)?;
        ensure!(
            page(&map, number) == wanted,
            "page {number} of {} is wrong",
            path.display()
        );
    }
    Ok(Faults::of(seconds))
}

impl Faults {
    fn of(mut seconds: Vec<f64>) -> Self {
        let count = u32::try_from(seconds.len()).unwrap_or(u32::MAX);
        let mean = seconds.iter().sum::<f64>() / f64::from(count);
        seconds.sort_by(f64::total_cmp);
        Self {
            mean,
            p99: percentile(&seconds, 99),
        }
    }
}

/// A page whose fault is timed, and one that is touched after it.
#[derive(Clone, Copy, Debug)]
pub struct Other {
    /// The first.
    pub measured: u64,
    /// The second.
    pub between: u64,
}

/// As [`faults`], without a comparison, of every other page only.
///
/// # Errors
/// If the file cannot be mapped.
pub fn others_between(path: &Path, advice: Advice, pages: &[Other]) -> anyhow::Result<Faults> {
    let map = map(path)?;
    map.advise(advice)?;
    let mut seconds = Vec::with_capacity(pages.len());
    for pair in pages {
        let start = Instant::now();
        std::hint::black_box(page(&map, pair.measured)[0]);
        seconds.push(start.elapsed().as_secs_f64());
        std::hint::black_box(page(&map, pair.between)[0]);
    }
    Ok(Faults::of(seconds))
}

fn page(map: &Mmap, number: u64) -> &[u8] {
    let start = usize::try_from(number).map_or(usize::MAX, |number| number * PAGE);
    &map[start..start + PAGE]
}

fn map(path: &Path) -> anyhow::Result<Mmap> {
    let file = File::open(path)?;
    // SAFETY: nobody writes to or truncates these files while they are mapped:
    // they are the benchmark's own copies and mounts, and the read-only images.
    Ok(unsafe { Mmap::map(&file) }?)
}
