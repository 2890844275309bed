//! What machines tell of themselves.

use anyhow::{Result, bail, ensure};
use rustix::process::Signal;
use serde_json::Value;
use snapstore_guests::TABLE;
use snapstore_tests::vm::{Lab, eventually, signal};

/// The only number of this name with these labels.
fn number(page: &Value, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
    let families = page["metrics"].as_array().into_iter().flatten();
    let samples = families.flat_map(|family| family["samples"].as_array().into_iter().flatten());
    let name = format!("snapstore_machine_{name}");
    let wanted = samples.filter(|sample| {
        sample["name"] == name
            && labels
                .iter()
                .all(|(key, value)| sample["labels"][key] == *value)
    });
    let wanted: Vec<_> = wanted.filter_map(|one| one["value"].as_f64()).collect();
    match wanted[..] {
        [one] => Ok(one),
        _ => bail!("{name} of {labels:?}: {wanted:?}"),
    }
}

#[test]
fn what_is_done_with_a_machine_is_counted() -> Result<()> {
    let Some(lab) = Lab::new("what_is_done_with_a_machine_is_counted")? else {
        return Ok(());
    };
    lab.run("web", TABLE, &[])?;
    lab.wait_for_steps("web", 1)?;
    let web = [("machine", "web")];
    let page = lab.cli.json(&["metrics"])?;
    for name in [
        "pauses_total",
        "commits_total",
        "freeze_pause_seconds_count",
    ] {
        ensure!(number(&page, name, &web)? == 0.0, "{name}");
    }
    lab.cli.ok(&["pause", "web"])?;
    let page = lab.cli.json(&["metrics"])?;
    let state = |page: &Value, state| number(page, "state", &[web[0], ("state", state)]);
    ensure!(state(&page, "paused")? == 1.0 && state(&page, "running")? == 0.0);
    lab.cli.ok(&["resume", "web"])?;
    lab.commit("one", "web")?;
    lab.commit("two", "web")?;
    let page = lab.cli.json(&["metrics"])?;
    ensure!(state(&page, "running")? == 1.0);
    ensure!(number(&page, "up", &web)? == 1.0);
    ensure!(number(&page, "pauses_total", &web)? == 1.0);
    ensure!(number(&page, "commits_total", &web)? == 2.0);
    ensure!(number(&page, "freeze_pause_seconds_count", &web)? == 2.0);
    ensure!(number(&page, "freeze_pause_seconds_sum", &web)? > 0.0);
    ensure!(number(&page, "memory_bytes", &web)? == f64::from(16 << 20));
    ensure!(number(&page, "private_bytes", &web)? > 0.0);
    lab.stop("web")?;
    let page = lab.cli.json(&["metrics"])?;
    ensure!(number(&page, "up", &[]).is_err(), "it has ended: {page}");
    lab.finish()
}

#[test]
fn a_machine_that_hangs_is_told_as_down() -> Result<()> {
    let Some(lab) = Lab::new("a_machine_that_hangs_is_told_as_down")? else {
        return Ok(());
    };
    lab.run("hung", TABLE, &[])?;
    lab.run("lives", TABLE, &[])?;
    lab.wait_for_steps("hung", 1)?;
    let pid = lab.pid("hung")?;
    signal(pid, Signal::STOP)?;
    let page = lab.cli.json(&["metrics"]);
    signal(pid, Signal::CONT)?;
    let page = page?;
    ensure!(number(&page, "up", &[("machine", "hung")])? == 0.0);
    ensure!(number(&page, "up", &[("machine", "lives")])? == 1.0);
    ensure!(number(&page, "vcpus", &[("machine", "hung")]).is_err());
    eventually("it answers again", || {
        let page = lab.cli.json(&["metrics"])?;
        let up = number(&page, "up", &[("machine", "hung")])?;
        Ok((up == 1.0).then_some(()))
    })?;
    lab.stop("hung")?;
    lab.stop("lives")?;
    lab.finish()
}
