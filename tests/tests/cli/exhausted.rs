//! Every command where something runs out: descriptors, memory, threads, room for what
//! it has to say. It is told as what it is, is never damage, and never ends in a panic.

use std::fs::{self, OpenOptions};
use std::io::ErrorKind;
use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, ensure};
use snapstore_tests::harness::{Cli, copy_program, noise, program, skipped};

use crate::{Fixture, PAGE};

/// What the system says of what runs out.
const REASONS: [&str; 5] = [
    "Too many open files",
    "Cannot allocate memory",
    "address space (ulimit -v)",
    "Resource temporarily unavailable",
    "memory allocation of",
];

/// Every command of a store, and those of machines that need none. `%` is the directory of
/// the test. `doctor` is not among them: its exit code is the host's.
const COMMANDS: [&[&str]; 24] = [
    &["init", "--store", "%/other"],
    &["commit", "new", "--replace", "--memory", "%/image"],
    &[
        "commit",
        "child",
        "--replace",
        "--memory",
        "%/image",
        "--parent",
        "one",
    ],
    &["tag", "one", "more", "--replace"],
    &["tags"],
    &["log"],
    &["log", "--graph", "--json"],
    &["show", "one"],
    &["diff", "one", "two"],
    &["rm", "--dry-run", "one"],
    &["rm", "spare"],
    &["gc", "--dry-run"],
    &["gc"],
    &["verify"],
    &["verify", "--read-data"],
    &["repair"],
    &["upgrade", "--dry-run"],
    &["stats"],
    &["ps"],
    &["stop", "--all"],
    &["export", "one", "--output", "%/exported"],
    &["import", "%/stream"],
    &["copy", "--from", "%/second", "far"],
    &["forget", "--keep-last", "1", "--dry-run"],
];

struct Store(Fixture);

impl Store {
    fn new() -> anyhow::Result<Self> {
        let fixture = Fixture::new()?;
        let mut bytes = noise(1, 32 * PAGE);
        fixture.commit("one", &bytes, &[])?;
        bytes[7] ^= 1;
        fixture.commit("two", &bytes, &["--parent", "one"])?;
        let image = fixture.file("image", &noise(9, 16 * PAGE))?;
        let second = Cli::new(&fixture.dir.path().join("second"));
        second.ok(&["init"])?;
        second.ok(&["commit", "far", "--memory", &image])?;
        second.ok(&["export", "far", "--output", &fixture.path("stream")])?;
        Ok(Self(fixture))
    }

    /// Before each command all is as it was, as far as it needs that.
    fn prepare(&self) -> anyhow::Result<()> {
        self.0.cli.ok(&["tag", "one", "spare", "--replace"])?;
        for name in ["other", "exported"] {
            let path = self.0.path(name);
            match fs::remove_dir_all(&path) {
                Err(error) if error.kind() == ErrorKind::NotADirectory => fs::remove_file(&path)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn arguments(&self, command: &[&str]) -> Vec<String> {
        let directory = self.0.dir.path().display().to_string();
        let all = command.iter().map(|it| it.replace('%', &directory));
        all.collect()
    }

    /// The program with these arguments, as an argument of another one.
    fn line(&self, command: &[&str]) -> anyhow::Result<Vec<String>> {
        let mut line = vec![program()?.display().to_string()];
        // `init` names another store.
        if command[0] != "init" {
            line.extend(["--store".to_owned(), self.0.path("store")]);
        }
        line.extend(self.arguments(command));
        Ok(line)
    }

    fn is_whole(&self) -> anyhow::Result<()> {
        let report = self.0.cli.ok(&["verify", "--read-data"])?;
        ensure!(report.contains("Nothing is damaged"), "{report}");
        ensure!(self.0.memory("one")? == noise(1, 32 * PAGE));
        Ok(())
    }
}

/// It is done, or says what ran out. Returns whether it is done.
fn judge(what: &str, output: &Output) -> anyhow::Result<bool> {
    let said = [&output.stdout[..], &output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    ensure!(!said.contains("panicked"), "{what}: {said}");
    ensure!(!said.contains("DAMAGED"), "{what}: {said}");
    match output.status.code() {
        Some(0) => Ok(true),
        Some(1) => {
            let is_told = REASONS.iter().any(|reason| said.contains(reason));
            ensure!(is_told, "{what}: it does not say what ran out: {said}");
            Ok(false)
        }
        _ => anyhow::bail!("{what}: {}: {said}", output.status),
    }
}

/// Each command with each limit, which a shell sets.
fn with_limits(option: &str, limits: &[u64]) -> anyhow::Result<()> {
    let store = Store::new()?;
    let mut wrong = Vec::new();
    let (mut refused, mut done) = (0, 0);
    for command in COMMANDS {
        for limit in limits {
            store.prepare()?;
            let output = Command::new("sh")
                .args(["-c", &format!("ulimit {option} $0 && exec \"$@\"")])
                .arg(limit.to_string())
                .args(store.line(command)?)
                .env("SNAPSTORE_RUNTIME_DIR", store.0.path("run"))
                .stdin(Stdio::null())
                .output()
                .context("sh")?;
            match judge(&format!("ulimit {option} {limit} {command:?}"), &output) {
                Ok(true) => done += 1,
                Ok(false) => refused += 1,
                Err(error) => wrong.push(error.to_string()),
            }
        }
        store.is_whole()?;
    }
    ensure!(
        wrong.is_empty(),
        "{} wrong:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    ensure!(refused > 20 && done > 20, "{refused} refused, {done} done");
    Ok(())
}

#[test]
fn descriptors() -> anyhow::Result<()> {
    with_limits("-n", &[4, 6, 8, 10, 12, 15, 18, 22, 26, 32, 64])
}

#[test]
fn address_space() -> anyhow::Result<()> {
    with_limits("-v", &[90_000, 150_000, 400_000, 1_000_000, 64_000_000])
}

#[test]
fn threads() -> anyhow::Result<()> {
    const TEST: &str = "threads";
    // The limit is a user's, and root has none.
    if !rustix::process::geteuid().is_root() {
        skipped(TEST, "it takes root to be another user");
        return Ok(());
    }
    let store = Store::new()?;
    let own = store.0.path("program");
    copy_program(&program()?, own.as_ref())?;
    let mut wrong = Vec::new();
    let (mut refused, mut done) = (0, 0);
    for command in COMMANDS {
        for limit in ["1", "2", "4", "7", "11", "200"] {
            store.prepare()?;
            let chowned = Command::new("chown")
                .args(["-R", "65533:65533"])
                .arg(store.0.dir.path())
                .status()?;
            ensure!(chowned.success(), "chown");
            let mut line = store.line(command)?;
            line[0] = own.clone();
            let output = Command::new("timeout")
                .args(["60", "setpriv", "--reuid=65533", "--regid=65533"])
                .args(["--clear-groups", "prlimit", &format!("--nproc={limit}")])
                .args(line)
                .env("SNAPSTORE_RUNTIME_DIR", store.0.path("run"))
                .stdin(Stdio::null())
                .output();
            let output = match output {
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    skipped(TEST, "there is no timeout(1)");
                    return Ok(());
                }
                other => other?,
            };
            let said = String::from_utf8_lossy(&output.stderr);
            if output.status.code() == Some(127) {
                skipped(TEST, &format!("no setpriv(1) or prlimit(1): {said}"));
                return Ok(());
            }
            match judge(&format!("{limit} processes {command:?}"), &output) {
                Ok(true) => done += 1,
                Ok(false) => refused += 1,
                Err(error) => wrong.push(error.to_string()),
            }
        }
    }
    store.is_whole()?;
    ensure!(
        wrong.is_empty(),
        "{} wrong:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    ensure!(refused > 20 && done > 20, "{refused} refused, {done} done");
    Ok(())
}

fn full() -> anyhow::Result<Stdio> {
    Ok(OpenOptions::new().write(true).open("/dev/full")?.into())
}

fn without_reader() -> anyhow::Result<Stdio> {
    let (reader, writer) = std::io::pipe()?;
    drop(reader);
    Ok(writer.into())
}

/// What is said on standard error may be lost, and changes nothing.
#[test]
fn room_for_what_is_said_on_standard_error() -> anyhow::Result<()> {
    let store = Store::new()?;
    for command in COMMANDS {
        for bad in [full, without_reader] {
            store.prepare()?;
            let line = store.line(command)?;
            let output = Command::new(&line[0])
                .args(&line[1..])
                .env("SNAPSTORE_RUNTIME_DIR", store.0.path("run"))
                .env("RUST_LOG", "trace")
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(bad()?)
                .spawn()?
                .wait_with_output()?;
            ensure!(output.status.success(), "{command:?}: {}", output.status);
        }
    }
    store.is_whole()
}

/// An answer that cannot be written is a failure that says so; a reader that went away, and
/// streams that are closed, are none.
#[test]
fn room_for_the_answer() -> anyhow::Result<()> {
    let store = Store::new()?;
    for command in COMMANDS {
        let run = |stdout: Stdio| -> anyhow::Result<Output> {
            store.prepare()?;
            let line = store.line(command)?;
            let mut program = Command::new(&line[0]);
            program.args(&line[1..]).stdin(Stdio::null()).stdout(stdout);
            program.env("SNAPSTORE_RUNTIME_DIR", store.0.path("run"));
            let child = program.stderr(Stdio::piped()).spawn()?;
            Ok(child.wait_with_output()?)
        };
        let output = run(full()?)?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(1), "{command:?}: {said}");
        ensure!(
            said.contains("standard output: No space"),
            "{command:?}: {said}"
        );
        let output = run(without_reader()?)?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "{command:?}: {said}");
        store.prepare()?;
        let closed = Command::new("sh")
            .args(["-c", "exec \"$0\" \"$@\" <&- >&- 2>&-"])
            .args(store.line(command)?)
            .env("SNAPSTORE_RUNTIME_DIR", store.0.path("run"))
            .status()?;
        ensure!(closed.success(), "{command:?}, all closed: {closed}");
    }
    store.is_whole()
}
