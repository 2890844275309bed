//! Answers of a guest's agent from arbitrary bytes: never a panic, never without end, and
//! no more output than was sent.
//!
//! The first byte chooses what was asked; the rest is what comes back.

#![no_main]

use std::io::Write as _;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use snapstore_vmm::agent::{AgentClient, Exec};

fuzz_target!(|bytes: &[u8]| {
    let Some((which, answer)) = bytes.split_first() else {
        return;
    };
    let (ours, mut theirs) = UnixStream::pair().expect("two sockets");
    theirs.set_nonblocking(true).expect("a socket");
    // A socket takes some hundred KiB; more is cut off.
    let _ = theirs.write_all(answer);
    theirs.shutdown(Shutdown::Write).expect("a socket");
    let mut client = AgentClient::over(ours).with_patience(Duration::from_secs(1));
    if which % 2 == 0 {
        // Either is fine.
        let _ = client.ping();
        let _ = client.after_restore(&[]);
        return;
    }
    let exec = Exec {
        command: vec!["true".to_owned()],
        ..Exec::default()
    };
    let mut got = 0;
    let _ = client.exec(&exec, None, &mut |_, output| {
        got += output.len();
        Ok(())
    });
    assert!(got <= answer.len(), "output out of nothing");
});
