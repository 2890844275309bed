//! Writable views: what it costs to have one, to write through it, and to commit what was
//! written.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::Context as _;
use memmap2::Advice;
use snapstore_tests::harness::{Cli, noise};
use snapstore_tests::shared_map::SharedMap;

use crate::guest::PAGE;
use crate::mounts::Mount;
use crate::stats::{Random, Run, Samples, alternate};
use crate::tools::{figure, settle, timed};
use crate::touch::faults;
use crate::{Bench, utf8};

const MIB: usize = 1 << 20;
/// Each way of writing has a part of the image of its own: nothing was written there.
const PART_BYTES: usize = 64 * MIB;
const PARTS: usize = 5;
const IMAGE_BYTES: usize = PARTS * PART_BYTES;
const LARGE_BYTES: usize = 128 << 10;
/// Pages that are written one by one, stored through a mapping, or touched.
const PAGES: usize = 4096;
const CLONES: usize = 10;

/// What is measured, in order, and the most that the view may take of the plain file's time.
const WAYS: [(&str, Option<f64>); 8] = [
    ("write 64 MiB, 128 KiB each, in order", Some(2.0)),
    ("write 64 MiB, 128 KiB each, anywhere", Some(2.0)),
    ("write 16 MiB, 4 KiB each, in order", None),
    ("write 16 MiB, 4 KiB each, anywhere", None),
    ("write the first 64 MiB once more", Some(2.0)),
    ("write the last 16 MiB once more", None),
    ("store to 4096 pages of a shared mapping, first touch", None),
    ("store to them once more", Some(1.1)),
];

/// A store with an image that does not compress, and the same as a plain file.
struct Image {
    cli: Cli,
    plain: PathBuf,
    dir: PathBuf,
    overlays: PathBuf,
}

impl Image {
    fn new(bench: &Bench, name: &str) -> anyhow::Result<Self> {
        let path = |what: &str| bench.path(&format!("{name}-{what}"));
        let plain = path("image");
        fs::write(&plain, noise(1, IMAGE_BYTES))?;
        let cli = bench.new_store(&format!("{name}-store"))?;
        cli.ok(&["commit", "base", "--memory", utf8(&plain)?])?;
        let overlays = path("overlays");
        fs::create_dir_all(&overlays)?;
        let dir = path("mount");
        Ok(Self {
            cli,
            plain,
            dir,
            overlays,
        })
    }

    /// A view of it, which nobody has read.
    fn view(&self, more: &[&str]) -> anyhow::Result<Mount> {
        let options = ["--rw", "--overlay-dir", utf8(&self.overlays)?];
        Mount::unrecorded(&self.cli, "base", &self.dir, &[&options, more].concat())
    }

    /// How far the kernel reads ahead in a view of it, in bytes.
    fn read_ahead(&self) -> anyhow::Result<u32> {
        let mount = self.view(&[])?;
        let bytes = mount.read_ahead()?;
        mount.unmount()?;
        Ok(bytes)
    }

    /// Nothing is left to be written, and what is read is in memory.
    fn settle(&self) -> anyhow::Result<()> {
        Ok(settle(&[self.cli.store(), &self.plain])?)
    }

    /// What the clones have on the disk.
    fn overlay_bytes(&self) -> anyhow::Result<u64> {
        allocated_under(&self.overlays)
    }
}

fn allocated_under(dir: &Path) -> anyhow::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        bytes += match entry.metadata()? {
            found if found.is_dir() => allocated_under(&entry.path())?,
            found => found.blocks() * 512,
        };
    }
    Ok(bytes)
}

fn open(path: &Path) -> anyhow::Result<File> {
    let file = OpenOptions::new().read(true).write(true).open(path);
    file.with_context(|| format!("cannot open {}", path.display()))
}

/// Writing through a view, against writing to a plain file on the same filesystem, and
/// against the least that FUSE takes: a server that throws away what it is given.
///
/// # Errors
/// If something fails.
pub fn write(bench: &mut Bench) -> anyhow::Result<()> {
    let image = Image::new(bench, "view-write")?;
    let read_ahead = image.read_ahead()?;
    let subjects: Vec<Run<'_>> = vec![
        Box::new(|round| {
            image.settle()?;
            let mount = image.view(&[])?;
            let figures = write_all_ways(&mount.memory(), round)?;
            mount.unmount()?;
            Ok(figures)
        }),
        Box::new(|round| {
            image.settle()?;
            write_all_ways(&image.plain, round)
        }),
        Box::new(|round| {
            image.settle()?;
            let mount = Mount::discarding(&image.plain, &image.dir, read_ahead)?;
            let figures = write_all_ways(&mount.memory(), round)?;
            mount.unmount()?;
            Ok(figures)
        }),
    ];
    let done = alternate(bench.rounds, subjects)?;
    for (number, (what, aim)) in WAYS.into_iter().enumerate() {
        let [through, plain, discarded] = [0, 1, 2].map(|subject| &done[subject][number]);
        bench.compare(what, through, "to a plain file, warm", plain, aim);
        bench.compare(what, through, "to FUSE that discards it", discarded, None);
    }
    Ok(())
}

fn write_all_ways(path: &Path, round: usize) -> anyhow::Result<Vec<f64>> {
    let file = open(path)?;
    let bytes = noise(round as u64 + 2, PART_BYTES);
    let large = (LARGE_BYTES, PART_BYTES / LARGE_BYTES);
    let small = (PAGE, PAGES);
    let mut figures = Vec::new();
    for (part, (grain, count), is_anywhere) in [
        (0, large, false),
        (1, large, true),
        (2, small, false),
        (3, small, true),
        (0, large, false),
        (3, small, true),
    ] {
        let mut places: Vec<usize> = (0..PART_BYTES / grain).collect();
        match is_anywhere {
            true => places = Random::new(round as u64).choose(&places, count),
            false => places.truncate(count),
        }
        let start = Instant::now();
        for place in places {
            let at = place * grain;
            file.write_all_at(&bytes[at..at + grain], (part * PART_BYTES + at) as u64)?;
        }
        figures.push(start.elapsed().as_secs_f64());
    }
    let map = SharedMap::new(&file, IMAGE_BYTES)?;
    let places: Vec<usize> = (0..PART_BYTES / PAGE).collect();
    let places = Random::new(round as u64).choose(&places, PAGES);
    for _ in 0..2 {
        let start = Instant::now();
        for place in &places {
            let at = place * PAGE;
            map.store(4 * PART_BYTES + at, &bytes[at..at + PAGE]);
        }
        figures.push(start.elapsed().as_secs_f64());
    }
    Ok(figures)
}

/// What a clone's image costs until it is used: a view, against a copy of the file.
///
/// # Errors
/// If something fails.
pub fn load(bench: &mut Bench) -> anyhow::Result<()> {
    let image = Image::new(bench, "view-load")?;
    let copy = bench.path("view-load-copy");
    let all: Vec<u64> = (0..(IMAGE_BYTES / PAGE) as u64).collect();
    let touch = |path: &Path, round: usize| -> anyhow::Result<f64> {
        let pages = Random::new(round as u64).choose(&all, PAGES);
        let found = faults(path, Advice::Normal, &pages, &image.plain)?;
        Ok(found.mean * figure(pages.len() as u64))
    };
    let read_ahead = image.read_ahead()?;
    let touch_mounted = |mount: Mount, round: usize| -> anyhow::Result<[f64; 2]> {
        let both = [
            touch(&mount.memory(), round)?,
            touch(&mount.memory(), round)?,
        ];
        mount.unmount()?;
        Ok(both)
    };
    let subjects: Vec<Run<'_>> = vec![
        Box::new(|round| {
            image.settle()?;
            let start = Instant::now();
            let mount = image.view(&[])?;
            let mounted = start.elapsed().as_secs_f64();
            let [cold, warm] = touch_mounted(mount, round)?;
            Ok(vec![mounted, mounted + cold, cold, warm])
        }),
        Box::new(|round| {
            image.settle()?;
            let mut cp = Command::new("cp");
            let copied = timed(cp.arg("--reflink=never").args([&image.plain, &copy]))?;
            let touched = touch(&copy, round)?;
            fs::remove_file(&copy)?;
            Ok(vec![copied, copied + touched])
        }),
        Box::new(|round| {
            image.settle()?;
            Ok(vec![touch(&image.plain, round)?])
        }),
        Box::new(|round| {
            image.settle()?;
            let mount = Mount::unrecorded(&image.cli, "base", &image.dir, &[])?;
            Ok(touch_mounted(mount, round)?.to_vec())
        }),
        Box::new(|round| {
            image.settle()?;
            let mount = Mount::ram(&image.plain, &image.dir, read_ahead)?;
            Ok(touch_mounted(mount, round)?.to_vec())
        }),
    ];
    let done = alternate(bench.rounds, subjects)?;
    let [view, copied, plain, read_only, ram] = [0, 1, 2, 3, 4].map(|subject| &done[subject]);
    let copy = "cp of 320 MiB, warm";
    bench.compare("mount a view", &view[0], copy, &copied[0], None);
    let what = "mount it, touch 4096 pages, cold";
    bench.compare(what, &view[1], "copy it, touch them", &copied[1], None);
    let cold = "touch 4096 pages, cold";
    let mount = "in a mount to be read, cold";
    bench.compare(cold, &view[2], mount, &read_only[0], None);
    bench.compare(cold, &view[2], "in FUSE from RAM, cold", &ram[0], None);
    let again = "touch them again, warm";
    bench.compare(
        again,
        &view[3],
        "in FUSE from RAM, warm",
        &ram[1],
        Some(1.1),
    );
    bench.compare(again, &view[3], "in a plain file, warm", &plain[0], None);
    Ok(())
}

/// A commit of what was written to a view, against writing as much to a file in memory: the
/// least that a monitor's own diff costs.
///
/// # Errors
/// If something fails.
pub fn commit(bench: &mut Bench) -> anyhow::Result<()> {
    let memory = Path::new("/dev/shm");
    if !memory.is_dir() {
        bench.report.skip("view-commit", "there is no /dev/shm");
        return Ok(());
    }
    let image = Image::new(bench, "view-commit")?;
    let pages: Vec<usize> = (0..IMAGE_BYTES / PAGE).collect();
    for mib in [1, 8, 64] {
        let changes = |round: usize| {
            let places = Random::new(round as u64).choose(&pages, mib * MIB / PAGE);
            (places, noise((mib * 1000 + round) as u64, mib * MIB))
        };
        let subjects: Vec<Run<'_>> = vec![
            Box::new(|round| {
                let mount = image.view(&[])?;
                let (places, bytes) = changes(round);
                put(&open(&mount.memory())?, &places, &bytes)?;
                image.settle()?;
                let tag = format!("changed-{mib}-{round}");
                let start = Instant::now();
                image
                    .cli
                    .ok(&["commit", &tag, "--mount", utf8(&image.dir)?])?;
                let seconds = start.elapsed().as_secs_f64();
                mount.unmount()?;
                Ok(vec![seconds])
            }),
            Box::new(|round| {
                let (mut places, bytes) = changes(round);
                places.sort_unstable();
                let file = tempfile::tempfile_in(memory)?;
                file.set_len(IMAGE_BYTES as u64)?;
                let start = Instant::now();
                put(&file, &places, &bytes)?;
                Ok(vec![start.elapsed().as_secs_f64()])
            }),
        ];
        let done = alternate(bench.rounds, subjects)?;
        let what = format!("commit of a view with {mib} MiB changed");
        let against = "as much written to tmpfs as a sparse file";
        bench.compare(&what, &done[0][0], against, &done[1][0], None);
    }
    Ok(())
}

fn put(file: &File, places: &[usize], bytes: &[u8]) -> anyhow::Result<()> {
    for (place, page) in places.iter().zip(bytes.chunks(PAGE)) {
        file.write_all_at(page, (place * PAGE) as u64)?;
    }
    Ok(())
}

/// What a clone takes on the disk, against a copy of the image.
///
/// # Errors
/// If something fails.
pub fn bytes(bench: &mut Bench) -> anyhow::Result<()> {
    let image = Image::new(bench, "view-bytes")?;
    let mount = image.view(&["-n", &CLONES.to_string()])?;
    let per_clone = |bytes: u64| Samples::one(figure(bytes) / figure(CLONES as u64));
    let untouched = per_clone(image.overlay_bytes()?);
    let pages: Vec<usize> = (0..IMAGE_BYTES / PAGE).collect();
    for number in 0..CLONES {
        let path = image.dir.join(number.to_string()).join("memory.bin");
        let file = open(&path)?;
        let places = Random::new(number as u64).choose(&pages, MIB / PAGE);
        put(&file, &places, &noise(number as u64, MIB))?;
        file.sync_all()?;
    }
    let written = per_clone(image.overlay_bytes()?);
    mount.unmount()?;
    let copied = Samples::one(figure(IMAGE_BYTES as u64));
    let copy = ("a copy of the image", &copied);
    bench.compare_bytes(("a clone that nobody wrote to", &untouched), copy, None);
    let what = "a clone with 256 pages written, anywhere";
    bench.compare_bytes((what, &written), copy, None);
    let least = Samples::one(figure(MIB as u64));
    bench.compare_bytes((what, &written), ("these pages alone", &least), None);
    Ok(())
}
