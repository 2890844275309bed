//! What the device's thread waits for.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::buffer::spare_capacity;
pub(super) use rustix::event::epoll::EventFlags;
use rustix::event::{Timespec, epoll};

use super::packet::{ANY_PORT, Ports};
use crate::rate::Rate;

/// The most events that are taken at once.
const EVENTS: usize = 64;

/// What an event is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Source {
    /// The device has something for its thread.
    Wake,
    /// Someone connects to the device's socket.
    Listener,
    /// Someone who connected says what to; by number.
    Greeting(u32),
    /// A connection's socket.
    Connection(Ports),
}

impl Source {
    /// As the kernel keeps it: the ports of a connection, of which the guest's is
    /// never [`ANY_PORT`]; with that one, everything else.
    fn to_u64(self) -> u64 {
        let (high, low) = match self {
            Self::Wake => (ANY_PORT, 0),
            Self::Listener => (ANY_PORT, 1),
            Self::Greeting(number) => (ANY_PORT, number.max(2)),
            Self::Connection(ports) => (ports.guest, ports.host),
        };
        u64::from(high) << 32 | u64::from(low)
    }

    fn from_u64(value: u64) -> Self {
        let low = u32::try_from(value & 0xffff_ffff).unwrap_or(0);
        let high = u32::try_from(value >> 32).unwrap_or(0);
        match (high, low) {
            (ANY_PORT, 0) => Self::Wake,
            (ANY_PORT, 1) => Self::Listener,
            (ANY_PORT, number) => Self::Greeting(number),
            (guest, host) => Self::Connection(Ports { guest, host }),
        }
    }
}

/// An epoll instance.
pub(super) struct Poll(OwnedFd);

impl Poll {
    pub fn new() -> rustix::io::Result<Self> {
        epoll::create(epoll::CreateFlags::CLOEXEC).map(Self)
    }

    /// Another handle of the same instance.
    pub fn share(&self) -> std::io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    pub fn add(&self, fd: impl AsFd, source: Source, events: EventFlags) -> rustix::io::Result<()> {
        epoll::add(
            &self.0,
            fd,
            epoll::EventData::new_u64(source.to_u64()),
            events,
        )
    }

    pub fn change(&self, fd: impl AsFd, source: Source, events: EventFlags) {
        let data = epoll::EventData::new_u64(source.to_u64());
        if let Err(error) = epoll::modify(&self.0, fd, data, events) {
            static RATE: Rate = Rate::new();
            RATE.log(|more| tracing::warn!(%error, more, "cannot wait for a socket"));
        }
    }

    /// Explicitly, before a descriptor is closed: for a moment a process that was
    /// forked may hold a copy of it, which would keep it registered.
    pub fn remove(&self, fd: impl AsFd) {
        // What was never added has nothing to remove.
        let _ = epoll::delete(&self.0, fd);
    }

    /// Waits for events, at most for `timeout`.
    pub fn wait(&self, timeout: Option<Duration>) -> rustix::io::Result<Vec<(Source, EventFlags)>> {
        // Rounded up: a deadline has passed when the wait for it ends.
        let timeout = timeout.map(|timeout| timeout + Duration::from_millis(1));
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let mut events: Vec<epoll::Event> = Vec::with_capacity(EVENTS);
        match epoll::wait(&self.0, spare_capacity(&mut events), timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        // The fields of a packed structure are copied, not borrowed.
        let events = events.iter().map(|event| {
            let (data, flags) = (event.data, event.flags);
            (Source::from_u64(data.u64()), flags)
        });
        Ok(events.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_survive_the_kernel() {
        let ports = |guest, host| Source::Connection(Ports { guest, host });
        for source in [
            Source::Wake,
            Source::Listener,
            Source::Greeting(2),
            Source::Greeting(u32::MAX),
            ports(0, 0),
            ports(1024, 1 << 30),
            ports(u32::MAX - 1, u32::MAX),
        ] {
            assert_eq!(Source::from_u64(source.to_u64()), source);
        }
    }
}
