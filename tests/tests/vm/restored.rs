//! Commits of restored machines, and state that lies outside memory.

use anyhow::{Context as _, Result, ensure};
use snapstore_guests::TABLE;
use snapstore_tests::vm::{Lab, eventually};

/// A lab with a snapshot `base` of a `table` guest, which is stopped.
fn with_base(test: &str) -> Result<Option<Lab>> {
    let Some(lab) = Lab::with_mounts(test)? else {
        return Ok(None);
    };
    lab.run("web", TABLE, &[])?;
    lab.wait_for_steps("web", 2)?;
    lab.commit("base", "web")?;
    lab.stop("web")?;
    Ok(Some(lab))
}

#[test]
fn siblings_descend_from_what_they_were_restored_from() -> Result<()> {
    let test = "siblings_descend_from_what_they_were_restored_from";
    let Some(lab) = with_base(test)? else {
        return Ok(());
    };
    let base = lab.cli.json(&["show", "base"])?["id"].clone();
    lab.restore("base", &["-n", "2"])?;
    for (vm, first, second) in [("base.1", "a1", "a2"), ("base.2", "b1", "b2")] {
        lab.wait_for_steps(vm, 2)?;
        let one = lab.commit(first, vm)?;
        ensure!(
            one["parent"] == base && one["parent_tag"] == "base",
            "{one}"
        );
        let now = lab.steps(vm)?.len();
        lab.wait_for_steps(vm, now + 2)?;
        let two = lab.commit(second, vm)?;
        ensure!(two["parent"] == one["id"], "{two}");
    }
    lab.cli.ok(&["stop", "--all"])?;
    for tag in ["a1", "a2", "b1", "b2", "base"] {
        lab.restore(tag, &[])?;
    }
    for tag in ["a1", "a2", "b1", "b2", "base"] {
        lab.assert_goes_on(tag, tag)?;
    }
    lab.finish()
}

/// Depth by restoring: each generation is restored, runs, and is committed.
#[test]
fn generations_follow_each_other() -> Result<()> {
    let Some(lab) = with_base("generations_follow_each_other")? else {
        return Ok(());
    };
    let mut last = "base".to_owned();
    for generation in 1..=4 {
        lab.restore(&last, &["--name", "vm"])?;
        lab.assert_goes_on("vm", &last)?;
        let parent = lab.cli.json(&["show", &last])?["id"].clone();
        let tag = format!("generation{generation}");
        let answer = lab.commit(&tag, "vm")?;
        ensure!(answer["parent"] == parent, "{answer}");
        ensure!(lab.committed_step(&tag)? > lab.committed_step(&last)?);
        lab.stop("vm")?;
        last = tag;
    }
    lab.finish()
}

/// What the guest prints of the counter of vCPU 1.
fn count(lab: &Lab, name: &str) -> Result<u32> {
    let counts = |said: &str| said.matches(" count ").count();
    let before = counts(&lab.console(name)?);
    lab.type_in(name, b"c")?;
    let line = eventually("the counter is printed", || {
        let said = lab.console(name)?;
        // Only whole lines.
        let whole = said.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let line = whole.lines().rfind(|line| line.starts_with("cpu 1 count "));
        Ok((counts(whole) > before)
            .then(|| line.map(ToOwned::to_owned))
            .flatten())
    })?;
    ensure!(!line.contains("BAD"), "{line}");
    let digits = line.rsplit(' ').next().context("no count")?;
    Ok(u32::from_str_radix(digits, 16)?)
}

/// Waits until the counter of vCPU 1 is beyond this; it may stand still while the
/// host has other things to do.
fn count_beyond(lab: &Lab, name: &str, last: u32) -> Result<u32> {
    eventually(&format!("vCPU 1 counts beyond {last}"), || {
        Ok(Some(count(lab, name)?).filter(|now| *now > last))
    })
}

#[test]
fn every_vcpu_goes_on() -> Result<()> {
    let Some(lab) = Lab::with_mounts("every_vcpu_goes_on")? else {
        return Ok(());
    };
    lab.run("two", TABLE, &["--cpus", "2"])?;
    lab.wait_for_steps("two", 1)?;
    let first = count_beyond(&lab, "two", 0)?;
    let second = count_beyond(&lab, "two", first)?;
    lab.commit("base", "two")?;
    count_beyond(&lab, "two", second)?;
    lab.stop("two")?;
    lab.restore("base", &[])?;
    ensure!(lab.ps("base")?["cpus"] == 2);
    let third = count(&lab, "base")?;
    ensure!(second <= third, "vCPU 1 fell back from {second} to {third}");
    count_beyond(&lab, "base", third)?;
    lab.assert_goes_on("base", "base")?;
    lab.finish()
}

/// Input that the guest had not read yet is part of the machine.
#[test]
fn input_under_way_is_restored() -> Result<()> {
    let Some(lab) = with_base("input_under_way_is_restored")? else {
        return Ok(());
    };
    lab.restore("base", &["--paused", "--name", "vm"])?;
    // More than the serial port itself can hold.
    lab.type_in("vm", &[b'p'; 200])?;
    lab.commit("asked", "vm")?;
    lab.stop("vm")?;
    lab.restore("asked", &[])?;
    eventually("every question is answered", || {
        let said = lab.console("asked")?;
        Ok((said.matches("pong\n").count() == 200).then_some(()))
    })?;
    lab.assert_goes_on("asked", "asked")?;
    lab.finish()
}
