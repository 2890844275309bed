//! Stores that cannot be written, or not with locks.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::ensure;
use rustix::mount::{MountFlags, UnmountFlags, mount_bind, mount_remount, unmount};
use snapstore_tests::harness::{noise, skipped};

use crate::lifecycle::{shows_base, with_base};
use crate::{Fixture, PAGE};

/// Mounts, and reads; returns what was said on standard error.
fn mount_and_read(fixture: &mut Fixture, tag: Option<&str>) -> anyhow::Result<String> {
    let name = format!("mnt {}", tag.unwrap_or("all"));
    let dir = fixture.mountpoint(&name)?;
    let shown = dir.display().to_string();
    let arguments: Vec<&str> = ["mount"].into_iter().chain(tag).chain([&*shown]).collect();
    let output = fixture.cli.run(&arguments)?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{}: {said}", output.status);
    shows_base(&tag.map_or_else(|| dir.join("base"), |_| dir.clone()))?;
    fixture.umount(&dir)?;
    Ok(said)
}

#[test]
fn a_store_on_a_read_only_filesystem_is_mounted_with_a_warning() -> anyhow::Result<()> {
    let test = "a_store_on_a_read_only_filesystem_is_mounted_with_a_warning";
    let Some(mut fixture) = with_base(test)? else {
        return Ok(());
    };
    let store = fixture.cli.store().to_owned();
    let read_only = MountFlags::BIND | MountFlags::RDONLY;
    if let Err(error) = mount_bind(&store, &store) {
        skipped(test, &error.to_string());
        return Ok(());
    }
    let tried = mount_remount(&store, read_only, "").map_err(anyhow::Error::from);
    let said = tried.and_then(|()| {
        let one = mount_and_read(&mut fixture, Some("base"))?;
        let all = mount_and_read(&mut fixture, None)?;
        fixture.cli.ok(&["diff", "base", "base"])?;
        fixture.cli.fails(1, &["rm", "base"])?;
        Ok([one, all])
    });
    unmount(&store, UnmountFlags::DETACH)?;
    for said in said? {
        ensure!(said.contains("read-only filesystem"), "{said:?}");
    }
    Ok(())
}

#[test]
fn a_store_of_another_user_is_mounted_with_a_warning() -> anyhow::Result<()> {
    let test = "a_store_of_another_user_is_mounted_with_a_warning";
    let Some(fixture) = with_base(test)? else {
        return Ok(());
    };
    let script = r#"
        mkdir device mnt; chown 65534 mnt
        chmod -R a+rX,go-w . && chmod 755 snapstore || exit 77
        mount -t tmpfs none device && mknod -m 666 device/fuse c 10 229 \
            && mount --bind device/fuse /dev/fuse || exit 77
        user() { setpriv --reuid 65534 --regid 65534 --clear-groups env HOME=/nonexistent "$@"; }
        user true || exit 77
        user ./snapstore --store store mount base mnt 2>said || { cat said; exit 1; }
        user cmp mnt/memory.bin memory && user ./snapstore umount mnt && cat said"#;
    fs::copy(
        snapstore_tests::harness::program()?,
        fixture.path("snapstore"),
    )?;
    let output = Command::new("unshare")
        .args(["-m", "bash", "-c", script])
        .current_dir(fixture.dir.path())
        .output();
    match output {
        Ok(output) if output.status.code() != Some(77) => {
            let said = String::from_utf8_lossy(&output.stdout);
            ensure!(output.status.success(), "{}: {said}", output.status);
            ensure!(said.contains("may not write"), "{said:?}");
        }
        other => skipped(
            test,
            &format!("no other user: {:?}", other.map(|it| it.status)),
        ),
    }
    Ok(())
}

/// As if the store were there: in builds with debug assertions.
fn pretend(fixture: &mut Fixture, filesystem: &str) {
    let cli = fixture.cli.clone();
    fixture.cli = cli.with_env("SNAPSTORE_PRETEND_FILESYSTEM", filesystem);
}

#[test]
fn where_locks_keep_nobody_away_nothing_is_written_but_all_is_read() -> anyhow::Result<()> {
    let test = "where_locks_keep_nobody_away_nothing_is_written_but_all_is_read";
    let Some(mut fixture) = with_base(test)? else {
        return Ok(());
    };
    if !cfg!(debug_assertions) {
        skipped(
            test,
            "only builds with debug assertions pretend filesystems",
        );
        return Ok(());
    }
    pretend(&mut fixture, "virtiofs");
    let image = fixture.path("memory").display().to_string();
    let writes: [&[&str]; 5] = [
        &["commit", "new", "--memory", &image],
        &["tag", "base", "new"],
        &["rm", "base"],
        &["gc"],
        &["repair"],
    ];
    for arguments in writes {
        let error = fixture.cli.fails(1, arguments)?;
        ensure!(error.contains("virtiofs"), "{arguments:?}: {error}");
    }
    for arguments in [
        &["tags"][..],
        &["show", "base"],
        &["log"],
        &["diff", "base", "base"],
    ] {
        fixture.cli.ok(arguments)?;
    }
    let said = mount_and_read(&mut fixture, Some("base"))?;
    ensure!(said.contains("locks do not work"), "{said:?}");
    // Its user knows better.
    fixture.cli = fixture.cli.clone().with_env("SNAPSTORE_TRUST_LOCKS", "1");
    fixture.cli.ok(&["tag", "base", "new"])?;
    ensure!(mount_and_read(&mut fixture, Some("new"))?.is_empty());
    Ok(())
}

#[test]
fn what_is_on_a_full_disk_can_be_mounted_and_taken_away() -> anyhow::Result<()> {
    let test = "what_is_on_a_full_disk_can_be_mounted_and_taken_away";
    let Some(mut fixture) = with_base(test)? else {
        return Ok(());
    };
    let disk = fixture.mountpoint("disk")?;
    if let Err(error) =
        rustix::mount::mount("none", &disk, "tmpfs", MountFlags::empty(), c"size=8m")
    {
        skipped(test, &error.to_string());
        return Ok(());
    }
    let elsewhere = fixture.cli.clone();
    let dir = fixture.mountpoint("mnt")?;
    let store = disk.join("store");
    fixture.cli = snapstore_tests::harness::Cli::new(&store);
    let cli = &fixture.cli;
    cli.ok(&["init"])?;
    let image = fixture.path("memory").display().to_string();
    cli.ok(&["commit", "base", "--memory", &image])?;
    // A pack of its own, which is dead once its tag is gone.
    let other = fixture.dir.path().join("other");
    fs::write(&other, noise(9, 8 * PAGE))?;
    let other = other.display().to_string();
    cli.ok(&["commit", "other", "--no-parent", "--memory", &other])?;
    fill(&disk)?;
    let dir_name = dir.display().to_string();
    let output = cli.run(&["mount", "base", &dir_name])?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{said}");
    shows_base(&dir)?;
    // It has found no room to say what it needs: all is kept.
    cli.ok(&["rm", "other"])?;
    let said = cli.fails(5, &["gc"])?;
    ensure!(said.contains("no room to say what"), "{said}");
    shows_base(&dir)?;
    cli.ok(&["umount", &dir_name])?;
    let stream = fixture.path("stream").display().to_string();
    cli.ok(&["export", "base", "-o", &stream])?;
    cli.ok(&["gc"])?;
    elsewhere.ok(&["import", &stream, "--replace"]).map(drop)
}

fn fill(disk: &Path) -> anyhow::Result<()> {
    let mut file = fs::File::create(disk.join("fill"))?;
    let filled = std::io::copy(&mut std::io::repeat(1), &mut file);
    ensure!(filled.is_err(), "a disk without end");
    Ok(())
}
