//! Creating a store beside others who create one there, and after one that was killed.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, ensure};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use snapstore_tests::harness::{Cli, noise, program};

use crate::{Fixture, PAGE};

const SIZES: [&str; 3] = ["4K", "16K", "64K"];
/// More durable steps than a creation has.
const MOST_STEPS: u32 = 64;

fn bytes(size: &str) -> u64 {
    let kib = size.trim_end_matches('K').parse::<u64>();
    kib.map_or(0, |kib| kib << 10)
}

/// The one that says that it has created the store; the others say that there is one.
fn winner(creating: Vec<(&'static str, Child)>) -> anyhow::Result<&'static str> {
    let mut winners = Vec::new();
    for (size, child) in creating {
        let output = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        match output.status.code() {
            Some(0) => winners.push(size),
            Some(1) => ensure!(said.contains("holds a store already"), "{said}"),
            _ => anyhow::bail!("{}: {said}", output.status),
        }
    }
    ensure!(winners.len() == 1, "{winners:?} have won");
    Ok(winners[0])
}

fn begin(cli: &Cli, size: &'static str, step: Option<(&str, u32)>) -> anyhow::Result<Child> {
    let mut command = cli.command(&["init", "--page-size", size])?;
    if let Some((variable, step)) = step {
        command.env(variable, step.to_string());
    }
    let quiet = command.stdout(Stdio::null()).stderr(Stdio::piped());
    Ok(quiet.spawn()?)
}

/// The store has the settings that its creator was told of, and works.
fn is_of(fixture: &Fixture, size: &str) -> anyhow::Result<()> {
    let store = snapstore_store::Store::open(fixture.cli.store())?;
    ensure!(store.page_size().bytes() == bytes(size), "not of {size}");
    fixture.commit("first", &noise(1, 32 * PAGE), &[])?;
    ensure!(fixture.memory("first")? == noise(1, 32 * PAGE));
    fixture.cli.ok(&["verify", "--read-data"])?;
    Ok(())
}

#[test]
fn one_of_many_creates_it() -> anyhow::Result<()> {
    for _ in 0..8 {
        let fixture = Fixture::without_store()?;
        let sizes = SIZES.iter().chain(&SIZES);
        let all = sizes.map(|size| Ok((*size, begin(&fixture.cli, size, None)?)));
        let size = winner(all.collect::<anyhow::Result<_>>()?)?;
        is_of(&fixture, size)?;
    }
    Ok(())
}

#[test]
fn one_that_is_slow_does_not_change_what_another_was_told() -> anyhow::Result<()> {
    for step in 1..MOST_STEPS {
        let fixture = Fixture::without_store()?;
        let slow = begin(&fixture.cli, "64K", Some(("SNAPSTORE_STOP_AT_STEP", step)))?;
        let pid = Pid::from_raw(i32::try_from(slow.id())?).context("no process")?;
        let Some((_, status)) = waitpid(Some(pid), WaitOptions::UNTRACED)? else {
            anyhow::bail!("nothing to wait for");
        };
        if !status.stopped() {
            ensure!(status.exit_status() == Some(0), "step {step}: {status:?}");
            ensure!(step > 6, "it has but {step} steps");
            return Ok(());
        }
        let quick = begin(&fixture.cli, "4K", None)?;
        // Whether it waits by now or not, one of them has to win.
        std::thread::yield_now();
        kill_process(pid, Signal::CONT)?;
        let size = winner(vec![("64K", slow), ("4K", quick)])?;
        is_of(&fixture, size).with_context(|| format!("step {step}"))?;
    }
    anyhow::bail!("it has no end")
}

#[test]
fn one_that_was_killed_can_be_run_again() -> anyhow::Result<()> {
    for step in 1..MOST_STEPS {
        let fixture = Fixture::without_store()?;
        let child = begin(&fixture.cli, "64K", Some(("SNAPSTORE_KILL_AT_STEP", step)))?;
        let output = child.wait_with_output()?;
        if output.status.success() {
            ensure!(step > 6, "it has but {step} steps");
            return Ok(());
        }
        let again = fixture.cli.run(&["init", "--page-size", "4K"])?;
        let said = String::from_utf8_lossy(&again.stderr);
        // Its last step makes durable what is there.
        let size = match said.contains("holds a store already, with pages of 65536") {
            true => "64K",
            false => {
                ensure!(again.status.success(), "step {step}: {said}");
                "4K"
            }
        };
        is_of(&fixture, size).with_context(|| format!("step {step}"))?;
    }
    anyhow::bail!("it has no end")
}

/// A creation can be killed where the index library writes, too.
#[test]
fn half_an_index_is_in_nobodys_way() -> anyhow::Result<()> {
    for file in ["CURRENT", "MANIFEST-000001", "000004.log", "LOCK"] {
        let fixture = Fixture::without_store()?;
        let index = fixture.cli.store().join("index");
        std::fs::create_dir_all(&index)?;
        std::fs::write(index.join(file), "hal")?;
        fixture.cli.ok(&["init"])?;
        is_of(&fixture, "4K").with_context(|| file.to_owned())?;
    }
    Ok(())
}

fn first_commit(home: &Path, tag: &str, image: &str) -> anyhow::Result<Child> {
    let mut command = Command::new(program()?);
    command
        .args(["commit", tag, "--memory", image])
        .env_remove("SNAPSTORE_DIR")
        .env("XDG_DATA_HOME", home)
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    Ok(command.spawn()?)
}

#[test]
fn first_commits_at_once_share_the_default_store() -> anyhow::Result<()> {
    for _ in 0..6 {
        let fixture = Fixture::without_store()?;
        let image = fixture.file("image", &noise(1, 8 * PAGE))?;
        let tags = ["a", "b", "c", "d"];
        let all = tags.map(|tag| first_commit(fixture.dir.path(), tag, &image));
        for child in all {
            let output = child?.wait_with_output()?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.success(), "{said}");
        }
        let cli = Cli::new(&fixture.dir.path().join("snapstore"));
        let listed = cli.json(&["tags"])?;
        ensure!(
            listed["tags"].as_array().map(Vec::len) == Some(4),
            "{listed}"
        );
        cli.ok(&["verify", "--read-data"])?;
    }
    Ok(())
}
