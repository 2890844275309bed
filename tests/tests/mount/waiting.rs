//! A mount of all tags beside others who use the store, or have used it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use rustix::fs::{Advice, FlockOperation, fadvise, flock};
use snapstore_tests::harness::noise;

use crate::{Fixture, PAGE, names};

const PAGES: usize = 600;

/// Reads some pages of a file from the server, not from the kernel's cache.
fn read_anew(file: &File, bytes: &[u8], first: usize) -> anyhow::Result<()> {
    fadvise(file, 0, None, Advice::DontNeed)?;
    for number in (first..PAGES).step_by(50) {
        let mut page = vec![0; PAGE];
        file.read_exact_at(&mut page, (number * PAGE) as u64)?;
        ensure!(
            page == bytes[number * PAGE..][..PAGE],
            "page {number} is another"
        );
    }
    Ok(())
}

/// Somebody holds the lock that pinning a snapshot needs. What was opened before
/// goes on, and so does what needs no pin.
#[test]
fn reads_do_not_wait_for_who_opens_a_tag() -> anyhow::Result<()> {
    let Some(mut fixture) = Fixture::new("reads_do_not_wait_for_who_opens_a_tag")? else {
        return Ok(());
    };
    let bytes = noise(1, PAGES * PAGE);
    fixture.commit("known", &bytes, &[])?;
    let (dir, _) = fixture.mount(None, "mnt")?;
    let file = File::open(dir.join("known/memory.bin"))?;
    read_anew(&file, &bytes, 0)?;
    // More than the server has threads.
    let new: Vec<String> = (0..5).map(|number| format!("new{number}")).collect();
    for tag in &new {
        // Each of a snapshot of its own: one that is pinned already waits for nothing.
        fixture.commit(
            tag,
            &noise(tag.len() as u64, PAGE),
            &["--label", &format!("is={tag}")],
        )?;
    }
    let lock = File::options()
        .write(true)
        .open(fixture.path("store/locks/allocate"))?;
    flock(&lock, FlockOperation::LockExclusive)?;
    std::thread::scope(|scope| {
        let opening: Vec<_> = new
            .iter()
            .map(|tag| {
                let path = dir.join(tag).join("memory.bin");
                scope.spawn(move || fs::metadata(path))
            })
            .collect();
        let meanwhile = || -> anyhow::Result<()> {
            for round in 0..20 {
                read_anew(&file, &bytes, round)?;
                fs::metadata(dir.join("known/memory.bin"))?;
                File::open(dir.join("known/manifest.json"))?;
                ensure!(names(&dir)?.len() == 1 + new.len(), "the list of tags");
                std::thread::sleep(Duration::from_millis(20));
            }
            let waiting = opening.iter().all(|opening| !opening.is_finished());
            ensure!(waiting, "the readers have waited until a tag was opened");
            Ok(())
        };
        let read = meanwhile();
        flock(&lock, FlockOperation::Unlock)?;
        for opening in opening {
            let opened = opening.join().expect("it does not panic")?;
            ensure!(opened.len() == PAGE as u64);
        }
        read
    })
}

/// What a process has open or mapped that was deleted, below a directory.
fn deleted_files(pid: u32, dir: &Path) -> anyhow::Result<Vec<String>> {
    let mut found: Vec<String> = fs::read_dir(format!("/proc/{pid}/fd"))?
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .map(|target| target.display().to_string())
        .collect();
    found.extend(
        fs::read_to_string(format!("/proc/{pid}/maps"))?
            .lines()
            .map(str::to_owned),
    );
    let dir = dir.display().to_string();
    found.retain(|name| name.contains(&dir) && name.ends_with(" (deleted)"));
    Ok(found)
}

#[test]
fn a_server_keeps_nothing_open_that_was_deleted() -> anyhow::Result<()> {
    let test = "a_server_keeps_nothing_open_that_was_deleted";
    let Some(mut fixture) = Fixture::new(test)? else {
        return Ok(());
    };
    for number in 1..4 {
        let image = noise(number, PAGES * PAGE);
        fixture.commit(&format!("tag{number}"), &image, &["--no-parent"])?;
    }
    let (dir, pid) = fixture.mount(None, "mnt")?;
    for tag in names(&dir)? {
        fs::read(dir.join(tag).join("memory.bin"))?;
    }
    fixture.cli.ok(&["rm", "tag1", "tag2"])?;
    gc_deletes(&fixture)?;
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let left = deleted_files(pid, fixture.cli.store())?;
        if left.is_empty() {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{left:?}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Runs `gc` until it has deleted a pack.
fn gc_deletes(fixture: &Fixture) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if fixture.cli.json(&["gc"])?["deleted_packs"] != 0 {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("the mount keeps what nobody uses");
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn a_mount_of_all_tags_lets_go_of_what_it_has_shown() -> anyhow::Result<()> {
    let test = "a_mount_of_all_tags_lets_go_of_what_it_has_shown";
    let Some(mut fixture) = Fixture::new(test)? else {
        return Ok(());
    };
    let images = [1, 2, 3].map(|seed| noise(seed, PAGES * PAGE));
    for (image, number) in images.iter().zip(1..) {
        fixture.commit(&format!("tag{number}"), image, &["--no-parent"])?;
    }
    let (dir, _) = fixture.mount(None, "mnt")?;
    for tag in names(&dir)? {
        for file in names(&dir.join(&tag))? {
            fs::read(dir.join(&tag).join(file))?;
        }
    }
    let file = File::open(dir.join("tag2/memory.bin"))?;
    fixture.cli.ok(&["rm", "tag1", "tag2"])?;
    gc_deletes(&fixture)?;
    ensure!(names(&fixture.path("store/packs"))?.len() == 2);
    read_anew(&file, &images[1], 0).context("an open file of a tag that was removed")?;
    drop(file);
    gc_deletes(&fixture)?;
    ensure!(names(&dir)? == ["tag3"]);
    ensure!(fs::read(dir.join("tag3/memory.bin"))? == images[2]);
    Ok(())
}
