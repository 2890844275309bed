//! All connections of a device: what the guest's packets do to them, and what is
//! to be told the guest next.
//!
//! Nothing here touches guest memory, so that sockets are served in a stopped
//! machine, too. What is kept is bounded: connections by [`MAX_CONNECTIONS`], the
//! bytes of each by its buffer, and resets by [`MAX_RESETS`]; beyond, a guest that
//! takes no packets is not told of more.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use super::connection::{BUFFER_BYTES, Connection, Phase, Violation};
use super::host::Host;
use super::packet::{ANY_PORT, HOST_CID, Header, Operation, Ports, TYPE_STREAM};
use super::poll::{EventFlags, Poll, Source};
use crate::rate::Rate;

/// The most connections of a device.
pub(super) const MAX_CONNECTIONS: usize = 1024;
/// The most resets that wait for the guest.
const MAX_RESETS: usize = 1024;
/// How long a guest has to confirm the end of a connection.
const CLOSING: Duration = Duration::from_secs(2);
/// The ports of the host's ends of connections that the host asks for.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// A reset to be told.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reset {
    ports: Ports,
    socket_type: u16,
}

/// What is to be told the guest next.
#[derive(Clone, Copy, Debug)]
pub(super) enum Output {
    Reset(Reset),
    Connection(Ports),
}

/// The connections.
pub(super) struct Table {
    pub guest_cid: u64,
    poll: Poll,
    host: Host,
    connections: HashMap<Ports, Connection>,
    limit: usize,
    /// Connections that may have something for the guest, in turn.
    ready: VecDeque<Ports>,
    resets: VecDeque<Reset>,
    /// Ends that the guest should confirm, in the order of their deadlines.
    closing: VecDeque<(Instant, Ports)>,
    next_host_port: u32,
}

impl Table {
    pub fn new(guest_cid: u64, path: &Path, poll: Poll) -> io::Result<Self> {
        // The machine needs descriptors for other things.
        let descriptors = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let half = descriptors.map_or(usize::MAX, |limit| {
            usize::try_from(limit / 2).unwrap_or(usize::MAX)
        });
        Ok(Self {
            guest_cid,
            host: Host::listen(path, &poll)?,
            poll,
            connections: HashMap::new(),
            limit: half.min(MAX_CONNECTIONS),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            closing: VecDeque::new(),
            next_host_port: first_port()?,
        })
    }

    // --- From the guest ------------------------------------------------------

    /// A packet of the guest. `payload` is `None` if the packet's length is not
    /// possible.
    pub fn on_guest(&mut self, header: &Header, payload: Option<&[u8]>) {
        if header.source_cid != self.guest_cid || header.destination_cid != HOST_CID {
            // Nobody to answer to.
            return;
        }
        let ports = header.ports_from_guest();
        if header.operation == Operation::Reset {
            return self.guest_resets(ports);
        }
        let reset = Reset {
            ports,
            socket_type: header.socket_type,
        };
        let (TYPE_STREAM, Some(payload)) = (header.socket_type, payload) else {
            self.refuse(ports);
            return self.queue_reset(reset);
        };
        if header.operation == Operation::Request {
            return self.guest_requests(header, ports);
        }
        let heard = match self.connections.get_mut(&ports) {
            Some(connection) => hear(connection, header, payload),
            None => Err(Violation),
        };
        match heard {
            Ok(()) => self.update(ports),
            Err(Violation) => {
                self.refuse(ports);
                self.queue_reset(reset);
            }
        }
    }

    /// Ends a connection that the guest misused, unless for the guest it is over.
    fn refuse(&mut self, ports: Ports) {
        let connection = self.connections.get(&ports);
        if connection.is_none_or(|there| there.phase != Phase::Lingering) {
            self.forget(ports);
        }
    }

    fn guest_requests(&mut self, header: &Header, ports: Ports) {
        let free = ports.guest != ANY_PORT
            && self.connections.len() < self.limit
            && !self.connections.contains_key(&ports);
        let added = free
            && match self.host.connect(ports.host) {
                Ok(stream) => self.add(ports, Connection::accepted(stream, header)),
                Err(error) => {
                    tracing::debug!(port = ports.host, %error, "nobody listens for the guest");
                    false
                }
            };
        if !added {
            self.refuse(ports);
            self.queue_reset(Reset {
                ports,
                socket_type: TYPE_STREAM,
            });
        }
    }

    /// What the guest sent before still goes to the host.
    fn guest_resets(&mut self, ports: Ports) {
        let Some(connection) = self.connections.get_mut(&ports) else {
            return;
        };
        if connection.has_pending() {
            connection.phase = Phase::Lingering;
            self.update(ports);
        } else {
            self.forget(ports);
        }
    }

    // --- From the host -------------------------------------------------------

    /// Someone connects to the device's socket.
    ///
    /// # Errors
    /// The operating system's: it has no descriptor left.
    pub fn accept(&mut self) -> io::Result<()> {
        self.host.accept(&self.poll)
    }

    /// Someone who connected says to which port.
    pub fn on_greeting(&mut self, number: u32) {
        let Some((stream, guest)) = self.host.hear(number, &self.poll) else {
            return;
        };
        if guest == ANY_PORT || self.connections.len() >= self.limit {
            return;
        }
        let ports = loop {
            let host = self.next_host_port;
            self.next_host_port = match host.checked_add(1) {
                None | Some(ANY_PORT) => FIRST_HOST_PORT,
                Some(next) => next,
            };
            let ports = Ports { guest, host };
            if !self.connections.contains_key(&ports) {
                break ports;
            }
        };
        self.add(ports, Connection::requested(stream));
    }

    /// A connection's socket reports something.
    pub fn on_socket(&mut self, ports: Ports, events: EventFlags) {
        let Some(connection) = self.connections.get_mut(&ports) else {
            return;
        };
        if connection.phase == Phase::Requested {
            // Whoever asked is gone: nothing else is waited for.
            return self.reset(ports);
        }
        connection.on_events(events);
        self.update(ports);
    }

    // --- Life of a connection ------------------------------------------------

    fn add(&mut self, ports: Ports, connection: Connection) -> bool {
        let source = Source::Connection(ports);
        if let Err(error) = self
            .poll
            .add(&connection.stream, source, EventFlags::ONESHOT)
        {
            static RATE: Rate = Rate::new();
            RATE.log(|more| tracing::warn!(%error, more, "cannot wait for a socket"));
            return false;
        }
        self.connections.insert(ports, connection);
        self.update(ports);
        true
    }

    /// After anything happened to a connection: whether it is over, what it has
    /// for the guest, what it waits for.
    fn update(&mut self, ports: Ports) {
        let Some(connection) = self.connections.get_mut(&ports) else {
            return;
        };
        if connection.guest_is_done() && connection.phase != Phase::Lingering {
            // Virtio 1.2, section 5.10.6.5: a reset confirms the end.
            connection.phase = Phase::Lingering;
            self.queue_reset(Reset {
                ports,
                socket_type: TYPE_STREAM,
            });
            return self.update(ports);
        }
        if connection.phase == Phase::Lingering && !connection.has_pending() {
            return self.forget(ports);
        }
        if connection.host_is_gone_and_told() {
            let deadline = Instant::now() + CLOSING;
            connection.phase = Phase::Closing(deadline);
            self.closing.push_back((deadline, ports));
        }
        if !connection.queued && connection.has_output() {
            connection.queued = true;
            self.ready.push_back(ports);
        }
        self.poll_for(ports);
    }

    fn poll_for(&mut self, ports: Ports) {
        let Some(connection) = self.connections.get_mut(&ports) else {
            return;
        };
        let Some(interest) = connection.interest() else {
            return;
        };
        let interest = interest | EventFlags::ONESHOT;
        if !connection.armed.contains(interest) {
            connection.armed = interest;
            let source = Source::Connection(ports);
            self.poll.change(&connection.stream, source, interest);
        }
    }

    /// Ends a connection and tells the guest.
    fn reset(&mut self, ports: Ports) {
        self.forget(ports);
        self.queue_reset(Reset {
            ports,
            socket_type: TYPE_STREAM,
        });
    }

    fn forget(&mut self, ports: Ports) {
        let Some(connection) = self.connections.remove(&ports) else {
            return;
        };
        self.poll.remove(&connection.stream);
        // A guest that connects and resets over and over must not lengthen them.
        if connection.queued {
            self.ready.retain(|queued| *queued != ports);
        }
        if matches!(connection.phase, Phase::Closing(_)) {
            self.closing.retain(|(_, closing)| *closing != ports);
        }
    }

    fn queue_reset(&mut self, reset: Reset) {
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back(reset);
        }
    }

    /// Ends all connections without a word.
    pub fn clear(&mut self) {
        for (_, connection) in self.connections.drain() {
            self.poll.remove(&connection.stream);
        }
        self.ready.clear();
        self.resets.clear();
        self.closing.clear();
    }

    /// Ends what the guest did not confirm in time. Returns the next deadline.
    pub fn expire(&mut self, now: Instant) -> Option<Instant> {
        while let Some(&(deadline, ports)) = self.closing.front() {
            let phase = self.connections.get(&ports).map(|there| there.phase);
            if phase != Some(Phase::Closing(deadline)) {
                self.closing.pop_front();
            } else if deadline <= now {
                self.closing.pop_front();
                self.reset(ports);
            } else {
                return Some(deadline);
            }
        }
        None
    }

    /// When the guest should have confirmed the first end, as far as it is known.
    pub fn deadline(&self) -> Option<Instant> {
        self.closing.front().map(|(deadline, _)| *deadline)
    }

    // --- For the guest -------------------------------------------------------

    /// Whether there may be something to tell the guest.
    pub fn has_output(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// What to tell the guest next. It is either told, or put back.
    pub fn next_output(&mut self) -> Option<Output> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(Output::Reset(reset));
        }
        while let Some(ports) = self.ready.pop_front() {
            let Some(connection) = self.connections.get_mut(&ports) else {
                continue;
            };
            connection.queued = false;
            if connection.has_output() {
                return Some(Output::Connection(ports));
            }
            self.update(ports);
        }
        None
    }

    /// The guest has no buffer for it now.
    pub fn put_back(&mut self, output: Output) {
        match output {
            Output::Reset(reset) => self.resets.push_front(reset),
            Output::Connection(ports) => {
                if let Some(connection) = self.connections.get_mut(&ports) {
                    connection.queued = true;
                    self.ready.push_front(ports);
                }
            }
        }
    }

    /// The packet for what is told; its payload is at the beginning of `payload`.
    pub fn packet(&mut self, output: Output, payload: &mut [u8]) -> Header {
        let longest = usize::try_from(BUFFER_BYTES)
            .unwrap_or(0)
            .min(payload.len());
        let (ports, socket_type, packet, taken_bytes) = match output {
            Output::Reset(reset) => (reset.ports, reset.socket_type, None, 0),
            Output::Connection(ports) => match self.connections.get_mut(&ports) {
                None => (ports, TYPE_STREAM, None, 0),
                Some(connection) => {
                    let packet = connection.next_packet(&mut payload[..longest]);
                    let taken_bytes = connection.forwarded();
                    self.update(ports);
                    (ports, TYPE_STREAM, Some(packet), taken_bytes)
                }
            },
        };
        let (operation, flags, length) = packet.unwrap_or((Operation::Reset, 0, 0));
        Header {
            source_cid: HOST_CID,
            destination_cid: self.guest_cid,
            source_port: ports.host,
            destination_port: ports.guest,
            length: u32::try_from(length).unwrap_or(0),
            socket_type,
            operation,
            flags,
            buffer_bytes: if packet.is_some() { BUFFER_BYTES } else { 0 },
            taken_bytes,
        }
    }

    /// How many connections there are, and how much waits for the guest.
    #[cfg(test)]
    pub fn sizes(&self) -> (usize, usize) {
        let waiting = self.resets.len() + self.ready.len() + self.closing.len();
        (self.connections.len(), waiting)
    }
}

/// Where the numbering begins. At random: what a restored guest still sends on a
/// connection of the past must not meet a new one of the same ports.
fn first_port() -> io::Result<u32> {
    let mut random = [0; 4];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    Ok(FIRST_HOST_PORT | u32::from_ne_bytes(random) >> 2)
}

/// A packet for a connection that there is.
fn hear(connection: &mut Connection, header: &Header, payload: &[u8]) -> Result<(), Violation> {
    if connection.phase == Phase::Lingering
        || !payload.is_empty() && header.operation != Operation::ReadWrite
    {
        return Err(Violation);
    }
    connection.on_credit(header);
    match header.operation {
        Operation::Response => connection.opened(header.destination_port),
        Operation::ReadWrite => connection.take(payload),
        Operation::Shutdown => {
            connection.guest_ends(header.flags);
            Ok(())
        }
        Operation::CreditUpdate => Ok(()),
        Operation::CreditRequest => {
            connection.owe_credit_update();
            Ok(())
        }
        Operation::Request | Operation::Reset | Operation::Unknown(_) => Err(Violation),
    }
}
