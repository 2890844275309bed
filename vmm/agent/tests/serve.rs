//! One connection to the agent, over a pair of UNIX sockets.

#![allow(clippy::unwrap_used, reason = "a failed test is the message")]

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use snapstore_agent_protocol::{
    ErrorKind, Exec, Exit, FRAME_HEADER_BYTES, FrameKind, MAX_FRAME_BYTES, Reply, Request,
    parse_frame_header, put_frame,
};

struct Client(UnixStream);

impl Client {
    fn new() -> Self {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        std::thread::spawn(move || snapstore_agent::serve(&mut theirs));
        Self(ours)
    }

    fn line(&mut self, line: &[u8]) {
        self.0.write_all(line).unwrap();
        self.0.write_all(b"\n").unwrap();
    }

    fn request(&mut self, request: &Request) {
        self.line(&serde_json::to_vec(request).unwrap());
    }

    fn exec(exec: Exec) -> Self {
        let mut client = Self::new();
        client.request(&Request::Exec(exec));
        client
    }

    fn frame(&mut self) -> (FrameKind, Vec<u8>) {
        let mut header = [0; FRAME_HEADER_BYTES];
        self.0.read_exact(&mut header).unwrap();
        let (kind, length) = parse_frame_header(header).unwrap();
        let mut content = vec![0; length];
        self.0.read_exact(&mut content).unwrap();
        (kind, content)
    }

    fn reply(&mut self) -> Reply {
        let (kind, content) = self.frame();
        assert_eq!(kind, FrameKind::Reply);
        serde_json::from_slice(&content).unwrap()
    }

    /// What a command wrote to standard output and error, and how it ended.
    fn all(&mut self) -> (Vec<u8>, Vec<u8>, Exit) {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            match self.frame() {
                (FrameKind::Stdout, content) => stdout.extend(content),
                (FrameKind::Stderr, content) => stderr.extend(content),
                (FrameKind::Stdin, _) => panic!("input from the agent"),
                (FrameKind::Reply, content) => match serde_json::from_slice(&content).unwrap() {
                    Reply::Exit(exit) => return (stdout, stderr, exit),
                    other => panic!("{other:?}"),
                },
            }
        }
    }

    fn input(&mut self, content: &[u8]) -> std::io::Result<()> {
        let mut frame = Vec::new();
        put_frame(&mut frame, FrameKind::Stdin, content);
        self.0.write_all(&frame)
    }
}

fn shell(script: &str) -> Exec {
    Exec {
        command: ["sh", "-c", script].map(str::to_owned).into(),
        ..Exec::default()
    }
}

fn code(code: i32) -> Exit {
    Exit {
        code: Some(code),
        ..Exit::default()
    }
}

#[test]
fn requests_follow_each_other() {
    let mut client = Client::new();
    for _ in 0..3 {
        client.request(&Request::Ping);
        assert_eq!(client.reply(), Reply::Pong { protocol: 1 });
    }
    client.request(&Request::Exec(shell("echo out; echo err >&2; exit 3")));
    let (stdout, stderr, exit) = client.all();
    assert_eq!((&stdout[..], &stderr[..]), (&b"out\n"[..], &b"err\n"[..]));
    assert_eq!(exit, code(3));
    assert_eq!(client.0.read(&mut [0]).unwrap(), 0);
}

#[test]
fn environment_and_directory_are_as_asked() {
    let mut exec = shell("echo $GREETING; pwd; cat");
    exec.env.insert("GREETING".to_owned(), "hello".to_owned());
    exec.directory = Some("/usr".to_owned());
    let (stdout, _, exit) = Client::exec(exec).all();
    assert_eq!((&stdout[..], exit), (&b"hello\n/usr\n"[..], code(0)));
}

#[test]
fn input_streams_through_a_command() {
    let mut exec = shell("cat");
    exec.stdin = true;
    let mut client = Client::exec(exec);
    let mut writer = Client(client.0.try_clone().unwrap());
    let sent: Vec<u8> = (0..3_000_000_u32).map(|at| (at % 251) as u8).collect();
    let copy = sent.clone();
    let writing = std::thread::spawn(move || {
        for piece in copy.chunks(MAX_FRAME_BYTES) {
            writer.input(piece).unwrap();
        }
        writer.input(b"").unwrap();
    });
    let (stdout, _, exit) = client.all();
    writing.join().unwrap();
    assert!(stdout == sent);
    assert_eq!(exit, code(0));
}

#[test]
fn small_frames_of_input_all_arrive() {
    let mut exec = shell("sleep 0.2; cat");
    exec.stdin = true;
    let mut client = Client::exec(exec);
    for _ in 0..1000 {
        client.input(&[b'x'; 100]).unwrap();
    }
    client.input(b"").unwrap();
    assert_eq!(client.all().0.len(), 100_000);
}

#[test]
fn input_that_nobody_reads_is_dropped() {
    let mut exec = shell("exec <&-; sleep 0.2; echo done");
    exec.stdin = true;
    let mut client = Client::exec(exec);
    // The agent may have gone before all was written.
    let written = (0..20).all(|_| client.input(&[0; MAX_FRAME_BYTES]).is_ok());
    assert!(written);
    assert_eq!(client.all().0, b"done\n");
}

#[test]
fn a_signal_and_the_time_limit_are_told() {
    let (_, _, exit) = Client::exec(shell("kill -TERM $$")).all();
    assert_eq!(
        (exit.code, exit.signal, exit.timed_out),
        (None, Some(15), false)
    );
    let mut exec = shell("echo before; sleep 100 & sleep 100");
    exec.timeout_seconds = Some(1);
    let began = Instant::now();
    let (stdout, _, exit) = Client::exec(exec).all();
    assert_eq!(stdout, b"before\n");
    assert_eq!(
        (exit.code, exit.signal, exit.timed_out),
        (None, Some(9), true)
    );
    assert!(began.elapsed() < Duration::from_secs(10));
}

#[test]
fn what_stays_in_the_background_does_not_hold_up_the_end() {
    let began = Instant::now();
    let (stdout, _, exit) = Client::exec(shell("sleep 30 & echo started")).all();
    assert_eq!((&stdout[..], exit), (&b"started\n"[..], code(0)));
    assert!(began.elapsed() < Duration::from_secs(10));
}

#[test]
fn commands_end_with_their_connection() {
    let directory = std::env::temp_dir().join(format!("agent-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let marker = directory.join("marker");
    let script = format!("echo up; sleep 1; touch {}", marker.display());
    let mut client = Client::exec(shell(&script));
    assert_eq!(client.frame().1, b"up\n");
    client.0.shutdown(Shutdown::Both).unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    assert!(!marker.exists());
    std::fs::remove_dir_all(&directory).unwrap();
}

#[test]
fn output_waits_for_a_slow_reader() {
    let mut client = Client::exec(shell("head -c 5000000 /dev/zero"));
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(client.all().0.len(), 5_000_000);
}

#[test]
fn nonsense_is_refused() {
    let lines: [&[u8]; 7] = [
        b"",
        b"{}",
        b"\xff",
        b"\"explode\"",
        b"{\"exec\":{}}",
        b"{\"exec\":{\"command\":[\"true\"],\"user\":\"x\"}}",
        b"{\"settime\":{\"unix_nanoseconds\":-1}}",
    ];
    for line in lines {
        let mut client = Client::new();
        client.line(line);
        let reply = client.reply();
        assert!(
            matches!(
                reply,
                Reply::Error {
                    kind: ErrorKind::Invalid,
                    ..
                }
            ),
            "{reply:?}"
        );
    }
    let mut client = Client::exec(Exec::default());
    assert!(matches!(
        client.reply(),
        Reply::Error {
            kind: ErrorKind::Invalid,
            ..
        }
    ));
    let mut exec = shell("");
    exec.command[0] = "/no/such/program".to_owned();
    let reply = Client::exec(exec).reply();
    assert!(matches!(
        reply,
        Reply::Error {
            kind: ErrorKind::NotFound,
            ..
        }
    ));
}

#[test]
fn a_frame_that_was_not_announced_ends_the_command() {
    let mut client = Client::exec(shell("sleep 30"));
    client.input(b"x").unwrap();
    assert_eq!(client.0.read(&mut [0]).unwrap(), 0);
}
