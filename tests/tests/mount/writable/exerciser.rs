//! Random operations on a view, against a model: bytes in memory.
//!
//! `SNAPSTORE_TEST_SEED` and `SNAPSTORE_TEST_OPS` choose another run, or a longer one.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use fastrand::Rng;
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use snapstore_store::Store;
use snapstore_tests::harness::noise;
use snapstore_tests::shared_map::SharedMap;

use super::{DISK, PAGES, base_memory, contents, open_both, with_machine};
use crate::lifecycle::kill;
use crate::{Fixture, PAGE};

const IMAGES: [&str; 2] = ["memory.bin", "root.img"];
const FILES: [&str; 3] = ["vmstate", "state.json", "config.json"];

type Files = BTreeMap<String, Vec<u8>>;

struct Run {
    fixture: Fixture,
    dir: PathBuf,
    server: u32,
    rng: Rng,
    model: Files,
    open: Vec<File>,
    maps: Vec<SharedMap>,
    commits: BTreeMap<String, Files>,
    done: Vec<String>,
}

fn setting(name: &str, default: u64) -> u64 {
    let text = std::env::var(name).ok();
    text.and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[test]
fn a_view_is_what_a_model_says() -> anyhow::Result<()> {
    let seeds = match std::env::var("SNAPSTORE_TEST_SEED") {
        Ok(_) => vec![setting("SNAPSTORE_TEST_SEED", 0)],
        Err(_) => vec![1, 2, 3],
    };
    for seed in seeds {
        let Some(fixture) = with_machine("a_view_is_what_a_model_says")? else {
            return Ok(());
        };
        let mut run = Run::begin(fixture, seed)?;
        for _ in 0..setting("SNAPSTORE_TEST_OPS", 250) {
            run.step().with_context(|| run.history(seed))?;
        }
        run.commit().with_context(|| run.history(seed))?;
        run.check_commits().with_context(|| run.history(seed))?;
        run.close();
        run.fixture.umount(&run.dir)?;
    }
    Ok(())
}

impl Run {
    fn begin(mut fixture: Fixture, seed: u64) -> anyhow::Result<Self> {
        let (dir, server) = fixture.mount_rw("view", &[])?;
        let model = Files::from([
            ("memory.bin".to_owned(), base_memory()),
            ("root.img".to_owned(), noise(2, DISK)),
            ("vmstate".to_owned(), b"as it was".to_vec()),
        ]);
        let mut run = Self {
            fixture,
            dir,
            server,
            rng: Rng::with_seed(seed),
            model,
            open: Vec::new(),
            maps: Vec::new(),
            commits: BTreeMap::new(),
            done: Vec::new(),
        };
        run.open()?;
        Ok(run)
    }

    fn history(&self, seed: u64) -> String {
        let last = self.done.iter().rev().take(25).rev();
        let last: Vec<_> = last.cloned().collect();
        let count = self.done.len();
        format!(
            "SNAPSTORE_TEST_SEED={seed}, after {count} steps, the last of them:\n  {}",
            last.join("\n  ")
        )
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn open(&mut self) -> anyhow::Result<()> {
        for name in IMAGES {
            let file = open_both(&self.path(name))?;
            let len = self.model[name].len();
            self.maps.push(SharedMap::new(&file, len)?);
            self.open.push(file);
        }
        Ok(())
    }

    fn close(&mut self) {
        self.maps.clear();
        self.open.clear();
    }

    fn step(&mut self) -> anyhow::Result<()> {
        let image = self.rng.usize(0..IMAGES.len());
        match self.rng.u32(0..100) {
            0..=29 => self.write(image, false),
            30..=36 => self.write(image, true),
            37..=52 => self.store(image),
            53..=62 => self.zero(image),
            63..=74 => self.read(image),
            75..=76 => self.truncate(image),
            77..=82 => self.write_file(),
            83..=84 => self.move_file(),
            85..=86 => self.sync(image),
            87..=89 => self.holes(image),
            90..=96 => self.commit(),
            97 => self.reopen(),
            98 => self.remount(false),
            _ => self.remount(true),
        }
    }

    fn range(&mut self, image: usize) -> (usize, usize) {
        let size = self.model[IMAGES[image]].len();
        let at = self.rng.usize(0..size);
        let len = match self.rng.u32(0..4) {
            0 => self.rng.usize(1..20),
            1 => PAGE,
            2 => self.rng.usize(1..3 * PAGE),
            _ => self.rng.usize(1..20 * PAGE),
        };
        let at = if self.rng.bool() { at - at % PAGE } else { at };
        (at, len.min(size - at))
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        match self.rng.u32(0..8) {
            0 => vec![0; len],
            _ => noise(self.rng.u64(..), len),
        }
    }

    fn set(&mut self, image: usize, at: usize, bytes: &[u8]) {
        let model = self.model.get_mut(IMAGES[image]).expect("an image");
        model[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn write(&mut self, image: usize, direct: bool) -> anyhow::Result<()> {
        let (mut at, mut len) = self.range(image);
        if direct {
            at -= at % PAGE;
            len = len
                .next_multiple_of(PAGE)
                .min((self.model[IMAGES[image]].len() - at) / PAGE * PAGE);
        }
        self.done.push(format!(
            "write {} {at} {len} direct {direct}",
            IMAGES[image]
        ));
        let bytes = self.bytes(len);
        if direct {
            let mut room = vec![0; len + PAGE];
            let start = room.as_ptr().align_offset(PAGE);
            room[start..start + len].copy_from_slice(&bytes);
            let flags = rustix::fs::OFlags::DIRECT.bits().cast_signed();
            let mut options = OpenOptions::new();
            let options = options.write(true).custom_flags(flags);
            let file = options.open(self.path(IMAGES[image]))?;
            file.write_all_at(&room[start..start + len], at as u64)?;
        } else {
            self.open[image].write_all_at(&bytes, at as u64)?;
        }
        self.set(image, at, &bytes);
        Ok(())
    }

    fn store(&mut self, image: usize) -> anyhow::Result<()> {
        let (at, len) = self.range(image);
        self.done
            .push(format!("store {} {at} {len}", IMAGES[image]));
        let bytes = self.bytes(len);
        self.maps[image].store(at, &bytes);
        self.set(image, at, &bytes);
        Ok(())
    }

    fn zero(&mut self, image: usize) -> anyhow::Result<()> {
        let (at, len) = self.range(image);
        self.done.push(format!("zero {} {at} {len}", IMAGES[image]));
        let flags = match self.rng.bool() {
            true => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            false => FallocateFlags::ZERO_RANGE,
        };
        fallocate(&self.open[image], flags, at as u64, len as u64)?;
        self.set(image, at, &vec![0; len]);
        Ok(())
    }

    fn read(&mut self, image: usize) -> anyhow::Result<()> {
        let (at, len) = self.range(image);
        self.done.push(format!("read {} {at} {len}", IMAGES[image]));
        let expected = &self.model[IMAGES[image]][at..at + len];
        let mut bytes = vec![0xee; len];
        self.open[image].read_exact_at(&mut bytes, at as u64)?;
        ensure!(bytes == expected, "what is read differs");
        ensure!(
            self.maps[image].load(at, len) == expected,
            "what is loaded differs"
        );
        Ok(())
    }

    fn truncate(&mut self, image: usize) -> anyhow::Result<()> {
        let size = self.model[IMAGES[image]].len() as u64;
        let other = self.rng.u64(0..2 * size);
        self.done
            .push(format!("truncate {} {other}", IMAGES[image]));
        ensure!(self.open[image].set_len(other).is_err() || other == size);
        Ok(())
    }

    fn write_file(&mut self) -> anyhow::Result<()> {
        let name = FILES[self.rng.usize(0..FILES.len())];
        let at = self.rng.usize(0..3000);
        let len = self.rng.usize(1..6000);
        let bytes = self.bytes(len);
        let whole = self.rng.bool();
        self.done
            .push(format!("write {name} {at} {} whole {whole}", bytes.len()));
        let path = self.path(name);
        let model = self.model.entry(name.to_owned()).or_default();
        if whole {
            fs::write(path, &bytes)?;
            *model = bytes;
            return Ok(());
        }
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        file.write_all_at(&bytes, at as u64)?;
        model.resize(model.len().max(at + bytes.len()), 0);
        model[at..at + bytes.len()].copy_from_slice(&bytes);
        Ok(())
    }

    fn move_file(&mut self) -> anyhow::Result<()> {
        let from = FILES[self.rng.usize(0..FILES.len())];
        let to = FILES[self.rng.usize(0..FILES.len())];
        let Some(bytes) = self.model.remove(from) else {
            return Ok(());
        };
        if from == to {
            self.done.push(format!("remove {from}"));
            fs::remove_file(self.path(from))?;
        } else {
            self.done.push(format!("rename {from} {to}"));
            fs::rename(self.path(from), self.path(to))?;
            self.model.insert(to.to_owned(), bytes);
        }
        Ok(())
    }

    fn sync(&mut self, image: usize) -> anyhow::Result<()> {
        self.done.push(format!("sync {}", IMAGES[image]));
        match self.rng.bool() {
            true => self.maps[image].sync()?,
            false => self.open[image].sync_all()?,
        }
        Ok(())
    }

    /// What is not zeros is data, and no page of zeros that was made so is.
    fn holes(&mut self, image: usize) -> anyhow::Result<()> {
        self.done.push(format!("holes {}", IMAGES[image]));
        // What is stored through mappings is not known before.
        self.open[image].sync_all()?;
        let model = &self.model[IMAGES[image]];
        let mut from = 0;
        while from < model.len() as u64 {
            let Ok(start) = seek(&self.open[image], SeekFrom::Data(from)) else {
                let rest = &model[usize::try_from(from)?..];
                ensure!(
                    rest.iter().all(|it| *it == 0),
                    "data is not told after {from}"
                );
                break;
            };
            let hole = usize::try_from(from)?..usize::try_from(start)?;
            ensure!(
                model[hole].iter().all(|it| *it == 0),
                "data is not told at {from}"
            );
            from = seek(&self.open[image], SeekFrom::Hole(start))?;
            ensure!(
                from > start,
                "a hole begins before the data at {start} ends"
            );
        }
        Ok(())
    }

    fn commit(&mut self) -> anyhow::Result<()> {
        let tag = format!("commit{}", self.commits.len());
        self.done.push(format!("commit {tag}"));
        self.fixture.commit_view(&tag, &self.dir)?;
        self.commits.insert(tag, self.model.clone());
        Ok(())
    }

    /// Drops what the kernel has cached of the files.
    fn reopen(&mut self) -> anyhow::Result<()> {
        self.done.push("reopen".to_owned());
        self.close();
        self.open()
    }

    /// Unmounts and goes on, or ends the server at once and goes on.
    fn remount(&mut self, killed: bool) -> anyhow::Result<()> {
        self.done.push(format!("remount killed {killed}"));
        if killed {
            // What was stored through mappings is the kernel's until then.
            for map in &self.maps {
                map.sync()?;
            }
            kill(self.server)?;
        }
        self.close();
        if !killed {
            let shown = self.dir.display().to_string();
            let told = self.fixture.cli.json(&["umount", "--keep", &shown])?;
            if told["kept"].is_null() {
                let newest = self.commits.keys().len().checked_sub(1);
                let newest = newest.map_or("base".to_owned(), |it| format!("commit{it}"));
                self.server = self.fixture.writable_on(&[&newest, &shown])?;
                return self.open();
            }
        }
        self.server = self.fixture.resume(&self.dir)?;
        let found: Files = contents(&self.dir)?.into_iter().collect();
        same(&found, &self.model).context("what is found again differs")?;
        self.open()
    }

    fn check_commits(&self) -> anyhow::Result<()> {
        let store = Store::open(self.fixture.cli.store())?;
        for (tag, expected) in &self.commits {
            same(&read(&store, tag)?, expected).with_context(|| tag.clone())?;
        }
        Ok(())
    }
}

/// All images and files of a snapshot.
fn read(store: &Store, tag: &str) -> anyhow::Result<Files> {
    let id = store.tag(tag)?.context("no such tag")?;
    let mut files = Files::new();
    for image in &store.manifest(id)?.images {
        let reader = store.image_reader(image);
        let mut bytes = vec![0; usize::try_from(reader.size_bytes())?];
        reader.read_at(&mut bytes, 0)?;
        files.insert(image.file_name(), bytes);
    }
    Ok(files)
}

fn same(found: &Files, expected: &Files) -> anyhow::Result<()> {
    let names = |files: &Files| files.keys().cloned().collect::<Vec<_>>();
    ensure!(
        names(found) == names(expected),
        "{:?} and not {:?}",
        names(found),
        names(expected)
    );
    for (name, bytes) in expected {
        let other = &found[name];
        ensure!(
            other.len() == bytes.len(),
            "{name} has {} bytes and not {}",
            other.len(),
            bytes.len()
        );
        let differs = other.iter().zip(bytes).position(|(a, b)| a != b);
        ensure!(differs.is_none(), "{name} differs at {differs:?}");
    }
    Ok(())
}

/// Where something is kept is used by nobody but the view.
#[test]
fn a_view_is_kept_private() -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    let Some(mut fixture) = with_machine("a_view_is_kept_private")? else {
        return Ok(());
    };
    let (dir, _) = fixture.mount_rw("view", &[])?;
    let kept = |path: &Path| -> anyhow::Result<u32> {
        Ok(fs::metadata(path)?.permissions().mode() & 0o777)
    };
    for entry in fs::read_dir(fixture.path("overlays"))? {
        assert_eq!(kept(&entry?.path())?, 0o700);
    }
    assert_eq!(PAGES * PAGE, base_memory().len());
    fixture.umount(&dir)
}
