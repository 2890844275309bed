//! The loop: run, commit again and again while the guest goes on, restore any.

use anyhow::{Result, ensure};
use snapstore_guests::TABLE;
use snapstore_tests::vm::{Lab, assert_within};

fn tag(depth: usize) -> String {
    match depth {
        0 => "base".to_owned(),
        _ => format!("step{depth}"),
    }
}

/// Commits a running machine `depth` times beyond its base. Each commit must
/// have the one before as its parent and hold a moment of just then.
fn build(lab: &Lab, depth: usize) -> Result<()> {
    lab.run("web", TABLE, &[])?;
    lab.wait_for_steps("web", 1)?;
    let mut parent = serde_json::Value::Null;
    for number in 0..=depth {
        let before = lab.steps("web")?.last().copied().unwrap_or(0);
        let answer = lab.commit(&tag(number), "web")?;
        let after = lab.steps("web")?.last().copied().unwrap_or(0);
        ensure!(
            answer["parent"] == parent,
            "{answer} should be made from {parent}"
        );
        ensure!(
            answer["vm"] == "web" && answer["tag"] == tag(number).as_str(),
            "{answer}"
        );
        parent = answer["id"].clone();
        assert_within(lab.committed_step(&tag(number))?, before..=after + 1)?;
        lab.wait_beyond("web", after)?;
    }
    let status = lab.ps("web")?;
    ensure!(status["origin"]["snapshot"] == parent, "{status}");
    ensure!(
        status["last_commit"]["tag"] == tag(depth).as_str(),
        "{status}"
    );
    let log = lab.cli.json(&["log", &tag(depth)])?;
    let chain = log["snapshots"].as_array().map_or(0, Vec::len);
    ensure!(chain == depth + 1, "a chain of {chain} snapshots");
    Ok(())
}

fn restore_and_check(lab: &Lab, depths: impl IntoIterator<Item = usize>) -> Result<()> {
    for depth in depths {
        let tag = tag(depth);
        ensure!(lab.restore(&tag, &[])? == [tag.as_str()]);
        lab.assert_goes_on(&tag, &tag)?;
        lab.stop(&tag)?;
    }
    Ok(())
}

#[test]
fn every_head_of_a_chain_of_ten_goes_on_where_it_was() -> Result<()> {
    let test = "every_head_of_a_chain_of_ten_goes_on_where_it_was";
    let Some(lab) = Lab::with_mounts(test)? else {
        return Ok(());
    };
    build(&lab, 10)?;
    // The machine itself never noticed.
    lab.steps("web")?;
    lab.stop("web")?;
    restore_and_check(&lab, 0..=10)?;
    lab.finish()
}

#[test]
fn heads_of_a_chain_of_a_hundred_go_on_where_they_were() -> Result<()> {
    let test = "heads_of_a_chain_of_a_hundred_go_on_where_they_were";
    let Some(lab) = Lab::with_mounts(test)? else {
        return Ok(());
    };
    build(&lab, 100)?;
    lab.stop("web")?;
    restore_and_check(&lab, [0, 1, 50, 99, 100])?;
    lab.finish()
}

#[test]
fn a_restored_machine_has_the_same_state_when_committed_at_once() -> Result<()> {
    let test = "a_restored_machine_has_the_same_state_when_committed_at_once";
    let Some(lab) = Lab::with_mounts(test)? else {
        return Ok(());
    };
    lab.run("web", TABLE, &[])?;
    lab.wait_for_steps("web", 2)?;
    lab.commit("base", "web")?;
    lab.restore("base", &["--paused"])?;
    let answer = lab.commit("again", "base")?;
    ensure!(answer["read_bytes"].as_u64() < Some(64 << 10), "{answer}");
    ensure!(lab.stored_all("again", "memory")? == lab.stored_all("base", "memory")?);
    lab.finish()
}

#[test]
fn memory_above_four_gib_is_restored() -> Result<()> {
    let Some(lab) = Lab::with_mounts("memory_above_four_gib_is_restored")? else {
        return Ok(());
    };
    lab.run("large", TABLE, &["--mem", "5G"])?;
    lab.wait_for_steps("large", 1)?;
    let base = lab.commit("base", "large")?;
    ensure!(base["images"][0]["size_bytes"] == 5_u64 << 30, "{base}");
    ensure!(base["read_bytes"].as_u64() < Some(1 << 20), "{base}");
    let now = lab.steps("large")?.len();
    lab.wait_for_steps("large", now + 2)?;
    lab.commit("next", "large")?;
    lab.stop("large")?;
    restore_and_check(&lab, [0])?;
    lab.restore("next", &[])?;
    lab.assert_goes_on("next", "next")?;
    ensure!(lab.ps("next")?["memory_bytes"] == 5_u64 << 30);
    lab.finish()
}
