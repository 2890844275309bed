//! Would the tests notice? Machines that must not go on as others do.

use anyhow::{Result, ensure};
use snapstore_guests::{TABLE, TABLE_ADDRESS};
use snapstore_tests::vm::{Lab, eventually};

const PAGE: usize = 4096;

/// A lab with `base` and a later `step1` of a `table` guest.
fn with_two(test: &str) -> Result<Option<Lab>> {
    let Some(lab) = Lab::with_mounts(test)? else {
        return Ok(None);
    };
    lab.run("web", TABLE, &[])?;
    lab.wait_for_steps("web", 2)?;
    lab.commit("base", "web")?;
    let now = lab.steps("web")?.len();
    lab.wait_for_steps("web", now + 3)?;
    lab.commit("step1", "web")?;
    lab.stop("web")?;
    Ok(Some(lab))
}

#[test]
fn a_base_knows_nothing_of_its_child() -> Result<()> {
    let Some(lab) = with_two("a_base_knows_nothing_of_its_child")? else {
        return Ok(());
    };
    lab.restore("base", &[])?;
    lab.restore("step1", &[])?;
    let base = lab.wait_for_steps("base", 1)?[0];
    let child = lab.wait_for_steps("step1", 1)?[0];
    ensure!(
        base + 2 < child,
        "base goes on at {base}, its child at {child}"
    );
    lab.finish()
}

/// Restores `base` with this memory; the guest must notice.
fn is_noticed(lab: &Lab, tag: &str, memory: &[u8]) -> Result<()> {
    let state = lab.file("state", &lab.stored_all("base", "vmstate")?)?;
    let memory = lab.file("memory", memory)?;
    lab.cli
        .ok(&["commit", tag, "--memory", &memory, "--vmstate", &state])?;
    lab.restore(tag, &[])?;
    eventually("the guest notices", || {
        Ok(lab.console(tag)?.contains(" BAD").then_some(()))
    })?;
    lab.stop(tag)
}

#[test]
fn a_guest_notices_wrong_pages() -> Result<()> {
    let Some(lab) = with_two("a_guest_notices_wrong_pages")? else {
        return Ok(());
    };
    let memory = lab.stored_all("base", "memory")?;
    let later = lab.stored_all("step1", "memory")?;
    let table = usize::try_from(TABLE_ADDRESS)?;
    let page = |number: usize| table + number * PAGE..table + (number + 1) * PAGE;

    let mut swapped = memory.clone();
    swapped[page(3)].copy_from_slice(&memory[page(4)]);
    swapped[page(4)].copy_from_slice(&memory[page(3)]);
    is_noticed(&lab, "swapped", &swapped)?;

    let mut mixed = memory.clone();
    mixed[page(7)].copy_from_slice(&later[page(7)]);
    is_noticed(&lab, "mixed", &mixed)?;

    let mut flipped = memory.clone();
    flipped[table + 9 * PAGE + 40] ^= 0x10;
    is_noticed(&lab, "flipped", &flipped)?;

    // And what was not changed is not called bad.
    let state = lab.file("state", &lab.stored_all("base", "vmstate")?)?;
    let same = lab.file("memory", &memory)?;
    lab.cli
        .ok(&["commit", "same", "--memory", &same, "--vmstate", &state])?;
    lab.restore("same", &[])?;
    lab.assert_goes_on("same", "base")?;
    lab.finish()
}

/// The state of one moment with the memory of another.
#[test]
fn a_guest_notices_state_of_another_moment() -> Result<()> {
    let Some(lab) = with_two("a_guest_notices_state_of_another_moment")? else {
        return Ok(());
    };
    let later = lab.stored_all("step1", "memory")?;
    is_noticed(&lab, "crossed", &later)?;
    lab.finish()
}
