//! Mounting, unmounting, and servers that end in other ways.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::FlockOperation;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use serde_json::{Value, json};
use snapstore_tests::harness::{noise, program};
use snapstore_tests::vm::eventually;

use crate::{Fixture, PAGE};

/// Waits until a process has ended, for a minute at most.
pub fn wait_for_end(pid: u32) -> anyhow::Result<()> {
    let pidfd = match pidfd_open(process(pid)?, PidfdFlags::empty()) {
        Err(rustix::io::Errno::SRCH) => return Ok(()),
        other => other?,
    };
    let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
    let ready = poll(
        &mut fds,
        Some(&Timespec::try_from(Duration::from_secs(60))?),
    )?;
    ensure!(ready == 1, "process {pid} does not end");
    Ok(())
}

pub fn process(pid: u32) -> anyhow::Result<Pid> {
    Pid::from_raw(i32::try_from(pid)?).context("no process has number 0")
}

/// Ends the server of a mount at once.
pub fn kill(pid: u32) -> anyhow::Result<()> {
    kill_process(process(pid)?, Signal::KILL)?;
    wait_for_end(pid)
}

pub fn with_base(test: &str) -> anyhow::Result<Option<Fixture>> {
    let Some(fixture) = Fixture::new(test)? else {
        return Ok(None);
    };
    fixture.commit("base", &noise(1, 8 * PAGE), &[])?;
    Ok(Some(fixture))
}

pub fn shows_base(dir: &Path) -> anyhow::Result<()> {
    ensure!(
        fs::read(dir.join("memory.bin"))? == noise(1, 8 * PAGE),
        "memory.bin"
    );
    Ok(())
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

#[test]
fn what_cannot_be_mounted() -> anyhow::Result<()> {
    let Some(mut fixture) = with_base("what_cannot_be_mounted")? else {
        return Ok(());
    };
    let dir = text(&fixture.mountpoint("mnt")?);
    fixture.cli.fails(3, &["mount", "nobody", &dir])?;
    let file = fixture.file("file", b"")?;
    let error = fixture.cli.fails(1, &["mount", "base", &file])?;
    assert!(error.contains("is not a directory"), "{error}");
    let error = fixture
        .cli
        .fails(1, &["mount", "base", &text(&fixture.path("nowhere"))])?;
    assert!(error.contains("create it first"), "{error}");
    Ok(())
}

#[test]
fn a_mount_point_in_use_is_busy() -> anyhow::Result<()> {
    let Some(mut fixture) = with_base("a_mount_point_in_use_is_busy")? else {
        return Ok(());
    };
    let (dir, _) = fixture.mount(Some("base"), "mnt")?;
    let error = fixture.cli.fails(5, &["mount", "base", &text(&dir)])?;
    assert!(error.contains("already a mount point"), "{error}");
    shows_base(&dir)
}

#[test]
fn unmounting_twice_finds_nothing() -> anyhow::Result<()> {
    let Some(mut fixture) = with_base("unmounting_twice_finds_nothing")? else {
        return Ok(());
    };
    let (dir, pid) = fixture.mount(Some("base"), "mnt")?;
    fixture.umount(&dir)?;
    wait_for_end(pid)?;
    let error = fixture.cli.fails(3, &["umount", &text(&dir)])?;
    assert!(error.contains("not a snapstore mount"), "{error}");
    Ok(())
}

#[test]
fn a_mount_with_an_open_file_is_busy_unless_lazy() -> anyhow::Result<()> {
    let Some(mut fixture) = with_base("a_mount_with_an_open_file_is_busy_unless_lazy")? else {
        return Ok(());
    };
    let (dir, pid) = fixture.mount(Some("base"), "mnt")?;
    let file = fs::File::open(dir.join("memory.bin"))?;
    let error = fixture.cli.fails(5, &["umount", &text(&dir)])?;
    assert!(error.contains("--lazy"), "{error}");
    fixture.cli.ok(&["umount", "--lazy", &text(&dir)])?;
    assert!(!dir.join("memory.bin").exists());
    let bytes = std::io::read_to_string(&file);
    assert!(bytes.is_err(), "noise is no text");
    assert_eq!(file.metadata()?.len(), 8 * PAGE as u64, "still served");
    drop(file);
    wait_for_end(pid)
}

#[test]
fn a_dead_mount_can_be_unmounted_and_mounted_again() -> anyhow::Result<()> {
    let Some(mut fixture) = with_base("a_dead_mount_can_be_unmounted_and_mounted_again")? else {
        return Ok(());
    };
    let (dir, pid) = fixture.mount(Some("base"), "mnt")?;
    shows_base(&dir)?;
    kill(pid)?;
    assert!(fs::read_dir(&dir).is_err(), "the mount is dead");
    fixture.umount(&dir)?;
    fixture.mount_on(Some("base"), &dir)?;
    shows_base(&dir)
}

#[test]
fn a_dead_mount_can_be_mounted_over() -> anyhow::Result<()> {
    let Some(mut fixture) = with_base("a_dead_mount_can_be_mounted_over")? else {
        return Ok(());
    };
    let (dir, pid) = fixture.mount(Some("base"), "mnt")?;
    shows_base(&dir)?;
    kill(pid)?;
    fixture.mount_on(Some("base"), &dir)?;
    shows_base(&dir)?;
    fixture.umount(&dir)?;
    assert!(fs::read_dir(&dir)?.next().is_none(), "nothing is below");
    Ok(())
}

#[test]
fn a_wrong_name_is_told_before_anything_is_done_where_it_would_be_mounted() -> anyhow::Result<()> {
    let test = "a_wrong_name_is_told_before_anything_is_done_where_it_would_be_mounted";
    let Some(mut fixture) = with_base(test)? else {
        return Ok(());
    };
    let (dir, pid) = fixture.mount(Some("base"), "mnt")?;
    let typo = ["mount", "bsae", &text(&dir)];
    let error = fixture.cli.fails(3, &typo)?;
    assert!(error.contains("snapstore tags"), "{error}");
    shows_base(&dir)?;
    kill(pid)?;
    fixture.cli.fails(3, &typo)?;
    assert!(fs::read_dir(&dir).is_err(), "the dead mount is not touched");
    // Who mounts there is told of it.
    let right = fixture.cli.run(&["mount", "base", &text(&dir)])?;
    let said = String::from_utf8(right.stderr)?;
    assert!(right.status.success(), "{said}");
    assert!(said.contains("what a dead server had left"), "{said}");
    shows_base(&dir)
}

#[test]
fn a_wrong_directory_is_told_before_a_remote_is_asked() -> anyhow::Result<()> {
    let test = "a_wrong_directory_is_told_before_a_remote_is_asked";
    let Some(mut fixture) = with_base(test)? else {
        return Ok(());
    };
    // Nothing is there.
    let url = format!("file://{}", text(&fixture.path("bucket")));
    fixture.cli.ok(&["remote", "add", "site", &url])?;
    let nowhere = text(&fixture.path("nowhere"));
    let error = fixture.cli.fails(1, &["mount", "site/base", &nowhere])?;
    assert!(error.contains("create it first"), "{error}");
    let dir = text(&fixture.mountpoint("mnt")?);
    let error = fixture.cli.fails(6, &["mount", "site/base", &dir])?;
    assert!(error.contains("nothing is there"), "{error}");
    Ok(())
}

/// Paths are those of the directory that `mount` is called in, whatever its server has.
#[test]
fn relative_paths_are_the_callers() -> anyhow::Result<()> {
    let Some(mut fixture) = with_base("relative_paths_are_the_callers")? else {
        return Ok(());
    };
    let dir = fixture.mountpoint("mnt")?;
    fs::create_dir(fixture.path("run"))?;
    let store = fixture.cli.store().to_owned();
    let name = store.file_name().context("a name")?;
    let above = store.parent().context("a directory")?;
    let mount = |arguments: &[&str]| -> anyhow::Result<std::process::Output> {
        let mut command = Command::new(program()?);
        command
            .current_dir(above)
            .env("SNAPSTORE_RUNTIME_DIR", "run");
        Ok(command.arg("--store").arg(name).args(arguments).output()?)
    };
    let made = mount(&["mount", "base", "mnt"])?;
    assert!(made.status.success(), "{made:?}");
    shows_base(&dir)?;
    fixture.umount(&dir)?;
    for hides in ["run", name.to_str().context("a name")?, "."] {
        let refused = mount(&["mount", "base", hides])?;
        assert_eq!(refused.status.code(), Some(1), "{hides}: {refused:?}");
    }
    let empty = mount(&["mount", "base", ""])?;
    let said = String::from_utf8(empty.stderr)?;
    assert!(said.contains("is not a directory"), "{said}");
    // Without a directory of the caller's they are nowhere.
    let script = "cd gone && rmdir ../gone && exec \"$0\" --store \"$1\" mount base tmp";
    fs::create_dir(fixture.path("gone"))?;
    let mut command = Command::new("sh");
    command.args(["-c", script]).arg(program()?).arg(&store);
    let lost = command.current_dir(above).output()?;
    let said = String::from_utf8(lost.stderr)?;
    assert_eq!(lost.status.code(), Some(1), "{said}");
    assert!(said.contains("working directory"), "{said}");
    Ok(())
}

/// Whether something is mounted there, dead or alive.
fn is_mounted(dir: &Path) -> anyhow::Result<bool> {
    let above = fs::metadata(dir.parent().context("a directory")?)?;
    // Who has no server any more tells nothing.
    Ok(fs::metadata(dir).map_or(true, |found| found.dev() != above.dev()))
}

/// A process that this one has started (proc(5), `/proc/PID/stat`).
fn child_of(parent: u32) -> anyhow::Result<Option<u32>> {
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|it| it.parse().ok()) else {
            continue;
        };
        // One may have ended meanwhile.
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let fields = stat.rsplit_once(") ").map(|(_, fields)| fields);
        let its_parent = fields.and_then(|fields| fields.split(' ').nth(1));
        if its_parent.and_then(|it| it.parse().ok()) == Some(parent) {
            return Ok(Some(pid));
        }
    }
    Ok(None)
}

/// There is a mount that can be read, or none, however few descriptors there can be.
#[test]
fn where_descriptors_run_out_there_is_no_mount_that_is_dead() -> anyhow::Result<()> {
    let test = "where_descriptors_run_out_there_is_no_mount_that_is_dead";
    let Some(mut fixture) = with_base(test)? else {
        return Ok(());
    };
    let dir = fixture.mountpoint("mnt")?;
    let script = "ulimit -n \"$3\" && exec \"$0\" --store \"$1\" mount base \"$2\"";
    let mut made = 0;
    for limit in 5..24 {
        let mut command = Command::new("sh");
        command.args(["-c", script]).arg(program()?);
        command.arg(fixture.cli.store()).arg(&dir);
        let ended = command.arg(limit.to_string()).output()?;
        let is_there = is_mounted(&dir)?;
        assert_eq!(ended.status.success(), is_there, "{limit}: {ended:?}");
        if is_there {
            // Its server lives: a reader may be told that it has no descriptor left.
            let read = fs::read(dir.join("manifest.json"));
            let lives =
                read.map_or_else(|error| error.raw_os_error() == Some(libc::EMFILE), |_| true);
            assert!(lives, "{limit}");
            fixture.umount(&dir)?;
            made += 1;
        }
    }
    assert!((1..19).contains(&made), "{made}");
    Ok(())
}

#[test]
fn who_is_gone_before_the_mount_is_there_has_none() -> anyhow::Result<()> {
    let test = "who_is_gone_before_the_mount_is_there_has_none";
    let Some(mut fixture) = with_base(test)? else {
        return Ok(());
    };
    let dir = fixture.mountpoint("mnt")?;
    let lock = fs::File::open(fixture.cli.store().join("locks/allocate"))?;
    rustix::fs::flock(&lock, FlockOperation::LockExclusive)?;
    let mut command = fixture.cli.command(&["mount", "base", &text(&dir)])?;
    let mut waits = command.stdout(Stdio::null()).spawn()?;
    let deadline = std::time::Instant::now() + Duration::from_secs(30);
    let server = loop {
        if let Some(pid) = child_of(waits.id())? {
            break pid;
        }
        ensure!(std::time::Instant::now() < deadline, "no server");
        std::thread::sleep(Duration::from_millis(5));
    };
    waits.kill()?;
    waits.wait()?;
    assert!(!is_mounted(&dir)?);
    rustix::fs::flock(&lock, FlockOperation::Unlock)?;
    wait_for_end(server)?;
    assert!(!is_mounted(&dir)?, "nobody knows of it");
    let log = fs::read_to_string(fixture.cli.store().join("mounts.log"))?;
    assert!(log.contains("whoever started this server is gone"), "{log}");
    Ok(())
}

#[test]
fn a_dead_server_pins_nothing() -> anyhow::Result<()> {
    let Some(mut fixture) = with_base("a_dead_server_pins_nothing")? else {
        return Ok(());
    };
    let (_, pid) = fixture.mount(Some("base"), "mnt")?;
    fixture.cli.ok(&["rm", "base"])?;
    kill(pid)?;
    assert_eq!(fixture.cli.json(&["gc"])?["deleted_packs"], 1);
    Ok(())
}

#[test]
fn a_server_in_the_foreground_unmounts_when_told_to_end() -> anyhow::Result<()> {
    let test = "a_server_in_the_foreground_unmounts_when_told_to_end";
    let Some(mut fixture) = with_base(test)? else {
        return Ok(());
    };
    let dir = fixture.mountpoint("mnt")?;
    let arguments = ["mount", "--foreground", "--announce", "base", &text(&dir)];
    let mut server = fixture
        .cli
        .command(&arguments)?
        .stdout(Stdio::piped())
        .spawn()?;
    let mut said = String::new();
    BufReader::new(server.stdout.take().context("no output")?).read_line(&mut said)?;
    assert_eq!(said, "ready\n");
    shows_base(&dir)?;
    kill_process(process(server.id())?, Signal::TERM)?;
    let status = server.wait()?;
    assert!(status.success(), "{status}");
    assert!(fs::read_dir(&dir)?.next().is_none(), "still mounted");
    fixture.cli.fails(3, &["umount", &text(&dir)])?;
    Ok(())
}

#[test]
fn a_server_in_the_foreground_says_that_it_serves() -> anyhow::Result<()> {
    let test = "a_server_in_the_foreground_says_that_it_serves";
    let Some(mut fixture) = with_base(test)? else {
        return Ok(());
    };
    let dir = fixture.mountpoint("mnt")?;
    let shown = text(&dir);
    for form in [&["--json"][..], &[]] {
        let arguments = [form, &["mount", "--foreground", "base", &shown]].concat();
        let mut command = fixture.cli.command(&arguments)?;
        let mut server = command.stdout(Stdio::piped()).spawn()?;
        let mut said = String::new();
        BufReader::new(server.stdout.take().context("no output")?).read_line(&mut said)?;
        shows_base(&dir)?;
        if form.is_empty() {
            assert_eq!(said, format!("Mounted base on {shown}.\n"));
        } else {
            let answer: Value = serde_json::from_str(&said)?;
            let told = json!({
                "dir": shown, "snapshot": "base", "server_pid": server.id(), "log": null,
            });
            assert_eq!(answer, told);
        }
        fixture.umount(&dir)?;
        assert!(server.wait()?.success());
    }
    // Nobody has to be able to hear it.
    let mut command = fixture
        .cli
        .command(&["mount", "--foreground", "base", &shown])?;
    let full = fs::OpenOptions::new().write(true).open("/dev/full")?;
    let mut server = command.stdout(full).spawn()?;
    eventually("it is mounted", || Ok(is_mounted(&dir)?.then_some(())))?;
    shows_base(&dir)?;
    fixture.umount(&dir)?;
    assert!(server.wait()?.success());
    Ok(())
}

#[test]
fn a_server_that_ends_in_order_leaves_no_lease() -> anyhow::Result<()> {
    let test = "a_server_that_ends_in_order_leaves_no_lease";
    let Some(mut fixture) = with_base(test)? else {
        return Ok(());
    };
    let dir = fixture.mountpoint("mnt")?;
    let shown = text(&dir);
    let overlays = text(&fixture.path("overlays"));
    fs::create_dir(&overlays)?;
    let writable = ["mount", "--rw", "--overlay-dir", &overlays, "base", &shown];
    let leases = fixture.cli.store().join("leases");
    for round in 0..40 {
        let arguments = match round % 4 {
            0 => &writable[..],
            _ => &["mount", "base", &shown],
        };
        let pid = fixture.cli.json(arguments)?["server_pid"].as_u64();
        let pid = u32::try_from(pid.context("no server_pid")?)?;
        assert_eq!(fs::read_dir(&leases)?.count(), 1, "it holds one");
        if round % 8 < 4 {
            fixture.umount(&dir)?;
        } else {
            kill_process(process(pid)?, Signal::TERM)?;
        }
        wait_for_end(pid)?;
        assert_eq!(fs::read_dir(&leases)?.count(), 0, "round {round}");
    }
    Ok(())
}
