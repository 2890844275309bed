//! Sockets between guest and host, virtio 1.2, section 5.10: stream sockets of the
//! guest's AF_VSOCK on one side, UNIX sockets of the host on the other.
//!
//! - `packet`: the header of what goes over the queues.
//! - `connection`: one socket of the host and the guest's credit.
//! - `table`: all connections, and what is to be told the guest next.
//! - `host`: the device's UNIX socket, and what is said on it.
//! - `poll`, `thread`: waiting for the host.
//!
//! What the guest sends goes to the host on the thread of the vCPU that notifies
//! the device; what the host sends is fetched when the guest has a buffer for it,
//! so that the device keeps nothing of it. The table has its own lock, which is
//! taken inside the transport's, never around it.
//!
//! Connections do not survive a restore. A restored device has none; it tells the
//! guest so with an event, upon which the guest ends its sockets and reads its
//! context id again (section 5.10.6.7). Sockets that listen go on listening. The
//! host's programs are not let in before the guest has dealt with the event, which
//! would otherwise end their connections, too.
//!
//! Absent on purpose: seqpacket and datagram sockets, connections between guests,
//! and merged receive buffers.

mod connection;
mod host;
mod packet;
mod poll;
mod shared;
mod table;
#[cfg(test)]
mod tests;
mod thread;

use std::path::Path;
use std::sync::{Arc, Mutex, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use super::{Broken, Chain, Transport, VirtioDevice, VirtioDeviceState, Virtqueue, Wake};
use crate::error::{Error, OsContext as _, Result};
use connection::BUFFER_BYTES;
use packet::{HEADER_BYTES, Header, Operation};
use poll::{EventFlags, Poll, Source};
use shared::{News, RECEIVE, Shared, lock};
use table::Table;

/// Receiving, sending and events, by the guest's view.
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];
const SEND: usize = 1;
const EVENTS: usize = 2;

/// The event that all connections are gone (section 5.10.6.7).
const TRANSPORT_RESET: u32 = 0;
/// How long the host's programs wait for a guest to deal with it.
const EVENT_PATIENCE: Duration = Duration::from_secs(2);
/// Room for one payload.
const PAYLOAD_BYTES: usize = 64 << 10;
const _: () = assert!(PAYLOAD_BYTES == BUFFER_BYTES as usize);

/// The address of a guest among those of its host: any from 3, the first that is
/// not reserved. The guests of this monitor never meet, so that all can have the
/// same.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GuestCid(u32);

impl GuestCid {
    /// A guest's context id; `None` for one that is reserved.
    #[must_use]
    pub fn new(cid: u32) -> Option<Self> {
        (3..u32::MAX).contains(&cid).then_some(Self(cid))
    }
}

impl Default for GuestCid {
    fn default() -> Self {
        Self(3)
    }
}

/// A virtio socket device.
pub struct Vsock {
    shared: Arc<Mutex<Shared>>,
    /// Whether the context id was given, and is not to be the saved one.
    fixed_cid: bool,
    wake: Wake,
    poll: Option<Poll>,
    thread: Option<JoinHandle<()>>,
    payload: Box<[u8]>,
}

impl Vsock {
    /// A device whose socket is at `path`, where nothing may be yet. Without a
    /// context id the guest has the first that is possible, or, when it is
    /// restored, the one that was saved.
    ///
    /// # Errors
    /// The operating system's.
    pub fn new(path: &Path, cid: Option<GuestCid>) -> Result<Self> {
        let poll = Poll::new().os("create an epoll instance")?;
        let wake = Wake::new().os("create an event")?;
        poll.add(wake.fd(), Source::Wake, EventFlags::IN)
            .os("wait for an event")?;
        let threads_poll = poll.share().os("copy a descriptor")?;
        let GuestCid(guest_cid) = cid.unwrap_or_default();
        let table = Table::new(guest_cid.into(), path, poll).map_err(|source| Error::File {
            action: "listen at",
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            shared: Arc::new(Mutex::new(Shared {
                table,
                news: News::None,
                ended: false,
            })),
            fixed_cid: cid.is_some(),
            wake,
            poll: Some(threads_poll),
            thread: None,
            payload: vec![0; PAYLOAD_BYTES].into(),
        })
    }

    /// Takes what the guest sends.
    fn on_guest(&mut self, queue: &mut Virtqueue<'_>) -> Result<(), Broken> {
        while let Some(chain) = queue.pop()? {
            let mut header = [0; HEADER_BYTES];
            chain.read_at(0, &mut header)?;
            let header = Header::decode(&header);
            let payload = read_payload(&chain, &header, &mut self.payload)?;
            lock(&self.shared).table.on_guest(&header, payload);
            queue.push(&chain, 0)?;
        }
        // The thread serves the other queue, and looks at deadlines.
        if lock(&self.shared).has_output() {
            self.wake.up();
        }
        Ok(())
    }

    /// Tells the guest what there is to tell.
    fn tell_guest(&mut self, queue: &mut Virtqueue<'_>) -> Result<(), Broken> {
        let mut shared = lock(&self.shared);
        if shared.news != News::None {
            return Ok(());
        }
        let deadline = shared.table.deadline();
        while let Some(output) = shared.table.next_output() {
            let Some(chain) = queue.pop().inspect_err(|_| shared.table.put_back(output))? else {
                shared.table.put_back(output);
                break;
            };
            let room = chain.writable_bytes().saturating_sub(HEADER_BYTES as u64);
            let room = usize::try_from(room).unwrap_or(0).min(PAYLOAD_BYTES);
            if room == 0 {
                shared.table.put_back(output);
                return Err(Broken::Chain("has no room for a packet"));
            }
            let header = shared.table.packet(output, &mut self.payload[..room]);
            let length = header.length as usize;
            chain.write_at(0, &header.encode())?;
            chain.write_at(HEADER_BYTES as u64, &self.payload[..length])?;
            queue.push(&chain, HEADER_BYTES as u32 + header.length)?;
        }
        if shared.table.deadline() != deadline {
            self.wake.up();
        }
        Ok(())
    }

    /// Tells the guest that its connections are gone; or hears that it knows.
    fn tell_news(&mut self, queue: &mut Virtqueue<'_>) -> Result<(), Broken> {
        let mut shared = lock(&self.shared);
        match shared.news {
            News::None => {}
            News::Due => {
                if let Some(chain) = queue.pop()? {
                    chain.write_at(0, &TRANSPORT_RESET.to_le_bytes())?;
                    queue.push(&chain, 4)?;
                    shared.news = News::Told(Instant::now() + EVENT_PATIENCE);
                    self.wake.up();
                }
            }
            News::Told(_) => {
                shared.news = News::None;
                self.wake.up();
            }
        }
        Ok(())
    }
}

/// The payload of a packet; `None` if it is too long, or longer than what the
/// guest sent.
fn read_payload<'p>(
    chain: &Chain<'_>,
    header: &Header,
    room: &'p mut [u8],
) -> Result<Option<&'p [u8]>, Broken> {
    let there = chain.readable_bytes() - HEADER_BYTES as u64;
    let length = usize::try_from(header.length).unwrap_or(usize::MAX);
    if length > room.len() || u64::from(header.length) > there {
        return Ok(None);
    }
    let payload = &mut room[..length];
    if header.operation == Operation::ReadWrite {
        chain.read_at(HEADER_BYTES as u64, payload)?;
    }
    Ok(Some(payload))
}

impl VirtioDevice for Vsock {
    fn id(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let cid = lock(&self.shared).table.guest_cid.to_le_bytes();
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let there = cid.get(from..).unwrap_or_default();
        let length = there.len().min(data.len());
        data[..length].copy_from_slice(&there[..length]);
    }

    fn process(&mut self, queue_index: usize, queue: &mut Virtqueue<'_>) -> Result<(), Broken> {
        match queue_index {
            RECEIVE => self.tell_guest(queue),
            SEND => self.on_guest(queue),
            EVENTS => self.tell_news(queue),
            _ => Ok(()),
        }
    }

    fn reset(&mut self) {
        let mut shared = lock(&self.shared);
        shared.table.clear();
        shared.news = News::None;
    }

    fn attached(&mut self, transport: Weak<Mutex<Transport>>) {
        let Some(poll) = self.poll.take() else {
            return;
        };
        let (shared, wake) = (self.shared.clone(), self.wake.clone());
        let thread = thread::spawn(poll, shared, wake, transport);
        self.thread = thread
            .inspect_err(|error| tracing::error!(%error, "no thread for the guest's sockets"))
            .ok();
    }

    fn save(&self) -> VirtioDeviceState {
        VirtioDeviceState::Vsock {
            guest_cid: lock(&self.shared).table.guest_cid,
        }
    }

    fn restore(&mut self, state: &VirtioDeviceState) -> Result<(), &'static str> {
        let VirtioDeviceState::Vsock { guest_cid } = *state else {
            return Err("kind");
        };
        let saved = u32::try_from(guest_cid).ok().and_then(GuestCid::new);
        let GuestCid(saved) = saved.ok_or("context id")?;
        let mut shared = lock(&self.shared);
        if !self.fixed_cid {
            shared.table.guest_cid = saved.into();
        }
        shared.news = News::Due;
        Ok(())
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        let mut shared = lock(&self.shared);
        shared.ended = true;
        shared.table.clear();
        drop(shared);
        self.wake.up();
        // The thread itself may be the last to let go of the transport.
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            // One that panicked has said so.
            let _ = thread.join();
        }
    }
}
