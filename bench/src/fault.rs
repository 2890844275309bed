//! How long page faults in a mount take, and mounting itself.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use memmap2::Advice;

use crate::Bench;
use crate::deep::DEPTH;
use crate::guest::{PAGE, nonzero_pages};
use crate::mounts::Mount;
use crate::read::read_timed;
use crate::stats::{Run, Samples, alternate};
use crate::tools::settle;
use crate::touch::faults;
use snapstore_tests::harness::Cli;

/// What a mount may take until its first page is read.
const USABLE_SECONDS: f64 = 0.012;
/// For as long a mount reads its leaves before it is measured whether it has.
const UNTIL_LOADED: Duration = Duration::from_millis(200);

/// Random faults in a fresh mount, against the trivial server and plain files.
///
/// # Errors
/// If something fails.
pub fn random(bench: &mut Bench) -> anyhow::Result<()> {
    let cli = bench.base_store()?.clone();
    let image = bench.images.path("base");
    let used = nonzero_pages(&bench.images.read("base")?);
    let dir = bench.path("fault-mount");
    let in_memory = memory_dir()?;
    let copy = in_memory.as_ref().map(|dir| dir.path().join("base.ram"));
    if let Some(copy) = &copy {
        fs::copy(&image, copy)?;
    }
    let mount = Mount::product(&cli, "base", &dir, &[])?;
    let read_ahead = mount.read_ahead()?;
    mount.unmount()?;
    let this = &*bench;
    let touch = |path: &Path, round: usize| -> anyhow::Result<Vec<f64>> {
        let pages = this.random_pages(&used, round);
        let faults = faults(path, Advice::Random, &pages, &image)?;
        Ok(vec![faults.mean, faults.p99])
    };
    let touch_mount = |mount: Mount, round: usize| -> anyhow::Result<Vec<f64>> {
        let figures = touch(&mount.memory(), round)?;
        mount.unmount()?;
        Ok(figures)
    };
    let mut subjects: Vec<Run<'_>> = vec![
        Box::new(|round| {
            settle(&[cli.store(), &image])?;
            touch_mount(Mount::unrecorded(&cli, "base", &dir, &[])?, round)
        }),
        Box::new(|round| {
            settle(&[&image])?;
            touch_mount(Mount::ram(&image, &dir, read_ahead)?, round)
        }),
        Box::new(|round| {
            settle(&[&image])?;
            touch(&image, round)
        }),
    ];
    if let Some(copy) = &copy {
        subjects.push(Box::new(|round| touch(copy, round)));
    }
    let done = alternate(bench.rounds, subjects)?;
    let statistics = ["mean", "p99"];
    for (number, statistic) in statistics.into_iter().enumerate() {
        let what = format!("a cold random fault, {statistic}");
        let product = &done[0][number];
        bench.compare(&what, product, "FUSE from RAM", &done[1][number], Some(1.5));
        bench.compare(&what, product, "plain file, warm", &done[2][number], None);
        match done.get(3) {
            Some(tmpfs) => bench.compare(&what, product, "tmpfs", &tmpfs[number], None),
            None => bench.report.skip("fault-random on tmpfs", "no /dev/shm"),
        }
    }
    Ok(())
}

/// The first fault in each leaf of a mount that has been there for a moment, against another
/// fault in the same leaf.
///
/// # Errors
/// If something fails.
pub fn first_of_leaf(bench: &mut Bench) -> anyhow::Result<()> {
    const LEAF_PAGES: u64 = 512;
    let cli = bench.base_store()?.clone();
    let image = bench.images.path("base");
    let used = nonzero_pages(&bench.images.read("base")?);
    let dir = bench.path("leaf-mount");
    let mut of_leaf: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    for page in used {
        of_leaf.entry(page / LEAF_PAGES).or_default().push(page);
    }
    // No page that is read around another one.
    let pairs = of_leaf.values().filter(|pages| pages.len() > 32);
    let pairs: Vec<(u64, u64)> = pairs
        .map(|pages| (pages[0], pages[pages.len() / 2]))
        .collect();
    let (first, other): (Vec<u64>, Vec<u64>) = pairs.into_iter().unzip();
    let measure = |_| -> anyhow::Result<Vec<f64>> {
        settle(&[cli.store(), &image])?;
        let mount = Mount::unrecorded(&cli, "base", &dir, &[])?;
        std::thread::sleep(UNTIL_LOADED);
        let first = faults(&mount.memory(), Advice::Random, &first, &image)?.mean;
        let other = faults(&mount.memory(), Advice::Random, &other, &image)?.mean;
        mount.unmount()?;
        Ok(vec![first, other])
    };
    let done = alternate(bench.rounds, vec![Box::new(measure)])?;
    let (first, other) = (&done[0][0], &done[0][1]);
    let what = "the first fault in a leaf, mean";
    bench.compare(what, first, "another one in it", other, Some(1.05));
    Ok(())
}

fn memory_dir() -> anyhow::Result<Option<tempfile::TempDir>> {
    let shm = Path::new("/dev/shm");
    if !shm.is_dir() {
        return Ok(None);
    }
    let dir = tempfile::Builder::new()
        .prefix("snapstore-bench-")
        .tempdir_in(shm)?;
    Ok(Some(dir))
}

/// What the options `--read-ahead` and `--threads` do.
///
/// # Errors
/// If something fails.
pub fn read_ahead(bench: &mut Bench) -> anyhow::Result<()> {
    const SIZES: [&str; 5] = ["128K", "64K", "32K", "16K", "4K"];
    const THREADS: [&str; 2] = ["1", "2"];
    let cli = bench.base_store()?.clone();
    let used = nonzero_pages(&bench.images.read("base")?);
    let subject = Subject {
        image: bench.images.path("base"),
        dir: bench.path("options-mount"),
        cli,
    };
    let (this, subject) = (&*bench, &subject);
    let options = SIZES
        .iter()
        .map(|size| ("--read-ahead", *size))
        .chain(THREADS.iter().map(|count| ("--threads", *count)));
    let subjects = options.clone().map(|(option, value)| -> Run<'_> {
        let used = &used;
        Box::new(move |round| {
            subject.measure([option, value], &this.random_pages(used, round), used)
        })
    });
    let done = alternate(bench.rounds, subjects.collect())?;
    let figures = [
        "a random fault",
        "a random fault, MADV_RANDOM",
        "touch all in order",
        "read all in order",
        "a random fault, two threads at once",
    ];
    for (figure, what) in figures.into_iter().enumerate() {
        for (number, (option, value)) in options.clone().enumerate() {
            // Each option's values against its first.
            let first = if number < SIZES.len() { 0 } else { SIZES.len() };
            if number != first {
                let what = format!("{what}, {option} {value}");
                let against = options.clone().nth(first).map_or("", |(_, value)| value);
                bench.compare(
                    &what,
                    &done[number][figure],
                    against,
                    &done[first][figure],
                    None,
                );
            }
        }
    }
    Ok(())
}

struct Subject {
    cli: Cli,
    image: PathBuf,
    dir: PathBuf,
}

impl Subject {
    /// One figure per fresh mount.
    fn measure(&self, option: [&str; 2], random: &[u64], used: &[u64]) -> anyhow::Result<Vec<f64>> {
        let mut figures = Vec::new();
        let mut fresh = |run: &dyn Fn(&Path) -> anyhow::Result<f64>| -> anyhow::Result<()> {
            settle(&[self.cli.store(), &self.image])?;
            let mount = Mount::unrecorded(&self.cli, "base", &self.dir, &option)?;
            figures.push(run(&mount.memory())?);
            mount.unmount()?;
            Ok(())
        };
        let mean = |path: &Path, advice, pages: &[u64]| -> anyhow::Result<f64> {
            Ok(faults(path, advice, pages, &self.image)?.mean)
        };
        fresh(&|path| mean(path, Advice::Normal, random))?;
        fresh(&|path| mean(path, Advice::Random, random))?;
        fresh(&|path| mean(path, Advice::Normal, used))?;
        fresh(&read_timed)?;
        fresh(&|path| {
            // Two threads that share nothing but the mount.
            let (left, right) = random.split_at(random.len() / 2);
            let means = std::thread::scope(|scope| {
                [left, right]
                    .map(|half| scope.spawn(move || mean(path, Advice::Random, half)))
                    .map(|thread| thread.join().expect("touching does not panic"))
            });
            let [left, right] = means;
            Ok(f64::midpoint(left?, right?))
        })?;
        Ok(figures)
    }
}

/// Mounting until a page can be read, and unmounting, with a long chain and
/// without.
///
/// # Errors
/// If something fails.
pub fn mount_time(bench: &mut Bench) -> anyhow::Result<()> {
    let deep = bench.deep()?;
    let dir = bench.path("time-mount");
    let end = format!("d{DEPTH}");
    let page = *deep.guest_at_end.used().last().unwrap_or(&0);
    let cycle = |cli: &Cli, tag: &str| -> anyhow::Result<Vec<f64>> {
        settle(&[cli.store()])?;
        let start = Instant::now();
        let mount = Mount::product(cli, tag, &dir, &[])?;
        let mounted = start.elapsed().as_secs_f64();
        File::open(mount.memory())?.read_exact_at(&mut [0; PAGE], page * PAGE as u64)?;
        let read = start.elapsed().as_secs_f64();
        Ok(vec![mounted, read, mount.unmount()?])
    };
    let done = alternate(
        bench.rounds,
        vec![
            Box::new(|_| cycle(&deep.long, &end)),
            Box::new(|_| cycle(&deep.flat, "head")),
        ],
    )?;
    let whats = ["mount", "mount and read a first page", "umount"];
    for (number, what) in whats.into_iter().enumerate() {
        let what = format!("{what}, depth {DEPTH}");
        let (long, flat) = (&done[0][number], &done[1][number]);
        bench.compare(&what, long, "depth 0", flat, None);
        if number == 1 {
            let limit = Samples::constant(USABLE_SECONDS, bench.rounds);
            bench.compare(&what, long, "12 ms", &limit, Some(1.0));
        }
    }
    Ok(())
}
