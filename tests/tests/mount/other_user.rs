//! Mounts of users other than root, which fusermount3 makes.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::ensure;
use snapstore_tests::harness::{copy_program, noise, program, skipped};

use crate::places::NAMES;
use crate::{Fixture, PAGE};

#[test]
fn another_user_mounts_under_any_name() -> anyhow::Result<()> {
    let test = "another_user_mounts_under_any_name";
    if Fixture::new(test)?.is_none() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    // The user gets to what is needed, wherever it was built.
    let open = |path: &Path| fs::set_permissions(path, fs::Permissions::from_mode(0o755));
    open(dir.path())?;
    let copy = dir.path().join("snapstore");
    copy_program(&program()?, copy.as_ref())?;
    open(&copy)?;
    let image = dir.path().join("image");
    fs::write(&image, noise(1, 8 * PAGE))?;
    open(&image)?;
    let script = include_str!("other_user.sh");
    let ran = Command::new("unshare")
        .args(["-m", "bash", "-c", script, "other_user"])
        .arg(&copy)
        .arg(&image)
        .args(NAMES.iter().map(|name| OsStr::from_bytes(name)))
        .current_dir(dir.path())
        .output();
    let output = match ran {
        Err(error) => {
            skipped(test, &format!("unshare: {error}"));
            return Ok(());
        }
        Ok(output) if output.status.code() == Some(77) => {
            let said = String::from_utf8_lossy(&output.stderr);
            skipped(test, said.lines().next().unwrap_or("no other user"));
            return Ok(());
        }
        Ok(output) => output,
    };
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    ensure!(output.status.success(), "{}: {said}", output.status);
    Ok(())
}
