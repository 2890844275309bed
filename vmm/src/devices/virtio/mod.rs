//! Virtio devices: disks, entropy, sockets and network interfaces, each in a window of memory-mapped registers.
//!
//! - [`Transport`]: the registers of virtio-mmio, and the queues behind them.
//! - [`VirtioDevice`]: what tells one device from another.
//! - [`Block`] on a [`Disk`], [`Entropy`], [`Vsock`], [`Net`] on a [`Tap`]: the
//!   devices.
//!
//! A device works on the thread of the vCPU that notifies it, and is done when
//! the notification is. So a stopped guest has no request under way, and there is
//! nothing to drain before a snapshot. A machine that is to stop waits for one request
//! at most; what is left in a queue is done when it goes on. So is a request that the
//! host could not do (no space, an I/O error): the machine stops, and the driver never
//! hears of it. A device that also hears from outside
//! (network, sockets) has threads of its own; they reach their queues through the
//! transport's lock only, and a transport that was made quiet lets them wait.
//!
//! All that a driver writes is taken as an attempt to break out. Work for one
//! notification is bounded by the size of the queue times the largest request. A
//! driver that breaks the form of a queue finds its device waiting for a reset.
//!
//! Absent on purpose: PCI, legacy devices, packed queues, event indices (devices
//! do not work ahead, so that there is little to suppress), and devices that keep
//! a buffer beyond a notification.

mod block;
mod broken;
mod chain;
mod disk;
mod entropy;
mod host;
#[cfg(test)]
mod hostile;
mod net;
mod queue;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod transport;
mod vsock;
mod wake;

use std::sync::{Mutex, Weak};

use crate::acpi::VirtioWindow;
pub use crate::state::VirtioDeviceState;
pub use block::Block;
pub use broken::Broken;
pub use chain::Chain;
pub use disk::{
    Content, DISK_BLOCK_BYTES, Disk, Extent, FrozenDisk, MAX_DISK_BYTES, MOST_OVERLAY_LAYERS,
};
pub use entropy::Entropy;
pub(crate) use host::Host;
pub use net::{Interface, MacAddress, Net, Network, NotAMacAddress, Tap};
pub use queue::Virtqueue;
pub use transport::{Interrupt, Transport};
pub use vsock::{GuestCid, Vsock};
use wake::Wake;

/// The guest-physical address of the first device's window.
pub const VIRTIO_MMIO_BASE: u64 = 0xd000_0000;
/// The length of a device's window in bytes; the next one follows.
pub const VIRTIO_MMIO_LEN: u64 = 0x1000;

/// The interrupts of the devices, all edge triggered: what a PC's old devices
/// leave free (not timer, keyboard, cascade, COM1, clock and FPU), then the I/O
/// APIC's own.
const GSIS: [u32; crate::state::MAX_VIRTIO_DEVICES] =
    [5, 6, 7, 9, 10, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 22];

/// The guest-physical address of a device's window.
#[must_use]
pub fn virtio_address(device: usize) -> u64 {
    VIRTIO_MMIO_BASE + VIRTIO_MMIO_LEN * device as u64
}

/// The interrupt of a device; `None` if there cannot be as many.
#[must_use]
pub fn virtio_gsi(device: usize) -> Option<u32> {
    GSIS.get(device).copied()
}

/// The windows of the first devices, for the tables that tell a guest of them.
pub(crate) fn windows(devices: usize) -> Vec<VirtioWindow> {
    let window = |device| {
        Some(VirtioWindow {
            base: u32::try_from(virtio_address(device)).ok()?,
            len: u32::try_from(VIRTIO_MMIO_LEN).ok()?,
            gsi: virtio_gsi(device)?,
        })
    };
    (0..devices).map_while(window).collect()
}

/// What tells one virtio device from another.
///
/// The transport offers `VIRTIO_F_VERSION_1` and `VIRTIO_F_INDIRECT_DESC` for all.
pub trait VirtioDevice: Send {
    /// The kind of device, virtio 1.2, section 5.
    fn id(&self) -> u32;

    /// The features of the device, beyond those of the transport.
    fn features(&self) -> u64 {
        0
    }

    /// The largest size of each of its queues, powers of two up to 32768.
    fn queue_sizes(&self) -> &[u16];

    /// Reads the device's configuration into zeroed `data`. The guest chose
    /// `offset` and the length; what is beyond the configuration stays zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// The guest writes to the device's configuration.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Driver and device agreed on these features, or had when it was saved.
    fn negotiated(&mut self, _features: u64) {}

    /// Works on a queue: the guest notified it, or a thread of the device asked
    /// for it. Takes buffers with [`Virtqueue::pop`] and gives each of them back
    /// with [`Virtqueue::push`] before it returns.
    ///
    /// # Errors
    /// The queue is not one; the device then waits for a reset.
    fn process(&mut self, queue_index: usize, queue: &mut Virtqueue<'_>) -> Result<(), Broken>;

    /// What the host failed in during the last [`VirtioDevice::process`], which put
    /// the request back ([`Virtqueue::put_back`]).
    fn take_fault(&mut self) -> Option<String> {
        None
    }

    /// The driver starts anew.
    fn reset(&mut self) {}

    /// The device is behind this transport, and its threads may begin, if it has some:
    /// they call [`Transport::serve`] when they have something for the driver.
    fn attached(&mut self, _transport: Weak<Mutex<Transport>>) {}

    /// What a restored device needs besides queues and features.
    fn save(&self) -> VirtioDeviceState;

    /// Becomes as it was saved, or says in what it differs from what was saved.
    ///
    /// # Errors
    /// The state is of another device.
    fn restore(&mut self, state: &VirtioDeviceState) -> Result<(), &'static str>;

    /// Whether a restored device's configuration may be another than the one that
    /// the driver knows.
    fn config_differs(&self) -> bool {
        false
    }

    /// The disk that a snapshot of the machine has to include.
    fn disk(&self) -> Option<&Disk> {
        None
    }

    /// The network interface that the device is, once it is as it was saved.
    fn interface(&self) -> Option<Interface> {
        None
    }
}
