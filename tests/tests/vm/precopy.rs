//! Memory that is read while the guest writes it is committed as it is at one instant.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use snapstore_guests::CHURN;
use snapstore_tests::vm::{Lab, eventually};

use crate::changed::tracks_writes;

/// Reads all of the frozen memory after a commit, too, and compares.
const CHECKED: (&str, &str) = ("SNAPSTORE_CHECK_COMMITS", "1");

fn stage(commit: &Value, name: &str) -> f64 {
    commit["timings"][name].as_f64().unwrap_or(0.0)
}

/// The passes that a `churn` guest has found good; it must not have found a bad one.
fn passes(lab: &Lab, name: &str) -> Result<usize> {
    let said = lab.console(name)?;
    ensure!(!said.contains("BAD"), "{name} is damaged: {said}");
    Ok(said.lines().filter(|line| line.ends_with(" ok")).count())
}

fn wait_for_passes(lab: &Lab, name: &str, count: usize) -> Result<()> {
    eventually(&format!("{name} has {count} good passes"), || {
        Ok((passes(lab, name)? >= count).then_some(()))
    })
}

/// A guest restored from this tag finds its memory whole.
fn check(lab: &Lab, tag: &str) -> Result<()> {
    let names = lab.restore(tag, &["--name", "restored"])?;
    let name = names.first().context("no machine")?;
    wait_for_passes(lab, name, 2)?;
    lab.stop(name)
}

#[test]
fn a_guest_that_writes_everywhere_all_the_time_is_committed_at_one_instant() -> Result<()> {
    let test = "a_guest_that_writes_everywhere_all_the_time_is_committed_at_one_instant";
    let Some(lab) = Lab::with_mounts(test)? else {
        return Ok(());
    };
    lab.run("vm", CHURN, &["--mem", "64M"])?;
    wait_for_passes(&lab, "vm", 1)?;
    for tag in ["first", "second", "third"] {
        let done = lab.commit(tag, "vm")?;
        // However fast it writes, its memory has been read before, and is so but
        // so often.
        ensure!(
            (stage(&done, "precopy") > 0.0) == tracks_writes()?,
            "{done}"
        );
        ensure!(
            done["read_bytes"].as_u64() <= Some(6 * (64 << 20)),
            "{done}"
        );
        check(&lab, tag)?;
    }
    passes(&lab, "vm")?;
    lab.finish()
}

#[test]
fn of_a_guest_that_writes_little_little_is_left_for_the_pause() -> Result<()> {
    let test = "of_a_guest_that_writes_little_little_is_left_for_the_pause";
    let Some(lab) = Lab::with_mounts(test)? else {
        return Ok(());
    };
    lab.run("vm", CHURN, &["--mem", "64M"])?;
    lab.type_in("vm", b"c")?;
    lab.wait_for_text("vm", "calm")?;
    let first = lab.commit("first", "vm")?;
    ensure!(
        (stage(&first, "precopy") > 0.0) == tracks_writes()?,
        "{first}"
    );
    let copied = stage(&first, "copy") > stage(&first, "fork");
    ensure!(copied == tracks_writes()?, "{first}");
    check(&lab, "first")?;
    // What little was written since is not worth a round.
    let second = lab.commit("second", "vm")?;
    ensure!(second["timings"]["precopy"].is_null(), "{second}");
    check(&lab, "second")?;
    lab.type_in("vm", b"a")?;
    lab.wait_for_text("vm", "all")?;
    wait_for_passes(&lab, "vm", passes(&lab, "vm")? + 1)?;
    lab.commit("third", "vm")?;
    check(&lab, "third")?;
    lab.finish()
}

#[test]
fn commits_are_what_the_memory_was_page_for_page() -> Result<()> {
    let test = "commits_are_what_the_memory_was_page_for_page";
    let Some(mut lab) = Lab::with_mounts(test)? else {
        return Ok(());
    };
    lab.run("vm", CHURN, &["--mem", "64M"])?;
    lab.cli = lab.cli.clone().with_env(CHECKED.0, CHECKED.1);
    for (number, command) in [b"a", b"c", b"a", b"c"].into_iter().enumerate() {
        lab.type_in("vm", command)?;
        lab.commit(&format!("step{number}"), "vm")?;
    }
    lab.finish()
}

#[test]
fn a_committer_that_is_killed_while_it_reads_loses_nothing() -> Result<()> {
    let test = "a_committer_that_is_killed_while_it_reads_loses_nothing";
    let Some(lab) = Lab::with_mounts(test)? else {
        return Ok(());
    };
    lab.run("vm", CHURN, &["--mem", "64M"])?;
    wait_for_passes(&lab, "vm", 1)?;
    for milliseconds in [20, 60, 120, 200] {
        let mut committer = lab
            .cli
            .command(&["commit", "killed", "--vm", "vm"])?
            .spawn()?;
        std::thread::sleep(std::time::Duration::from_millis(milliseconds));
        committer.kill()?;
        let ended = committer.wait()?;
        if ended.success() {
            // It was faster.
            lab.cli.ok(&["rm", "killed"])?;
        }
    }
    eventually("another may commit", || {
        let done = lab.cli.run(&["commit", "whole", "--vm", "vm"])?;
        Ok(done.status.success().then_some(()))
    })?;
    check(&lab, "whole")?;
    lab.finish()
}
