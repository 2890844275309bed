//! Views of another user's: a monitor that is not root.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::ensure;
use snapstore_tests::harness::skipped;

use super::{base_memory, named, with_machine};

const USER: u32 = 65534;
const OTHER: u32 = 65533;

fn run_as(user: u32, dir: &Path, script: &str) -> std::io::Result<Output> {
    let mut command = Command::new("sh");
    command.args(["-ec", script]).current_dir("/");
    command.env("DIR", dir).uid(user).gid(user).output()
}

#[test]
fn another_user_has_a_view() -> anyhow::Result<()> {
    let test = "another_user_has_a_view";
    if !rustix::process::geteuid().is_root() {
        skipped(test, "it takes root");
        return Ok(());
    }
    let Some(mut fixture) = with_machine(test)? else {
        return Ok(());
    };
    fs::set_permissions(fixture.dir.path(), Permissions::from_mode(0o755))?;
    let owner = format!("{USER}:{USER}");
    let (dir, _) = fixture.mount_rw("view", &["--owner", &owner, "--mode", "640"])?;
    let written = "printf written | dd of=$DIR/memory.bin conv=notrunc status=none
        echo state >$DIR/vmstate.new && mv $DIR/vmstate.new $DIR/vmstate
        stat -c '%u %g %a' $DIR $DIR/memory.bin $DIR/vmstate";
    let output = run_as(USER, &dir, written)?;
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{errors}");
    assert_eq!(
        said, "65534 65534 750\n65534 65534 640\n65534 65534 644\n",
        "{errors}"
    );
    for script in ["cat $DIR/memory.bin", "echo x >$DIR/new"] {
        let output = run_as(OTHER, &dir, script)?;
        ensure!(!output.status.success(), "user {OTHER} may {script}");
    }
    fixture.commit_view("next", &dir)?;
    let shown = fixture.shown("next")?;
    let mut memory = base_memory();
    memory[..7].copy_from_slice(b"written");
    assert!(named(&shown, "memory.bin") == Some(&memory[..]));
    assert_eq!(named(&shown, "vmstate"), Some(&b"state\n"[..]));
    fixture.umount(&dir)
}
