//! Pausing and resuming.

use std::os::unix::fs::DirBuilderExt as _;
use std::time::Duration;

use anyhow::{Result, ensure};
use snapstore_guests::TABLE;
use snapstore_tests::vm::Lab;

fn printed(lab: &Lab, name: &str) -> Result<Option<u64>> {
    Ok(lab.ps(name)?["console_bytes"].as_u64())
}

#[test]
fn a_paused_machine_prints_nothing() -> Result<()> {
    let Some(lab) = Lab::with_mounts("a_paused_machine_prints_nothing")? else {
        return Ok(());
    };
    lab.run("web", TABLE, &["--paused"])?;
    ensure!(lab.ps("web")?["state"] == "paused");
    ensure!(
        printed(&lab, "web")? == Some(0),
        "it ran before it was told to"
    );
    let resumed = lab.cli.json(&["resume", "web"])?;
    ensure!(
        resumed["state"] == "running" && resumed["name"] == "web",
        "{resumed}"
    );
    lab.wait_for_steps("web", 2)?;
    for _ in 0..2 {
        // Twice is as good as once.
        ensure!(lab.cli.json(&["pause", "web"])?["state"] == "paused");
    }
    let before = printed(&lab, "web")?;

    // Another machine shows that time passes.
    lab.run("other", TABLE, &[])?;
    lab.wait_for_steps("other", 3)?;
    lab.commit("paused", "web")?;
    lab.commit("paused.again", "web")?;
    ensure!(printed(&lab, "web")? == before);
    ensure!(lab.ps("web")?["state"] == "paused", "a commit let it run");

    let at = lab.steps("web")?.len();
    lab.cli.ok(&["resume", "web"])?;
    lab.cli.ok(&["resume", "web"])?;
    lab.wait_for_steps("web", at + 2)?;
    ensure!(lab.ps("web")?["state"] == "running");

    lab.restore("paused", &["--paused"])?;
    ensure!(lab.ps("paused")?["state"] == "paused");
    lab.wait_for_steps("other", 5)?;
    ensure!(printed(&lab, "paused")? == Some(0));
    lab.cli.ok(&["resume", "paused"])?;
    lab.assert_goes_on("paused", "paused")?;
    lab.finish()
}

#[test]
fn a_paused_machine_can_be_stopped() -> Result<()> {
    let Some(lab) = Lab::new("a_paused_machine_can_be_stopped")? else {
        return Ok(());
    };
    lab.run("never-ran", TABLE, &["--paused"])?;
    lab.run("ran", TABLE, &["--cpus", "2"])?;
    lab.wait_for_steps("ran", 1)?;
    lab.cli.ok(&["pause", "ran"])?;
    lab.stop("never-ran")?;
    lab.stop("ran")?;
    lab.assert_nothing_left()
}

#[test]
fn many_pauses_do_no_harm() -> Result<()> {
    let Some(lab) = Lab::new("many_pauses_do_no_harm")? else {
        return Ok(());
    };
    lab.run("web", TABLE, &["--cpus", "2"])?;
    let mut control = lab.connect("web")?;
    for _ in 0..200 {
        for request in ["pause", "resume"] {
            let reply = control.ask(&serde_json::json!({"request": request}))?;
            ensure!(reply["reply"] == "done", "{reply}");
        }
    }
    let now = lab.steps("web")?.len();
    lab.wait_for_steps("web", now + 2)?;
    lab.finish()
}

#[test]
fn a_machine_that_has_only_its_name_yet_is_busy() -> Result<()> {
    let Some(lab) = Lab::new("a_machine_that_has_only_its_name_yet_is_busy")? else {
        return Ok(());
    };
    lab.cli.ok(&["ps"])?;
    std::fs::DirBuilder::new()
        .mode(0o700)
        .create(lab.vm_dir("web"))?;
    let lock = std::fs::File::create(lab.vm_dir("web").join("lock"))?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)?;
    for command in [&["pause", "web"][..], &["console", "web"], &["ps", "web"]] {
        let said = lab.cli.fails(5, command)?;
        ensure!(said.contains("web is still starting"), "{said}");
    }
    lab.cli.fails(5, &["commit", "tag", "--vm", "web"])?;
    // Ending it takes until it can be told, or has gone by itself.
    let mut stop = lab.cli.command(&["stop", "web"])?.spawn()?;
    std::thread::sleep(Duration::from_millis(100));
    ensure!(stop.try_wait()?.is_none(), "it did not wait");
    drop(lock);
    ensure!(stop.wait()?.success());
    lab.assert_nothing_left()
}

#[test]
fn machines_keep_no_directory_of_their_starter() -> Result<()> {
    let Some(lab) = Lab::new("machines_keep_no_directory_of_their_starter")? else {
        return Ok(());
    };
    let kernel = lab.file("kernel", TABLE)?;
    let cli = lab.cli.clone().with_env("SNAPSTORE_RUNTIME_DIR", "run");
    let arguments = [
        "run", "web", "--kernel", &kernel, "--mem", "16M", "--detach",
    ];
    let mut command = cli.command(&arguments)?;
    ensure!(command.current_dir(lab.path("")).output()?.status.success());
    let cwd = std::fs::read_link(format!("/proc/{}/cwd", lab.pid("web")?))?;
    ensure!(cwd == std::path::Path::new("/"), "{}", cwd.display());
    lab.stop("web")?;
    lab.assert_nothing_left()
}

#[test]
fn what_does_not_run_is_not_found() -> Result<()> {
    let Some(lab) = Lab::new("what_does_not_run_is_not_found")? else {
        return Ok(());
    };
    for command in ["pause", "resume", "stop", "console", "ps"] {
        let said = lab.cli.fails(3, &[command, "nobody"])?;
        ensure!(said.contains("nobody"), "{said}");
    }
    lab.cli.fails(3, &["commit", "tag", "--vm", "nobody"])?;
    lab.cli.fails(3, &["restore", "nothing", "--detach"])?;
    for name in ["../up", "a/b", "", ".hidden"] {
        lab.cli.fails(2, &["pause", name])?;
    }
    lab.finish()
}
