//! Listings that are longer than the terminal.

use std::fs::{self, File};
use std::os::fd::FromRawFd as _;
use std::process::Output;

use anyhow::Context as _;
use snapstore_tests::harness::noise;

use crate::{Fixture, PAGE};

/// Both ends of a terminal of ten rows.
fn terminal() -> anyhow::Result<(File, File)> {
    let size = libc::winsize {
        ws_row: 10,
        ws_col: 200,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let (mut user, mut program) = (-1, -1);
    // SAFETY: it fills two descriptors, which nobody else has, and reads the size.
    let made = unsafe {
        libc::openpty(
            &raw mut user,
            &raw mut program,
            std::ptr::null_mut(),
            std::ptr::null(),
            &raw const size,
        )
    };
    anyhow::ensure!(made == 0, "openpty: {}", std::io::Error::last_os_error());
    // SAFETY: they are this function's alone.
    Ok(unsafe { (File::from_raw_fd(user), File::from_raw_fd(program)) })
}

/// A store with this many tags.
fn with_tags(count: usize) -> anyhow::Result<Fixture> {
    let fixture = Fixture::new()?;
    fixture.commit("tag-0", &noise(1, PAGE), &[])?;
    for number in 1..count {
        fixture
            .cli
            .ok(&["tag", "tag-0", &format!("tag-{number}")])?;
    }
    Ok(fixture)
}

/// Runs a command whose standard output is a terminal, with these variables.
fn on_terminal(
    fixture: &Fixture,
    variables: &[(&str, &str)],
    arguments: &[&str],
) -> anyhow::Result<(Output, String)> {
    use std::io::Read as _;
    let (mut user, program) = terminal()?;
    let mut command = fixture.cli.command(arguments)?;
    for name in ["PAGER", "SNAPSTORE_PAGER", "LESS"] {
        command.env_remove(name);
    }
    command
        .env("TERM", "xterm")
        .envs(variables.iter().copied())
        .stdout(program)
        .stderr(std::process::Stdio::piped());
    let child = command.spawn()?;
    // Its end of the terminal is open here, too, until this is dropped.
    drop(command);
    let mut shown = Vec::new();
    let mut bytes = [0; 4096];
    // At the last close a terminal has an error for its reader.
    while let Ok(got @ 1..) = user.read(&mut bytes) {
        shown.extend_from_slice(&bytes[..got]);
    }
    let output = child.wait_with_output()?;
    Ok((output, String::from_utf8(shown)?.replace("\r\n", "\n")))
}

#[test]
fn what_is_longer_than_the_terminal_goes_through_the_pager() -> anyhow::Result<()> {
    let fixture = with_tags(20)?;
    let kept = fixture.path("kept");
    let pager = format!("cat > {kept}; echo paged with $LESS");
    let table = fixture.cli.ok(&["tags"])?;
    for variables in [
        &[("PAGER", &*pager)][..],
        &[("SNAPSTORE_PAGER", &pager), ("PAGER", "false")],
    ] {
        let (output, shown) = on_terminal(&fixture, variables, &["tags"])?;
        assert!(output.status.success(), "{output:?}");
        assert_eq!(shown, "paged with FRX\n", "{variables:?}");
        assert_eq!(fs::read_to_string(&kept)?, table);
        fs::remove_file(&kept)?;
    }
    Ok(())
}

#[test]
fn everything_else_goes_through_none() -> anyhow::Result<()> {
    let fixture = with_tags(20)?;
    let kept = fixture.path("kept");
    let pager = format!("cat > {kept}");
    let paged = [("PAGER", &*pager)];
    for (variables, arguments) in [
        (&paged[..], &["tags", "--json"][..]),
        (&paged, &["tags", "-o", "{tag}"]),
        (&paged, &["tags", "--no-pager"]),
        (&paged, &["--no-pager", "tags"]),
        (&[("PAGER", "")], &["tags"]),
        (&[("PAGER", "cat")], &["tags"]),
        (&[("PAGER", &pager), ("SNAPSTORE_PAGER", "")], &["tags"]),
        (&[("PAGER", &pager), ("TERM", "dumb")], &["tags"]),
        // As long as the terminal with its prompt, or shorter.
        (&paged, &["stats", "-o", "{total_bytes}"]),
        (&paged, &["show", "tag-0"]),
        // There is none of this name.
        (&[("PAGER", "/nowhere/pager")], &["tags"]),
    ] {
        let (output, shown) = on_terminal(&fixture, variables, arguments)?;
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        assert!(!shown.is_empty(), "{arguments:?}");
        assert!(!fs::exists(&kept)?, "{variables:?} {arguments:?}");
    }
    // No terminal.
    let output = fixture.cli.command(&["tags"])?.envs(paged).output()?;
    assert!(output.stdout.starts_with(b"TAG") && !fs::exists(&kept)?);
    Ok(())
}

/// Damage that a listing tells of has its exit code, whatever the pager ends with.
#[test]
fn a_pager_that_has_seen_enough_is_no_failure() -> anyhow::Result<()> {
    let fixture = with_tags(20)?;
    let (output, shown) = on_terminal(&fixture, &[("PAGER", "head -1; exit 3")], &["tags"])?;
    assert!(output.status.success(), "{output:?}");
    assert!(
        shown.starts_with("TAG") && shown.lines().count() == 1,
        "{shown}"
    );
    fs::write(fixture.cli.store().join("tags/broken"), b"nothing")?;
    let (output, _) = on_terminal(&fixture, &[("PAGER", "head -1")], &["tags"])?;
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    Ok(())
}

/// Ctrl-C in a pager is the pager's.
#[test]
fn an_interrupt_leaves_the_pager_where_it_is() -> anyhow::Result<()> {
    let fixture = with_tags(20)?;
    for command in ["tags", "stats"] {
        let pager = "kill -INT $PPID; kill -INT $PPID; sleep 0.2; head -1";
        let (output, shown) = on_terminal(&fixture, &[("PAGER", pager)], &[command])?;
        assert!(output.status.success(), "{command}: {output:?}");
        shown.lines().next().context("nothing is shown")?;
    }
    Ok(())
}
