//! A queue of a device: its registers, and the ring once it is in use.

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT as _, QueueState, QueueT as _};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

use super::broken::Broken;
use super::{Chain, Host};
use crate::state::VirtioQueueState;

/// A queue as its registers describe it.
pub(super) struct QueueSlot {
    max_size: u16,
    size: u16,
    descriptor_table: u64,
    available_ring: u64,
    used_ring: u64,
    /// The queue in use.
    active: Option<Queue>,
}

/// An address register of a queue.
#[derive(Clone, Copy)]
pub(super) enum Address {
    Descriptors,
    Available,
    Used,
}

impl QueueSlot {
    pub fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            descriptor_table: 0,
            available_ring: 0,
            used_ring: 0,
            active: None,
        }
    }

    pub fn max_size(&self) -> u16 {
        self.max_size
    }

    pub fn is_ready(&self) -> bool {
        self.active.is_some()
    }

    /// The driver chooses a size; whether it is one is seen when the queue is put
    /// to use. A queue in use stays as it is.
    pub fn set_size(&mut self, size: u32) {
        if self.active.is_none() {
            self.size = u16::try_from(size).unwrap_or(0);
        }
    }

    /// The driver chooses half of an address.
    pub fn set_address(&mut self, which: Address, high: bool, value: u32) {
        if self.active.is_some() {
            return;
        }
        let address = match which {
            Address::Descriptors => &mut self.descriptor_table,
            Address::Available => &mut self.available_ring,
            Address::Used => &mut self.used_ring,
        };
        let (value, kept) = (u64::from(value), *address);
        *address = if high {
            kept & 0xffff_ffff | value << 32
        } else {
            kept & !0xffff_ffff | value
        };
    }

    /// Puts the queue to use, from its beginning.
    pub fn enable(&mut self, memory: &GuestMemoryMmap<()>) -> Result<(), Broken> {
        if self.active.is_none() {
            self.active = Some(self.build(memory, 0, 0)?);
        }
        Ok(())
    }

    /// Takes the queue out of use.
    pub fn disable(&mut self) {
        self.active = None;
    }

    fn build(
        &self,
        memory: &GuestMemoryMmap<()>,
        next_avail: u16,
        next_used: u16,
    ) -> Result<Queue, Broken> {
        let queue = Queue::try_from(QueueState {
            max_size: self.max_size,
            next_avail,
            next_used,
            event_idx_enabled: false,
            size: self.size,
            ready: true,
            desc_table: self.descriptor_table,
            avail_ring: self.available_ring,
            used_ring: self.used_ring,
        })
        .map_err(Broken::Ring)?;
        if queue.is_valid(memory) {
            Ok(queue)
        } else {
            Err(Broken::Chain("has its rings outside guest memory"))
        }
    }

    /// The queue in use, for one pass of a device over it.
    pub fn open<'m>(
        &'m mut self,
        memory: &'m GuestMemoryMmap<()>,
        host: &'m Host,
    ) -> Option<Virtqueue<'m>> {
        let queue = self.active.as_mut()?;
        Some(Virtqueue {
            left: queue.size(),
            longest: self.max_size,
            queue,
            memory,
            host,
            used: false,
        })
    }

    pub fn save(&self) -> VirtioQueueState {
        let queue = self.active.as_ref();
        VirtioQueueState {
            max_size: self.max_size,
            size: self.size,
            ready: queue.is_some(),
            descriptor_table: self.descriptor_table,
            available_ring: self.available_ring,
            used_ring: self.used_ring,
            next_available: queue.map_or(0, |queue| queue.next_avail()),
            next_used: queue.map_or(0, |queue| queue.next_used()),
        }
    }

    /// As saved, if such a queue can be in this memory.
    pub fn restore(state: &VirtioQueueState, memory: &GuestMemoryMmap<()>) -> Result<Self, Broken> {
        let mut slot = Self {
            max_size: state.max_size,
            size: state.size,
            descriptor_table: state.descriptor_table,
            available_ring: state.available_ring,
            used_ring: state.used_ring,
            active: None,
        };
        if state.ready {
            slot.active = Some(slot.build(memory, state.next_available, state.next_used)?);
        }
        Ok(slot)
    }
}

/// A queue during one pass of a device over it.
pub struct Virtqueue<'m> {
    queue: &'m mut Queue,
    memory: &'m GuestMemoryMmap<()>,
    host: &'m Host,
    /// How many more buffers this pass takes.
    left: u16,
    /// The longest chain.
    longest: u16,
    used: bool,
}

impl<'m> Virtqueue<'m> {
    /// Whether [`Virtqueue::pop`] has something to give.
    ///
    /// # Errors
    /// The queue is not one.
    pub fn has_next(&self) -> Result<bool, Broken> {
        let available = self.queue.avail_idx(self.memory, Ordering::Acquire);
        let available = available.map_err(Broken::Ring)?.0;
        Ok(self.may_take() && available != self.queue.next_avail())
    }

    /// Whether this pass may take no more, whatever there is.
    #[must_use]
    pub fn is_over(&self) -> bool {
        !self.may_take()
    }

    /// Nothing is begun in a machine that is about to stop.
    fn may_take(&self) -> bool {
        self.left > 0 && !self.host.is_pausing()
    }

    /// Whether the driver has put more into the queue than was taken.
    pub(super) fn has_more(&self) -> bool {
        let available = self.queue.avail_idx(self.memory, Ordering::Acquire);
        available.is_ok_and(|available| available.0 != self.queue.next_avail())
    }

    /// The request that was taken last, and not given back, is the next one again.
    pub fn put_back(&mut self) {
        let next = self.queue.next_avail();
        self.queue.set_next_avail(next.wrapping_sub(1));
        self.left += 1;
    }

    /// The next request, or `None` when there is none or this pass has taken as
    /// many as the queue can hold. A driver that adds more meanwhile notifies the
    /// device of it once more.
    ///
    /// # Errors
    /// The queue is not one.
    pub fn pop(&mut self) -> Result<Option<Chain<'m>>, Broken> {
        if !self.may_take() {
            return Ok(None);
        }
        let next = self.queue.iter(self.memory).map_err(Broken::Ring)?.next();
        let Some(descriptors) = next else {
            return Ok(None);
        };
        self.left -= 1;
        Chain::read(self.memory, descriptors, self.longest).map(Some)
    }

    /// Gives a request back to the driver; the device wrote `written_bytes` to it.
    ///
    /// # Errors
    /// The queue is not one.
    pub fn push(&mut self, chain: &Chain<'_>, written_bytes: u32) -> Result<(), Broken> {
        self.queue
            .add_used(self.memory, chain.head(), written_bytes)
            .map_err(Broken::Ring)?;
        self.used = true;
        Ok(())
    }

    /// Whether the driver has something to look at, and does not look anyway
    /// (virtio 1.2, section 2.7.7).
    pub(super) fn wants_interrupt(&self) -> bool {
        if !self.used {
            return false;
        }
        // A driver that wants to be interrupted again says so, then looks whether it
        // was too late; so it is looked at after what was given back can be seen.
        fence(Ordering::SeqCst);
        let flags = GuestAddress(self.queue.avail_ring());
        let flags: u16 = self.memory.load(flags, Ordering::Relaxed).unwrap_or(0);
        u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0
    }
}
