//! The client against an agent of this process, behind a socket that greets as the
//! device does.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixListener;

use super::*;

const PATIENCE: Duration = Duration::from_secs(10);

/// A socket behind which an agent listens on port 1024; each number of `refused`
/// is a connection that is not accepted.
fn agent(directory: &Path, refused: usize) -> PathBuf {
    let path = directory.join("vsock.sock");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        for (number, stream) in listener.incoming().enumerate() {
            let mut stream = stream.unwrap();
            let line = snapstore_agent::protocol::read_line(&mut stream).unwrap();
            if number >= refused && line.as_deref() == Some(b"CONNECT 1024") {
                stream.write_all(b"OK 1073741824\n").unwrap();
                std::thread::spawn(move || snapstore_agent::serve(&mut stream));
            }
        }
    });
    path
}

fn shell(script: &str) -> Exec {
    Exec {
        command: ["sh", "-c", script].map(str::to_owned).into(),
        ..Exec::default()
    }
}

#[test]
fn a_command_gets_input_and_gives_output() {
    let directory = tempfile::tempdir().unwrap();
    let path = agent(directory.path(), 3);
    let input = directory.path().join("input");
    let sent: Vec<u8> = (0..500_000_u32).map(|at| (at % 253) as u8).collect();
    std::fs::write(&input, &sent).unwrap();
    let input = File::open(&input).unwrap();
    let mut client = AgentClient::connect(&path, AGENT_PORT, PATIENCE).unwrap();
    client.ping().unwrap();
    let (mut stdout, mut stderr) = (Vec::<u8>::new(), Vec::<u8>::new());
    let exit = client
        .exec(
            &shell("cat; echo bad >&2; exit 7"),
            Some(input.as_fd()),
            &mut |stream, bytes| {
                match stream {
                    Stream::Stdout => stdout.extend(bytes),
                    Stream::Stderr => stderr.extend(bytes),
                }
                Ok(())
            },
        )
        .unwrap();
    assert!(stdout == sent);
    assert_eq!((&stderr[..], exit.code), (&b"bad\n"[..], Some(7)));
}

#[test]
fn refusals_and_absence_are_errors() {
    let directory = tempfile::tempdir().unwrap();
    let path = agent(directory.path(), 0);
    let mut client = AgentClient::connect(&path, AGENT_PORT, PATIENCE).unwrap();
    let error = client.reseed(&[]).unwrap_err();
    assert!(
        matches!(
            error,
            AgentError::Refused {
                kind: ErrorKind::Invalid,
                ..
            }
        ),
        "{error}"
    );
    let error = client.identify(None, Some("x")).unwrap_err();
    assert!(matches!(error, AgentError::Refused { .. }), "{error}");
    let nothing = Exec {
        command: vec!["/no/such/program".to_owned()],
        ..Exec::default()
    };
    let error = client.exec(&nothing, None, &mut |_, _| Ok(())).unwrap_err();
    assert!(
        matches!(
            error,
            AgentError::Refused {
                kind: ErrorKind::NotFound,
                ..
            }
        ),
        "{error}"
    );
    let patience = Duration::from_millis(100);
    for (path, port) in [(&path, 1025), (&directory.path().join("none"), AGENT_PORT)] {
        let error = AgentClient::connect(path, port, patience).err().unwrap();
        assert!(matches!(error, AgentError::NoAgent { .. }), "{error}");
    }
}

#[test]
fn a_broken_output_ends_the_command() {
    let directory = tempfile::tempdir().unwrap();
    let path = agent(directory.path(), 0);
    let client = AgentClient::connect(&path, AGENT_PORT, PATIENCE).unwrap();
    let error = client
        .exec(&shell("while :; do echo y; done"), None, &mut |_, _| {
            Err(io::ErrorKind::BrokenPipe.into())
        })
        .unwrap_err();
    assert!(matches!(error, AgentError::Local(_)), "{error}");
}
