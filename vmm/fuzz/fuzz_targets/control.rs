//! The control socket, both ends, from arbitrary bytes: never a panic, never without end.

#![no_main]

use std::io::Write as _;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use libfuzzer_sys::fuzz_target;
use snapstore_vmm::control::{Client, Request, read_requests};

/// An end of a connection over which these bytes have come, and nothing more.
fn sent(bytes: &[u8]) -> (UnixStream, UnixStream) {
    let (ours, mut theirs) = UnixStream::pair().expect("two sockets");
    theirs.set_nonblocking(true).expect("a socket");
    let _ = theirs.write_all(bytes);
    theirs.shutdown(Shutdown::Write).expect("a socket");
    (ours, theirs)
}

fuzz_target!(|bytes: &[u8]| {
    // Either is fine.
    let (ours, _theirs) = sent(bytes);
    let _ = read_requests(ours);
    for request in [Request::Status, Request::Stop, Request::Pause] {
        let (ours, _theirs) = sent(bytes);
        let _ = Client::over(ours).request(&request);
    }
});
