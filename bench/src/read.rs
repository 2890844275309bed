//! How long reading takes, through the library and through a mount.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::ensure;
use snapstore_store::Store;
use snapstore_tests::harness::Cli;

use crate::Bench;
use crate::deep::DEPTH;
use crate::guest::PAGE;
use crate::mounts::Mount;
use crate::stats::{Run, Samples, alternate};
use crate::tools::{find, hash, read_all, settle, timed};

/// What one read(2) asks for.
const BUFFER: usize = 1 << 20;

/// Reading the end of a long chain, against the same bytes without a chain.
///
/// # Errors
/// If something fails.
pub fn depth(bench: &mut Bench) -> anyhow::Result<()> {
    let deep = bench.deep()?;
    let used = deep.guest_at_end.used();
    let end = format!("d{DEPTH}");
    let read = |store: &Path, tag: &str, round: usize| {
        read_both(store, tag, &bench.random_pages(used, round))
    };
    let done = alternate(
        bench.rounds,
        vec![
            Box::new(|round| read(deep.long.store(), &end, round)),
            Box::new(|round| read(deep.flat.store(), "head", round)),
        ],
    )?;
    for (number, what) in WHATS.into_iter().enumerate() {
        let what = format!("{what}, depth {DEPTH}");
        let (long, flat) = (&done[0][number], &done[1][number]);
        bench.compare(&what, long, "same bytes, depth 0", flat, Some(1.1));
    }
    Ok(())
}

/// What [`read_both`] measures.
const WHATS: [&str; 2] = [
    "open, read the image in order",
    "open, read 4096 random pages",
];

/// The seconds of reading the image in order, and of reading these pages.
fn read_both(store: &Path, tag: &str, pages: &[u64]) -> anyhow::Result<Vec<f64>> {
    settle(&[store])?;
    Ok(vec![
        read_in_order(store, tag)?,
        read_pages(store, tag, pages)?,
    ])
}

/// The seconds of opening a store and reading the first image of a snapshot in order.
///
/// # Errors
/// If that fails.
pub fn read_in_order(store: &Path, tag: &str) -> anyhow::Result<f64> {
    let mut buffer = vec![0; BUFFER];
    let start = Instant::now();
    let store = Store::open(store)?;
    let manifest = store.manifest(store.resolve(tag)?)?;
    let reader = store.image_reader(&manifest.images[0]);
    let mut at = 0;
    while reader.read_at(&mut buffer, at)? > 0 {
        at += BUFFER as u64;
    }
    Ok(start.elapsed().as_secs_f64())
}

fn read_pages(store: &Path, tag: &str, pages: &[u64]) -> anyhow::Result<f64> {
    let mut buffer = vec![0; PAGE];
    let start = Instant::now();
    let store = Store::open(store)?;
    let manifest = store.manifest(store.resolve(tag)?)?;
    let reader = store.image_reader(&manifest.images[0]);
    for page in pages {
        reader.read_at(&mut buffer, page * PAGE as u64)?;
    }
    Ok(start.elapsed().as_secs_f64())
}

/// The same once both were optimised, and against what a commit alone has made.
///
/// # Errors
/// If something fails.
pub fn depth_optimized(bench: &mut Bench) -> anyhow::Result<()> {
    let deep = bench.deep()?;
    let used = deep.guest_at_end.used();
    let end = format!("d{DEPTH}");
    let optimized = |name: &str, cli: &Cli| -> anyhow::Result<Cli> {
        let copy = bench.new_store(name)?;
        std::fs::remove_dir_all(copy.store())?;
        let mut command = Command::new("cp");
        timed(command.arg("-a").arg(cli.store()).arg(copy.store()))?;
        copy.ok(&["gc", "--optimize"])?;
        Ok(copy)
    };
    let long = optimized("long-optimized", &deep.long)?;
    let flat = optimized("flat-optimized", &deep.flat)?;
    let read = |store: &Path, tag: &str, round: usize| {
        read_both(store, tag, &bench.random_pages(used, round))
    };
    let done = alternate(
        bench.rounds,
        vec![
            Box::new(|round| read(long.store(), &end, round)),
            Box::new(|round| read(flat.store(), "head", round)),
            Box::new(|round| read(deep.flat.store(), "head", round)),
        ],
    )?;
    for (number, what) in WHATS.into_iter().enumerate() {
        let what = format!("{what}, depth {DEPTH}, optimised");
        let [long, flat, committed] = [0, 1, 2].map(|subject| &done[subject][number]);
        bench.compare(&what, long, "depth 0, optimised", flat, Some(1.02));
        bench.compare(&what, long, "depth 0, as committed", committed, None);
    }
    for cli in [&long, &flat] {
        std::fs::remove_dir_all(cli.store())?;
    }
    Ok(())
}

/// Reading a mounted image in order, cold and warm, against decompressing a
/// file, the trivial server, and a plain file.
///
/// # Errors
/// If something fails.
pub fn sequential(bench: &mut Bench) -> anyhow::Result<()> {
    let cli = bench.base_store()?.clone();
    let image = bench.images.path("base");
    let packed = bench.path("base.zst");
    let dir = bench.path("seq-mount");
    let zstd = find("zstd");
    if let Some(zstd) = &zstd {
        let mut command = Command::new(zstd);
        timed(
            command
                .args(["-1", "-q", "-f"])
                .arg(&image)
                .arg("-o")
                .arg(&packed),
        )?;
    }
    let wanted = hash(&image)?;
    let mount = Mount::product(&cli, "base", &dir, &[])?;
    ensure!(
        hash(&mount.memory())? == wanted,
        "the mount shows other bytes"
    );
    let read_ahead = mount.read_ahead()?;
    mount.unmount()?;
    let read_mount = |mount: Mount| -> anyhow::Result<Vec<f64>> {
        let (cold, warm) = (read_timed(&mount.memory())?, read_timed(&mount.memory())?);
        // What was read is still what the kernel shows.
        ensure!(
            hash(&mount.memory())? == wanted,
            "the mount shows other bytes"
        );
        mount.unmount()?;
        Ok(vec![cold, warm])
    };
    let mut subjects: Vec<Run<'_>> = vec![
        Box::new(|_| {
            settle(&[cli.store()])?;
            read_mount(Mount::unrecorded(&cli, "base", &dir, &[])?)
        }),
        Box::new(|_| {
            settle(&[&image])?;
            read_mount(Mount::ram(&image, &dir, read_ahead)?)
        }),
        Box::new(|_| {
            settle(&[&image])?;
            Ok(vec![read_timed(&image)?])
        }),
    ];
    let packed = &packed;
    if let Some(zstd) = &zstd {
        subjects.push(Box::new(move |_| {
            settle(&[packed])?;
            Ok(vec![timed(Command::new(zstd).arg("-dc").arg(packed))?])
        }));
    }
    let done = alternate(bench.rounds, subjects)?;
    let [cold, warm] = ["read all of a mounted image, cold", "the same again, warm"];
    match done.get(3) {
        Some(zstd) => bench.compare(cold, &done[0][0], "zstd -dc", &zstd[0], Some(1.0)),
        None => bench.report.skip("seq-read", "zstd is not installed"),
    }
    let plain: &Samples = &done[2][0];
    bench.compare(cold, &done[0][0], "FUSE from RAM, cold", &done[1][0], None);
    bench.compare(cold, &done[0][0], "plain file, warm", plain, None);
    bench.compare(warm, &done[0][1], "FUSE from RAM, warm", &done[1][1], None);
    bench.compare(warm, &done[0][1], "plain file, warm", plain, None);
    Ok(())
}

/// The seconds that reading a file takes.
///
/// # Errors
/// If it cannot be read.
pub fn read_timed(path: &Path) -> anyhow::Result<f64> {
    let start = Instant::now();
    read_all(path, BUFFER)?;
    Ok(start.elapsed().as_secs_f64())
}
