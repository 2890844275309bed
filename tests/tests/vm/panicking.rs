//! A fault of the program itself, in a machine's thread.

use anyhow::{Result, ensure};
use snapstore_guests::TABLE;
use snapstore_tests::vm::Lab;

#[test]
fn a_machine_one_of_whose_threads_panics_ends_and_tells_why() -> Result<()> {
    let test = "a_machine_one_of_whose_threads_panics_ends_and_tells_why";
    let Some(lab) = Lab::new(test)? else {
        return Ok(());
    };
    lab.run("other", TABLE, &[])?;
    let kernel = lab.file("kernel", TABLE)?;
    let cli = lab.cli.clone().with_env("SNAPSTORE_PANIC_IN", "vcpu");
    let run = ["run", "web", "--kernel", &kernel, "--mem", "16M"];
    cli.ok(&[&run[..], &["--detach", "--paused"]].concat())?;
    ensure!(lab.ps("web")?["state"] == "paused");
    // It may end before it has answered.
    lab.cli.command(&["resume", "web"])?.output()?;
    let reason = lab.wait_for_death("web")?;
    let fault = "a fault of this program, in vcpu";
    ensure!(reason.contains(fault), "{reason}");
    ensure!(reason.contains("asked to panic"), "{reason}");
    let text = lab.cli.ok(&["ps"])?;
    ensure!(text.contains(fault), "{text}");
    // Who waits for it is told, and the others run on.
    let said = cli.fails(1, &run)?;
    ensure!(said.contains(fault), "{said}");
    lab.wait_for_steps("other", 2)?;
    lab.finish()
}
