//! The serial line, attached and not.

use std::io::{Read as _, Write as _};
use std::process::{Child, Stdio};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use serde_json::json;
use snapstore_guests::{SPIN, TABLE, TRIPLE};
use snapstore_tests::vm::{Lab, eventually, signal, steps};

/// A guest run attached, with pipes.
fn attach(lab: &Lab, name: &str, guest: &[u8]) -> Result<Child> {
    attach_to(Stdio::piped(), lab, name, guest)
}

fn attach_to(out: Stdio, lab: &Lab, name: &str, guest: &[u8]) -> Result<Child> {
    let kernel = lab.file("kernel", guest)?;
    let mut command = lab
        .cli
        .command(&["run", name, "--kernel", &kernel, "--mem", "16M"])?;
    command
        .stdin(Stdio::piped())
        .stdout(out)
        .stderr(Stdio::piped());
    Ok(command.spawn()?)
}

fn read_until(child: &mut Child, text: &str) -> Result<String> {
    let out = child.stdout.as_mut().context("no output")?;
    let mut said = Vec::new();
    let mut bytes = [0; 512];
    loop {
        let now = String::from_utf8_lossy(&said).into_owned();
        if now.contains(text) {
            return Ok(now);
        }
        let got = out.read(&mut bytes)?;
        ensure!(got > 0, "the output ended: {now}");
        said.extend(&bytes[..got]);
    }
}

#[test]
fn an_attached_guest_is_talked_to_and_ends_its_command() -> Result<()> {
    let test = "an_attached_guest_is_talked_to_and_ends_its_command";
    let Some(lab) = Lab::new(test)? else {
        return Ok(());
    };
    let mut child = attach(&lab, "talk", TABLE)?;
    let mut input = child.stdin.take().context("no input")?;
    input.write_all(b"p")?;
    let first = read_until(&mut child, "pong\n")?;
    input.write_all(b"q")?;
    drop(input);
    let output = child.wait_with_output()?;
    ensure!(output.status.code() == Some(0), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(said.contains("talk: the guest reset the machine"), "{said}");
    steps(&(first + &String::from_utf8_lossy(&output.stdout)))?;
    lab.finish()
}

#[test]
fn an_attached_command_ends_with_its_machines_code() -> Result<()> {
    let test = "an_attached_command_ends_with_its_machines_code";
    let Some(lab) = Lab::new(test)? else {
        return Ok(());
    };
    let output = attach(&lab, "triple", TRIPLE)?.wait_with_output()?;
    ensure!(output.status.code() == Some(1), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        said.starts_with("error: triple: ") && said.contains("triple fault"),
        "{said}"
    );

    // Ended from elsewhere, as wanted.
    let child = attach(&lab, "stopped", SPIN)?;
    eventually("it runs", || Ok(lab.pid("stopped").ok()))?;
    lab.stop("stopped")?;
    let output = child.wait_with_output()?;
    ensure!(output.status.code() == Some(0), "{output:?}");

    // And killed.
    let child = attach(&lab, "killed", SPIN)?;
    eventually("it runs", || Ok(lab.pid("killed").ok()))?;
    signal(lab.pid("killed")?, Signal::KILL)?;
    let output = child.wait_with_output()?;
    ensure!(output.status.code() == Some(1), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(said.contains("was killed"), "{said}");
    lab.finish()
}

#[test]
fn signals_to_the_attached_command_end_the_machine() -> Result<()> {
    let test = "signals_to_the_attached_command_end_the_machine";
    let Some(lab) = Lab::new(test)? else {
        return Ok(());
    };
    for sent in [Signal::TERM, Signal::INT, Signal::HUP] {
        let mut child = attach(&lab, "web", TABLE)?;
        read_until(&mut child, " ok\n")?;
        signal(child.id(), sent)?;
        let output = child.wait_with_output()?;
        ensure!(output.status.code() == Some(0), "{sent:?}: {output:?}");
        lab.assert_nothing_left()?;
    }
    // As does output that nobody takes.
    let mut child = attach(&lab, "web", TABLE)?;
    read_until(&mut child, " ok\n")?;
    drop(child.stdout.take());
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(said.contains("its output cannot be shown"), "{output:?}");
    lab.assert_nothing_left()?;
    // A full disk has lost it.
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full")?;
    let output = attach_to(full.into(), &lab, "web", TABLE)?.wait_with_output()?;
    ensure!(output.status.code() == Some(1), "{output:?}");
    lab.assert_nothing_left()?;
    // A visitor's signals are its own.
    lab.run("web", TABLE, &[])?;
    lab.wait_for_steps("web", 1)?;
    let mut visitor = lab.cli.command(&["console", "web"])?;
    let visitor = visitor
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    signal(visitor.id(), Signal::TERM)?;
    visitor.wait_with_output()?;
    let now = lab.steps("web")?.len();
    lab.wait_for_steps("web", now + 1)?;
    // So are a detached machine's: told to end, it ends in order.
    signal(lab.pid("web")?, Signal::TERM)?;
    lab.assert_nothing_left()
}

#[test]
fn an_attached_restore_goes_on_and_ends_in_order() -> Result<()> {
    let test = "an_attached_restore_goes_on_and_ends_in_order";
    let Some(lab) = Lab::with_mounts(test)? else {
        return Ok(());
    };
    lab.run("web", TABLE, &[])?;
    lab.wait_for_steps("web", 2)?;
    lab.commit("base", "web")?;
    lab.stop("web")?;
    let at = lab.committed_step("base")?;
    let mut child = lab.cli.command(&["restore", "base"])?;
    child
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = child.spawn()?;
    let mut input = child.stdin.take().context("no input")?;
    let said = read_until(&mut child, " ok\n")?;
    input.write_all(b"q")?;
    let output = child.wait_with_output()?;
    ensure!(output.status.code() == Some(0), "{output:?}");
    // Nothing between the restored moment and the attaching is missed.
    let steps = steps(&(said + &String::from_utf8_lossy(&output.stdout)))?;
    ensure!(steps[0] == at || steps[0] == at + 1, "{at}: {steps:?}");
    lab.cli.fails(2, &["restore", "base", "-n", "2"])?;
    lab.assert_nothing_left()?;
    lab.finish()
}

#[test]
fn an_attached_machine_can_begin_paused() -> Result<()> {
    let Some(lab) = Lab::new("an_attached_machine_can_begin_paused")? else {
        return Ok(());
    };
    let kernel = lab.file("kernel", TABLE)?;
    let arguments = [
        "run", "web", "--kernel", &kernel, "--mem", "16M", "--paused",
    ];
    let mut command = lab.cli.command(&arguments)?;
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    eventually("it is there", || Ok(lab.pid("web").ok()))?;
    ensure!(lab.ps("web")?["state"] == "paused");
    lab.cli.ok(&["resume", "web"])?;
    let said = read_until(&mut child, " ok\n")?;
    ensure!(said.starts_with("table guest 1"), "{said}");
    lab.stop("web")?;
    ensure!(child.wait()?.success());
    lab.finish()
}

#[test]
fn a_flood_of_input_harms_nobody() -> Result<()> {
    let Some(lab) = Lab::new("a_flood_of_input_harms_nobody")? else {
        return Ok(());
    };
    // A guest that never reads: as many floods as the machine takes clients.
    lab.run("spin", SPIN, &[])?;
    for _ in 0..80 {
        // Those before take a moment to be noticed to have gone.
        let mut control = eventually("there is room for a client", || {
            let mut control = lab.connect("spin")?;
            control
                .request(&json!({"request": "console", "replay": false}))
                .ok();
            let reply = control.reply()?;
            let served = reply.is_some_and(|reply| reply["reply"] == "console");
            Ok(served.then_some(control))
        })?;
        let stream = control.0.get_mut();
        stream.set_nonblocking(true)?;
        let flood = vec![b'x'; 1 << 20];
        // Takes what fits; the rest has to wait for a guest that never reads.
        let _ = stream.write(&flood)?;
        drop(control);
    }
    eventually("it answers", || Ok(lab.pid("spin").ok()))?;
    lab.stop("spin")?;

    // A guest that reads gets all of it, whatever it thinks of it.
    lab.run("web", TABLE, &[])?;
    let mut flood = vec![b'p'; 3000];
    flood.extend(b"x");
    lab.type_in("web", &flood)?;
    lab.wait_for_text("web", "got 78\n")?;
    ensure!(lab.console("web")?.matches("pong\n").count() >= 2900);
    lab.finish()
}

#[test]
fn several_readers_see_the_same() -> Result<()> {
    let Some(lab) = Lab::new("several_readers_see_the_same")? else {
        return Ok(());
    };
    lab.run("web", TABLE, &[])?;
    let mut readers = Vec::new();
    for _ in 0..5 {
        let mut command = lab.cli.command(&["console", "web"])?;
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        readers.push(command.spawn()?);
    }
    lab.wait_for_steps("web", 3)?;
    lab.type_in("web", b"q")?;
    // A reader whose input ends leaves, and this is about the machine's end.
    let inputs: Vec<_> = readers.iter_mut().map(|it| it.stdin.take()).collect();
    let mut outputs = Vec::new();
    for reader in readers {
        let output = reader.wait_with_output()?;
        ensure!(output.status.code() == Some(0), "{output:?}");
        outputs.push(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    drop(inputs);
    ensure!(outputs[0].starts_with("table guest 1"), "{}", outputs[0]);
    ensure!(
        outputs.windows(2).all(|pair| pair[0] == pair[1]),
        "{outputs:?}"
    );
    lab.finish()
}

/// The answer to what was piped in comes before that, also from a guest that goes on.
#[test]
fn a_visitor_leaves_at_the_end_of_its_input() -> Result<()> {
    let Some(lab) = Lab::new("a_visitor_leaves_at_the_end_of_its_input")? else {
        return Ok(());
    };
    lab.run("silent", SPIN, &[])?;
    lab.run("talks", TABLE, &[])?;
    let visit = |name: &str, typed: &str| -> Result<String> {
        let mut visitor = lab.cli.command(&["console", name])?;
        let mut visitor = visitor
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let mut input = visitor.stdin.take().context("no input")?;
        input.write_all(typed.as_bytes())?;
        drop(input);
        let output = visitor.wait_with_output()?;
        ensure!(output.status.success(), "{output:?}");
        let left = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(left.contains(&format!("Left {name} running")), "{left}");
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    for (name, typed, says) in [("silent", "", "spinning"), ("talks", "p", "pong")] {
        // On a busy host the guest may answer only after its visitor has left: the next
        // one is shown that.
        eventually(says, || {
            Ok(visit(name, typed)?.contains(says).then_some(()))
        })?;
    }
    let running = lab.cli.ok(&["ps", "-q"])?;
    ensure!(running.lines().count() == 2, "{running}");
    lab.cli.ok(&["stop", "--all"])?;
    lab.finish()
}
