//! One client's connection: requests, and their answers in order.

mod commit;
mod console;

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;

use crate::control::error_kind::ErrorKind;
use crate::control::protocol::{Reply, Request};
use crate::control::vm::Vm;
use crate::control::wire::Connection;
use crate::devices::virtio::FrozenDisk;
use crate::error::{Error, Result};
use crate::machine::{Freeze, FreezeOptions};

/// One client's connection.
pub(super) struct Session<'a> {
    vm: &'a Vm,
    connection: Option<Connection>,
    /// What this client froze and has not yet committed.
    freeze: Option<Freeze>,
    /// The disks of what it froze and was too slow to commit. What a client reads of
    /// them stays what it was, as long as it is there.
    lost: Vec<FrozenDisk>,
    /// Whether it is this client that commits.
    commits: bool,
    /// Whether it was too slow.
    gave_up: bool,
    /// Whether it has asked to be told when the guest is ready.
    waits_for_ready: bool,
}

impl<'a> Session<'a> {
    pub fn new(vm: &'a Vm, stream: UnixStream) -> Self {
        Self {
            vm,
            connection: Some(Connection::new(stream)),
            freeze: None,
            lost: Vec::new(),
            commits: false,
            gave_up: false,
            waits_for_ready: false,
        }
    }

    pub fn serve(mut self) {
        while let Some(connection) = &mut self.connection {
            let (reply, fds) = match connection.receive::<Request>() {
                Ok(None) => break,
                Ok(Some(Request::Console { replay })) => {
                    self.console(replay);
                    break;
                }
                Ok(Some(request)) => self.answer(request),
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    self.refuse(&error);
                    break;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && self.commits => {
                    self.give_up_freeze();
                    continue;
                }
                Err(error) => {
                    tracing::debug!(%error, "a client's connection broke");
                    break;
                }
            };
            let borrowed: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
            if let Some(connection) = &mut self.connection
                && connection.send(&reply, &borrowed).is_err()
            {
                break;
            }
        }
        self.thaw();
        self.leave_ready();
    }

    fn refuse(&mut self, error: &io::Error) {
        let reply = Reply::Error {
            kind: ErrorKind::Invalid,
            message: format!("this is no request: {error}"),
        };
        if let Some(connection) = &mut self.connection {
            // The connection ends either way.
            let _ = connection.send(&reply, &[]);
        }
    }

    fn answer(&mut self, request: Request) -> (Reply, Vec<OwnedFd>) {
        let answer = match request {
            Request::Status => Ok(Reply::Status(Box::new(self.vm.status()))),
            Request::Pause => self.vm.machine.pause().map(|()| {
                self.vm.record().totals.pauses += 1;
                Reply::Done
            }),
            Request::Resume => self.vm.machine.resume().map(|()| Reply::Done),
            Request::Stop => {
                self.vm.machine.stop();
                Ok(self.ended())
            }
            Request::Wait => Ok(self.ended()),
            Request::WaitReady => self.wait_ready().map(|()| Reply::Done),
            Request::Precopy { after } => return self.precopy(after),
            Request::Freeze { after, whole } => {
                return self.freeze(FreezeOptions { after, whole });
            }
            Request::Alive if !self.commits => Ok(self.nothing_frozen()),
            Request::Alive => Ok(Reply::Done),
            Request::Committed(report) => Ok(self.committed(report)),
            Request::Console { .. } => unreachable!("taken by the caller"),
        };
        (answer.unwrap_or_else(|error| failure(&error)), Vec::new())
    }

    fn wait_ready(&mut self) -> Result<()> {
        if !std::mem::replace(&mut self.waits_for_ready, true) {
            self.vm.ready_clients.fetch_add(1, Ordering::AcqRel);
        }
        self.vm.machine.wait_until_ready()
    }

    /// With the last client that wanted the guest to stand still when it is ready, the
    /// guest goes on: nobody else would let it.
    fn leave_ready(&self) {
        if self.waits_for_ready {
            self.vm.ready_clients.fetch_sub(1, Ordering::AcqRel);
            self.vm.skip_ready_unless_awaited();
        }
    }

    fn ended(&self) -> Reply {
        Reply::Ended {
            ending: self.vm.machine.wait(),
        }
    }
}

fn invalid(message: &str) -> Reply {
    Reply::Error {
        kind: ErrorKind::Invalid,
        message: message.to_owned(),
    }
}

fn failure(error: &Error) -> Reply {
    let kind = match error {
        Error::Ended(_) => ErrorKind::Ended,
        Error::DoesNotStop => ErrorKind::Busy,
        _ => ErrorKind::Failed,
    };
    Reply::Error {
        kind,
        message: error.to_string(),
    }
}
