//! A machine's socket, spoken to by clients that do not know how.

use std::io::Write as _;
use std::net::Shutdown;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use snapstore_guests::TABLE;
use snapstore_tests::vm::{Lab, eventually};

/// A lab with a running `table` guest named `web`.
fn with_machine(test: &str) -> Result<Option<Lab>> {
    let Some(lab) = Lab::with_mounts(test)? else {
        return Ok(None);
    };
    lab.run("web", TABLE, &[])?;
    lab.wait_for_steps("web", 1)?;
    Ok(Some(lab))
}

/// It prints on, can be committed, and what was committed goes on.
fn is_well(lab: &Lab) -> Result<()> {
    let now = lab.steps("web")?.last().copied().unwrap_or(0);
    lab.wait_beyond("web", now + 1)?;
    ensure!(lab.ps("web")?["state"] == "running");
    lab.commit("well", "web")?;
    lab.wait_until_thawed()?;
    lab.restore("well", &[])?;
    lab.assert_goes_on("well", "well")?;
    lab.finish()
}

#[test]
fn junk_is_refused() -> Result<()> {
    let Some(lab) = with_machine("junk_is_refused")? else {
        return Ok(());
    };
    let deep = format!("{}\n", "[".repeat(60_000));
    let long = format!("{{\"request\":\"{}\"}}\n", "a".repeat(60_000));
    let lines: [&[u8]; 14] = [
        b"\n",
        b"{\n",
        b"{}\n",
        b"null\n",
        b"[]\n",
        b"\"status\"\n",
        b"{\"request\":\"explode\"}\n",
        b"{\"request\":\"console\"}\n",
        b"{\"request\":\"console\",\"replay\":\"yes\"}\n",
        b"{\"request\":\"committed\"}\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff\xfe\x00\x01\n",
        deep.as_bytes(),
        long.as_bytes(),
    ];
    for line in lines {
        let mut control = lab.connect("web")?;
        control.send(line)?;
        let shown = String::from_utf8_lossy(&line[..line.len().min(80)]).into_owned();
        let reply = control
            .reply()?
            .with_context(|| format!("no reply to {shown:?}"))?;
        ensure!(
            reply["reply"] == "error" && reply["kind"] == "invalid",
            "{shown:?}: {reply}"
        );
    }
    is_well(&lab)
}

#[test]
fn lines_without_an_end_are_refused() -> Result<()> {
    let Some(lab) = with_machine("lines_without_an_end_are_refused")? else {
        return Ok(());
    };
    let mut control = lab.connect("web")?;
    let flood = vec![b' '; 1 << 20];
    // The machine hangs up in the middle of it.
    ensure!(control.send(&flood).is_err());
    let mut control = lab.connect("web")?;
    control.send(&vec![b'a'; 64 << 10])?;
    let reply = control.reply()?.context("no reply")?;
    ensure!(reply["kind"] == "invalid", "{reply}");

    // Half a line, and then nothing more, or the end.
    let mut waiting = lab.connect("web")?;
    waiting.send(b"{\"request\":")?;
    for _ in 0..5 {
        let mut half = lab.connect("web")?;
        half.send(b"{\"request\":\"stop\"")?;
    }
    let mut half = lab.connect("web")?;
    half.send(b"{\"request\":\"stop\"}")?;
    half.0.get_mut().shutdown(Shutdown::Write)?;
    ensure!(half.reply()?.is_none(), "half a line was obeyed");
    waiting.send(b"\"status\"}\n")?;
    let reply = waiting.reply()?.context("no reply")?;
    ensure!(reply["reply"] == "status", "{reply}");
    is_well(&lab)
}

#[test]
fn requests_in_one_write_are_answered_in_order() -> Result<()> {
    let Some(lab) = with_machine("requests_in_one_write_are_answered_in_order")? else {
        return Ok(());
    };
    let mut control = lab.connect("web")?;
    let lines = [
        json!({"request": "pause"}),
        json!({"request": "status"}),
        json!({"request": "resume"}),
        json!({"request": "status"}),
    ];
    let all: String = lines.iter().map(|line| format!("{line}\n")).collect();
    control.send(all.as_bytes())?;
    for wanted in ["done", "paused", "done", "running"] {
        let reply = control.reply()?.context("no reply")?;
        let got = if reply["reply"] == "status" {
            &reply["state"]
        } else {
            &reply["reply"]
        };
        ensure!(got == wanted, "{reply}");
    }
    is_well(&lab)
}

#[test]
fn nothing_frozen_cannot_be_committed() -> Result<()> {
    let Some(lab) = with_machine("nothing_frozen_cannot_be_committed")? else {
        return Ok(());
    };
    let committed = json!({"request": "committed", "snapshot": "0".repeat(64), "tag": "t",
                           "timings": {}});
    let mut control = lab.connect("web")?;
    let reply = control.ask(&committed)?;
    ensure!(reply["kind"] == "invalid", "{reply}");
    // The connection goes on.
    ensure!(control.ask(&json!({"request": "status"}))?["reply"] == "status");
    // Frozen by another connection is not frozen by this one.
    let mut other = lab.connect("web")?;
    ensure!(other.ask(&json!({"request": "freeze"}))?["reply"] == "frozen");
    ensure!(control.ask(&committed)?["kind"] == "invalid");
    ensure!(control.ask(&json!({"request": "freeze"}))?["kind"] == "busy");
    let said = lab.cli.fails(5, &["commit", "busy", "--vm", "web"])?;
    ensure!(said.contains("committing this machine"), "{said}");
    ensure!(other.ask(&json!({"request": "freeze"}))?["kind"] == "invalid");
    let status = control.ask(&json!({"request": "status"}))?;
    ensure!(status["origin"]["snapshot"].is_null(), "{status}");
    drop(other);
    lab.wait_until_thawed()?;
    is_well(&lab)
}

#[test]
fn clients_that_leave_take_their_frozen_copies_along() -> Result<()> {
    let test = "clients_that_leave_take_their_frozen_copies_along";
    let Some(lab) = with_machine(test)? else {
        return Ok(());
    };
    for leave_early in [true, false] {
        for _ in 0..5 {
            let control = if leave_early {
                let mut control = lab.connect("web")?;
                control.request(&json!({"request": "freeze"}))?;
                control
            } else {
                // The one before may be on its way out.
                let (control, reply) = eventually("it is frozen", || {
                    let mut control = lab.connect("web")?;
                    let reply = control.ask(&json!({"request": "freeze"}))?;
                    Ok((reply["reply"] == "frozen").then_some((control, reply)))
                })?;
                // Once the machine knows what was written, it may copy that instead.
                let forked = usize::from(!reply["pid"].is_null());
                ensure!(lab.frozen()?.len() == forked, "{:?}", lab.processes()?);
                control
            };
            drop(control);
            eventually("it is thawed", || {
                let mut control = lab.connect("web")?;
                let reply = control.ask(&json!({"request": "freeze"}))?;
                Ok((reply["reply"] == "frozen").then_some(()))
            })?;
            lab.wait_until_thawed()?;
        }
    }
    is_well(&lab)
}

#[test]
fn more_clients_than_fit_do_no_harm() -> Result<()> {
    let Some(lab) = with_machine("more_clients_than_fit_do_no_harm")? else {
        return Ok(());
    };
    let mut idle: Vec<_> = (0..100)
        .map(|_| lab.connect("web"))
        .collect::<Result<_>>()?;
    // Some are served, and the rest are told.
    let mut served = 0;
    for control in &mut idle {
        let sent = control.request(&json!({"request": "status"}));
        match (sent, control.reply()?) {
            (Ok(()), Some(reply)) if reply["reply"] == "status" => served += 1,
            (_, Some(reply)) => ensure!(reply["kind"] == "busy", "{reply}"),
            (_, None) => {}
        }
    }
    // The machine takes 64; some of those before may still be on their way out.
    ensure!((32..=64).contains(&served), "{served} clients were served");
    // Room that earlier clients leave late is taken, too.
    eventually("there is no room", || {
        let mut control = lab.connect("web")?;
        if control
            .ask(&json!({"request": "status"}))
            .is_ok_and(|reply| reply["reply"] == "status")
        {
            served += 1;
            idle.push(control);
        }
        Ok((served == 64).then_some(()))
    })?;
    let said = lab.cli.fails(5, &["resume", "web"])?;
    ensure!(said.contains("clients"), "{said}");
    drop(idle);
    eventually("it answers again", || Ok(lab.pid("web").ok()))?;
    is_well(&lab)
}

#[test]
fn a_machine_with_too_many_clients_is_stopped_all_the_same() -> Result<()> {
    let Some(lab) = with_machine("a_machine_with_too_many_clients_is_stopped_all_the_same")? else {
        return Ok(());
    };
    let idle: Vec<_> = (0..100)
        .map(|_| lab.connect("web"))
        .collect::<Result<_>>()?;
    lab.cli.ok(&["stop", "web"])?;
    drop(idle);
    lab.finish()
}

#[test]
fn consoles_that_are_not_read_do_no_harm() -> Result<()> {
    let Some(lab) = with_machine("consoles_that_are_not_read_do_no_harm")? else {
        return Ok(());
    };
    let mut consoles = Vec::new();
    for _ in 0..20 {
        let mut control = lab.connect("web")?;
        control.request(&json!({"request": "console", "replay": true}))?;
        consoles.push(control);
    }
    // More than a socket holds.
    lab.type_in("web", &[b'p'; 4000])?;
    lab.type_in("web", b"x")?;
    lab.wait_for_text("web", "got 78\n")?;
    for mut console in consoles {
        let _ = console.0.get_mut().write(b"p");
    }
    let at = lab.steps("web")?.last().copied().unwrap_or(0);
    lab.wait_beyond("web", at)?;
    is_well(&lab)
}

/// A flat guest has no device by which an agent could answer: nobody waits for one.
#[test]
fn a_machine_without_a_vsock_device_is_not_waited_for() -> Result<()> {
    let Some(lab) = with_machine("a_machine_without_a_vsock_device_is_not_waited_for")? else {
        return Ok(());
    };
    let output = lab
        .cli
        .run(&["exec", "web", "--wait", "3600", "--", "true"])?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(1), "{output:?}");
    ensure!(said.contains("no vsock device"), "{said}");
    is_well(&lab)
}
