//! How long it takes until what a restored machine touches first is read from a bucket that
//! is far away: by a lazy mount, and by others who know more.
//!
//! The set lies scattered over the image, whose pages cannot be compressed; it is touched by
//! one reader, page after page.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use rustix::fs::{Advice, fadvise};
use snapstore_tests::harness::{Cli, noise};
use snapstore_tests::proxy::Proxy;

use crate::far::{Far, WAYS, download, get_all, remove};
use crate::guest;
use crate::mounts::Mount;
use crate::stats::{Random, Run, Samples, alternate};
use crate::{Bench, utf8};

const PAGE: u64 = guest::PAGE as u64;
const IMAGE_PAGES: usize = 16 << 10;
/// Pages of the set: 8 of 64 MiB.
const SET_PAGES: usize = 2 << 10;
const MOST_ROUNDS: usize = 3;
/// As a client downloads that wants to be quick.
const RANGES_AT_ONCE: usize = 4;
/// As one reads who has many small ranges to read.
const PAGES_AT_ONCE: usize = 16;
/// What a first instruction may cost beside the server's own time (docs/BENCHMARKS.md).
const ROUND_TRIPS: u32 = 5;
const OWN: Duration = Duration::from_millis(30);

struct Scene {
    image: Vec<u8>,
    /// In the order in which they are touched.
    set: Vec<u64>,
    far: Far,
    dir: PathBuf,
}

/// A lazy mount against a full download, and against the set alone.
///
/// # Errors
/// If something fails.
pub fn remote(bench: &mut Bench) -> anyhow::Result<()> {
    let scene = Scene::new(&bench.path("remote"))?;
    let rounds = bench.rounds.min(MOST_ROUNDS);
    let used = (SET_PAGES as u64 * PAGE) as f64;
    for way in WAYS {
        let proxy = scene.far.line(way.line())?;
        let (scene, proxy) = (&scene, &proxy);
        let raw = |work: fn(&Scene, SocketAddr) -> anyhow::Result<()>| -> Run<'_> {
            Box::new(move |_| {
                let began = Instant::now();
                work(scene, proxy.address())?;
                Ok(vec![began.elapsed().as_secs_f64()])
            })
        };
        let subjects: Vec<Run<'_>> = vec![
            Box::new(|_| scene.lazily(proxy)),
            raw(Scene::whole),
            raw(Scene::ranges),
            raw(Scene::set_alone),
        ];
        let done = alternate(rounds, subjects)?;
        let (first, all, fetched) = (&done[0][0], &done[0][1], &done[0][2]);
        let least = ROUND_TRIPS * way.round_trip() + OWN;
        let least = Samples::constant(least.as_secs_f64(), rounds);
        let named = format!("first page, {way}");
        bench.compare(&named, first, "5 round trips and 30 ms", &least, Some(1.0));
        let named = format!("8 MiB of 64 are read, {way}");
        bench.compare(&named, all, "download all, then read", &done[1][0], None);
        let against = "ranges of exactly its pages, 16 at once";
        bench.compare(&named, all, against, &done[2][0], Some(1.3));
        let against = "exactly its pages, as one object";
        bench.compare(&named, all, against, &done[3][0], Some(1.3));
        let named = format!("bytes fetched, {way}");
        let used = Samples::constant(used, rounds);
        bench.compare_bytes((&named, fetched), ("bytes of its pages", &used), Some(1.5));
    }
    Ok(())
}

impl Scene {
    fn new(dir: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(dir)?;
        let image = noise(1, IMAGE_PAGES * PAGE as usize);
        let all: Vec<u64> = (0..IMAGE_PAGES as u64).collect();
        let set = Random::new(1).choose(&all, SET_PAGES);
        fs::write(dir.join("image"), &image)?;
        let there = Cli::new(&dir.join("there"));
        there.ok(&["init"])?;
        let memory = dir.join("image");
        there.ok(&["commit", "base", "--memory", utf8(&memory)?])?;
        let scene = Self {
            far: Far::new(dir)?,
            dir: dir.to_owned(),
            image,
            set,
        };
        // As machines that were restored before touched it.
        let mount = Mount::product(&there, "base", &dir.join("recorded"), &[])?;
        scene.touch(&mount.memory())?;
        mount.unmount()?;
        // The server writes it when it ends.
        wait_for_set(&there);
        let bucket = scene.far.bucket();
        let url = format!("file://{}", utf8(bucket)?);
        there.ok(&["remote", "add", "site", &url])?;
        there.ok(&["remote", "init", "site"])?;
        let pushed = there.json(&["push", "base", "site"])?;
        let of_set = pushed["working_set_pages"].as_u64();
        ensure!(of_set == Some(SET_PAGES as u64), "{pushed}");
        fs::rename(&memory, bucket.join("image"))?;
        let pages: Vec<u8> = scene
            .set
            .iter()
            .flat_map(|page| scene.page(*page))
            .copied()
            .collect();
        fs::write(bucket.join("set"), pages)?;
        Ok(scene)
    }

    fn page(&self, number: u64) -> &[u8] {
        let start = usize::try_from(number * PAGE).expect("it fits in memory");
        &self.image[start..start + PAGE as usize]
    }

    /// Reads the set. Returns how long its first page took.
    fn touch(&self, path: &Path) -> anyhow::Result<Instant> {
        let file = File::open(path)?;
        fadvise(&file, 0, None, Advice::Random)?;
        let mut bytes = vec![0; PAGE as usize];
        let mut first = None;
        for page in &self.set {
            file.read_exact_at(&mut bytes, page * PAGE)?;
            first.get_or_insert_with(Instant::now);
            ensure!(bytes == self.page(*page), "page {page} is another one");
        }
        first.context("the set is not empty")
    }

    /// Until the first page, until all of the set, and the bytes that came.
    fn lazily(&self, proxy: &Proxy) -> anyhow::Result<Vec<f64>> {
        let store = self.dir.join("here");
        let cli = Cli::new(&store);
        cli.ok(&["init"])?;
        self.far.reach(&cli, "", proxy)?;
        let before = proxy.received_bytes();
        let began = Instant::now();
        let mount = Mount::product(&cli, "site/base", &self.dir.join("mnt"), &[])?;
        let first = self.touch(&mount.memory())?;
        let took = began.elapsed();
        let fetched = proxy.received_bytes() - before;
        mount.unmount()?;
        remove(&store)?;
        let first = first.duration_since(began).as_secs_f64();
        Ok(vec![first, took.as_secs_f64(), fetched as f64])
    }

    /// All of the image into a file, and then the set from there.
    fn whole(&self, address: SocketAddr) -> anyhow::Result<()> {
        let path = self.dir.join("whole");
        let file = File::create(&path)?;
        let len = self.image.len() as u64;
        download(address, "image", len, |start, bytes| {
            Ok(file.write_all_at(bytes, start)?)
        })?;
        self.touch(&path)?;
        Ok(fs::remove_file(path)?)
    }

    /// The pages of the set, each where it is in the image.
    fn ranges(&self, address: SocketAddr) -> anyhow::Result<()> {
        let parts = self.set.iter().map(|page| (page * PAGE, PAGE)).collect();
        get_all(address, "image", parts, PAGES_AT_ONCE, |start, bytes| {
            ensure!(bytes == self.page(start / PAGE), "another page");
            Ok(())
        })
    }

    /// An object that holds nothing else.
    fn set_alone(&self, address: SocketAddr) -> anyhow::Result<()> {
        let len = SET_PAGES as u64 * PAGE;
        let step = len.div_ceil(RANGES_AT_ONCE as u64);
        let parts = (0..len).step_by(usize::try_from(step)?);
        let parts = parts.map(|start| (start, step.min(len - start)));
        get_all(address, "set", parts.collect(), RANGES_AT_ONCE, |_, _| {
            Ok(())
        })
    }
}

/// Until a store has what a mount of it has recorded: it is written when the server ends.
pub(crate) fn wait_for_set(cli: &Cli) {
    let sets = cli.store().join("working-sets");
    let is_written = || {
        let names = fs::read_dir(&sets).into_iter().flatten().flatten();
        let mut names = names.map(|entry| entry.file_name());
        names.any(|name| !name.to_string_lossy().starts_with('.'))
    };
    for _ in 0..1000 {
        if is_written() {
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
}
