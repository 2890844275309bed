//! What a mount's readers touch first is recorded, and pushed in the next mount.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail, ensure};
use rustix::fs::{Advice, fadvise};
use rustix::mount::{MountFlags, UnmountFlags, mount_bind, mount_remount, unmount};
use snapstore_store::{Seen, SnapshotId, Store, WorkingSet};
use snapstore_tests::harness::{noise, skipped};
use snapstore_tests::vm::eventually;

use super::{Fixture, PAGE};

/// Pages of the image.
const PAGES: usize = 4096;

/// Pseudo-random pages, each once.
fn some_pages(seed: u64, count: usize) -> Vec<u32> {
    let mut pages: Vec<u32> = (0..PAGES as u32).collect();
    fastrand::Rng::with_seed(seed).shuffle(&mut pages);
    pages.truncate(count);
    pages
}

fn image() -> Vec<u8> {
    noise(1, PAGES * PAGE)
}

/// A file of a mount, of which the kernel reads what is asked for and no more.
fn open(path: &Path, flags: i32) -> anyhow::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)?;
    fadvise(&file, 0, None, Advice::Random)?;
    Ok(file)
}

fn read(file: &File, pages: &[u32]) -> anyhow::Result<()> {
    let expected = image();
    let mut bytes = vec![0; PAGE];
    for page in pages {
        let at = *page as usize * PAGE;
        file.read_exact_at(&mut bytes, at as u64)?;
        ensure!(bytes == expected[at..at + PAGE], "page {page} is wrong");
    }
    Ok(())
}

impl Fixture {
    fn image_committed(test: &str) -> anyhow::Result<Option<Self>> {
        let Some(fixture) = Self::new(test)? else {
            return Ok(None);
        };
        fixture.commit("base", &image(), &[])?;
        Ok(Some(fixture))
    }

    fn store(&self) -> anyhow::Result<(Store, SnapshotId)> {
        let store = Store::open(self.cli.store())?;
        let id = store.resolve("base")?;
        Ok((store, id))
    }

    fn set(&self) -> anyhow::Result<Option<WorkingSet>> {
        let (store, id) = self.store()?;
        Ok(store.working_set(id, "memory")?)
    }

    /// Waits until what a mount has seen is written.
    fn written(&self, is_so: impl Fn(&WorkingSet) -> bool) -> anyhow::Result<WorkingSet> {
        let deadline = Instant::now() + Duration::from_secs(60);
        while Instant::now() < deadline {
            match self.set()? {
                Some(set) if is_so(&set) => return Ok(set),
                _ => std::thread::sleep(Duration::from_millis(10)),
            }
        }
        bail!("nothing is recorded: {:?}", self.set()?)
    }

    /// Mounts, reads these pages after what is to be pushed was pushed, and unmounts.
    fn use_pages(&mut self, name: &str, options: &[&str], pages: &[u32]) -> anyhow::Result<()> {
        // One that is damaged is not pushed.
        let known = self.set().ok().flatten().filter(WorkingSet::is_trusted);
        let expected = match options.contains(&"--no-prefetch") {
            true => 0,
            false => known.map_or(0, |set| set.pages().count()),
        };
        let dir = self.mountpoint(name)?;
        let shown = dir.display().to_string();
        self.cli
            .ok(&[&["mount", "base", &shown], options].concat())?;
        let file = open(&dir.join("memory.bin"), 0)?;
        let (mut before, mut still) = (0, 0);
        eventually("what is to be pushed is pushed", || {
            let used = self.cli.json(&["show", "--mount", &shown])?;
            let pushed = used["counters"]["pushed_pages"].as_u64();
            let pushed = pushed.context("no number of pushed pages")?;
            still = if pushed == before { still + 1 } else { 0 };
            before = pushed;
            // A few are left out, to see whether they are asked for.
            let most = pushed as usize + expected / 10 >= expected;
            // The threads that push have the lowest priority.
            let rests = still > if expected > 0 { 50 } else { 0 };
            Ok((most && rests).then_some(()))
        })?;
        read(&file, pages)?;
        drop(file);
        self.umount(&dir)
    }
}

/// The kernel asks for pages that are about to be pushed: now and then for all that a thread has
/// taken up.
#[test]
fn a_set_that_is_read_while_it_is_pushed_is_recorded_each_time() -> anyhow::Result<()> {
    let test = "a_set_that_is_read_while_it_is_pushed_is_recorded_each_time";
    let Some(mut fixture) = Fixture::image_committed(test)? else {
        return Ok(());
    };
    let touched = some_pages(1, 2000);
    fixture.use_pages("first", &[], &touched)?;
    let mut recorded = fixture.written(|_| true)?.recorded();
    let dir = fixture.mountpoint("again")?;
    let shown = dir.display().to_string();
    for _ in 0..10 {
        fixture.cli.ok(&["mount", "base", &shown])?;
        let file = open(&dir.join("memory.bin"), 0)?;
        let (some, others) = touched.split_at(touched.len() / 2);
        std::thread::scope(|scope| {
            let other = scope.spawn(|| read(&file, others));
            read(&file, some)?;
            other.join().expect("it does not panic")
        })?;
        drop(file);
        fixture.umount(&dir)?;
        recorded = fixture
            .written(|set| set.recorded() != recorded)?
            .recorded();
    }
    Ok(())
}

#[test]
fn what_is_read_is_recorded_and_pushed_next_time() -> anyhow::Result<()> {
    let test = "what_is_read_is_recorded_and_pushed_next_time";
    let Some(mut fixture) = Fixture::image_committed(test)? else {
        return Ok(());
    };
    let touched = some_pages(1, 1000);
    fixture.use_pages("one", &[], &touched)?;
    let first = fixture.written(|_| true)?;
    assert_eq!(first.pages().collect::<Vec<_>>(), touched);
    assert_eq!(first.last().pushed, 0);
    fixture.use_pages("two", &[], &touched)?;
    let second = fixture.written(|set| set.recordings() == 2)?;
    let last = second.last();
    assert_eq!(second.pages().collect::<Vec<_>>(), touched);
    assert_eq!(last.pushed + last.left_out, 1000, "{last:?}");
    assert_eq!((last.left_out_touched, last.outside), (last.left_out, 0));
    assert!(last.left_out > 0 && last.left_out < 100, "{last:?}");
    let shown = fixture.cli.json(&["show", "base"])?;
    let shown = &shown["working_sets"][0];
    assert_eq!(shown["pages"], 1000);
    assert_eq!(shown["bytes"], 1000 * PAGE);
    assert_eq!(shown["hit_rate"], 1.0);
    // Of each other recording half, it stays in the set; of less it goes.
    let others = some_pages(2, 1000);
    fixture.use_pages("three", &["--no-prefetch"], &others)?;
    let third = fixture.written(|set| set.recordings() == 3)?;
    assert_eq!(third.last().pushed, 0, "not wanted");
    let of_touched: BTreeSet<u32> = touched.iter().copied().collect();
    let of_third: BTreeSet<u32> = third.pages().collect();
    assert!(of_touched.is_subset(&of_third), "touched in one of two");
    assert!(of_third.is_subset(&of_touched), "touched in one of three");
    Ok(())
}

#[test]
fn show_tells_how_old_a_recording_is() -> anyhow::Result<()> {
    let Some(fixture) = Fixture::image_committed("show_tells_how_old_a_recording_is")? else {
        return Ok(());
    };
    let (store, id) = fixture.store()?;
    let minutes = |count: u64| Duration::from_secs(60 * count + 30);
    for (age, text) in [
        (minutes(0), "s ago"),
        (minutes(5), "5m"),
        (minutes(200), "3h20m ago"),
    ] {
        let recorded = SystemTime::now() - age;
        let part = (age == minutes(5)).then(|| std::iter::once(0..8).collect());
        let seen = Seen {
            touched: vec![7, 3],
            part,
            ..Seen::default()
        };
        let set = WorkingSet::merged(None, &seen, recorded);
        store.keep_working_set(id, "memory", &set)?;
        let shown = fixture.cli.json(&["show", "base"])?["working_sets"][0].clone();
        let since = recorded.duration_since(UNIX_EPOCH)?.as_secs();
        ensure!(
            shown["recorded"].as_f64().map(|it| it as u64) == Some(since),
            "{shown}"
        );
        let shown = fixture.cli.ok(&["show", "base"])?;
        let line = shown
            .lines()
            .find(|line| line.starts_with("Working set of memory.bin"));
        let line = line.context("no line")?;
        ensure!(line.contains("2 pages") && line.contains(text), "{line}");
        ensure!(
            line.contains("recordings of parts") == seen.part.is_some(),
            "{line}"
        );
    }
    // A clock that was set back makes nothing older than it is.
    let ahead = SystemTime::now() + minutes(60);
    let set = WorkingSet::merged(None, &Seen::default(), ahead);
    store.keep_working_set(id, "memory", &set)?;
    let shown = fixture.cli.ok(&["show", "base"])?;
    ensure!(shown.contains("the last one 0s ago"), "{shown}");
    Ok(())
}

#[test]
fn what_is_warmed_is_in_memory_and_not_recorded() -> anyhow::Result<()> {
    let test = "what_is_warmed_is_in_memory_and_not_recorded";
    let Some(mut fixture) = Fixture::image_committed(test)? else {
        return Ok(());
    };
    let said = fixture.cli.fails(3, &["warm", "base"])?;
    assert!(said.contains("base is not mounted"), "{said}");
    let touched = some_pages(1, 1000);
    fixture.use_pages("one", &[], &touched)?;
    fixture.written(|_| true)?;
    let dir = fixture.mountpoint("two")?;
    let shown = dir.display().to_string();
    fixture
        .cli
        .ok(&["mount", "base", &shown, "--no-prefetch"])?;
    let warmed = fixture.cli.json(&["warm", "base"])?;
    assert_eq!(warmed["pages"], 1000);
    // Nobody asks the server for what is in memory, so there is one page to be seen.
    let other = (0..).find(|page| !touched.contains(page));
    let pages = [&touched[..], &[other.context("a page")?]].concat();
    read(&open(&dir.join("memory.bin"), 0)?, &pages)?;
    fixture.umount(&dir)?;
    let deadline = Instant::now() + Duration::from_secs(1);
    while Instant::now() < deadline {
        let set = fixture.set()?.context("a set")?;
        assert_eq!(set.recordings(), 1, "too little to count");
        std::thread::sleep(Duration::from_millis(50));
    }
    fixture.commit("new", &noise(9, PAGE), &[])?;
    let (dir, _) = fixture.mount(Some("new"), "three")?;
    let said = fixture.cli.fails(3, &["warm", "new"])?;
    assert!(said.contains("nothing is recorded of new"), "{said}");
    fixture.umount(&dir)
}

#[test]
fn a_set_that_is_wrong_is_not_pushed_again() -> anyhow::Result<()> {
    let test = "a_set_that_is_wrong_is_not_pushed_again";
    let Some(mut fixture) = Fixture::image_committed(test)? else {
        return Ok(());
    };
    let (touched, others) = (some_pages(1, 4000), some_pages(2, PAGES));
    let (touched, others) = (&touched[..2000], &others[..2000]);
    let wrong: Vec<u32> = others
        .iter()
        .copied()
        .filter(|page| !touched.contains(page))
        .collect();
    fixture.use_pages("one", &[], touched)?;
    fixture.written(|_| true)?;
    fixture.use_pages("two", &[], &wrong)?;
    let set = fixture.written(|set| set.recordings() == 2)?;
    assert!(!set.is_trusted(), "{:?}", set.last());
    fixture.use_pages("three", &[], &wrong)?;
    let set = fixture.written(|set| set.recordings() == 3)?;
    assert_eq!(set.last().pushed, 0);
    assert!(set.is_trusted());
    let pages: BTreeSet<u32> = set.pages().collect();
    assert!(
        wrong.iter().all(|page| pages.contains(page)),
        "touched twice in three"
    );
    Ok(())
}

#[test]
fn pushed_pages_are_right_beside_readers_and_a_collection() -> anyhow::Result<()> {
    let test = "pushed_pages_are_right_beside_readers_and_a_collection";
    let Some(mut fixture) = Fixture::new(test)? else {
        return Ok(());
    };
    // Disks end anywhere in a page.
    let disk = noise(2, 700 * PAGE + 512);
    let path = fixture.file("disk", &disk)?;
    let named = format!("root={path}");
    fixture.commit("base", &image(), &["--disk", &named, "--vmstate", &path])?;
    let files = [("memory.bin", image()), ("root.img", disk)];
    for round in 0..4 {
        // What is live is moved while it is pushed.
        fixture.commit("other", &noise(round, 1 << 20), &[])?;
        fixture.cli.ok(&["rm", "other"])?;
        let name = format!("mount{round}");
        let (dir, _) = fixture.mount(Some("base"), &name)?;
        std::thread::scope(|scope| {
            let gc = scope.spawn(|| fixture.cli.ok(&["gc", "--keep-percent", "100"]));
            let readers: Vec<_> = (0..4_usize)
                .map(|reader| {
                    let (name, expected) = &files[reader % 2];
                    let path = dir.join(name);
                    scope.spawn(move || -> anyhow::Result<()> {
                        let bytes = fs::read(&path)?;
                        ensure!(bytes == *expected, "{name} is wrong, or has another length");
                        Ok(())
                    })
                })
                .collect();
            for reader in readers {
                reader.join().expect("it does not panic")?;
            }
            gc.join().expect("it does not panic").map(|_| ())
        })?;
        fixture.umount(&dir)?;
    }
    let sets = fixture.cli.store().join("working-sets");
    let (store, id) = fixture.store()?;
    // The last server may write once more after its mount's end.
    eventually("those of the memory and the disk are there", || {
        let both = ["memory", "root"].map(|image| store.working_set(id, image));
        let files = fs::read_dir(&sets)?.count();
        let [memory, disk] = both;
        Ok((memory?.is_some() && disk?.is_some() && files == 2).then_some(()))
    })?;
    assert!(store.working_set(id, "vmstate")?.is_none());
    fixture.cli.ok(&["verify", "--read-data"])?;
    fixture.cli.ok(&["rm", "base"])?;
    eventually("they are gone", || {
        fixture.cli.ok(&["gc"])?;
        Ok((!sets.exists()).then_some(()))
    })
}

#[test]
fn what_is_wrong_with_a_recording_is_said_and_nothing_more() -> anyhow::Result<()> {
    let test = "what_is_wrong_with_a_recording_is_said_and_nothing_more";
    let Some(mut fixture) = Fixture::image_committed(test)? else {
        return Ok(());
    };
    let touched = some_pages(1, 100);
    fixture.use_pages("one", &[], &touched)?;
    fixture.written(|_| true)?;
    let (store, id) = fixture.store()?;
    let path = store.path().join(format!("working-sets/{id}.memory"));
    let mut bytes = fs::read(&path)?;
    bytes[40] ^= 1;
    fs::write(&path, &bytes)?;
    let shown = fixture.cli.ok(&["show", "base"])?;
    assert!(
        shown.contains("Working set of memory.bin is not used"),
        "{shown}"
    );
    fixture.cli.ok(&["verify"])?;
    fixture.use_pages("two", &[], &touched)?;
    let deadline = Instant::now() + Duration::from_secs(60);
    while !matches!(fixture.set(), Ok(Some(_))) {
        ensure!(Instant::now() < deadline, "it is not replaced");
        std::thread::sleep(Duration::from_millis(10));
    }
    let log = fs::read_to_string(store.path().join("mounts.log"))?;
    assert!(log.contains("a working set is not used"), "{log}");
    Ok(())
}

#[test]
fn a_reader_who_only_looks_is_not_recorded_and_there_is_a_most() -> anyhow::Result<()> {
    let test = "a_reader_who_only_looks_is_not_recorded_and_there_is_a_most";
    let Some(mut fixture) = Fixture::new(test)? else {
        return Ok(());
    };
    // 160 MiB, nearly all of it holes.
    let path = fixture.file("memory", b"begins")?;
    OpenOptions::new()
        .write(true)
        .open(&path)?
        .set_len(160 << 20)?;
    fixture.cli.ok(&["commit", "base", "--memory", &path])?;
    let (dir, _) = fixture.mount(Some("base"), "mount")?;
    let looks = open(&dir.join("memory.bin"), libc::O_NOATIME)?;
    looks.read_exact_at(&mut vec![0; 4 << 20], 0)?;
    drop(looks);
    let reads = open(&dir.join("memory.bin"), 0)?;
    let mut bytes = vec![0; 1 << 20];
    for at in (4..160_u64).rev() {
        reads.read_exact_at(&mut bytes, at << 20)?;
    }
    drop(reads);
    fixture.umount(&dir)?;
    // Written more than once, and for the last time after the end of the mount.
    let set = fixture.written(|set| set.pages().count() >= 1 << 15)?;
    let pages: Vec<u32> = set.pages().collect();
    assert_eq!(pages.len(), 1 << 15);
    assert!(pages.iter().all(|page| *page >= 1024), "looked at only");
    Ok(())
}

#[test]
fn a_server_that_is_killed_while_it_writes_leaves_a_whole_file_or_none() -> anyhow::Result<()> {
    let test = "a_server_that_is_killed_while_it_writes_leaves_a_whole_file_or_none";
    let Some(mut fixture) = Fixture::image_committed(test)? else {
        return Ok(());
    };
    let dir = fixture.mountpoint("mount")?;
    let shown = dir.display().to_string();
    let mut killed = 0;
    for step in 1..8_u32 {
        let cli = fixture
            .cli
            .clone()
            .with_env("SNAPSTORE_KILL_AT_STEP", &step.to_string());
        let mut server = cli
            .command(&["mount", "--foreground", "base", &shown])?
            .spawn()?;
        let deadline = Instant::now() + Duration::from_secs(60);
        while server.try_wait()?.is_none() && !dir.join("memory.bin").exists() {
            ensure!(Instant::now() < deadline, "it is not mounted");
            std::thread::sleep(Duration::from_millis(5));
        }
        if let Ok(file) = open(&dir.join("memory.bin"), 0) {
            let _ = read(&file, &some_pages(step.into(), 50));
        }
        let _ = fixture.cli.run(&["umount", &shown])?;
        killed += u32::from(!server.wait()?.success());
        fixture.set().context("a file that is not whole")?;
    }
    assert!(killed > 0, "none was killed");
    fixture.written(|_| true)?;
    fixture.cli.ok(&["gc"])?;
    let sets = fixture.cli.store().join("working-sets");
    eventually("what was left of the others is gone", || {
        Ok((fs::read_dir(&sets)?.count() == 1).then_some(()))
    })
}

#[test]
fn a_store_that_cannot_be_written_is_not() -> anyhow::Result<()> {
    let test = "a_store_that_cannot_be_written_is_not";
    let Some(mut fixture) = Fixture::image_committed(test)? else {
        return Ok(());
    };
    let touched = some_pages(1, 600);
    fixture.use_pages("one", &[], &touched)?;
    let before = fixture.written(|_| true)?;
    let store = fixture.cli.store().to_owned();
    let read_only = MountFlags::BIND | MountFlags::RDONLY;
    if let Err(error) = mount_bind(&store, &store) {
        skipped(test, &error.to_string());
        return Ok(());
    }
    let tried = mount_remount(&store, read_only, "").map_err(anyhow::Error::from);
    let used = tried.and_then(|()| fixture.use_pages("two", &[], &touched));
    unmount(&store, UnmountFlags::DETACH)?;
    used?;
    assert_eq!(fixture.set()?, Some(before));
    Ok(())
}
