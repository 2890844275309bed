//! Where remotes may be, what a store remembers of them, and what is told when a place cannot
//! be used.

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;

use anyhow::ensure;
use snapstore_tests::harness::{Cli, noise, skipped};

use crate::{Fixture, PAGE, list};

fn url(path: &std::path::Path) -> String {
    format!("file://{}", path.display())
}

/// A store with `base`.
fn with_base() -> anyhow::Result<Fixture> {
    let fixture = Fixture::new()?;
    fixture.commit("base", &noise(1, 20 * PAGE), &[])?;
    Ok(fixture)
}

#[test]
fn a_bucket_is_in_no_store_and_holds_none() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let cli = &fixture.cli;
    let dir = fixture.dir.path();
    let other = Cli::new(&dir.join("other"));
    other.ok(&["init"])?;
    symlink(cli.store(), dir.join("link"))?;
    let bad = [
        cli.store().to_owned(),
        cli.store().join("tags"),
        cli.store().join("packs/new/deep"),
        cli.store().join("new/../tags"),
        dir.join("link/tags"),
        dir.to_owned(),
        other.store().join("packs"),
    ];
    for place in &bad {
        let error = cli.fails(2, &["remote", "add", "site", &url(place)])?;
        ensure!(error.contains("choose a"), "{}: {error}", place.display());
    }
    // One that an earlier program wrote, or whose directory became that of a store.
    let known = format!("{{\"site\": \"{}\"}}", url(&cli.store().join("tags")));
    fs::write(cli.store().join("remotes.json"), known)?;
    cli.fails(2, &["remote", "init", "site"])?;
    ensure!(list(&cli.store().join("tags"))?.len() == 1);
    cli.ok(&["verify"])?;
    cli.ok(&["gc"])?;
    cli.ok(&["remote", "add", "beside", &url(&dir.join("store-2"))])?;
    cli.ok(&["remote", "init", "beside"]).map(drop)
}

#[test]
fn a_push_by_id_is_under_the_snapshots_tag() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let cli = &fixture.cli;
    cli.ok(&["tag", "base", "alias"])?;
    let id = cli.ok(&["tags", "-o", "{id}"])?;
    let id = id.lines().next().unwrap_or_default().to_owned();
    let short = &id[..12];
    cli.ok(&[
        "remote",
        "add",
        "site",
        &url(&fixture.dir.path().join("bk")),
    ])?;
    cli.ok(&["remote", "init", "site"])?;
    let tags = || cli.ok(&["remote", "tags", "site", "-o", "{tag}"]);
    // Of several tags the one that it was first committed under.
    cli.ok(&["push", short, "site"])?;
    ensure!(tags()? == "base\n", "{}", tags()?);
    cli.ok(&["rm", "base"])?;
    cli.ok(&["push", &id, "site"])?;
    ensure!(tags()? == "alias\nbase\n", "{}", tags()?);
    cli.ok(&["rm", "alias"])?;
    let error = cli.fails(3, &["push", short, "site"])?;
    ensure!(error.contains("snapstore tag"), "{error}");
    ensure!(tags()? == "alias\nbase\n", "{}", tags()?);
    Ok(())
}

#[test]
fn a_damaged_list_of_remotes_is_named_and_set_aside() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let cli = &fixture.cli;
    let place = url(&fixture.dir.path().join("bk"));
    let file = cli.store().join("remotes.json");
    for number in 0..2 {
        cli.ok(&["remote", "add", "site", &place])?;
        match number {
            0 => fs::write(&file, "{")?,
            _ => {
                fs::remove_file(&file)?;
                fs::create_dir(&file)?;
            }
        }
        for command in [
            "push base site",
            "pull site/base",
            "remote list",
            "remote add other file:///nowhere",
            "verify",
        ] {
            let command: Vec<&str> = command.split(' ').collect();
            let output = cli.run(&command)?;
            ensure!(output.status.code() == Some(4), "{command:?}: {output:?}");
            let told = [output.stdout, output.stderr].concat();
            let told = String::from_utf8_lossy(&told).into_owned();
            ensure!(told.contains("remotes.json"), "{told}");
            ensure!(told.contains("snapstore repair"), "{told}");
        }
        let told = cli.ok(&["repair"])?;
        ensure!(told.contains("snapstore remote add"), "{told}");
        cli.ok(&["verify"])?;
        ensure!(cli.ok(&["remote", "list"])?.contains("No remotes"));
    }
    ensure!(fs::read(cli.store().join("damaged/remotes.json"))? == b"{");
    ensure!(cli.store().join("damaged/remotes.json.1").is_dir());
    Ok(())
}

#[test]
fn a_file_in_the_place_of_a_bucket_is_told_as_that() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let cli = &fixture.cli;
    let place = fixture.dir.path().join("bk");
    cli.ok(&["remote", "add", "site", &url(&place)])?;
    cli.ok(&["remote", "init", "site"])?;
    fs::remove_dir_all(&place)?;
    fs::write(&place, "a file")?;
    for command in ["remote init site", "push base site", "remote tags site"] {
        let command: Vec<&str> = command.split(' ').collect();
        let error = cli.fails(2, &command)?;
        ensure!(error.contains("it has to be a directory"), "{error}");
        ensure!(error.contains("bk"), "{error}");
    }
    let below = url(&place.join("below"));
    cli.fails(2, &["remote", "add", "other", &below]).map(drop)
}

/// No command mends it, and none says so.
#[test]
fn a_directory_in_the_place_of_a_record_is_removed_by_hand() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let cli = &fixture.cli;
    let place = fixture.dir.path().join("bk");
    cli.ok(&["remote", "add", "site", &url(&place)])?;
    cli.ok(&["remote", "init", "site"])?;
    cli.ok(&["push", "base", "site"])?;
    let record = crate::list(&place.join("refs/base"))?.pop();
    let record = record.expect("it was pushed");
    fs::remove_file(&record)?;
    fs::create_dir(&record)?;
    for command in [
        "push base site --replace",
        "remote rm site base",
        "remote tags site",
    ] {
        let command: Vec<&str> = command.split(' ').collect();
        let error = cli.fails(4, &command)?;
        ensure!(error.contains("remove it; then run the command"), "{error}");
        ensure!(!error.contains("--replace"), "{error}");
    }
    fs::remove_dir(&record)?;
    // The record is gone with it, which this store has seen.
    let error = cli.fails(4, &["push", "base", "site"])?;
    ensure!(error.contains("remote accept"), "{error}");
    cli.ok(&["remote", "accept", "site", "base"])?;
    cli.ok(&["push", "base", "site"])?;
    ensure!(cli.ok(&["remote", "tags", "site", "-o", "{tag}"])? == "base\n");
    Ok(())
}

/// What it condemned is not known.
#[test]
fn a_damaged_condemnation_stops_pushes_until_it_is_removed() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let cli = &fixture.cli;
    let place = fixture.dir.path().join("bk");
    cli.ok(&["remote", "add", "site", &url(&place)])?;
    cli.ok(&["remote", "init", "site"])?;
    let condemned = place.join(format!("condemn/{}-00000000", "b".repeat(32)));
    fs::create_dir_all(place.join("condemn"))?;
    fs::write(&condemned, "junk")?;
    for command in [&["push", "base", "site"][..], &["remote", "gc", "site"]] {
        let error = cli.fails(4, command)?;
        ensure!(error.contains("delete this object"), "{error}");
    }
    fs::remove_file(condemned)?;
    cli.ok(&["push", "base", "site"])?;
    cli.ok(&["remote", "gc", "site"]).map(drop)
}

#[test]
fn a_remote_that_is_forgotten_keeps_what_it_has() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let cli = &fixture.cli;
    let bucket = url(&fixture.dir.path().join("bk"));
    cli.ok(&["remote", "add", "site", &bucket])?;
    cli.ok(&["remote", "add", "other", "file:///nowhere"])?;
    cli.ok(&["remote", "init", "site"])?;
    cli.ok(&["push", "base", "site"])?;
    let told = cli.ok(&["remote", "forget", "site"])?;
    ensure!(told.contains(&bucket), "{told}");
    let left = cli.json(&["remote", "list"])?;
    ensure!(
        left["remotes"]
            .as_array()
            .is_some_and(|left| left.len() == 1)
    );
    for command in [&["remote", "forget", "site"][..], &["pull", "site/base"]] {
        let error = cli.fails(3, command)?;
        ensure!(error.contains("no remote \"site\""), "{error}");
    }
    // Under another name it is what it was.
    cli.ok(&["remote", "add", "place", &bucket])?;
    cli.ok(&["pull", "place/base", "--as", "again"]).map(drop)
}

#[test]
fn a_tag_of_a_remote_that_is_given_twice_is_wrong_usage() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let cli = &fixture.cli;
    cli.ok(&[
        "remote",
        "add",
        "site",
        &url(&fixture.dir.path().join("bk")),
    ])?;
    cli.ok(&["remote", "init", "site"])?;
    cli.ok(&["push", "base", "site"])?;
    cli.fails(2, &["remote", "rm", "site", "base", "base"])?;
    ensure!(cli.ok(&["remote", "tags", "site", "-o", "{tag}"])? == "base\n");
    // What no tag needs is named without any.
    fs::create_dir(fixture.dir.path().join("bk/lease/1"))?;
    let lease = fixture
        .dir
        .path()
        .join("bk/lease/00000000000000000000000000000001");
    fs::create_dir(&lease)?;
    fs::write(lease.join("00000000"), "nothing")?;
    let output = cli.run(&["remote", "verify", "site"])?;
    ensure!(output.status.code() == Some(4), "{output:?}");
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        told.contains("lease/0000") && !told.contains("needed by"),
        "{told}"
    );
    Ok(())
}

/// A filesystem of its own that is full, or can only be read.
struct Mounted<'a>(&'a std::path::Path);

impl Mounted<'_> {
    fn mount(at: &std::path::Path) -> anyhow::Result<Option<Mounted<'_>>> {
        fs::create_dir(at)?;
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=4m", "tmpfs"]);
        Ok(mount
            .arg(at)
            .output()?
            .status
            .success()
            .then_some(Mounted(at)))
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0).status();
    }
}

#[test]
fn a_disk_that_is_full_or_read_only_is_told_as_that() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let at = fixture.dir.path().join("disk");
    let Some(_mounted) = Mounted::mount(&at)? else {
        skipped(
            "a_disk_that_is_full_or_read_only_is_told_as_that",
            "no filesystem can be mounted",
        );
        return Ok(());
    };
    // The bucket, then the store.
    let cli = &fixture.cli;
    cli.ok(&["remote", "add", "site", &url(&at.join("bk"))])?;
    cli.ok(&["remote", "init", "site"])?;
    cli.ok(&["push", "base", "site"])?;
    fixture.commit("next", &noise(2, 20 * PAGE), &[])?;
    let full = Cli::new(&at.join("store"));
    full.ok(&["init"])?;
    full.ok(&["remote", "add", "first", "file:///nowhere"])?;
    let fill = || {
        Command::new("dd")
            .args(["if=/dev/zero", "bs=4k"])
            .arg(format!("of={}", at.join("fill").display()))
            .output()
    };
    fill()?;
    let error = cli.fails(1, &["push", "next", "site"])?;
    ensure!(error.contains("No space left"), "{error}");
    ensure!(!error.contains("may have happened"), "{error}");
    let error = full.fails(1, &["remote", "add", "other", "file:///nowhere"])?;
    ensure!(error.contains("No space left"), "{error}");
    let part = full.store().join("remotes.json.new");
    ensure!(!part.exists(), "it is left there");
    fs::remove_file(at.join("fill"))?;
    // As one leaves it who was killed.
    fs::write(&part, "{")?;
    full.ok(&["gc"])?;
    ensure!(!part.exists(), "gc leaves it there");
    let read_only = Command::new("mount")
        .args(["-o", "remount,ro"])
        .arg(&at)
        .status()?;
    ensure!(read_only.success());
    let error = cli.fails(1, &["push", "next", "site"])?;
    ensure!(error.contains("Read-only"), "{error}");
    ensure!(!error.contains("may have happened"), "{error}");
    Ok(())
}
