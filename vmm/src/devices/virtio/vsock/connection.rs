//! One connection: a socket of the host, and the guest's credit.
//!
//! Credit (virtio 1.2, section 5.10.6.3): each side tells in every packet how
//! large its buffer is and how many bytes were taken out of it, and sends no more
//! than the other has room for. All counts wrap around. A guest that tells
//! nonsense gets no credit, and one that sends more than it has loses the
//! connection.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::packet::{Header, Operation, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::poll::EventFlags;

/// The buffer for what the guest sends, in bytes; also the longest payload.
pub(super) const BUFFER_BYTES: u32 = 64 << 10;
/// The guest hears of room in the buffer when there is this much news.
const NEWS_BYTES: u32 = BUFFER_BYTES / 2;

/// Where a connection is in its life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    /// The guest has not yet answered the host.
    Requested,
    /// Both ends may send, unless they said that they will not.
    Open,
    /// The host's end is gone and the guest was told; it should confirm by then.
    Closing(Instant),
    /// For the guest the connection is over. What it had sent goes to the host.
    Lingering,
}

/// What the guest is to be told.
#[derive(Default)]
struct Owed {
    request: bool,
    response: bool,
    credit_update: bool,
    credit_request: bool,
}

/// One connection.
pub(super) struct Connection {
    /// Not blocking.
    pub stream: UnixStream,
    pub phase: Phase,
    /// Whether it is in the list of those that have something for the guest.
    pub queued: bool,
    /// What it is waited for, until the next event.
    pub armed: EventFlags,
    owed: Owed,
    /// Taken from the guest and not yet by the host; at most [`BUFFER_BYTES`].
    pending: VecDeque<u8>,
    /// Bytes that came from the guest, that left `pending`, and of which the guest
    /// knows that they did.
    received: u32,
    forwarded: u32,
    announced: u32,
    /// Bytes that went to the guest, and what it tells about its buffer.
    sent: u32,
    guest_buffer: u32,
    guest_taken: u32,
    /// The guest was asked for credit and has not given any.
    asked: bool,
    /// The host may have sent something.
    readable: bool,
    /// What the host will not do any more, as flags of a shutdown; and as far as
    /// the guest was told.
    host_ended: u32,
    host_ended_told: u32,
    /// What the guest will not do any more.
    guest_ended: u32,
}

/// A connection that cannot go on.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Violation;

impl Connection {
    /// The host asks the guest for a connection.
    pub fn requested(stream: UnixStream) -> Self {
        Self::new(stream, Phase::Requested)
    }

    /// The guest asked for a connection that the host accepted.
    pub fn accepted(stream: UnixStream, request: &Header) -> Self {
        let mut connection = Self::new(stream, Phase::Open);
        connection.on_credit(request);
        connection
    }

    fn new(stream: UnixStream, phase: Phase) -> Self {
        Self {
            stream,
            phase,
            queued: false,
            armed: EventFlags::empty(),
            owed: Owed {
                request: phase == Phase::Requested,
                response: phase == Phase::Open,
                ..Owed::default()
            },
            pending: VecDeque::new(),
            received: 0,
            forwarded: 0,
            announced: 0,
            sent: 0,
            guest_buffer: 0,
            guest_taken: 0,
            asked: false,
            readable: false,
            host_ended: 0,
            host_ended_told: 0,
            guest_ended: 0,
        }
    }

    /// The guest accepts: the host hears of it, then data flows.
    pub fn opened(&mut self, host_port: u32) -> Result<(), Violation> {
        if self.phase != Phase::Requested || self.owed.request {
            return Err(Violation);
        }
        let answer = format!("OK {host_port}\n");
        // An empty socket takes it whole, unless nobody is there.
        match send(&self.stream, answer.as_bytes(), SendFlags::NOSIGNAL) {
            Ok(sent) if sent == answer.len() => {
                self.phase = Phase::Open;
                Ok(())
            }
            _ => Err(Violation),
        }
    }

    /// Every packet of the guest tells its credit.
    pub fn on_credit(&mut self, header: &Header) {
        self.guest_buffer = header.buffer_bytes;
        self.guest_taken = header.taken_bytes;
        self.asked &= self.credit() == 0;
    }

    /// How many bytes the guest has room for.
    fn credit(&self) -> u32 {
        let under_way = self.sent.wrapping_sub(self.guest_taken);
        self.guest_buffer.saturating_sub(under_way)
    }

    /// The guest asks for a credit update.
    pub fn owe_credit_update(&mut self) {
        self.owed.credit_update = true;
    }

    /// Payload from the guest.
    pub fn take(&mut self, payload: &[u8]) -> Result<(), Violation> {
        let length = u32::try_from(payload.len()).map_err(|_| Violation)?;
        let kept = u32::try_from(self.pending.len()).map_err(|_| Violation)?;
        let allowed = matches!(self.phase, Phase::Open | Phase::Closing(_))
            && self.guest_ended & SHUTDOWN_SEND == 0
            && length <= BUFFER_BYTES - kept;
        if !allowed {
            return Err(Violation);
        }
        self.received = self.received.wrapping_add(length);
        if self.host_ended & SHUTDOWN_RECEIVE != 0 {
            // Sent before the guest heard that nobody will read it.
            self.forget_pending();
            return Ok(());
        }
        let mut rest = payload;
        if self.pending.is_empty() {
            rest = &payload[self.write(payload).min(payload.len())..];
        }
        if self.host_ended & SHUTDOWN_RECEIVE == 0 {
            self.pending.extend(rest);
        }
        Ok(())
    }

    /// Gives the host what it takes of what is pending.
    pub fn flush(&mut self) {
        while !self.pending.is_empty() {
            let (front, _) = self.pending.as_slices();
            // Bounded by the buffer.
            let piece = front.to_vec();
            let written = self.write(&piece);
            if written == 0 {
                return;
            }
            self.pending.drain(..written.min(self.pending.len()));
        }
    }

    /// Whether something waits for the host to take it.
    pub fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Writes to the host what it takes at once. If it never will, what the guest
    /// sent is dropped, and the guest is told.
    fn write(&mut self, bytes: &[u8]) -> usize {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        loop {
            match send(&self.stream, bytes, flags) {
                Ok(written) => {
                    let count = u32::try_from(written).unwrap_or(0);
                    self.forwarded = self.forwarded.wrapping_add(count);
                    let news = self.forwarded.wrapping_sub(self.announced);
                    self.owed.credit_update |= news >= NEWS_BYTES;
                    return written;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return 0,
                Err(_) => {
                    self.host_ended |= SHUTDOWN_RECEIVE;
                    self.forget_pending();
                    return 0;
                }
            }
        }
    }

    fn forget_pending(&mut self) {
        self.pending.clear();
        self.forwarded = self.received;
    }

    /// The guest will not receive, or not send, any more.
    pub fn guest_ends(&mut self, flags: u32) {
        self.guest_ended |= flags & SHUTDOWN_BOTH;
        if self.guest_ended & SHUTDOWN_RECEIVE != 0 {
            self.readable = false;
        }
        self.pass_on_ends();
    }

    /// Tells the host what the guest will not do, once all was handed over.
    pub fn pass_on_ends(&mut self) {
        // Of a socket whose other end is gone nothing more can be shut.
        if self.guest_ended & SHUTDOWN_SEND != 0 && self.pending.is_empty() {
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        if self.guest_ended & SHUTDOWN_RECEIVE != 0 {
            let _ = self.stream.shutdown(Shutdown::Read);
        }
    }

    /// Whether the guest wants nothing more of the connection.
    pub fn guest_is_done(&self) -> bool {
        self.guest_ended == SHUTDOWN_BOTH
    }

    /// Whether neither end of the host is there, and the guest knows.
    pub fn host_is_gone_and_told(&self) -> bool {
        self.phase == Phase::Open && self.host_ended_told == SHUTDOWN_BOTH
    }

    /// What the socket reported.
    pub fn on_events(&mut self, events: EventFlags) {
        self.armed = EventFlags::empty();
        if events.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR)
        {
            self.readable = self.guest_ended & SHUTDOWN_RECEIVE == 0;
        }
        if events.intersects(EventFlags::HUP | EventFlags::ERR) && !self.readable_matters() {
            self.host_ended = SHUTDOWN_BOTH;
        }
        self.flush();
        self.pass_on_ends();
    }

    /// Whether there may be more to read.
    fn readable_matters(&self) -> bool {
        self.guest_ended & SHUTDOWN_RECEIVE == 0 && self.host_ended & SHUTDOWN_SEND == 0
    }

    /// What to wait for on the socket; `None` if nothing that happens there
    /// changes anything.
    pub fn interest(&self) -> Option<EventFlags> {
        let mut events = EventFlags::empty();
        if self.has_pending() {
            events |= EventFlags::OUT;
        }
        match self.phase {
            // The end of both directions, which is reported without being asked for:
            // whoever only sends may have said all before the guest answers.
            Phase::Requested => Some(EventFlags::empty()),
            Phase::Lingering => (!events.is_empty()).then_some(events),
            Phase::Closing(_) => None,
            Phase::Open if self.readable && self.readable_matters() => {
                (!events.is_empty()).then_some(events)
            }
            Phase::Open if self.host_ended == SHUTDOWN_BOTH => None,
            Phase::Open if self.readable_matters() => {
                Some(events | EventFlags::IN | EventFlags::RDHUP)
            }
            // The end of the other direction is reported without being asked for.
            Phase::Open => Some(events),
        }
    }

    /// Whether there is certainly something to tell the guest.
    pub fn has_output(&mut self) -> bool {
        match self.phase {
            Phase::Requested => self.owed.request,
            Phase::Closing(_) | Phase::Lingering => false,
            Phase::Open => self.owed.response || self.has_data() || self.owes_words(),
        }
    }

    fn owes_words(&self) -> bool {
        self.owed.credit_update
            || self.owed.credit_request
            || self.host_ended != self.host_ended_told
    }

    /// Whether there is something to read and credit for it. Finds the end of the
    /// stream, too.
    fn has_data(&mut self) -> bool {
        if !self.readable || !self.readable_matters() {
            return false;
        }
        let mut byte = [0];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        match recv(&self.stream, &mut byte, flags) {
            Ok((_, 1..)) => {
                if self.credit() == 0 && !self.asked {
                    self.asked = true;
                    self.owed.credit_request = true;
                }
                self.credit() > 0
            }
            Ok(_) => {
                self.stream_ended();
                false
            }
            Err(Errno::AGAIN | Errno::INTR) => {
                self.readable = false;
                false
            }
            Err(_) => {
                self.host_ended = SHUTDOWN_BOTH;
                self.forget_pending();
                false
            }
        }
    }

    /// The host sends no more; if it is gone, it does not receive either.
    fn stream_ended(&mut self) {
        self.readable = false;
        self.host_ended |= SHUTDOWN_SEND;
        let mut state = [PollFd::new(&self.stream, PollFlags::empty())];
        let gone = match poll(&mut state, Some(&Timespec::default())) {
            Ok(_) => state[0]
                .revents()
                .intersects(PollFlags::HUP | PollFlags::ERR),
            Err(_) => false,
        };
        if gone {
            self.host_ended = SHUTDOWN_BOTH;
            self.forget_pending();
        }
    }

    /// The next thing to tell the guest: operation, flags and how much of `payload`
    /// was filled. To be called after [`Connection::has_output`]; when nothing is
    /// left after all, a credit update does no harm.
    pub fn next_packet(&mut self, payload: &mut [u8]) -> (Operation, u32, usize) {
        let packet = self.choose_packet(payload);
        // Every packet tells the credit.
        self.owed.credit_update = false;
        self.announced = self.forwarded;
        packet
    }

    fn choose_packet(&mut self, payload: &mut [u8]) -> (Operation, u32, usize) {
        if std::mem::take(&mut self.owed.request) {
            return (Operation::Request, 0, 0);
        }
        if std::mem::take(&mut self.owed.response) {
            return (Operation::Response, 0, 0);
        }
        if self.phase == Phase::Open && self.has_data() {
            let credit = usize::try_from(self.credit()).unwrap_or(0);
            let room = payload.len().min(credit);
            match self.read(&mut payload[..room]) {
                Ok(0) | Err(_) => {}
                Ok(length) => return (Operation::ReadWrite, 0, length),
            }
        }
        let ended = self.host_ended;
        if self.phase == Phase::Open && ended != self.host_ended_told {
            self.host_ended_told = ended;
            return (Operation::Shutdown, ended, 0);
        }
        if std::mem::take(&mut self.owed.credit_request) {
            return (Operation::CreditRequest, 0, 0);
        }
        (Operation::CreditUpdate, 0, 0)
    }

    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let (_, length) = recv(&self.stream, &mut *room, RecvFlags::DONTWAIT)?;
        self.sent = self.sent.wrapping_add(u32::try_from(length).unwrap_or(0));
        self.readable = length == room.len();
        Ok(length)
    }

    /// How many bytes the host took.
    pub fn forwarded(&self) -> u32 {
        self.forwarded
    }
}
