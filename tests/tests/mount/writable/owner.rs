//! Views of another user's: a monitor that is not root.

use std::fs::{self, Permissions};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::ensure;
use snapstore_tests::harness::{noise, skipped};

use super::{base_memory, named, with_machine};
use crate::PAGE;

const USER: u32 = 65534;
const OTHER: u32 = 65533;

fn run_as(user: u32, dir: &Path, script: &str) -> std::io::Result<Output> {
    let mut command = Command::new("sh");
    command.args(["-ec", script]).current_dir("/");
    command.env("DIR", dir).uid(user).gid(user).output()
}

#[test]
fn another_user_has_a_view() -> anyhow::Result<()> {
    let test = "another_user_has_a_view";
    if !rustix::process::geteuid().is_root() {
        skipped(test, "it takes root");
        return Ok(());
    }
    let Some(mut fixture) = with_machine(test)? else {
        return Ok(());
    };
    fs::set_permissions(fixture.dir.path(), Permissions::from_mode(0o755))?;
    let owner = format!("{USER}:{USER}");
    let (dir, _) = fixture.mount_rw("view", &["--owner", &owner, "--mode", "640"])?;
    let written = "printf written | dd of=$DIR/memory.bin conv=notrunc status=none
        echo state >$DIR/vmstate.new && mv $DIR/vmstate.new $DIR/vmstate
        stat -c '%u %g %a' $DIR $DIR/memory.bin $DIR/vmstate";
    let output = run_as(USER, &dir, written)?;
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{errors}");
    assert_eq!(
        said, "65534 65534 750\n65534 65534 640\n65534 65534 644\n",
        "{errors}"
    );
    for script in ["cat $DIR/memory.bin", "echo x >$DIR/new"] {
        let output = run_as(OTHER, &dir, script)?;
        ensure!(!output.status.success(), "user {OTHER} may {script}");
    }
    fixture.commit_view("next", &dir)?;
    let shown = fixture.shown("next")?;
    let mut memory = base_memory();
    memory[..7].copy_from_slice(b"written");
    assert!(named(&shown, "memory.bin") == Some(&memory[..]));
    assert_eq!(named(&shown, "vmstate"), Some(&b"state\n"[..]));
    fixture.umount(&dir)
}

/// What another user puts beside root's overlays, with a link to a file of root's in it, is
/// neither served nor in the way.
#[test]
fn a_view_that_another_user_has_made_is_not_looked_at() -> anyhow::Result<()> {
    let test = "a_view_that_another_user_has_made_is_not_looked_at";
    if !rustix::process::geteuid().is_root() {
        skipped(test, "it takes root");
        return Ok(());
    }
    let Some(mut fixture) = with_machine(test)? else {
        return Ok(());
    };
    let secret = fixture.path("secret");
    fs::write(&secret, "of root's")?;
    let (dir, _) = fixture.mount_rw("view", &[])?;
    fs::write(dir.join("note"), "written")?;
    let shown = dir.display().to_string();
    let said = fixture.cli.ok(&["umount", "--keep", &shown])?;
    let overlays = fixture.path("overlays");
    let again = format!("mount --rw --overlay-dir {} --resume", overlays.display());
    assert!(said.contains(&again), "{said}");
    let entries: Vec<_> = fs::read_dir(&overlays)?.collect::<Result<_, _>>()?;
    let kept = entries.first().expect("it is kept").path();
    let planted = overlays.join("snapstore-view-planted");
    fs::rename(&kept, &planted)?;
    fs::remove_file(planted.join("0/files/note"))?;
    std::os::unix::fs::symlink(&secret, planted.join("0/files/note"))?;
    std::os::unix::fs::chown(&planted, Some(USER), Some(USER))?;
    let resumed = fixture.resume(&dir);
    ensure!(resumed.is_err(), "it is served");
    // A directory of root's that others can write to is none of root's making either.
    std::os::unix::fs::chown(&planted, Some(0), Some(0))?;
    fs::set_permissions(&planted, Permissions::from_mode(0o777))?;
    ensure!(fixture.resume(&dir).is_err(), "it is served");
    let (again, _) = fixture.mount_rw("view-again", &[])?;
    fixture.umount(&again)
}

/// Whose directory it is could put another one in the place of the overlay, and have the
/// server write with its own rights wherever a link leads.
#[test]
fn overlays_are_not_kept_where_another_user_can_change_them() -> anyhow::Result<()> {
    let test = "overlays_are_not_kept_where_another_user_can_change_them";
    if !rustix::process::geteuid().is_root() {
        skipped(test, "it takes root");
        return Ok(());
    }
    let Some(mut fixture) = with_machine(test)? else {
        return Ok(());
    };
    let overlays = fixture.path("overlays");
    let refused = |fixture: &mut crate::Fixture, name: &str| -> anyhow::Result<()> {
        let error = fixture.mount_rw(name, &[]).expect_err("it is refused");
        ensure!(error.to_string().contains("other users"), "{error}");
        ensure!(
            fs::read_dir(&overlays)?.next().is_none(),
            "something is left"
        );
        Ok(())
    };
    std::os::unix::fs::chown(&overlays, Some(USER), Some(USER))?;
    refused(&mut fixture, "of-another")?;
    std::os::unix::fs::chown(&overlays, Some(0), Some(0))?;
    fs::set_permissions(&overlays, Permissions::from_mode(0o777))?;
    refused(&mut fixture, "of-all")?;
    fs::set_permissions(&overlays, Permissions::from_mode(0o1777))?;
    let (dir, _) = fixture.mount_rw("view", &[])?;
    fixture.umount(&dir)
}

/// A small filesystem of overlays is full: a commit makes room.
#[test]
fn what_fills_the_filesystem_of_overlays_can_be_committed() -> anyhow::Result<()> {
    let test = "what_fills_the_filesystem_of_overlays_can_be_committed";
    if !rustix::process::geteuid().is_root() {
        skipped(test, "it takes root, to mount a small filesystem");
        return Ok(());
    }
    let Some(mut fixture) = with_machine(test)? else {
        return Ok(());
    };
    const PAGES_OF_IT: usize = 5120;
    fixture.commit("large", &noise(3, PAGES_OF_IT * PAGE), &[])?;
    let overlays = fixture.path("overlays");
    let tmpfs = ["-t", "tmpfs", "-o", "size=10M", "small"];
    let mounted = Command::new("mount").args(tmpfs).arg(&overlays).status()?;
    ensure!(mounted.success(), "a small filesystem cannot be mounted");
    let filled = fill_twice(&mut fixture, PAGES_OF_IT);
    let unmounted = Command::new("umount").arg(&overlays).status()?;
    filled?;
    ensure!(
        unmounted.success(),
        "something is left in {}",
        overlays.display()
    );
    Ok(())
}

fn fill_twice(fixture: &mut crate::Fixture, pages: usize) -> anyhow::Result<()> {
    let dir = fixture.mountpoint("large")?;
    let shown = dir.display().to_string();
    fixture.writable_on(&["large", &shown])?;
    // The second time in slots that were used before.
    for round in 0..2 {
        let memory = super::open_both(&dir.join("memory.bin"))?;
        let page = noise(10 + round, PAGE);
        let mut written = 0;
        let full = (0..pages).find_map(|number| {
            let result = memory.write_all_at(&page, (number * PAGE) as u64);
            written += usize::from(result.is_ok());
            result.err()
        });
        let full = full.and_then(|error| error.raw_os_error());
        assert_eq!(full, Some(rustix::io::Errno::NOSPC.raw_os_error()));
        ensure!(written > pages / 4, "{written} pages fit");
        drop(memory);
        fixture.commit_view(&format!("round-{round}"), &dir)?;
    }
    fixture.umount(&dir)
}
