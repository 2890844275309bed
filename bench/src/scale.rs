//! What depends on how much a store holds, though it should not: stores with few and
//! with very many chunks, tags and packs, made directly.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use snapstore_store::{
    CommitRequest, GcOptions, ImageRole, Input, InputData, InputKind, PageSize, ParentChoice,
    Silent, SnapshotId, Store,
};

use crate::report::{Comparison, Unit};
use crate::stats::{Run, Samples, take_turns};
use crate::{Bench, utf8};
use snapstore_tests::harness::{self, Cli};
use snapstore_tests::scale::{self, Made, PAGE};

/// The largest ratio to the small store that is good enough.
const AIM: f64 = 1.2;
/// As long as a commit may wait for the publish lock beside a collection.
const LONGEST_WAIT: Duration = Duration::from_millis(100);

/// How often an operation is repeated in a round; the middle one counts.
const REPEATS: usize = 7;

/// Stores with 10^4, 10^6 and 10^7 chunks.
///
/// # Errors
/// If a store cannot be made or an operation fails.
pub fn chunks(bench: &mut Bench) -> anyhow::Result<()> {
    for (name, count) in [("10^6", 1_000_000), ("10^7", scale::largest())] {
        // Another one for each: it is collected, too.
        let small = Subject::make(&bench.path(&format!("beside-{name}")), 10_000)?;
        let large = Subject::make(&bench.path(name), count)?;
        compare(bench, &small, &large, &format!("{name} chunks"), "10^4")?;
        let cost = |subject: &Subject| subject.collect_and_verify();
        let (large_costs, small_costs) = (cost(&large)?, cost(&small)?);
        let [merge, gc, verify] = large_costs;
        let [small_merge, small_gc, small_verify] = small_costs;
        for (what, per_chunk, small_per_chunk) in [
            ("gc that merges packs, for each chunk", merge, small_merge),
            ("gc of 1 %, for each chunk of the store", gc, small_gc),
            ("verify, for each chunk", verify, small_verify),
        ] {
            bench.compare(
                &format!("{what}, {name} chunks"),
                &Samples::one(per_chunk),
                "10^4",
                &Samples::one(small_per_chunk),
                None,
            );
        }
        std::fs::remove_dir_all(&large.path)?;
    }
    Ok(())
}

/// Stores with 10 and with 10 000 tags.
///
/// # Errors
/// As [`chunks`].
pub fn tags(bench: &mut Bench) -> anyhow::Result<()> {
    let few = Subject::make(&bench.path("few"), 10_000)?;
    let many = Subject::make(&bench.path("many"), 10_000)?;
    for (subject, count) in [(&few, 10), (&many, 10_000)] {
        let store = Store::open(&subject.path)?;
        for number in 0..count {
            store.set_tag(&format!("name-{number}"), subject.made.whole, false)?;
        }
    }
    compare(bench, &few, &many, "10 000 tags", "10")
}

/// Stores of many packs: as many as commits that were never merged, and a tenth of that.
///
/// # Errors
/// As [`chunks`].
pub fn packs(bench: &mut Bench) -> anyhow::Result<()> {
    let count = scale::packs();
    let few = Subject::make(&bench.path("few-packs"), 10_000)?;
    let many = Subject::make(&bench.path("many-packs"), 10_000)?;
    let tenth = count / 10;
    scale::add_packs(&many.path, tenth, 0)?;
    compare(bench, &few, &many, &format!("{tenth} packs"), "3")?;
    scale::add_packs(&many.path, count - tenth, tenth)?;
    compare(bench, &few, &many, &format!("{count} packs"), "3")?;
    let each = |started: Instant| started.elapsed().as_secs_f64() / count as f64;
    let started = Instant::now();
    let report = Store::open(&many.path)?.verify(false, &Silent)?;
    let verify = each(started);
    ensure!(report.findings.is_empty(), "nothing is damaged");
    let started = Instant::now();
    Store::repair(&many.path, &Silent)?;
    let repair = each(started);
    let started = Instant::now();
    let merged = Store::open(&many.path)?.gc(GcOptions::default(), &Silent)?;
    let gc = each(started);
    ensure!(merged.deleted_packs > count / 2, "they are merged");
    for (what, seconds) in [("repair", repair), ("gc that merges", gc)] {
        bench.compare(
            &format!("{what}, for each pack"),
            &Samples::one(seconds),
            "verify",
            &Samples::one(verify),
            None,
        );
    }
    Ok(())
}

/// How long a commit waits beside a collection of 10^6 chunks.
///
/// # Errors
/// As [`chunks`].
pub fn beside_gc(bench: &mut Bench) -> anyhow::Result<()> {
    let path = bench.path("collected");
    Store::create(&path, PageSize::KIB_4)?;
    scale::fill_half_dead(&path, 1_000_000)?;
    let quiet = publish_times(&path, |_| std::thread::sleep(Duration::from_secs(2)))?;
    let busy = publish_times(&path, |store| {
        store
            .gc(GcOptions::default(), &Silent)
            .map(|report| {
                eprintln!("the collection deleted {} packs", report.deleted_packs);
            })
            .expect("the collection succeeds");
    })?;
    let longest = |times: &[f64]| times.iter().copied().fold(0.0, f64::max);
    eprintln!("{} commits beside it, {} without", busy.len(), quiet.len());
    for (what, figure) in [
        (
            "longest publication beside a gc of 10^6 chunks",
            longest(&busy),
        ),
        ("longest publication without", longest(&quiet)),
    ] {
        bench.report.add(&Comparison {
            what: what.to_owned(),
            unit: Unit::Seconds,
            product: Samples::one(figure),
            against: "bound".to_owned(),
            baseline: Samples::one(LONGEST_WAIT.as_secs_f64()),
            aim: Some(1.0),
        });
    }
    Ok(())
}

/// The publish stage of commits of one page, one after the other, while `work` runs.
fn publish_times(path: &Path, work: impl FnOnce(&Store) + Send) -> anyhow::Result<Vec<f64>> {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            work(&Store::open(path).expect("the store is there"));
            done.store(true, Ordering::Relaxed);
        });
        let mut times = Vec::new();
        while !done.load(Ordering::Relaxed) {
            let store = Store::open(path)?;
            let number = scale::fresh_number();
            times.push(commit_page(&store, number)?.1.as_secs_f64());
            std::thread::sleep(Duration::from_millis(2));
        }
        ensure!(!times.is_empty(), "there was time for a commit");
        Ok(times)
    })
}

/// Commits a page of its own; returns the whole time and that of publishing.
fn commit_page(store: &Store, number: u64) -> anyhow::Result<(Duration, Duration)> {
    let mut page = vec![0; PAGE];
    page[..8].copy_from_slice(&number.to_le_bytes());
    page[8] = 1;
    let request = CommitRequest {
        tag: "one-page".to_owned(),
        replace: true,
        parent: ParentChoice::Nothing,
        inputs: vec![memory(page)],
        ..CommitRequest::default()
    };
    let committed = store.commit(&request, &Silent)?;
    Ok((committed.timings.total(), committed.timings.publish))
}

fn memory(bytes: Vec<u8>) -> Input {
    Input {
        name: "memory".to_owned(),
        role: ImageRole::Memory,
        data: InputData::Bytes(Arc::from(bytes)),
        kind: InputKind::Full,
    }
}

/// A store to measure.
struct Subject {
    path: PathBuf,
    made: Made,
}

impl Subject {
    fn make(path: &Path, chunks: u64) -> anyhow::Result<Self> {
        let started = Instant::now();
        Store::create(path, PageSize::KIB_4)?;
        let made = scale::fill(path, chunks)?;
        eprintln!("made {chunks} chunks in {:.0?}", started.elapsed());
        Ok(Self {
            path: path.to_owned(),
            made,
        })
    }

    /// Opening, and looking a full id up.
    fn open(&self) -> anyhow::Result<f64> {
        middle(|| {
            let started = Instant::now();
            let store = Store::open(&self.path)?;
            let id: SnapshotId = store.resolve(&self.made.whole.to_string())?;
            ensure!(id == self.made.whole, "it was found");
            Ok(started.elapsed().as_secs_f64())
        })
    }

    /// A commit of one page by a process that has just opened the store.
    fn commit_one(&self) -> anyhow::Result<f64> {
        middle(|| {
            let store = Store::open(&self.path)?;
            Ok(commit_page(&store, scale::fresh_number())?.0.as_secs_f64())
        })
    }

    /// A commit of 2 MiB of which one page is not its parent's.
    fn commit_child(&self) -> anyhow::Result<f64> {
        middle(|| {
            let store = Store::open(&self.path)?;
            let started = Instant::now();
            let mut bytes = scale::pages(0, 512);
            bytes[..8].copy_from_slice(&scale::fresh_number().to_le_bytes());
            bytes[9] = 2;
            let request = CommitRequest {
                tag: "child".to_owned(),
                replace: true,
                parent: ParentChoice::Named("base".to_owned()),
                inputs: vec![memory(bytes)],
                ..CommitRequest::default()
            };
            store.commit(&request, &Silent)?;
            Ok(started.elapsed().as_secs_f64())
        })
    }

    /// A lookup of a full id in a store that is open.
    fn look_up(&self) -> anyhow::Result<f64> {
        let store = Store::open(&self.path)?;
        let name = self.made.whole.to_string();
        store.resolve(&name)?;
        middle(|| {
            let started = Instant::now();
            store.resolve(&name)?;
            Ok(started.elapsed().as_secs_f64())
        })
    }

    /// From the start of `mount` until it has ended and a page can be read.
    fn mount(&self, dir: &Path) -> anyhow::Result<f64> {
        let cli = Cli::new(&self.path);
        std::fs::create_dir_all(dir)?;
        let dir_name = utf8(dir)?;
        middle(|| {
            let started = Instant::now();
            cli.ok(&["mount", "base", dir_name])?;
            std::fs::File::open(dir.join("memory.bin"))?;
            let taken = started.elapsed().as_secs_f64();
            cli.ok(&["umount", dir_name])?;
            Ok(taken)
        })
    }

    /// The most memory that a process has in use which commits one page.
    fn memory(&self, dir: &Path) -> anyhow::Result<f64> {
        let file = dir.with_extension("page");
        middle(|| {
            std::fs::write(&file, scale::pages(scale::fresh_number(), 1))?;
            let arguments = ["commit", "one-page", "--replace", "--no-parent", "--memory"];
            let mut command =
                Cli::new(&self.path).command(&[&arguments[..], &[utf8(&file)?]].concat())?;
            command.stdout(std::process::Stdio::null());
            Ok(scale::usage(&command)?.peak_bytes as f64)
        })
    }

    /// Seconds for each chunk of the store: a collection that merges the packs of which
    /// there are too many, one of what only one tag needs, and a verification of the
    /// footers.
    fn collect_and_verify(&self) -> anyhow::Result<[f64; 3]> {
        let store = Store::open(&self.path)?;
        let started = Instant::now();
        let merged = store.gc(GcOptions::default(), &Silent)?.deleted_packs;
        let merge = started.elapsed();
        eprintln!("merged {merged} packs in {merge:.1?}");
        store.remove_tags(&["doomed".to_owned()])?;
        let started = Instant::now();
        store.gc(GcOptions::default(), &Silent)?;
        let gc = started.elapsed();
        let started = Instant::now();
        let report = Store::open(&self.path)?.verify(false, &Silent)?;
        let verify = started.elapsed();
        ensure!(report.findings.is_empty(), "nothing is damaged");
        let each = |taken: Duration| taken.as_secs_f64() / self.made.chunks as f64;
        Ok([each(merge), each(gc), each(verify)])
    }
}

type Operation<'a> = (&'a str, Unit, fn(&Subject, &Path) -> anyhow::Result<f64>);

fn compare(
    bench: &mut Bench,
    small: &Subject,
    large: &Subject,
    what: &str,
    against: &str,
) -> anyhow::Result<()> {
    let mut operations: Vec<Operation<'_>> = vec![
        ("open, resolve a full id", Unit::Seconds, |it, _| it.open()),
        ("look a full id up", Unit::Seconds, |it, _| it.look_up()),
        ("commit one page", Unit::Seconds, |it, _| it.commit_one()),
        ("commit one page of 512", Unit::Seconds, |it, _| {
            it.commit_child()
        }),
        (
            "peak memory of a one-page commit",
            Unit::Bytes,
            Subject::memory,
        ),
    ];
    if Path::new("/dev/fuse").exists() {
        operations.push(("mount", Unit::Seconds, Subject::mount));
    } else {
        harness::skipped("scale: mount", "there is no /dev/fuse");
    }
    for (name, unit, operation) in operations {
        let dir = bench.path("mount");
        let subject = |it| -> Run<'_> {
            let dir = dir.clone();
            Box::new(move |_| Ok(vec![operation(it, &dir)?]))
        };
        let figures = take_turns(bench.rounds, vec![subject(large), subject(small)])
            .with_context(|| format!("{name}, {what}"))?;
        bench.report.add(&Comparison {
            what: format!("{name}, {what}"),
            unit,
            product: figures[0][0].clone(),
            against: against.to_owned(),
            baseline: figures[1][0].clone(),
            aim: Some(AIM),
        });
    }
    Ok(())
}

/// The middle one of a few figures.
fn middle(mut measure: impl FnMut() -> anyhow::Result<f64>) -> anyhow::Result<f64> {
    let figures: anyhow::Result<Vec<f64>> = (0..REPEATS).map(|_| measure()).collect();
    Ok(Samples::new(figures?).spread().median)
}
