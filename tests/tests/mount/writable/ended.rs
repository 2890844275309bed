//! What is found of a view after its host went down, and whether what is kept is on the disk.
//!
//! Another boot is one that `SNAPSTORE_BOOT_ID` names (builds with debug assertions).

use std::fs;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::mount::UnmountFlags;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::{open_both, with_machine};
use crate::{Fixture, PAGE, unmount};

const GONE: &str = "the host went down before this view was unmounted";

/// The one view that is kept.
fn place(fixture: &Fixture) -> anyhow::Result<PathBuf> {
    let entries: Vec<_> = fs::read_dir(fixture.path("overlays"))?.collect::<Result<_, _>>()?;
    Ok(entries.first().expect("it is kept").path())
}

/// Goes on with it after `boot`; returns what is said of it.
fn resume_in(fixture: &Fixture, dir: &Path, boot: &str) -> anyhow::Result<String> {
    let cli = fixture.cli.clone().with_env("SNAPSTORE_BOOT_ID", boot);
    let overlays = fixture.path("overlays").display().to_string();
    let shown = dir.display().to_string();
    let mount = ["mount", "--rw", "--resume", "--overlay-dir", &overlays];
    let output = cli.run(&[&mount[..], &[&shown]].concat())?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    anyhow::ensure!(output.status.success(), "{said}");
    Ok(said)
}

fn write(dir: &Path) -> anyhow::Result<()> {
    open_both(&dir.join("memory.bin"))?.write_all_at(b"memory", 5000)?;
    open_both(&dir.join("root.img"))?.write_all_at(b"root", 5000)?;
    Ok(fs::write(dir.join("note"), "noted")?)
}

fn is_written(dir: &Path) -> anyhow::Result<()> {
    assert!(fs::read(dir.join("memory.bin"))?[5000..].starts_with(b"memory"));
    assert!(fs::read(dir.join("root.img"))?[5000..].starts_with(b"root"));
    assert_eq!(fs::read(dir.join("note"))?, b"noted");
    Ok(())
}

fn end(pid: u32, signal: Signal) -> anyhow::Result<()> {
    let server = Pid::from_raw(pid.cast_signed()).expect("it has a number");
    kill_process(server, signal)?;
    crate::lifecycle::wait_for_end(pid)
}

#[test]
fn what_is_kept_is_all_there_after_another_boot() -> anyhow::Result<()> {
    let test = "what_is_kept_is_all_there_after_another_boot";
    let Some(mut fixture) = with_machine(test)? else {
        return Ok(());
    };
    let (dir, pid) = fixture.mount_rw("view", &[])?;
    let shown = dir.display().to_string();
    write(&dir)?;
    // By a signal,
    end(pid, Signal::TERM)?;
    let said = resume_in(&fixture, &dir, "second")?;
    assert!(!said.contains(GONE), "{said}");
    is_written(&dir)?;
    // by umount(8),
    open_both(&dir.join("memory.bin"))?.write_all_at(b"later", 9 * PAGE as u64)?;
    unmount(&dir, UnmountFlags::empty())?;
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while !place(&fixture)?.join("ended.json").exists() {
        assert!(std::time::Instant::now() < deadline, "it does not end");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let said = resume_in(&fixture, &dir, "third")?;
    assert!(!said.contains(GONE), "{said}");
    is_written(&dir)?;
    assert!(fs::read(dir.join("memory.bin"))?[9 * PAGE..].starts_with(b"later"));
    // and by the command, of a view in which nothing more was written.
    let kept: Value = fixture.cli.json(&["umount", "--keep", &shown])?;
    assert_eq!(kept["on_disk"], true, "{kept}");
    // Who begins anew is told how to go on with it.
    let overlays = fixture.path("overlays").display().to_string();
    let anew = ["mount", "--rw", "--overlay-dir", &overlays, "base", &shown];
    let said = fixture.cli.fails(1, &anew)?;
    let again = format!("mount --rw --resume --overlay-dir {overlays} {shown}`");
    assert!(said.contains(&again), "{said}");
    let said = resume_in(&fixture, &dir, "fourth")?;
    assert!(!said.contains(GONE), "{said}");
    is_written(&dir)?;
    fixture.umount(&dir)
}

/// What was acknowledged is there if only the server ended; after another boot it is not, but
/// for what was synced, and that is said.
#[test]
fn what_is_gone_with_the_host_is_told() -> anyhow::Result<()> {
    let Some(mut fixture) = with_machine("what_is_gone_with_the_host_is_told")? else {
        return Ok(());
    };
    let (dir, pid) = fixture.mount_rw("view", &[])?;
    end(pid, Signal::KILL)?;
    unmount(&dir, UnmountFlags::DETACH)?;
    // In the second boot nothing of it is there, and in that boot it is written to.
    let said = resume_in(&fixture, &dir, "second")?;
    assert!(said.contains(GONE), "{said}");
    write(&dir)?;
    let memory = open_both(&dir.join("memory.bin"))?;
    memory.sync_all()?;
    memory.write_all_at(b"unsynced", 0)?;
    drop(memory);
    let pid = server_of(&fixture, &dir)?;
    end(pid, Signal::KILL)?;
    // Only the server ended:
    let said = resume_in(&fixture, &dir, "second")?;
    assert!(!said.contains(GONE), "{said}");
    assert!(fs::read(dir.join("memory.bin"))?.starts_with(b"unsynced"));
    is_written(&dir)?;
    open_both(&dir.join("memory.bin"))?.write_all_at(b"again", 0)?;
    let pid = server_of(&fixture, &dir)?;
    end(pid, Signal::KILL)?;
    let said = resume_in(&fixture, &dir, "third")?;
    assert!(said.contains(GONE), "{said}");
    let memory = fs::read(dir.join("memory.bin"))?;
    assert!(memory[5000..].starts_with(b"memory"));
    fixture.umount(&dir)
}

fn server_of(fixture: &Fixture, _dir: &Path) -> anyhow::Result<u32> {
    let locked = fs::metadata(place(fixture)?.join("lock"))?;
    let inode = std::os::unix::fs::MetadataExt::ino(&locked);
    let locks = fs::read_to_string("/proc/locks")?;
    let line = locks
        .lines()
        .find(|line| line.contains(&format!(":{inode} ")));
    let pid = line.and_then(|line| line.split_whitespace().nth(4));
    Ok(pid.expect("it is locked").parse()?)
}

#[test]
fn what_the_disk_did_not_take_is_not_said_to_be_kept() -> anyhow::Result<()> {
    let test = "what_the_disk_did_not_take_is_not_said_to_be_kept";
    let Some(mut fixture) = with_machine(test)? else {
        return Ok(());
    };
    let whole = fixture.cli.clone();
    fixture.cli = whole.clone().with_env("SNAPSTORE_NO_OVERLAY_SYNC", "1");
    // An image, and a file that is none.
    for (name, file) in [("image", "memory.bin"), ("file", "vmstate")] {
        let (dir, pid) = fixture.mount_rw(name, &[])?;
        open_both(&dir.join(file))?.write_all_at(b"x", 3)?;
        let shown = dir.display().to_string();
        let output = fixture.cli.run(&["umount", "--keep", &shown])?;
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("not known to be on the disk"), "{said}");
        crate::lifecycle::wait_for_end(pid)?;
        let place = place(&fixture)?;
        assert!(!place.join("ended.json").exists(), "it is said to be whole");
        fs::remove_dir_all(place)?;
    }
    Ok(())
}

/// Whatever bit of what says how much there is: nothing is left out without a word.
#[test]
fn flipped_bits_of_what_tells_of_a_view_are_damage() -> anyhow::Result<()> {
    let test = "flipped_bits_of_what_tells_of_a_view_are_damage";
    let Some(mut fixture) = with_machine(test)? else {
        return Ok(());
    };
    let (dir, _) = fixture.mount_rw("view", &[])?;
    write(&dir)?;
    fixture.commit_view("next", &dir)?;
    open_both(&dir.join("memory.bin"))?.write_all_at(b"more", 0)?;
    let shown = dir.display().to_string();
    fixture.cli.ok(&["umount", "--keep", &shown])?;
    let place = place(&fixture)?;
    let overlays = fixture.path("overlays").display().to_string();
    let resume = [
        "mount",
        "--rw",
        "--resume",
        "--overlay-dir",
        &overlays,
        &shown,
    ];
    for file in ["view.json", "ended.json", "0/state.json"] {
        let path = place.join(file);
        let good = fs::read(&path)?;
        for at in (0..good.len()).step_by(7) {
            let mut bytes = good.clone();
            bytes[at] ^= 1 << (at % 7);
            fs::write(&path, &bytes)?;
            let said = fixture.cli.fails(4, &resume)?;
            assert!(
                said.contains(file) && said.contains("remove"),
                "{at}: {said}"
            );
        }
        fs::write(&path, good)?;
    }
    // One that is gone is not taken for one that never was.
    let state = place.join("0/state.json");
    let good = fs::read(&state)?;
    fs::remove_file(&state)?;
    let said = fixture.cli.fails(4, &resume)?;
    assert!(said.contains("it is gone"), "{said}");
    let ended = fs::read(place.join("ended.json"))?;
    fs::remove_file(place.join("ended.json"))?;
    let said = fixture.cli.fails(4, &resume)?;
    assert!(said.contains("it is gone"), "{said}");
    fs::write(place.join("ended.json"), ended)?;
    fs::write(&state, good)?;
    fixture.resume(&dir)?;
    assert!(fs::read(dir.join("memory.bin"))?.starts_with(b"more"));
    is_written(&dir)?;
    fixture.umount(&dir)
}

/// Before these files had a check, and before an end in order was noted.
#[test]
fn what_an_earlier_version_kept_is_found() -> anyhow::Result<()> {
    let Some(mut fixture) = with_machine("what_an_earlier_version_kept_is_found")? else {
        return Ok(());
    };
    let (dir, _) = fixture.mount_rw("view", &[])?;
    write(&dir)?;
    let shown = dir.display().to_string();
    fixture.cli.ok(&["umount", "--keep", &shown])?;
    let place = place(&fixture)?;
    fs::remove_file(place.join("ended.json"))?;
    for (file, version) in [("view.json", Some(1)), ("0/state.json", None)] {
        let path = place.join(file);
        let mut value: Value = serde_json::from_slice(&fs::read(&path)?)?;
        let fields = value.as_object_mut().expect("it is an object");
        fields.remove("check").expect("it has a check");
        fields.remove("version");
        fields.extend(version.map(|it| ("version".to_owned(), Value::from(it))));
        fs::write(&path, serde_json::to_vec(&value)?)?;
    }
    fixture.resume(&dir)?;
    is_written(&dir)?;
    fixture.umount(&dir)
}

/// Who ran into its limit goes on with a higher one; what is not given stays as it was.
#[test]
fn a_view_is_gone_on_with_under_other_limits() -> anyhow::Result<()> {
    let test = "a_view_is_gone_on_with_under_other_limits";
    let Some(mut fixture) = with_machine(test)? else {
        return Ok(());
    };
    let (dir, _) = fixture.mount_rw("view", &["--overlay-limit", "64K", "--mode", "640"])?;
    let shown = dir.display().to_string();
    let overlays = fixture.path("overlays").display().to_string();
    let again = |options: &[&str]| {
        fixture.cli.ok(&["umount", "--keep", &shown])?;
        let mount = ["mount", "--rw", "--resume", "--overlay-dir", &overlays];
        fixture.cli.ok(&[&mount[..], options, &[&shown]].concat())
    };
    let write = |page: usize| -> anyhow::Result<std::io::Result<()>> {
        let file = open_both(&dir.join("memory.bin"))?;
        Ok(file.write_all_at(&[1; PAGE], (page * PAGE) as u64))
    };
    let mode = || -> anyhow::Result<u32> {
        let mode = fs::metadata(dir.join("memory.bin"))?.permissions().mode();
        Ok(mode & 0o777)
    };
    for page in 0..16 {
        write(page)??;
    }
    assert!(write(20)?.is_err(), "the limit");
    again(&[])?;
    assert!(write(20)?.is_err(), "the same limit");
    assert_eq!(mode()?, 0o640);
    again(&["--overlay-limit", "1M", "--mode", "600"])?;
    write(20)??;
    assert_eq!(mode()?, 0o600);
    again(&[])?;
    write(40)??;
    assert_eq!(mode()?, 0o600);
    fixture.umount(&dir)
}
