//! Paths are bytes: what is no text in them does not matter.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;

use anyhow::{Result, ensure};
use snapstore_guests::TABLE;
use snapstore_tests::vm::Lab;

#[test]
fn a_machine_is_started_from_any_path() -> Result<()> {
    let Some(lab) = Lab::with_mounts("a_machine_is_started_from_any_path")? else {
        return Ok(());
    };
    let odd = lab
        .path("x")
        .with_file_name(OsStr::from_bytes(b"k, \n\xff"));
    fs::create_dir(&odd)?;
    let kernel = odd.join("kernel");
    fs::write(&kernel, TABLE)?;
    let starts = |arguments: &[&str], option: &str, path: &std::path::Path| -> Result<()> {
        let mut command = lab.cli.command(arguments)?;
        let output = command.arg(option).arg(path).output()?;
        ensure!(output.status.success(), "{output:?}");
        Ok(())
    };
    let run = ["run", "web", "--mem", "16M", "--detach"];
    starts(&run, "--kernel", &kernel)?;
    lab.wait_for_steps("web", 2)?;
    lab.commit("base", "web")?;
    lab.stop("web")?;
    let restore = ["restore", "base", "--name", "again", "--detach"];
    starts(&restore, "--overlay-dir", &odd)?;
    lab.assert_goes_on("again", "base")?;
    lab.finish()
}
