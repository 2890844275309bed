//! The device's thread: it waits for frames of the host, and has the guest given
//! them.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, EventData, EventFlags};

use super::link::{Link, RECEIVE};
use super::tap::Tap;
use crate::confine::{self, Role};
use crate::devices::virtio::{Transport, Wake};

const STACK_BYTES: usize = 256 << 10;
/// What an event is about.
const WAKE: u64 = 0;
const TAP: u64 = 1;

/// An epoll instance. The tap is in it for one event at a time: a frame that the
/// guest has no buffer for must not wake the thread again and again.
pub(super) struct Poll(OwnedFd);

impl Poll {
    /// Nobody waits for a frame yet.
    pub fn new(wake: &Wake, tap: &Tap) -> rustix::io::Result<Self> {
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&poll, wake.fd(), EventData::new_u64(WAKE), EventFlags::IN)?;
        epoll::add(&poll, tap, EventData::new_u64(TAP), EventFlags::ONESHOT)?;
        Ok(Self(poll))
    }

    /// Another handle of the same instance.
    pub fn share(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// The thread is to look when the tap has a frame, at once if it has one.
    pub fn wait_for_frame(&self, tap: &Tap) {
        let flags = EventFlags::IN | EventFlags::ONESHOT;
        if let Err(error) = epoll::modify(&self.0, tap, EventData::new_u64(TAP), flags) {
            tracing::error!(%error, "cannot wait for the guest's frames");
        }
    }

    fn wait(&self) -> rustix::io::Result<Vec<(u64, EventFlags)>> {
        let mut events: Vec<epoll::Event> = Vec::with_capacity(2);
        match epoll::wait(&self.0, spare_capacity(&mut events), None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        // The fields of a packed structure are copied, not borrowed.
        let events = events.iter().map(|event| {
            let (data, flags) = (event.data, event.flags);
            (data.u64(), flags)
        });
        Ok(events.collect())
    }
}

/// Starts the thread. It ends with the device.
pub(super) fn spawn(
    poll: Poll,
    link: Arc<Link>,
    wake: Wake,
    transport: Weak<Mutex<Transport>>,
) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name("net".to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || run(&poll, &link, &wake, &transport))
}

fn run(poll: &Poll, link: &Link, wake: &Wake, transport: &Weak<Mutex<Transport>>) {
    confine::enter(Role::Net);
    loop {
        let events = match poll.wait() {
            Ok(events) => events,
            Err(error) => {
                tracing::error!(%error, "the guest's network is no longer served");
                return;
            }
        };
        if link.ended.load(Ordering::Acquire) {
            return;
        }
        let (mut news, mut frames) = (false, false);
        for (source, flags) in events {
            if source == WAKE {
                // The device has lost its tap.
                wake.heard();
                news = true;
            } else if flags.contains(EventFlags::ERR) {
                news |= link.lose();
            } else {
                frames = true;
            }
        }
        let Some(transport) = transport.upgrade() else {
            return;
        };
        let mut transport = transport.lock().unwrap_or_else(PoisonError::into_inner);
        if news {
            transport.config_changed();
        }
        if frames {
            transport.serve(RECEIVE);
        }
    }
}
