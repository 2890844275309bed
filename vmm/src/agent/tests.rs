//! The client against an agent of this process, behind a socket that greets as the
//! device does.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixListener;

use snapstore_agent_protocol::read_line;

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
            let line = snapstore_agent_protocol::read_line(&mut stream).unwrap();
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
fn what_a_guest_says_is_one_line_that_does_nothing_to_a_terminal() {
    let directory = tempfile::tempdir().unwrap();
    let said = "no\nended in order: powered off\r\u{1b}[2J\u{9b}1m\u{7f}";
    let (path, agent) = scripted(directory.path(), vec![refusal(said)]);
    let mut client = AgentClient::connect(&path, AGENT_PORT, PATIENCE).unwrap();
    let error = client.ping().unwrap_err().to_string();
    let told = "the guest's agent: no ended in order: powered off  [2J 1m ";
    assert_eq!(error, told);
    agent.join().unwrap();
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

/// A socket behind which an agent gives these answers, then ends the connection;
/// the thread returns what it was asked.
fn scripted(
    directory: &Path,
    answers: Vec<Reply>,
) -> (PathBuf, std::thread::JoinHandle<Vec<Request>>) {
    let path = directory.join("vsock.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let agent = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        read_line(&mut stream).unwrap();
        stream.write_all(b"OK 1073741824\n").unwrap();
        let mut requests = Vec::new();
        for answer in answers {
            let line = read_line(&mut stream).unwrap().unwrap();
            requests.push(serde_json::from_slice(&line).unwrap());
            let mut frame = Vec::new();
            let content = serde_json::to_vec(&answer).unwrap();
            put_frame(&mut frame, FrameKind::Reply, &content);
            stream.write_all(&frame).unwrap();
        }
        requests
    });
    (path, agent)
}

fn refusal(message: &str) -> Reply {
    Reply::Error {
        kind: ErrorKind::NotFound,
        message: message.to_owned(),
    }
}

fn setmac((from, to): &(MacAddress, MacAddress)) -> Request {
    Request::Setmac {
        from: from.to_string(),
        to: to.to_string(),
    }
}

fn three_pairs() -> [(MacAddress, MacAddress); 3] {
    let mac = |last| MacAddress::new([2, 0, 0, 0, 0, last]).unwrap();
    [(mac(1), mac(11)), (mac(2), mac(12)), (mac(3), mac(13))]
}

#[test]
fn a_refusal_keeps_a_restored_guest_from_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let answers = vec![
        Reply::Done,
        Reply::Done,
        refusal("first"),
        refusal("second"),
        Reply::Done,
    ];
    let (path, agent) = scripted(directory.path(), answers);
    let mut client = AgentClient::connect(&path, AGENT_PORT, PATIENCE).unwrap();
    let pairs = three_pairs();
    let error = client.after_restore(&pairs).unwrap_err();
    assert!(
        matches!(&error, AgentError::Refused { message, .. } if message == "first"),
        "{error}"
    );
    let requests = agent.join().unwrap();
    assert!(matches!(requests[0], Request::Reseed { .. }));
    assert!(matches!(requests[1], Request::Settime { .. }));
    assert!(requests[2..].iter().eq(&pairs.each_ref().map(setmac)));
}

#[test]
fn an_agent_that_refuses_and_leaves_has_refused() {
    let directory = tempfile::tempdir().unwrap();
    let answers = vec![Reply::Done, Reply::Done, refusal("not a request")];
    let (path, agent) = scripted(directory.path(), answers);
    let mut client = AgentClient::connect(&path, AGENT_PORT, PATIENCE).unwrap();
    let error = client.after_restore(&three_pairs()).unwrap_err();
    assert!(matches!(error, AgentError::Refused { .. }), "{error}");
    assert_eq!(agent.join().unwrap().len(), 3);
}

#[test]
fn a_connection_that_breaks_ends_the_rest() {
    let directory = tempfile::tempdir().unwrap();
    let (path, agent) = scripted(directory.path(), vec![Reply::Done, Reply::Done]);
    let mut client = AgentClient::connect(&path, AGENT_PORT, PATIENCE).unwrap();
    let error = client.after_restore(&three_pairs()).unwrap_err();
    assert!(matches!(error, AgentError::Connection(_)), "{error}");
    agent.join().unwrap();
}

#[test]
fn a_clock_that_was_set_late_is_set_again() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let agent = std::thread::spawn(move || {
        let mut told = Vec::new();
        while let Ok(Some(line)) = read_line(&mut theirs) {
            told.push(serde_json::from_slice::<Request>(&line).unwrap());
            if told.len() < 3 {
                std::thread::sleep(Duration::from_millis(300));
            }
            let mut frame = Vec::new();
            let content = serde_json::to_vec(&Reply::Done).unwrap();
            put_frame(&mut frame, FrameKind::Reply, &content);
            theirs.write_all(&frame).unwrap();
        }
        told
    });
    let mut client = AgentClient::over(ours);
    client.set_time_now().unwrap();
    drop(client);
    let times: Vec<u64> = agent
        .join()
        .unwrap()
        .into_iter()
        .map(|request| match request {
            Request::Settime { unix_nanoseconds } => unix_nanoseconds,
            other => panic!("{other:?}"),
        })
        .collect();
    // A busy host may be slow once more.
    assert!(times.len() >= 3, "{times:?}");
    assert!(
        times
            .windows(2)
            .all(|pair| pair[1] >= pair[0] + 200_000_000),
        "{times:?}"
    );
}

/// A client of an agent that does what it likes with the connection.
fn odd(act: impl FnOnce(UnixStream) + Send + 'static) -> AgentClient {
    let (ours, theirs) = UnixStream::pair().unwrap();
    std::thread::spawn(move || act(theirs));
    AgentClient::over(ours).with_patience(Duration::from_millis(100))
}

#[test]
fn an_agent_that_never_answers_is_given_up() {
    // It says nothing; it says a little again and again; it takes nothing.
    let mut silent = odd(|stream| {
        std::thread::park();
        drop(stream);
    });
    assert!(matches!(silent.ping(), Err(AgentError::Late(0))));
    let mut slow = odd(|mut stream| {
        while stream.write_all(&[3]).is_ok() {
            std::thread::sleep(Duration::from_millis(30));
            if stream.write_all(&[0]).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_secs(1));
        }
    });
    assert!(matches!(slow.ping(), Err(AgentError::Late(_))));
    let mut deaf = odd(|stream| {
        std::thread::park();
        drop(stream);
    });
    let long = "x".repeat(4 << 20);
    let done = deaf.identify(Some(&long), None);
    assert!(matches!(done, Err(AgentError::Late(_))));
}

#[test]
fn a_command_whose_time_is_over_is_not_waited_for_much_longer() {
    let mut exec = shell("true");
    exec.timeout_seconds = Some(0);
    let began = Instant::now();
    // It writes without end, and never says that the command has ended.
    let client = odd(|mut stream| {
        let mut frame = Vec::new();
        put_frame(&mut frame, FrameKind::Stdout, &[b'x'; 100]);
        while stream.write_all(&frame).is_ok() {
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    let done = client.exec(&exec, None, &mut |_, _| Ok(()));
    assert!(matches!(done, Err(AgentError::Late(10))), "{done:?}");
    assert!(began.elapsed() >= EXEC_GRACE);
}
