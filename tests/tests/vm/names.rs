//! A name is free once the command has returned that ended its machine.

use anyhow::{Result, ensure};
use snapstore_guests::SPIN;
use snapstore_tests::vm::{Lab, kill};

const ROUNDS: usize = 15;

#[test]
fn a_name_is_used_again_right_after_a_stop() -> Result<()> {
    let Some(lab) = Lab::with_mounts("a_name_is_used_again_right_after_a_stop")? else {
        return Ok(());
    };
    lab.run("web", SPIN, &[])?;
    lab.commit("base", "web")?;
    for _ in 0..ROUNDS {
        lab.stop("web")?;
        ensure!(!lab.vm_dir("web").join("lock").exists());
        lab.run("web", SPIN, &[])?;
        // Not `base.1`.
        ensure!(lab.restore("base", &[])? == ["base"]);
        lab.stop("base")?;
        ensure!(lab.restore("base", &["--name", "base"])? == ["base"]);
        lab.stop("base")?;
    }
    lab.finish()
}

#[test]
fn a_name_is_used_again_when_its_process_was_killed() -> Result<()> {
    let Some(lab) = Lab::new("a_name_is_used_again_when_its_process_was_killed")? else {
        return Ok(());
    };
    for _ in 0..ROUNDS {
        lab.run("web", SPIN, &[])?;
        kill(lab.pid("web")?)?;
    }
    lab.finish()
}

/// A guest that ends by itself, in a terminal.
#[test]
fn a_name_is_used_again_right_after_an_attached_machine() -> Result<()> {
    let test = "a_name_is_used_again_right_after_an_attached_machine";
    let Some(lab) = Lab::new(test)? else {
        return Ok(());
    };
    // HLT with interrupts off would wait for ever: a fault without handlers ends it.
    let kernel = lab.file("kernel", &[0x0f, 0x0b])?;
    for _ in 0..ROUNDS {
        let output = lab
            .cli
            .run(&["run", "web", "--kernel", &kernel, "--mem", "16M"])?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(said.contains("triple fault"), "{said}");
        ensure!(output.status.code() == Some(1), "{output:?}");
    }
    lab.finish()
}

/// Whoever names several wants each of them gone.
#[test]
fn a_stop_of_several_ends_those_that_there_are() -> Result<()> {
    let Some(lab) = Lab::new("a_stop_of_several_ends_those_that_there_are")? else {
        return Ok(());
    };
    for name in ["a", "b", "c"] {
        lab.run(name, SPIN, &[])?;
    }
    let stop = lab.cli.run(&["stop", "a", "x", "c", "y", "--json"])?;
    ensure!(stop.status.code() == Some(3), "{stop:?}");
    let answer: serde_json::Value = serde_json::from_slice(&stop.stdout)?;
    ensure!(
        answer["stopped"] == serde_json::json!(["a", "c"]),
        "{answer}"
    );
    let said = String::from_utf8_lossy(&stop.stderr).into_owned();
    ensure!(said.lines().count() == 2, "{said}");
    ensure!(
        said.contains("named x;") && said.contains("named y;"),
        "{said}"
    );
    ensure!(lab.cli.ok(&["ps", "-q"])? == "b\n");
    // Where none is stopped there is no answer.
    let stop = lab.cli.run(&["stop", "a", "x"])?;
    ensure!(
        stop.status.code() == Some(3) && stop.stdout.is_empty(),
        "{stop:?}"
    );
    lab.stop("b")?;
    lab.finish()
}

/// A socket's path has 107 bytes at most: a directory in which no machine could have one is
/// refused before anything is made.
#[test]
fn a_directory_too_deep_for_sockets_is_not_made() -> Result<()> {
    let Some(lab) = Lab::new("a_directory_too_deep_for_sockets_is_not_made")? else {
        return Ok(());
    };
    let deep = lab.path(&"d".repeat(100));
    for command in [&["ps"][..], &["restore", "base", "--detach"]] {
        let mut command = lab.cli.command(command)?;
        let output = command.env("SNAPSTORE_RUNTIME_DIR", &deep).output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(2), "{output:?}");
        ensure!(said.contains("SNAPSTORE_RUNTIME_DIR"), "{said}");
        ensure!(!deep.exists(), "{} is left", deep.display());
    }
    lab.finish()
}
