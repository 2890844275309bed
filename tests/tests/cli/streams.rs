//! Standard output and standard error that are full, closed, or no terminal.

use std::fs::{File, OpenOptions};
use std::process::{Command, Output, Stdio};

use anyhow::ensure;
use snapstore_tests::harness::{Cli, program};

/// A pipe that nobody reads any more.
fn without_reader() -> anyhow::Result<Stdio> {
    let (reader, writer) = std::io::pipe()?;
    drop(reader);
    Ok(writer.into())
}

fn full() -> anyhow::Result<Stdio> {
    Ok(OpenOptions::new().write(true).open("/dev/full")?.into())
}

/// What can be wrong with a stream.
const BAD: [fn() -> anyhow::Result<Stdio>; 2] = [full, without_reader];

/// A store, and an image to commit.
fn store() -> anyhow::Result<(tempfile::TempDir, Cli, String)> {
    let dir = tempfile::tempdir()?;
    let cli = Cli::new(&dir.path().join("store"));
    cli.ok(&["init"])?;
    let image = dir.path().join("image");
    std::fs::write(&image, [7; 8192])?;
    let image = image.display().to_string();
    Ok((dir, cli, image))
}

/// With everything logged that can be.
fn run(cli: &Cli, arguments: &[&str], stdout: Stdio, stderr: Stdio) -> anyhow::Result<Output> {
    let mut command = cli.command(arguments)?;
    command.env("RUST_LOG", "trace");
    Ok(command
        .stdout(stdout)
        .stderr(stderr)
        .spawn()?
        .wait_with_output()?)
}

#[test]
fn exit_codes_do_not_depend_on_standard_error() -> anyhow::Result<()> {
    let (_dir, cli, image) = store()?;
    for bad in BAD {
        let expected = [
            (3, vec!["show", "nosuch"]),
            (2, vec!["frobnicate"]),
            (0, vec!["commit", "base", "--replace", "--memory", &image]),
            (0, vec!["gc"]),
            (0, vec!["verify", "--read-data"]),
        ];
        for (code, arguments) in expected {
            let ended = run(&cli, &arguments, Stdio::null(), bad()?)?;
            ensure!(
                ended.status.code() == Some(code),
                "{arguments:?}: {}",
                ended.status
            );
        }
    }
    cli.ok(&["show", "base"])?;
    Ok(())
}

#[test]
fn a_default_store_is_made_though_nobody_can_be_told() -> anyhow::Result<()> {
    let (dir, _, image) = store()?;
    let mut command = Command::new(program()?);
    command
        .args(["commit", "base", "--memory", &image])
        .env_remove("SNAPSTORE_DIR")
        .env("XDG_DATA_HOME", dir.path().join("data"))
        .stdout(Stdio::null())
        .stderr(full()?);
    ensure!(command.status()?.success());
    Ok(())
}

#[test]
fn an_answer_that_cannot_be_written_is_a_failure_that_says_so() -> anyhow::Result<()> {
    let (_dir, cli, image) = store()?;
    cli.ok(&["commit", "base", "--memory", &image])?;
    for arguments in [
        &["tags"][..],
        &["show", "base", "--json"],
        &["log"],
        &["--help"],
    ] {
        let ended = run(&cli, arguments, full()?, Stdio::piped())?;
        let said = String::from_utf8_lossy(&ended.stderr);
        ensure!(
            ended.status.code() == Some(1),
            "{arguments:?}: {}",
            ended.status
        );
        ensure!(
            said.contains("standard output: No space"),
            "{arguments:?}: {said}"
        );
    }
    Ok(())
}

#[test]
fn a_reader_that_went_away_is_no_failure() -> anyhow::Result<()> {
    let (_dir, cli, image) = store()?;
    cli.ok(&["commit", "base", "--memory", &image])?;
    for arguments in [&["tags"][..], &["show", "base", "--json"], &["--help"]] {
        let mut command = cli.command(arguments)?;
        let ended = command.stdout(without_reader()?).stderr(Stdio::piped());
        let ended = ended.spawn()?.wait_with_output()?;
        let said = String::from_utf8_lossy(&ended.stderr);
        ensure!(
            ended.status.success() && said.is_empty(),
            "{arguments:?}: {said}"
        );
    }
    Ok(())
}

#[test]
fn what_is_no_terminal_gets_no_colours() -> anyhow::Result<()> {
    let (dir, cli, image) = store()?;
    let log = dir.path().join("log");
    let arguments = ["commit", "base", "--memory", &image];
    let ended = run(&cli, &arguments, Stdio::piped(), File::create(&log)?.into())?;
    ensure!(ended.status.success());
    let said = std::fs::read(&log)?;
    ensure!(!said.is_empty(), "nothing was logged");
    ensure!(!said.contains(&b'\x1b') && !ended.stdout.contains(&b'\x1b'));
    Ok(())
}
