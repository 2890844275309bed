//! A cold read of a working set, from a store that was optimised with it and from one without.

use std::fs;
use std::num::NonZero;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::available_parallelism;
use std::time::{Instant, SystemTime};

use anyhow::{Context as _, ensure};
use snapstore_store::{ImageReader, OptimizeOptions, PageSize, Seen, Silent, Store, WorkingSet};

use crate::Bench;
use crate::deep::commit_file;
use crate::guest::PAGE;
use crate::read::read_in_order;
use crate::stats::{Random, Samples, alternate};
use crate::vm_warm::forget_packs;

/// The pages of the image, 512 MiB, and of the set, 64 MiB.
const PAGES: u32 = 1 << 17;
const SET: usize = 1 << 14;
/// Pages that a mount takes at once, and asks the disk for in advance.
const BATCH: usize = 16;

/// The set, read as a mount pushes it; and the image in order. Every page takes about half of its
/// bytes, and none is like another.
///
/// # Errors
/// If something fails.
pub fn near(bench: &mut Bench) -> anyhow::Result<()> {
    let image = bench.path("near-image");
    fs::write(&image, halves())?;
    let all: Vec<u32> = (0..PAGES).collect();
    let set = Random::new(3).choose(&all, SET);
    // What is recorded when each store is optimised.
    let recorded = [Some(&set), None];
    let mut stores = Vec::new();
    for (number, recorded) in recorded.into_iter().enumerate() {
        let path = bench.path(&format!("near-{number}"));
        let store = Store::create(&path, PageSize::KIB_4)?;
        let committed = commit_file(&store, "head", &image, None)?;
        if let Some(pages) = recorded {
            let seen = Seen {
                touched: pages.clone(),
                ..Seen::default()
            };
            let set = WorkingSet::merged(None, &seen, SystemTime::now());
            store.keep_working_set(committed.id, "memory", &set)?;
        }
        let report = store.optimize(OptimizeOptions::default(), &Silent)?;
        ensure!(report.left_packs == 0, "not all is optimised: {report:?}");
        stores.push(path);
    }
    fs::remove_file(&image)?;
    let read = |number: usize| {
        let path = &stores[number];
        let set = &set;
        move |_| -> anyhow::Result<Vec<f64>> {
            forget_packs(path)?;
            let set = read_set(path, set)?;
            forget_packs(path)?;
            let cold = read_in_order(path, "head")?;
            Ok(vec![set, cold, read_in_order(path, "head")?])
        }
    };
    let done = alternate(bench.rounds, vec![Box::new(read(0)), Box::new(read(1))])?;
    let whats = [
        "read a set of 64 MiB of 512, cold",
        "open, read the image in order, cold",
        "open, read the image in order",
    ];
    for (number, what) in whats.into_iter().enumerate() {
        let [together, scattered]: [&Samples; 2] = [0, 1].map(|at| &done[at][number]);
        let what = format!("{what}, set laid together");
        bench.compare(&what, together, "in the image's order", scattered, None);
    }
    for path in &stores {
        fs::remove_dir_all(path)?;
    }
    Ok(())
}

/// An image whose bytes have four random bits each.
fn halves() -> Vec<u8> {
    let mut random = Random::new(1);
    let mut image = Vec::with_capacity(PAGES as usize * PAGE);
    while image.len() < image.capacity() {
        let word = random.word() & 0x0f0f_0f0f_0f0f_0f0f;
        image.extend_from_slice(&word.to_le_bytes());
    }
    image
}

/// The seconds until a set is read by a thread a core, each batch of it asked for while the
/// one before is read.
fn read_set(path: &Path, set: &[u32]) -> anyhow::Result<f64> {
    let began = Instant::now();
    let store = Store::open(path)?;
    let manifest = store.manifest(store.resolve("head")?)?;
    let reader = store.image_reader(&manifest.images[0]);
    let next = AtomicUsize::new(0);
    let cores = available_parallelism().map_or(1, NonZero::get);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..cores)
            .map(|_| scope.spawn(|| read_some(&reader, &next, set)))
            .collect();
        threads.into_iter().try_for_each(|thread| {
            let ended = thread.join();
            ended.ok().context("a thread that reads has ended")?
        })
    })?;
    Ok(began.elapsed().as_secs_f64())
}

fn read_some(reader: &ImageReader, next: &AtomicUsize, set: &[u32]) -> anyhow::Result<()> {
    let mut buffer = vec![0; BATCH * PAGE];
    loop {
        let first = next.fetch_add(BATCH, Ordering::Relaxed);
        if first >= set.len() {
            return Ok(());
        }
        let asked = if first == 0 { 0 } else { first + BATCH };
        let asked = asked.min(set.len())..(first + 2 * BATCH).min(set.len());
        reader.ask_for(set[asked].iter().map(|page| u64::from(*page)));
        let pages = &set[first..(first + BATCH).min(set.len())];
        let pages: Vec<u64> = pages.iter().map(|page| u64::from(*page)).collect();
        reader.read_pages(&pages, &mut buffer[..pages.len() * PAGE])?;
    }
}
