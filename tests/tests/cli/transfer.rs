//! Snapshots between stores, as a user sees it: files, pipes, copies, and what is left
//! when one of them ends early.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Stdio};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use snapstore_tests::harness::{Cli, noise};

use crate::{Fixture, PAGE};

/// A chain of two, and a snapshot of its own.
fn with_chain() -> anyhow::Result<Fixture> {
    let fixture = Fixture::new()?;
    let mut bytes = noise(1, 700 * PAGE);
    fixture.commit("base", &bytes, &["--label", "os=none"])?;
    bytes[9 * PAGE..10 * PAGE].copy_from_slice(&noise(2, PAGE));
    fixture.commit("base+1", &bytes, &["--parent", "base"])?;
    fixture.commit("other", &noise(3, 20 * PAGE), &["--no-parent"])?;
    Ok(fixture)
}

/// An empty store beside the fixture's.
fn other(fixture: &Fixture, name: &str, init: &[&str]) -> anyhow::Result<Fixture> {
    let dir = tempfile::tempdir_in(fixture.dir.path())?;
    let cli = Cli::new(&dir.path().join(name));
    cli.ok(&[&["init"], init].concat())?;
    Ok(Fixture { dir, cli })
}

fn id(fixture: &Fixture, tag: &str) -> anyhow::Result<String> {
    let shown = fixture.cli.json(&["show", tag])?;
    Ok(shown["id"].as_str().context("no id")?.to_owned())
}

fn tags(fixture: &Fixture) -> anyhow::Result<usize> {
    Ok(fixture.cli.ok(&["tags"])?.lines().count().saturating_sub(1))
}

fn assert_whole(fixture: &Fixture, from: &Fixture, tags: &[&str]) -> anyhow::Result<()> {
    for tag in tags {
        ensure!(fixture.memory(tag)? == from.memory(tag)?, "{tag} differs");
        ensure!(id(fixture, tag)? == id(from, tag)?, "{tag} has another id");
    }
    fixture.cli.ok(&["verify", "--read-data"])?;
    Ok(())
}

#[test]
fn a_file_takes_a_chain_to_another_store() -> anyhow::Result<()> {
    let from = with_chain()?;
    let file = from.path("chain.snapstream");
    let exported = from
        .cli
        .json(&["export", "base+1", "--chain", "-o", &file])?;
    ensure!(exported["snapshots"].as_array().map(Vec::len) == Some(2));
    ensure!(exported["stream_bytes"].as_u64() == Some(fs::metadata(&file)?.len()));
    ensure!(exported["left_out"].as_array().is_some_and(Vec::is_empty));

    let to = other(&from, "store", &[])?;
    let imported = to.cli.json(&["import", &file])?;
    ensure!(imported["snapshots"][1]["tags"][0] == "base+1");
    ensure!(imported["snapshots"][1]["id"] == imported["snapshots"][1]["exported_as"]);
    ensure!(imported["chunks"] == exported["chunks"]);
    ensure!(imported["added_chunks"] == exported["chunks"]);
    assert_whole(&to, &from, &["base", "base+1"])?;
    ensure!(tags(&to)? == 2);
    // Once more: nothing to do, and said so.
    let said = to.cli.ok(&["import", &file])?;
    ensure!(
        said.contains("Imported 2 snapshots: stored 0 new chunks"),
        "{said}"
    );
    // A protected tag may name what it names, and nothing else.
    to.cli.ok(&["tag", "base", "--protect"])?;
    to.cli.ok(&["import", &file])?;
    from.commit("base", &noise(5, PAGE), &["--replace"])?;
    from.cli.ok(&["export", "base", "-o", &file])?;
    to.refused(1, "protected", &["import", &file, "--replace"])
}

#[test]
fn a_pipe_joins_two_stores() -> anyhow::Result<()> {
    let from = with_chain()?;
    let to = other(&from, "store", &[])?;
    let mut export = from
        .cli
        .command(&["export", "base", "other", "-o", "-"])?
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let stream = export.stdout.take().context("a pipe")?;
    let import = to.cli.command(&["import", "-"])?.stdin(stream).output()?;
    let export = export.wait_with_output()?;
    let said = String::from_utf8_lossy(&export.stderr);
    ensure!(
        export.status.success() && said.contains("Exported 2 snapshots"),
        "{said}"
    );
    let said = String::from_utf8_lossy(&import.stdout);
    ensure!(
        import.status.success() && said.contains("Imported 2 snapshots"),
        "{import:?}"
    );
    assert_whole(&to, &from, &["base", "other"])?;

    // Nobody there to read any more is a failure: the snapshots did not arrive.
    let mut export = from
        .cli
        .command(&["export", "base", "-o", "-"])?
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    drop(export.stdout.take());
    let export = export.wait_with_output()?;
    let said = String::from_utf8_lossy(&export.stderr);
    ensure!(export.status.code() == Some(1), "{export:?}");
    ensure!(said.contains("standard output"), "{said}");
    Ok(())
}

#[test]
fn a_copy_needs_no_file() -> anyhow::Result<()> {
    let from = with_chain()?;
    let to = other(&from, "store", &[])?;
    let store = from.cli.store().display().to_string();
    let copied = to
        .cli
        .json(&["copy", "--from", &store, "base+1", "--chain"])?;
    ensure!(copied["snapshots"].as_array().map(Vec::len) == Some(2));
    assert_whole(&to, &from, &["base", "base+1"])?;
    let said = to.cli.fails(3, &["copy", "--from", &store, "nosuch"])?;
    ensure!(said.contains("nosuch"), "{said}");
    let nowhere = from.path("nowhere");
    let said = to.cli.fails(3, &["copy", "--from", &nowhere, "base"])?;
    ensure!(said.contains("holds no store"), "{said}");
    // A name that is taken, unless it may be moved.
    to.commit("other", &noise(4, PAGE), &["--no-parent"])?;
    to.refused(1, "--replace", &["copy", "--from", &store, "other"])?;
    to.cli
        .ok(&["copy", "--from", &store, "other", "--replace"])?;
    assert_whole(&to, &from, &["other"])
}

#[test]
fn what_cannot_be_imported_is_said_and_leaves_no_tag() -> anyhow::Result<()> {
    let from = with_chain()?;
    let file = from.path("other.snapstream");
    from.cli.ok(&["export", "other", "-o", &file])?;
    let to = other(&from, "store", &[])?;

    let mut bytes = fs::read(&file)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    let flipped = from.file("flipped", &bytes)?;
    to.refused(4, "flipped is damaged at byte", &["import", &flipped])?;
    bytes.truncate(middle);
    let cut = from.file("cut", &bytes)?;
    to.refused(4, "it was cut off", &["import", &cut])?;
    let none = from.file("none", b"something else")?;
    to.refused(1, "does not begin as a stream", &["import", &none])?;
    to.refused(1, "nosuch", &["import", &from.path("nosuch")])?;
    let large = other(&from, "large", &["--page-size", "64K"])?;
    large.refused(1, "pages of 4096 bytes", &["import", &file])?;
    Ok(())
}

#[test]
fn a_file_appears_once_it_is_whole() -> anyhow::Result<()> {
    let from = with_chain()?;
    let dir = tempfile::tempdir_in(from.dir.path())?;
    let file = dir.path().join("file").display().to_string();
    fs::write(&file, "what was there before")?;
    from.refused(3, "nosuch", &["export", "base", "nosuch", "-o", &file])?;
    ensure!(fs::read(&file)? == b"what was there before");
    ensure!(fs::read_dir(dir.path())?.count() == 1, "something is left");
    from.cli.ok(&["export", "base", "-o", &file])?;
    ensure!(fs::metadata(&file)?.len() > 700 * PAGE as u64);
    ensure!(fs::read_dir(dir.path())?.count() == 1, "something is left");

    let said = from
        .cli
        .fails(2, &["export", "base", "-o", "-", "--json"])?;
    ensure!(said.contains("both"), "{said}");
    let nowhere = dir.path().join("no/file").display().to_string();
    from.refused(1, "no/file", &["export", "base", "-o", &nowhere])
}

fn pid(child: &Child) -> anyhow::Result<Pid> {
    Pid::from_raw(i32::try_from(child.id())?).context("no process")
}

/// Stopped at its durable steps, one after the other, and killed there.
#[test]
fn an_import_that_is_killed_anywhere_is_gone_on_with() -> anyhow::Result<()> {
    let from = with_chain()?;
    let file = from.path("chain.snapstream");
    from.cli.ok(&["export", "base+1", "--chain", "-o", &file])?;
    let (mut killed, mut reused) = (0, 0);
    for step in 1..60 {
        let to = other(&from, "store", &[])?;
        let child = to
            .cli
            .command(&["import", &file])?
            .env("SNAPSTORE_STOP_AT_STEP", step.to_string())
            .stdout(Stdio::null())
            .spawn()?;
        let pid = pid(&child)?;
        let (_, status) = waitpid(Some(pid), WaitOptions::UNTRACED)?.context("no child")?;
        if !status.stopped() {
            ensure!(status.exit_status() == Some(0), "step {step}: {status:?}");
            break;
        }
        kill_process(pid, Signal::KILL)?;
        child.wait_with_output()?;
        killed += 1;
        // What has a tag is whole, however far it got.
        to.cli.ok(&["verify", "--read-data"])?;
        let imported = to.cli.json(&["import", &file])?;
        let written = imported["added_chunks"].as_u64().context("a number")?;
        reused += u32::from(written < 600);
        assert_whole(&to, &from, &["base", "base+1"])?;
        // And what is left of the first attempt goes.
        to.cli.ok(&["rm", "base", "base+1"])?;
        to.cli.ok(&["gc"])?;
        to.cli.ok(&["gc"])?;
        ensure!(to.packs()?.is_empty(), "step {step}: {:?}", to.packs()?);
    }
    ensure!(killed > 8, "it was killed {killed} times only");
    ensure!(reused > 2, "what it had was used {reused} times only");
    Ok(())
}

/// Waiting for the other end of a pipe, too.
#[test]
fn a_signal_stops_an_import_and_an_export_that_wait() -> anyhow::Result<()> {
    let from = with_chain()?;
    let to = other(&from, "store", &[])?;
    let file = from.path("file");
    from.cli.ok(&["export", "other", "-o", &file])?;
    let mut import = to
        .cli
        .command(&["import", "-"])?
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut stdin = import.stdin.take().context("a pipe")?;
    stdin.write_all(&fs::read(&file)?[..1000])?;
    ends_by_signal(import, &to)?;
    ensure!(tags(&to)? == 0);

    let mut export = from
        .cli
        .command(&["export", "base", "-o", "-"])?
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut stdout = export.stdout.take().context("a pipe")?;
    stdout.read_exact(&mut [0; 1000])?;
    ends_by_signal(export, &from)
}

/// Once it is seen to be at work, by the lease that it has.
fn ends_by_signal(child: Child, fixture: &Fixture) -> anyhow::Result<()> {
    let leases = fixture.cli.store().join("leases");
    let prefix = format!("{}-", child.id());
    while !has_file(&leases, &prefix)? {
        sleep(Duration::from_millis(5));
    }
    kill_process(pid(&child)?, Signal::TERM)?;
    let output = child.wait_with_output()?;
    ensure!(
        output.status.signal() == Some(Signal::TERM.as_raw()),
        "{output:?}"
    );
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(said.contains("cancelled"), "{said}");
    ensure!(!has_file(&leases, &prefix)?, "its lease is left");
    Ok(())
}

fn has_file(dir: &Path, prefix: &str) -> anyhow::Result<bool> {
    for entry in fs::read_dir(dir)? {
        if entry?.file_name().to_string_lossy().starts_with(prefix) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// An output that is there and is no regular file is written to, not replaced.
#[test]
fn a_named_pipe_can_be_written_to() -> anyhow::Result<()> {
    let from = with_chain()?;
    let to = other(&from, "store", &[])?;
    let fifo = from.path("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        fifo.as_str(),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )?;
    let export = from
        .cli
        .command(&["export", "other", "-o", &fifo])?
        .spawn()?;
    let import = to
        .cli
        .command(&["import", "-"])?
        .stdin(File::open(&fifo)?)
        .output()?;
    ensure!(export.wait_with_output()?.status.success());
    ensure!(import.status.success(), "{import:?}");
    assert_whole(&to, &from, &["other"])
}
