//! Machines from snapshots that stay in a remote.

use std::fs;

use anyhow::{Result, ensure};
use snapstore_guests::TABLE;
use snapstore_tests::vm::{Lab, eventually, names};

/// A lab whose store is empty, and a bucket with `base` of a `table` guest.
fn with_remote(test: &str) -> Result<Option<Lab>> {
    let Some(mut lab) = Lab::with_mounts(test)? else {
        return Ok(None);
    };
    lab.run("web", TABLE, &[])?;
    lab.wait_for_steps("web", 2)?;
    lab.commit("base", "web")?;
    lab.stop("web")?;
    let url = format!("file://{}", lab.path("bucket").display());
    lab.cli.ok(&["remote", "add", "site", &url])?;
    lab.cli.ok(&["remote", "init", "site"])?;
    lab.cli.ok(&["push", "base", "site"])?;
    lab.use_store(&lab.path("empty"))?;
    lab.cli.ok(&["remote", "add", "site", &url])?;
    Ok(Some(lab))
}

#[test]
fn a_machine_of_a_remote_is_committed_here_and_pushed_as_a_child() -> Result<()> {
    let test = "a_machine_of_a_remote_is_committed_here_and_pushed_as_a_child";
    let Some(lab) = with_remote(test)? else {
        return Ok(());
    };
    ensure!(lab.restore("site/base", &["-n", "2"])? == ["base.1", "base.2"]);
    let base = lab.cli.json(&["remote", "tags", "site"])?["tags"][0]["id"].clone();
    ensure!(lab.cli.json(&["tags"])?["tags"] == serde_json::json!([]));
    for vm in ["base.1", "base.2"] {
        let steps = lab.steps(vm)?.len();
        lab.wait_for_steps(vm, steps + 2)?;
    }
    let one = lab.commit("one", "base.1")?;
    ensure!(one["parent"] == base && one["pulled_as"] == "base", "{one}");
    let two = lab.commit("two", "base.1")?;
    ensure!(
        two["parent"] == one["id"] && two["pulled_as"].is_null(),
        "{two}"
    );
    // Its parent is here by now.
    let other = lab.commit("other", "base.2")?;
    ensure!(
        other["parent"] == base && other["pulled_as"].is_null(),
        "{other}"
    );
    let pushed = lab.cli.json(&["push", "two", "site"])?;
    let pages = pushed["pages"].as_u64();
    ensure!(pages.is_some_and(|pages| pages < 100), "{pushed}");
    lab.cli.ok(&["stop", "--all"])?;
    lab.restore("two", &[])?;
    lab.assert_goes_on("two", "two")?;
    lab.finish()
}

/// The tag names another snapshot by now: the mount's lease keeps the one that it named.
#[test]
fn a_machine_is_committed_though_its_tag_has_moved() -> Result<()> {
    let test = "a_machine_is_committed_though_its_tag_has_moved";
    let Some(lab) = with_remote(test)? else {
        return Ok(());
    };
    let base = lab.cli.json(&["remote", "tags", "site"])?["tags"][0]["id"].clone();
    lab.restore("site/base", &["--name", "vm"])?;
    let memory = lab.file("memory", &[7; 8192])?;
    lab.cli.ok(&["commit", "base", "--memory", &memory])?;
    lab.cli.ok(&["push", "base", "site", "--replace"])?;
    lab.cli.ok(&["remote", "gc", "site"])?;
    let one = lab.commit("one", "vm")?;
    ensure!(one["parent"] == base, "{one}");
    let tag = one["pulled_as"].as_str().unwrap_or_default();
    ensure!(tag.starts_with("base-"), "{one}");
    lab.stop("vm")?;
    lab.restore("one", &[])?;
    lab.assert_goes_on("one", "one")?;
    lab.finish()
}

#[test]
fn a_mount_of_a_remote_ends_with_its_last_machine() -> Result<()> {
    let test = "a_mount_of_a_remote_ends_with_its_last_machine";
    let Some(lab) = with_remote(test)? else {
        return Ok(());
    };
    lab.restore("site/base", &["-n", "2"])?;
    let leases = || -> Result<usize> {
        let answer = lab.cli.json(&["remote", "leases", "site"])?;
        Ok(answer["leases"].as_array().map_or(0, Vec::len))
    };
    ensure!(leases()? == 1, "one mount for both");
    lab.stop("base.1")?;
    let steps = lab.steps("base.2")?.len();
    lab.wait_for_steps("base.2", steps + 1)?;
    ensure!(leases()? == 1);
    lab.stop("base.2")?;
    eventually("its lease goes", || Ok((leases()? == 0).then_some(())))?;
    eventually("its mount goes", || {
        Ok(names(&lab.runtime().join("mounts"))
            .is_empty()
            .then_some(()))
    })?;
    lab.finish()
}

#[test]
fn what_is_here_by_a_tag_is_restored_from_here() -> Result<()> {
    let test = "what_is_here_by_a_tag_is_restored_from_here";
    let Some(lab) = with_remote(test)? else {
        return Ok(());
    };
    lab.cli.ok(&["pull", "site/base", "--as", "mine"])?;
    lab.restore("site/base", &["--name", "vm"])?;
    fs::remove_dir_all(lab.path("bucket"))?;
    lab.assert_goes_on("vm", "mine")?;
    lab.finish()
}
