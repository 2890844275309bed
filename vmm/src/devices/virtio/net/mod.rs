//! A network interface, virtio 1.2, section 5.1, on a tap.
//!
//! - `tap`: the host's interface that the guest's frames go to and come from.
//! - `thread`: waiting for frames of the host.
//!
//! What the guest sends goes to the tap on the thread of the vCPU that notifies
//! the device. What the host sends stays in the tap's own queue, which the kernel
//! bounds, until the guest has a buffer for it: the device keeps no frame. While
//! the guest has none, nobody waits for the tap; the notification of the next
//! buffer looks at it.
//!
//! A restored device has no tap unless it is given one, and then its link is
//! down. It has another address than the one that was saved, which Linux's driver
//! does not look at again: something in the guest has to set it.
//!
//! A frame is dropped, as a cable would, when the other side cannot take it: a
//! guest's buffer is too small for it, the link is down, the tap is not up or has
//! no room, or it is too long or too short to be a frame.
//!
//! Absent on purpose: offloads (frames are whole and their checksums done),
//! several queues, a control queue and so filters by address (the tap's bridge
//! does that), and any look into a frame.

mod link;
mod tap;
#[cfg(test)]
mod tests;
mod thread;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::thread::JoinHandle;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};
pub use snapstore_agent_protocol::{MacAddress, NotAMacAddress};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_MAC, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP};

use super::{Broken, Chain, Transport, VirtioDevice, VirtioDeviceState, Virtqueue, Wake};
use crate::error::{OsContext as _, Result};
use link::{Link, RECEIVE};
use tap::HEADER_BYTES;
pub use tap::Tap;
#[cfg(test)]
pub(super) use tests::cable;
use thread::Poll;

/// Receiving and sending, by the guest's view.
const QUEUE_SIZES: [u16; 2] = [256, 256];
const SEND: usize = 1;

/// Where in it is how many buffers a frame takes: one.
const BUFFERS_AT: usize = 10;
/// An Ethernet header.
const MIN_FRAME_BYTES: usize = 14;
/// The longest frame.
const MAX_FRAME_BYTES: usize = 64 << 10;
/// How many frames that the host cannot hand over are dropped in one go.
const MAX_DROPPED: usize = 256;

/// A network interface as its owner sees it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Network {
    /// The host's end.
    pub tap: Option<String>,
    /// Its address.
    pub mac: MacAddress,
    /// The address that it had when it was saved.
    pub saved_mac: Option<MacAddress>,
    /// Whether frames can go through.
    pub link_up: bool,
}

/// An interface as its owner asks for it, whatever the device does meanwhile.
pub struct Interface {
    link: Option<Arc<Link>>,
    mac: MacAddress,
    saved_mac: Option<MacAddress>,
}

impl Interface {
    /// How it is now.
    #[must_use]
    pub fn network(&self) -> Network {
        let tap = self.link.as_ref().and_then(|link| link.tap.name());
        Network {
            tap: tap.map(str::to_owned),
            mac: self.mac,
            saved_mac: self.saved_mac,
            link_up: self.link.as_ref().is_some_and(|link| !link.is_lost()),
        }
    }
}

/// What there is with a tap.
struct Host {
    link: Arc<Link>,
    poll: Poll,
    wake: Wake,
    thread: Option<JoinHandle<()>>,
}

/// A virtio network device.
pub struct Net {
    host: Option<Host>,
    mac: MacAddress,
    saved_mac: Option<MacAddress>,
    /// Room for one frame and its header, and a byte that tells a longer one.
    frame: Box<[u8]>,
}

impl Net {
    /// A device on a tap, or with its link down. Without an address it gets a
    /// random one, locally administered.
    ///
    /// # Errors
    /// The operating system's.
    pub fn new(tap: Option<Tap>, mac: Option<MacAddress>) -> Result<Self> {
        let mac = match mac {
            Some(mac) => mac,
            None => random_mac()?,
        };
        Ok(Self {
            host: tap.map(Host::new).transpose()?,
            mac,
            saved_mac: None,
            frame: vec![0; HEADER_BYTES + MAX_FRAME_BYTES + 1].into(),
        })
    }

    fn is_link_up(&self) -> bool {
        self.host.as_ref().is_some_and(|host| !host.link.is_lost())
    }

    /// Gives the guest what the host sent, as long as it has buffers.
    fn receive(&mut self, queue: &mut Virtqueue<'_>) -> Result<(), Broken> {
        let Some(host) = &self.host else {
            return Ok(());
        };
        let mut dropped = 0;
        while queue.has_next()? && dropped < MAX_DROPPED {
            if host.link.is_lost() {
                return Ok(());
            }
            let length = match host.link.tap.receive(&mut self.frame) {
                Ok(0) => {
                    host.lose(Errno::PIPE);
                    return Ok(());
                }
                Ok(length) => length,
                Err(Errno::AGAIN) => {
                    host.poll.wait_for_frame(&host.link.tap);
                    return Ok(());
                }
                // The tap has no form for this frame, and has thrown it away.
                Err(Errno::INVAL) => {
                    dropped += 1;
                    continue;
                }
                // EBADFD, EIO: it is deleted.
                Err(error) => {
                    host.lose(error);
                    return Ok(());
                }
            };
            // A driver that took it back meanwhile loses the frame.
            let Some(chain) = queue.pop()? else {
                return Ok(());
            };
            let written_bytes = deliver(&chain, &mut self.frame[..length])?;
            queue.push(&chain, written_bytes)?;
        }
        if queue.is_over() || dropped == MAX_DROPPED {
            // There may be more of both. Others first: the thread goes on.
            host.poll.wait_for_frame(&host.link.tap);
        }
        Ok(())
    }

    /// Gives the host what the guest sends.
    fn send(&mut self, queue: &mut Virtqueue<'_>) -> Result<(), Broken> {
        let host = self.host.as_ref().filter(|host| !host.link.is_lost());
        while let Some(chain) = queue.pop()? {
            if let (Some(host), Some(length)) = (host, frame_bytes(&chain)) {
                let frame = &mut self.frame[..HEADER_BYTES + length];
                // No offload was agreed on: what the header says means nothing.
                frame[..HEADER_BYTES].fill(0);
                chain.read_at(HEADER_BYTES as u64, &mut frame[HEADER_BYTES..])?;
                host.send(frame);
            }
            queue.push(&chain, 0)?;
        }
        Ok(())
    }
}

/// The length of the frame in a request to send; `None` if it is none.
fn frame_bytes(chain: &Chain<'_>) -> Option<usize> {
    let length = chain.readable_bytes().checked_sub(HEADER_BYTES as u64)?;
    let length = usize::try_from(length).ok()?;
    (MIN_FRAME_BYTES..=MAX_FRAME_BYTES)
        .contains(&length)
        .then_some(length)
}

/// Writes a frame behind a header of the device's own into the guest's buffer.
/// Returns how many bytes were written: none if it does not fit or is no frame.
fn deliver(chain: &Chain<'_>, frame: &mut [u8]) -> Result<u32, Broken> {
    let lengths = HEADER_BYTES + MIN_FRAME_BYTES..=HEADER_BYTES + MAX_FRAME_BYTES;
    if !lengths.contains(&frame.len()) || chain.writable_bytes() < frame.len() as u64 {
        return Ok(0);
    }
    frame[..HEADER_BYTES].fill(0);
    frame[BUFFERS_AT] = 1;
    chain.write_at(0, frame)?;
    Ok(u32::try_from(frame.len()).unwrap_or(0))
}

fn random_mac() -> Result<MacAddress> {
    let mut bytes = [0; 6];
    let mut filled = 0;
    while filled < bytes.len() {
        let flags = rustix::rand::GetRandomFlags::empty();
        match rustix::rand::getrandom(&mut bytes[filled..], flags) {
            Ok(got) => filled += got,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error).os("choose an address at random"),
        }
    }
    Ok(MacAddress::local(bytes))
}

impl Host {
    fn new(tap: Tap) -> Result<Self> {
        let wake = Wake::new().os("create an event")?;
        let poll = Poll::new(&wake, &tap).os("wait for a tap")?;
        Ok(Self {
            link: Arc::new(Link {
                tap,
                lost: AtomicBool::new(false),
                ended: AtomicBool::new(false),
            }),
            poll,
            wake,
            thread: None,
        })
    }

    /// A frame that the host does not take is lost, as on a cable.
    fn send(&self, frame: &[u8]) {
        if let Err(error) = self.link.tap.send(frame) {
            tracing::debug!(%error, "a frame is lost");
        }
    }

    /// The tap is none any more: the thread tells the guest.
    fn lose(&self, error: Errno) {
        if self.link.lose() {
            tracing::warn!(%error, "the guest's tap is gone");
            self.wake.up();
        }
    }
}

impl VirtioDevice for Net {
    fn id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_STATUS
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// `struct virtio_net_config`, as far as the features reach.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 8];
        config[..6].copy_from_slice(&self.mac.bytes());
        if self.is_link_up() {
            config[6..].copy_from_slice(&VIRTIO_NET_S_LINK_UP.to_le_bytes()[..2]);
        }
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let there = config.get(from..).unwrap_or_default();
        let length = there.len().min(data.len());
        data[..length].copy_from_slice(&there[..length]);
    }

    fn process(&mut self, queue_index: usize, queue: &mut Virtqueue<'_>) -> Result<(), Broken> {
        match queue_index {
            RECEIVE => self.receive(queue),
            SEND => self.send(queue),
            _ => Ok(()),
        }
    }

    fn attached(&mut self, transport: Weak<Mutex<Transport>>) {
        let Some(host) = &mut self.host else {
            return;
        };
        let (link, wake) = (host.link.clone(), host.wake.clone());
        let started = host
            .poll
            .share()
            .and_then(|poll| thread::spawn(poll, link, wake, transport));
        match started {
            Ok(thread) => host.thread = Some(thread),
            Err(error) => {
                // Nobody would hear the host. No driver has looked yet.
                tracing::error!(%error, "no thread for the guest's network");
                host.link.lose();
            }
        }
    }

    fn save(&self) -> VirtioDeviceState {
        VirtioDeviceState::Net {
            mac: self.mac.bytes(),
        }
    }

    fn restore(&mut self, state: &VirtioDeviceState) -> Result<(), &'static str> {
        let VirtioDeviceState::Net { mac } = *state else {
            return Err("kind");
        };
        let saved = MacAddress::new(mac).map_err(|NotAMacAddress| "address")?;
        self.saved_mac = Some(saved);
        Ok(())
    }

    fn config_differs(&self) -> bool {
        self.saved_mac.is_some()
    }

    fn interface(&self) -> Option<Interface> {
        Some(Interface {
            link: self.host.as_ref().map(|host| host.link.clone()),
            mac: self.mac,
            saved_mac: self.saved_mac,
        })
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.link.ended.store(true, Ordering::Release);
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
