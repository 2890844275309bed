//! A client at the serial line.

use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::control::protocol::Reply;
use crate::control::session::Session;
use crate::devices::Console;

/// A console's reader that takes nothing for so long is dropped.
const CONSOLE_PATIENCE: Duration = Duration::from_secs(30);
/// How often a console looks whether there is room for input.
const INPUT_RETRY: Duration = Duration::from_millis(5);
/// How long a console waits for output before it looks whether it is still used.
const OUTPUT_WAIT: Duration = Duration::from_secs(1);

impl Session<'_> {
    pub(super) fn console(&mut self, replay: bool) {
        let Some(mut connection) = self.connection.take() else {
            return;
        };
        let from = if replay { 0 } else { self.vm.console.written() };
        if connection.send(&Reply::Console, &[]).is_err() {
            return;
        }
        let (stream, early) = connection.into_stream();
        let gone = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                print_to(&self.vm.console, &stream, from, &gone);
                // Ends the reading half below.
                let _ = stream.shutdown(Shutdown::Both);
            });
            self.type_from(&stream, &early);
            gone.store(true, Ordering::Release);
        });
    }

    /// Gives the guest what the client types, at the guest's pace.
    fn type_from(&self, mut stream: &UnixStream, early: &[u8]) {
        if !self.type_all(early, stream) {
            return;
        }
        let mut bytes = [0; 4096];
        loop {
            match stream.read(&mut bytes) {
                Ok(0) => return,
                Ok(got) if self.type_all(&bytes[..got], stream) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => return,
            }
        }
    }

    /// Whether the machine took all of it before it ended. What a client leaves
    /// that a guest does not read is dropped.
    fn type_all(&self, mut input: &[u8], client: &UnixStream) -> bool {
        while !input.is_empty() {
            let taken = self.vm.machine.serial_input(input);
            input = &input[taken..];
            if taken == 0 {
                if self.vm.machine.ending().is_some() || has_hung_up(client) {
                    return false;
                }
                std::thread::sleep(INPUT_RETRY);
            }
        }
        true
    }
}

/// Whether nobody is at the other end any more.
fn has_hung_up(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream, PollFlags::empty())];
    let at_once = Timespec::default();
    poll(&mut fds, Some(&at_once)).is_ok_and(|ready| ready > 0)
}

/// Sends the guest's output until the machine or the client ends.
fn print_to(console: &Console, mut stream: &UnixStream, mut from: u64, gone: &AtomicBool) {
    if stream.set_write_timeout(Some(CONSOLE_PATIENCE)).is_err() {
        return;
    }
    while let Some(output) = console.read(from, OUTPUT_WAIT) {
        if gone.load(Ordering::Acquire) {
            return;
        }
        if output.missed > 0 {
            let note = format!("\r\n[{} bytes of output were lost]\r\n", output.missed);
            if from > 0 && stream.write_all(note.as_bytes()).is_err() {
                return;
            }
        }
        from = output.next;
        if stream.write_all(&output.bytes).is_err() {
            return;
        }
    }
}
