//! `restore --require-reseed`: a guest that takes no fresh entropy does not run on.

use anyhow::{Result, ensure};
use snapstore_guests::TABLE;
use snapstore_tests::vm::{Lab, eventually};
use snapstore_vmm::state::{MachineState, VirtioDeviceState, VirtioQueueState, VirtioState};

/// A lab with a snapshot `base` of a `table` guest, and a snapshot `silent` of the same
/// guest with a vsock device, of which it knows nothing.
fn with_silent(test: &str) -> Result<Option<Lab>> {
    let Some(lab) = Lab::with_mounts(test)? else {
        return Ok(None);
    };
    lab.run("web", TABLE, &[])?;
    lab.wait_for_steps("web", 2)?;
    lab.commit("base", "web")?;
    lab.stop("web")?;
    let memory = lab.file("memory", &lab.stored_all("base", "memory")?)?;
    let mut state = MachineState::decode(&lab.stored_all("base", "vmstate")?)?;
    state.devices.virtio.push(VirtioState {
        device: VirtioDeviceState::Vsock { guest_cid: 3 },
        status: 0,
        driver_features: 0,
        device_features_select: 0,
        driver_features_select: 0,
        queue_select: 0,
        interrupt_status: 0,
        config_generation: 0,
        queues: [256, 256, 64]
            .map(|max_size| VirtioQueueState {
                max_size,
                ..VirtioQueueState::default()
            })
            .into(),
    });
    let state = lab.file("state", &state.encode())?;
    let commit = ["commit", "silent", "--memory", &memory, "--vmstate", &state];
    lab.cli.ok(&commit)?;
    Ok(Some(lab))
}

#[test]
fn a_guest_that_cannot_be_reseeded_is_not_started() -> Result<()> {
    let Some(lab) = with_silent("a_guest_that_cannot_be_reseeded_is_not_started")? else {
        return Ok(());
    };
    for more in [&["--detach"][..], &[], &["--detach", "-n", "2"]] {
        let restore = [&["restore", "base", "--require-reseed"], more].concat();
        let said = lab.cli.fails(1, &restore)?;
        ensure!(said.contains("no vsock device"), "{said}");
        // Processes that were to become machines may still be ending.
        eventually("no machine is left", || {
            Ok(lab.machines()?.is_empty().then_some(()))
        })?;
    }
    lab.finish()
}

#[test]
fn a_guest_that_takes_no_entropy_does_not_run_on() -> Result<()> {
    let Some(lab) = with_silent("a_guest_that_takes_no_entropy_does_not_run_on")? else {
        return Ok(());
    };
    // Without being asked to, it runs.
    lab.restore("silent", &["--name", "free"])?;
    ensure!(lab.ps("free")?["reseeded"] == false);
    lab.assert_goes_on("free", "base")?;
    for more in [&["--detach"][..], &["--detach", "-n", "2"], &[]] {
        let restore = [&["restore", "silent", "--require-reseed"], more].concat();
        let said = lab.cli.fails(1, &restore)?;
        ensure!(said.contains("could not be reseeded"), "{more:?}: {said}");
        eventually("no machine runs but the free one", || {
            let running = lab.machines()?.into_iter();
            let mut running = running.filter(|vm| !vm["pid"].is_null());
            Ok(running.all(|vm| vm["name"] == "free").then_some(()))
        })?;
        // A `stop` of several stops none if it does not know one of them.
        for name in ["silent", "silent.1", "silent.2"] {
            lab.cli.run(&["stop", name])?;
        }
    }
    // One that is paused first is ended once it has run for as long.
    lab.restore("silent", &["--require-reseed", "--paused"])?;
    ensure!(lab.ps("silent")?["state"] == "paused");
    lab.cli.ok(&["resume", "silent"])?;
    let reason = lab.wait_for_death("silent")?;
    ensure!(reason.contains("could not be reseeded"), "{reason}");
    lab.assert_goes_on("free", "base")?;
    lab.cli.ok(&["stop", "--all"])?;
    lab.finish()
}
