//! Sockets that are no monitor's, or one's that hangs: each ends in an error, in time, and
//! without a snapshot.

use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use serde_json::{Value, json};

use crate::Fixture;

/// Serves one client after the other with this, for as long as the test runs.
fn serve(path: &Path, serve: impl Fn(UnixStream) + Send + 'static) -> anyhow::Result<()> {
    let listener = UnixListener::bind(path)?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            serve(stream);
        }
    });
    Ok(())
}

const GREETING: &[u8] =
    b"{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 0, \"minor\": 0, \"major\": 9}}}}\n";

#[test]
fn what_is_no_monitor_is_told_so() -> anyhow::Result<()> {
    let Some(fixture) = Fixture::new("what_is_no_monitor_is_told_so")? else {
        return Ok(());
    };
    let socket = fixture.text("s");
    let commit = ["commit", "x", "--qmp", &socket];
    let said = fixture.cli.fails(3, &commit)?;
    assert!(said.contains("there is no socket"), "{said}");
    std::fs::write(&socket, "a file")?;
    let said = fixture.cli.fails(3, &commit)?;
    assert!(said.contains("nobody listens"), "{said}");
    std::fs::remove_file(&socket)?;
    drop(UnixListener::bind(&socket)?);
    let said = fixture.cli.fails(3, &commit)?;
    assert!(said.contains("nobody listens"), "{said}");
    type Answer = fn(UnixStream);
    let garbage: [(&str, Answer, &str); 5] = [
        ("closes", drop, "closed the connection"),
        (
            "http",
            |mut s| drop(s.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")),
            "no QMP socket",
        ),
        (
            "endless",
            |mut s| while s.write_all(&[b'a'; 65536]).is_ok() {},
            "a line of more than",
        ),
        (
            "bytes",
            |mut s| drop(s.write_all(&[0xff, 0xfe, b'\n'])),
            "no QMP socket",
        ),
        (
            "refuses",
            |mut s| {
                let _ = s.write_all(GREETING);
                let mut line = [0; 1000];
                let len = s.read(&mut line).unwrap_or(0);
                let asked: Value = serde_json::from_slice(&line[..len]).unwrap_or_default();
                // What a client that is gone had asked is answered to the next one.
                let others = [json!({"return": {}}), json!({"return": {}, "id": "1-1"})];
                let ours = json!({"error": {"desc": "no"}, "id": asked["id"]});
                for answer in others.iter().chain([&ours]) {
                    let _ = s.write_all(format!("{answer}\n").as_bytes());
                }
            },
            "QEMU refuses qmp_capabilities: no",
        ),
    ];
    for (name, answer, expected) in garbage {
        let socket = fixture.path(name);
        serve(&socket, answer)?;
        let socket = socket.display().to_string();
        let said = fixture.cli.fails(1, &["commit", "x", "--qmp", &socket])?;
        assert!(said.contains(expected), "{name}: {said}");
    }
    fixture.cli.fails(3, &["show", "x"])?;
    Ok(())
}

#[test]
fn a_monitor_that_never_answers_is_given_up() -> anyhow::Result<()> {
    let Some(fixture) = Fixture::new("a_monitor_that_never_answers_is_given_up")? else {
        return Ok(());
    };
    type Answer = fn(UnixStream);
    let wedged: [(&str, Answer); 2] = [
        ("silent", |mut s| drop(s.read_to_end(&mut Vec::new()))),
        ("greets", |mut s| {
            let _ = s.write_all(GREETING);
            let _ = s.read_to_end(&mut Vec::new());
        }),
    ];
    for (name, answer) in wedged {
        let socket = fixture.path(name);
        serve(&socket, answer)?;
        let socket = socket.display().to_string();
        let said = fixture.cli.fails(5, &["commit", "x", "--qmp", &socket])?;
        assert!(said.contains("does not answer"), "{name}: {said}");
    }
    // One whose queue is full, and who takes nobody.
    let socket = fixture.path("full");
    let _listener = UnixListener::bind(&socket)?;
    rustix::net::listen(&_listener, 0)?;
    let _first = UnixStream::connect(&socket)?;
    let socket = socket.display().to_string();
    let said = fixture.cli.fails(5, &["commit", "x", "--qmp", &socket])?;
    assert!(said.contains("takes no more clients"), "{said}");
    Ok(())
}
