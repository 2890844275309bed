//! The machine's end of its control socket.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

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

/// What the thread that accepts clients heeds beside them: no other thread has to.
pub struct Heeded {
    /// There is something to read from it once the machine is to end, as by a signal.
    pub end: OwnedFd,
    /// A socket of whoever starts the machine: it runs at a byte from there, and ends if none
    /// can come.
    pub word: Option<OwnedFd>,
}

impl Vm {
    /// Begins to serve clients, and to heed who may end the machine or let it run.
    ///
    /// # Errors
    /// The socket's thread cannot be started.
    pub fn listen(self: &Arc<Self>, listener: UnixListener, heeded: Heeded) -> io::Result<()> {
        // A client that has gone again is not waited for.
        listener.set_nonblocking(true)?;
        let vm = self.clone();
        std::thread::Builder::new()
            .name("control".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || vm.serve(&listener, heeded))?;
        Ok(())
    }

    fn serve(self: &Arc<Self>, listener: &UnixListener, heeded: Heeded) {
        confine::enter(Role::Control);
        // Given up for a moment to turn a client away when there is no other descriptor.
        let mut spare = listener.as_fd().try_clone_to_owned().ok();
        let (mut end, mut word) = (Some(heeded.end), heeded.word);
        loop {
            let mut fds = [
                PollFd::new(listener, PollFlags::IN),
                watched(end.as_ref(), listener),
                watched(word.as_ref(), listener),
            ];
            match poll(&mut fds, None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => {
                    tracing::debug!(%error, "clients cannot be waited for");
                    std::thread::sleep(EXHAUSTED);
                    continue;
                }
            }
            let [is_client, is_end, is_word] = fds.map(|fd| !fd.revents().is_empty());
            if is_end {
                self.machine.stop();
                // It stays open: the next signal is told to it, too.
                std::mem::forget(end.take());
            }
            if is_word && word.as_ref().is_some_and(|word| self.has_heeded(word)) {
                word = None;
            }
            if is_client {
                self.accept(listener, &mut spare);
            }
        }
    }

    /// Lets the machine run if its starter says so, and ends it if they are gone. Returns
    /// whether there is nothing more to hear.
    fn has_heeded(self: &Arc<Self>, word: &OwnedFd) -> bool {
        // Words for other machines wait there, too: each takes one byte, and one that comes
        // late does not wait for the next.
        match recv(word, &mut [0], RecvFlags::DONTWAIT) {
            Err(Errno::AGAIN | Errno::INTR) => return false,
            Ok((got, _)) if got > 0 => self.resume(),
            Ok(_) | Err(_) => self.machine.stop(),
        }
        true
    }

    /// Lets the machine run. Its devices go on with what their queues hold, in memory that may not
    /// be there yet: a thread of its own waits for that, and clients and signals do not.
    fn resume(self: &Arc<Self>) {
        let vm = self.clone();
        let started = std::thread::Builder::new()
            .name("resume".to_owned())
            .stack_size(STACK_BYTES)
            // It may have ended meanwhile, which its owner will see.
            .spawn(move || drop(vm.machine.resume()));
        if started.is_err() {
            drop(self.machine.resume());
        }
    }

    fn accept(self: &Arc<Self>, listener: &UnixListener, spare: &mut Option<OwnedFd>) {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if is_passing(&error) => return,
            Err(error) => {
                tracing::debug!(%error, "no client can be accepted");
                if spare.take().is_some()
                    && let Ok((stream, _)) = listener.accept()
                {
                    turn_away(stream, "no descriptors are left to the machine");
                }
                *spare = listener.as_fd().try_clone_to_owned().ok();
                // Until a client leaves, accepting fails at once.
                std::thread::sleep(EXHAUSTED);
                return;
            }
        };
        if self.clients.fetch_add(1, Ordering::AcqRel) >= MAX_CLIENTS {
            self.clients.fetch_sub(1, Ordering::AcqRel);
            turn_away(
                stream,
                &format!("the machine has {MAX_CLIENTS} clients already"),
            );
            return;
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

/// One to be read, or nothing of `other`.
fn watched<'fd>(fd: Option<&'fd OwnedFd>, other: &'fd UnixListener) -> PollFd<'fd> {
    match fd {
        Some(fd) => PollFd::new(fd, PollFlags::IN),
        None => PollFd::new(other, PollFlags::empty()),
    }
}

/// Whether it is enough to wait for the next client.
fn is_passing(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    [ConnectionAborted, Interrupted, WouldBlock].contains(&error.kind())
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
