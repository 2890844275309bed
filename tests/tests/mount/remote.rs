//! Mounts of snapshots that stay in a remote, on a host whose store has none of them.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use rustix::fs::{Advice, fadvise};
use snapstore_tests::harness::{Cli, noise};

use crate::lifecycle::{kill, wait_for_end};
use crate::{Fixture, PAGE, names};

pub const PAGES: usize = 1500;

/// Another store than the fixture's, with `base`.
pub fn commit_base(fixture: &Fixture) -> anyhow::Result<Cli> {
    let there = Cli::new(&fixture.path("there"));
    there.ok(&["init"])?;
    let memory = fixture.file("image", &noise(1, PAGES * PAGE))?;
    let state = fixture.file("state", b"the state")?;
    let disk = fixture.file("disk", &[noise(2, 40 * PAGE), vec![0; 100 * PAGE]].concat())?;
    let disk = format!("disk0={disk}");
    let arguments = ["commit", "base", "--memory", &memory, "--disk", &disk];
    there.ok(&[&arguments[..], &["--vmstate", &state]].concat())?;
    Ok(there)
}

/// A bucket with `base`, which one store has pushed; the fixture's own store has nothing.
fn with_remote(test: &str) -> anyhow::Result<Option<(Fixture, Cli)>> {
    let Some(fixture) = Fixture::new(test)? else {
        return Ok(None);
    };
    let there = commit_base(&fixture)?;
    let url = format!("file://{}", fixture.path("bucket").display());
    for cli in [&there, &fixture.cli] {
        cli.ok(&["remote", "add", "site", &url])?;
    }
    there.ok(&["remote", "init", "site"])?;
    there.ok(&["push", "base", "site"])?;
    Ok(Some((fixture, there)))
}

pub fn read_page(file: &File, number: usize) -> std::io::Result<Vec<u8>> {
    fadvise(file, 0, None, Advice::DontNeed)?;
    let mut page = vec![0; PAGE];
    file.read_exact_at(&mut page, (number * PAGE) as u64)?;
    Ok(page)
}

pub fn expect_page(file: &File, number: usize) -> anyhow::Result<()> {
    let page = read_page(file, number).with_context(|| format!("page {number}"))?;
    ensure!(
        page == noise(1, PAGES * PAGE)[number * PAGE..][..PAGE],
        "page {number} is another"
    );
    Ok(())
}

/// The longest file below a directory.
pub fn longest(dir: &Path) -> anyhow::Result<PathBuf> {
    let mut found: Option<(u64, PathBuf)> = None;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let one = match entry.file_type()?.is_dir() {
            true => longest(&entry.path()).ok(),
            false => Some(entry.path()),
        };
        if let Some(path) = one {
            let len = fs::metadata(&path)?.len();
            if found.as_ref().is_none_or(|(longest, _)| *longest < len) {
                found = Some((len, path));
            }
        }
    }
    Ok(found.context("no file")?.1)
}

#[test]
fn a_snapshot_of_an_encrypted_remote_is_shown_to_who_has_the_key() -> anyhow::Result<()> {
    let test = "a_snapshot_of_an_encrypted_remote_is_shown_to_who_has_the_key";
    let Some(mut fixture) = Fixture::new(test)? else {
        return Ok(());
    };
    let there = commit_base(&fixture)?;
    let url = format!("file://{}", fixture.path("bucket").display());
    let key = fixture.path("key").display().to_string();
    there.ok(&["remote", "key", &key])?;
    there.ok(&["remote", "add", "site", &url, "--key", &key])?;
    there.ok(&["remote", "init", "site"])?;
    there.ok(&["push", "base", "site"])?;
    let mnt = fixture.mountpoint("none")?.display().to_string();
    fixture.cli.ok(&["remote", "add", "site", &url])?;
    let error = fixture.cli.fails(2, &["mount", "site/base", &mnt])?;
    ensure!(error.contains("no key was given"), "{error}");
    fixture
        .cli
        .ok(&["remote", "add", "site", &url, "--key", &key])?;
    let (dir, _) = fixture.mount(Some("site/base"), "mnt")?;
    ensure!(fs::read(dir.join("memory.bin"))? == noise(1, PAGES * PAGE));
    ensure!(fs::read(dir.join("vmstate"))? == b"the state");
    Ok(())
}

/// What readers of the mount touch, which the one who pushed it does not know.
#[test]
fn what_is_touched_of_a_remote_is_recorded_and_read_first_next_time() -> anyhow::Result<()> {
    let test = "what_is_touched_of_a_remote_is_recorded_and_read_first_next_time";
    let Some((mut fixture, _)) = with_remote(test)? else {
        return Ok(());
    };
    let asked = |fixture: &Fixture, dir: &Path| -> anyhow::Result<(u64, u64)> {
        let shown = dir.display().to_string();
        let told = fixture.cli.json(&["show", "--mount", &shown])?;
        let all = told["counters"]["elsewhere"]
            .as_array()
            .context("counters")?;
        let of = |cause: &str| {
            let one = all.iter().find(|one| one["cause"] == cause);
            one.and_then(|one| one["requests"].as_u64())
                .context("requests")
        };
        Ok((of("demand")?, of("working_set")?))
    };
    let pages = [3, 700, 1400, 1001];
    for (name, is_known) in [("first", false), ("second", true)] {
        let (dir, pid) = fixture.mount(Some("site/base"), name)?;
        let file = File::open(dir.join("memory.bin"))?;
        // Of what is recorded nobody has to have asked.
        while is_known && asked(&fixture, &dir)?.1 == 0 {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        for page in pages {
            expect_page(&file, page)?;
        }
        let asked = asked(&fixture, &dir)?;
        ensure!((asked.1 > 0) == is_known, "{asked:?}");
        drop(file);
        fixture.umount(&dir)?;
        wait_for_end(pid)?;
        // What was read goes, and what was recorded stays.
        let mut sets = 0;
        for bucket in fs::read_dir(fixture.cli.store().join("cache"))? {
            let bucket = bucket?.path();
            for entry in bucket.is_dir().then(|| fs::read_dir(&bucket)).into_iter() {
                for entry in entry? {
                    let path = entry?.path();
                    match path.extension().is_some_and(|suffix| suffix == "set") {
                        true => sets += 1,
                        false => fs::remove_file(path)?,
                    }
                }
            }
        }
        ensure!(sets > 0, "nothing is recorded");
    }
    Ok(())
}

#[test]
fn a_snapshot_of_a_remote_is_shown_as_one_of_the_store() -> anyhow::Result<()> {
    let test = "a_snapshot_of_a_remote_is_shown_as_one_of_the_store";
    let Some((mut fixture, there)) = with_remote(test)? else {
        return Ok(());
    };
    let local = fixture.mountpoint("local")?;
    there.ok(&["mount", "base", &local.display().to_string()])?;
    let (dir, pid) = fixture.mount(Some("site/base"), "mnt")?;
    ensure!(names(&dir)? == names(&local)?, "{:?}", names(&dir)?);
    for name in names(&dir)? {
        let (one, other) = (
            fs::metadata(dir.join(&name))?,
            fs::metadata(local.join(&name))?,
        );
        ensure!(
            name == "manifest.json" || one.len() == other.len(),
            "{name}"
        );
        if name != "manifest.json" {
            ensure!(
                fs::read(dir.join(&name))? == fs::read(local.join(&name))?,
                "{name}"
            );
        }
    }
    let id = |dir: &Path| -> anyhow::Result<serde_json::Value> {
        let manifest = fs::read(dir.join("manifest.json"))?;
        Ok(serde_json::from_slice::<serde_json::Value>(&manifest)?["id"].clone())
    };
    ensure!(id(&dir)? == id(&local)?);
    // Holes are known without reading them.
    let disk = File::open(dir.join("disk0.img"))?;
    let hole = rustix::fs::seek(&disk, rustix::fs::SeekFrom::Hole(0))?;
    ensure!(hole == 40 * PAGE as u64, "{hole}");
    drop(disk);
    ensure!(fixture.cli.json(&["tags"])?["tags"] == serde_json::json!([]));
    let leases = fixture.cli.json(&["remote", "leases", "site"])?;
    ensure!(leases["leases"][0]["kind"] == "view", "{leases}");
    fixture.umount(&dir)?;
    wait_for_end(pid)?;
    let leases = fixture.cli.json(&["remote", "leases", "site"])?;
    ensure!(leases["leases"] == serde_json::json!([]), "{leases}");
    ensure!(fs::read_dir(&dir)?.next().is_none(), "still mounted");
    Ok(())
}

#[test]
fn what_cannot_be_mounted_of_a_remote() -> anyhow::Result<()> {
    let Some((mut fixture, _)) = with_remote("what_cannot_be_mounted_of_a_remote")? else {
        return Ok(());
    };
    let dir = fixture.mountpoint("mnt")?.display().to_string();
    let cli = &fixture.cli;
    let error = cli.fails(3, &["mount", "site/nobody", &dir])?;
    ensure!(error.contains("nobody"), "{error}");
    let error = cli.fails(3, &["mount", "nowhere/base", &dir])?;
    ensure!(error.contains("remote add"), "{error}");
    cli.fails(2, &["mount", "site/", &dir])?;
    cli.fails(2, &["mount", "../base", &dir])?;
    let error = cli.fails(2, &["mount", "--rw", "site/base", &dir])?;
    ensure!(error.contains("pull site/base"), "{error}");
    // Nobody answers, as where a disk is not mounted.
    let bucket = fixture.path("bucket");
    fs::rename(&bucket, fixture.path("away"))?;
    cli.fails(6, &["mount", "site/base", &dir])?;
    fs::write(&bucket, "")?;
    let error = cli.fails(2, &["mount", "site/base", &dir])?;
    ensure!(error.contains("has to be a directory"), "{error}");
    Ok(())
}

#[test]
fn a_server_that_is_killed_leaves_what_it_has_read() -> anyhow::Result<()> {
    let test = "a_server_that_is_killed_leaves_what_it_has_read";
    let Some((mut fixture, _)) = with_remote(test)? else {
        return Ok(());
    };
    let (dir, pid) = fixture.mount(Some("site/base"), "mnt")?;
    expect_page(&File::open(dir.join("memory.bin"))?, 700)?;
    kill(pid)?;
    let shown = dir.display().to_string();
    // Over the dead one.
    fixture.cli.ok(&["umount", "--lazy", &shown])?;
    fixture.mount_on(Some("site/base"), &dir)?;
    let file = File::open(dir.join("memory.bin"))?;
    let pack = longest(&fixture.path("bucket/packs"))?;
    let away = fixture.path("pack");
    fs::rename(&pack, &away)?;
    expect_page(&file, 700)?;
    let error = read_page(&file, 20).expect_err("its pack is gone");
    ensure!(error.raw_os_error() == Some(libc::EIO), "{error}");
    fs::rename(&away, &pack)?;
    expect_page(&file, 20)?;
    drop(file);
    fixture.umount(&dir)?;
    // Another one's bytes in the cache, as after a crash.
    let cached = longest(&fixture.path("store/cache"))?;
    let len = usize::try_from(fs::metadata(&cached)?.len())?;
    fs::write(&cached, noise(9, len))?;
    fixture.mount_on(Some("site/base"), &dir)?;
    let memory = fs::read(dir.join("memory.bin"))?;
    ensure!(memory == noise(1, PAGES * PAGE), "other bytes are shown");
    Ok(())
}

#[test]
fn damage_is_an_error_that_the_log_names() -> anyhow::Result<()> {
    let Some((mut fixture, _)) = with_remote("damage_is_an_error_that_the_log_names")? else {
        return Ok(());
    };
    let pack = longest(&fixture.path("bucket/packs"))?;
    let whole = fs::read(&pack)?;
    let mut damaged = whole.clone();
    let half = damaged.len() / 2;
    damaged[half..half + 100_000].fill(7);
    fs::write(&pack, damaged)?;
    let (dir, _) = fixture.mount(Some("site/base"), "mnt")?;
    let file = File::open(dir.join("memory.bin"))?;
    let failed = (0..PAGES).filter(|number| read_page(&file, *number).is_err());
    let failed: Vec<usize> = failed.collect();
    ensure!((20..60).contains(&failed.len()), "{failed:?}");
    let log = fs::read_to_string(fixture.path("store/mounts.log"))?;
    let name = pack.file_name().context("a name")?.to_string_lossy();
    ensure!(
        log.lines()
            .any(|line| line.contains("ERROR") && line.contains(&*name)),
        "{log}"
    );
    fs::write(&pack, whole)?;
    for number in failed {
        expect_page(&file, number)?;
    }
    Ok(())
}

#[test]
fn a_bucket_that_goes_and_comes_back_is_an_error_and_then_none() -> anyhow::Result<()> {
    let test = "a_bucket_that_goes_and_comes_back_is_an_error_and_then_none";
    let Some((mut fixture, _)) = with_remote(test)? else {
        return Ok(());
    };
    let dir = fixture.mountpoint("mnt")?;
    let shown = dir.display().to_string();
    let arguments = ["mount", "--remote-timeout", "1", "site/base", &shown];
    fixture.cli.ok(&arguments)?;
    let file = File::open(dir.join("memory.bin"))?;
    expect_page(&file, 3)?;
    let (bucket, away) = (fixture.path("bucket"), fixture.path("away"));
    fs::rename(&bucket, &away)?;
    let error = read_page(&file, 900).expect_err("nobody answers");
    ensure!(error.raw_os_error() == Some(libc::EIO), "{error}");
    expect_page(&file, 3)?;
    fs::rename(&away, &bucket)?;
    expect_page(&file, 900)?;
    drop(file);
    fixture.umount(&dir)
}

#[test]
fn a_collection_leaves_what_is_mounted() -> anyhow::Result<()> {
    let Some((mut fixture, there)) = with_remote("a_collection_leaves_what_is_mounted")? else {
        return Ok(());
    };
    let (dir, pid) = fixture.mount(Some("site/base"), "mnt")?;
    there.ok(&["remote", "rm", "site", "base"])?;
    there.ok(&["remote", "gc", "site"])?;
    let memory = fs::read(dir.join("memory.bin"))?;
    ensure!(memory == noise(1, PAGES * PAGE), "other bytes are shown");
    fixture.umount(&dir)?;
    wait_for_end(pid)?;
    there.ok(&["remote", "gc", "site"])?;
    ensure!(names(&fixture.path("bucket/packs"))?.is_empty());
    Ok(())
}

/// What is mounted is read from the old pack, which goes once it is not; the next mount reads
/// the new one.
#[test]
fn a_repack_leaves_what_is_mounted() -> anyhow::Result<()> {
    let Some((mut fixture, there)) = with_remote("a_repack_leaves_what_is_mounted")? else {
        return Ok(());
    };
    let mut image = noise(1, PAGES * PAGE);
    image[100 * PAGE..].copy_from_slice(&noise(3, (PAGES - 100) * PAGE));
    let memory = fixture.file("next", &image)?;
    there.ok(&["commit", "next", "--memory", &memory, "--parent", "base"])?;
    there.ok(&["push", "next", "site"])?;
    let (dir, pid) = fixture.mount(Some("site/next"), "mnt")?;
    let file = File::open(dir.join("memory.bin"))?;
    ensure!(read_page(&file, PAGES - 1)? == image[(PAGES - 1) * PAGE..]);
    there.ok(&["remote", "rm", "site", "base"])?;
    let told = there.json(&["remote", "gc", "site"])?;
    ensure!(told["repacked"]["packs"] == 1, "{told}");
    let packs = fixture.path("bucket").join("packs");
    let count = || anyhow::Ok(names(&packs)?.len());
    ensure!(count()? == 3, "{told}");
    ensure!(fs::read(dir.join("memory.bin"))? == image);
    drop(file);
    fixture.umount(&dir)?;
    wait_for_end(pid)?;
    there.ok(&["remote", "gc", "site"])?;
    ensure!(count()? == 2);
    let (dir, _) = fixture.mount(Some("site/next"), "again")?;
    ensure!(fs::read(dir.join("memory.bin"))? == image);
    Ok(())
}

#[test]
fn a_limit_of_nothing_keeps_nothing() -> anyhow::Result<()> {
    let Some((mut fixture, _)) = with_remote("a_limit_of_nothing_keeps_nothing")? else {
        return Ok(());
    };
    let dir = fixture.mountpoint("mnt")?;
    let shown = dir.display().to_string();
    let arguments = ["mount", "--cache-limit", "0", "site/base", &shown];
    fixture.cli.ok(&arguments)?;
    let memory = fs::read(dir.join("memory.bin"))?;
    ensure!(memory == noise(1, PAGES * PAGE), "other bytes are shown");
    ensure!(!fixture.path("store/cache").exists());
    Ok(())
}
