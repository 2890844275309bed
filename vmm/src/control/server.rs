//! The machine's end of its control socket.

use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::confine::{self, Role};
use crate::control::error_kind::ErrorKind;
use crate::control::protocol::Reply;
use crate::control::session::Session;
use crate::control::vm::Vm;
use crate::control::wire::Connection;
use crate::rate::Rate;

/// The most clients at a time; further ones are turned away.
const MAX_CLIENTS: usize = 64;
/// How long accepting waits when there is no descriptor or no memory for a client.
const EXHAUSTED: Duration = Duration::from_millis(50);

impl Vm {
    /// Begins to serve clients.
    ///
    /// # Errors
    /// The socket's thread cannot be started.
    pub fn listen(self: &Arc<Self>, listener: UnixListener) -> io::Result<()> {
        let vm = self.clone();
        std::thread::Builder::new()
            .name("control".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || vm.accept(&listener))?;
        Ok(())
    }

    fn accept(self: &Arc<Self>, listener: &UnixListener) {
        confine::enter(Role::Control);
        // Given up for a moment to turn a client away when there is no other descriptor.
        let mut spare = listener.as_fd().try_clone_to_owned().ok();
        for stream in listener.incoming() {
            let stream = match stream {
                Ok(stream) => stream,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::debug!(%error, "no client can be accepted");
                    if spare.take().is_some()
                        && let Ok((stream, _)) = listener.accept()
                    {
                        turn_away(stream, "no descriptors are left to the machine");
                    }
                    spare = listener.as_fd().try_clone_to_owned().ok();
                    // Until a client leaves, accepting fails at once.
                    std::thread::sleep(EXHAUSTED);
                    continue;
                }
            };
            if self.clients.fetch_add(1, Ordering::AcqRel) >= MAX_CLIENTS {
                self.clients.fetch_sub(1, Ordering::AcqRel);
                turn_away(
                    stream,
                    &format!("the machine has {MAX_CLIENTS} clients already"),
                );
                continue;
            }
            let vm = self.clone();
            let started = std::thread::Builder::new()
                .name("client".to_owned())
                .stack_size(STACK_BYTES)
                .spawn(move || {
                    Session::new(&vm, stream).serve();
                    vm.clients.fetch_sub(1, Ordering::AcqRel);
                });
            if let Err(error) = started {
                static RATE: Rate = Rate::new();
                RATE.log(|more| tracing::warn!(%error, more, "a client was turned away"));
                self.clients.fetch_sub(1, Ordering::AcqRel);
            }
        }
    }
}

/// Says why to a client that is one too many.
fn turn_away(stream: UnixStream, why: &str) {
    let reply = Reply::Error {
        kind: ErrorKind::Busy,
        message: format!("{why}; try again later"),
    };
    // A client that has gone needs no answer, and none is waited for.
    let mut connection = Connection::new(stream);
    let _ = connection.set_patience(Some(EXHAUSTED));
    let _ = connection.send(&reply, &[]);
}

/// Requests are small and handled with few calls; a hundred machines have a
/// hundred of these.
const STACK_BYTES: usize = 256 << 10;
