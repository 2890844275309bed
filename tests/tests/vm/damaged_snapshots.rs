//! Snapshots that no machine can be made of.

use anyhow::{Result, ensure};
use snapstore_guests::TABLE;
use snapstore_tests::vm::Lab;

/// The state's header: magic, version, length.
const HEADER: usize = 20;
const CHECKSUM: usize = 32;

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

/// Commits this as files, and expects one clear error from restoring it.
fn is_refused(lab: &Lab, tag: &str, memory: &[u8], state: Option<&[u8]>) -> Result<String> {
    let memory = lab.file("memory", memory)?;
    let mut arguments = vec!["commit", tag, "--memory", &memory, "--no-parent"];
    let state = state.map(|state| lab.file("state", state)).transpose()?;
    if let Some(state) = &state {
        arguments.extend(["--vmstate", state]);
    }
    lab.cli.ok(&arguments)?;
    let mut said = String::new();
    for more in [&["--detach"][..], &[], &["--detach", "-n", "3"]] {
        said = lab.cli.fails(1, &[&["restore", tag], more].concat())?;
        ensure!(said.matches("error:").count() == 1, "{tag}: {said}");
        ensure!(!said.contains("panicked"), "{tag}: {said}");
        ensure!(
            lab.machines()?.is_empty(),
            "{tag} left {:?}",
            lab.machines()?
        );
    }
    Ok(said)
}

/// The state with this change, under a checksum that fits.
fn sealed(state: &[u8], change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut state = state[..state.len() - CHECKSUM].to_vec();
    change(&mut state);
    let checksum = blake3::hash(&state);
    state.extend(checksum.as_bytes());
    state
}

#[test]
fn damaged_states_are_refused() -> Result<()> {
    let Some(lab) = with_base("damaged_states_are_refused")? else {
        return Ok(());
    };
    let memory = lab.stored_all("base", "memory")?;
    let state = lab.stored_all("base", "vmstate")?;
    ensure!(&state[..8] == b"SNAPVMST");
    let said = is_refused(&lab, "none", &memory, None)?;
    ensure!(said.contains("vmstate"), "{said}");
    is_refused(&lab, "junk", &memory, Some(b"not a state"))?;
    is_refused(&lab, "truncated", &memory, Some(&state[..state.len() - 1]))?;
    is_refused(&lab, "header", &memory, Some(&state[..HEADER]))?;
    is_refused(&lab, "longer", &memory, Some(&[&state[..], b"x"].concat()))?;
    for (number, at) in [0, 8, 12, HEADER, state.len() / 2, state.len() - 1]
        .into_iter()
        .enumerate()
    {
        let mut flipped = state.clone();
        flipped[at] ^= 1;
        is_refused(&lab, &format!("flipped{number}"), &memory, Some(&flipped))?;
    }
    // What another version wrote is not damaged.
    let other = sealed(&state, |state| state[8] = 3);
    let said = is_refused(&lab, "version", &memory, Some(&other))?;
    ensure!(
        said.contains("newer snapstore: it has format version 3"),
        "{said}"
    );
    // Its first part of a later version, and of an unknown kind.
    let clock = state.windows(5).position(|five| five == b"clock");
    ensure!(clock == Some(HEADER), "{clock:?}");
    let other = sealed(&state, |state| state[HEADER + 16] = 9);
    let said = is_refused(&lab, "part", &memory, Some(&other))?;
    ensure!(
        said.contains("newer snapstore: its part \"clock\" has version 9"),
        "{said}"
    );
    let other = sealed(&state, |state| {
        state[HEADER..][..5].copy_from_slice(b"chime")
    });
    let said = is_refused(&lab, "kind", &memory, Some(&other))?;
    ensure!(
        said.contains("newer snapstore: its part \"chime\""),
        "{said}"
    );
    let huge = sealed(&state, |state| state[12..20].fill(0xff));
    is_refused(&lab, "huge", &memory, Some(&huge))?;
    let zeros = sealed(&state, |state| state[HEADER..].fill(0));
    is_refused(&lab, "zeros", &memory, Some(&zeros))?;
    let ones = sealed(&state, |state| state[HEADER + 4..].fill(0xff));
    is_refused(&lab, "ones", &memory, Some(&ones))?;
    let large = vec![0; 17 << 20];
    is_refused(&lab, "large", &memory, Some(&large))?;
    lab.assert_nothing_left()?;
    // What is whole still starts.
    lab.restore("base", &[])?;
    lab.assert_goes_on("base", "base")?;
    lab.finish()
}

#[test]
fn memory_of_another_size_is_refused() -> Result<()> {
    let Some(lab) = with_base("memory_of_another_size_is_refused")? else {
        return Ok(());
    };
    let memory = lab.stored_all("base", "memory")?;
    let state = lab.stored_all("base", "vmstate")?;
    let shorter = &memory[..memory.len() - 4096];
    let longer = [&memory[..], &[0; 4096]].concat();
    for (tag, memory) in [("shorter", shorter), ("longer", &longer)] {
        let said = is_refused(&lab, tag, memory, Some(&state))?;
        ensure!(said.contains("memory"), "{tag}: {said}");
    }
    // The state of a larger machine, with this one's memory.
    lab.run("large", TABLE, &["--mem", "32M"])?;
    lab.wait_for_steps("large", 1)?;
    lab.commit("large", "large")?;
    lab.stop("large")?;
    let other = lab.stored_all("large", "vmstate")?;
    let said = is_refused(&lab, "crossed", &memory, Some(&other))?;
    ensure!(said.contains("memory"), "{said}");
    lab.finish()
}

#[test]
fn a_snapshot_of_disks_only_is_no_machine() -> Result<()> {
    let Some(lab) = with_base("a_snapshot_of_disks_only_is_no_machine")? else {
        return Ok(());
    };
    let disk = format!("root={}", lab.file("disk", &[1; 8192])?);
    lab.cli.ok(&["commit", "disk", "--disk", &disk])?;
    let said = lab.cli.fails(1, &["restore", "disk", "--detach"])?;
    ensure!(said.contains("memory"), "{said}");
    lab.assert_nothing_left()?;
    lab.finish()
}

/// A page that cannot be served is never made up.
#[test]
fn a_machine_that_meets_a_damaged_page_ends() -> Result<()> {
    let test = "a_machine_that_meets_a_damaged_page_ends";
    let Some(lab) = with_base(test)? else {
        return Ok(());
    };
    let packs = lab.cli.store().join("packs");
    for name in snapstore_tests::vm::names(&packs) {
        let path = packs.join(name);
        let mut bytes = std::fs::read(&path)?;
        // The table's pages are most of it; the footer stays whole.
        let len = bytes.len();
        for at in (len / 4..len / 2).step_by(512) {
            bytes[at] ^= 0xff;
        }
        std::fs::write(&path, bytes)?;
    }
    let output = lab.cli.run(&["restore", "base", "--detach"])?;
    if output.status.success() {
        let reason = lab.wait_for_death("base")?;
        ensure!(reason.contains("memory can no longer be read"), "{reason}");
        lab.stop("base")?;
    } else {
        ensure!(lab.machines()?.is_empty());
    }
    lab.cli.ok(&["stop", "--all"])?;
    lab.assert_nothing_left()
}
