//! One request of a driver: a chain of buffers in guest memory.
//!
//! The descriptors are read once, when the chain is taken from its queue. What
//! the guest makes of them later changes nothing.

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::broken::Broken;

/// A request: buffers that the device reads, then buffers that it writes
/// (virtio 1.2, section 2.7.4.2).
pub struct Chain<'m> {
    memory: &'m GuestMemoryMmap<()>,
    head: u16,
    /// The readable buffers, then the writable ones.
    buffers: Vec<Buffer>,
    readable: usize,
}

#[derive(Clone, Copy)]
struct Buffer {
    address: GuestAddress,
    length: u32,
}

impl<'m> Chain<'m> {
    /// Reads the descriptors; there are at most `limit`.
    pub(super) fn read(
        memory: &'m GuestMemoryMmap<()>,
        descriptors: DescriptorChain<&GuestMemoryMmap<()>>,
        limit: u16,
    ) -> Result<Self, Broken> {
        let mut chain = Self {
            memory,
            head: descriptors.head_index(),
            buffers: Vec::new(),
            readable: 0,
        };
        // The iterator ends early at whatever it cannot follow: an index or an
        // address out of range, a loop, more than 4 GiB.
        let mut ended = false;
        for descriptor in descriptors {
            if chain.buffers.len() == usize::from(limit) {
                return Err(Broken::Chain("has more buffers than its queue can hold"));
            }
            if !descriptor.is_write_only() {
                if chain.readable < chain.buffers.len() {
                    return Err(Broken::Chain("has a readable buffer after a writable one"));
                }
                chain.readable += 1;
            }
            chain.buffers.push(Buffer {
                address: descriptor.addr(),
                length: descriptor.len(),
            });
            ended = !descriptor.has_next();
        }
        if ended {
            Ok(chain)
        } else {
            Err(Broken::Chain("does not end, or leads out of its table"))
        }
    }

    /// The index of its first descriptor.
    pub(super) fn head(&self) -> u16 {
        self.head
    }

    /// How many bytes the device may read.
    #[must_use]
    pub fn readable_bytes(&self) -> u64 {
        total(&self.buffers[..self.readable])
    }

    /// How many bytes the device may write.
    #[must_use]
    pub fn writable_bytes(&self) -> u64 {
        total(&self.buffers[self.readable..])
    }

    /// Fills `bytes` from `offset` of the readable buffers.
    ///
    /// # Errors
    /// The buffers are shorter, or not in guest memory.
    pub fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<(), GuestMemoryError> {
        let mut done = 0;
        for (address, length) in parts(&self.buffers[..self.readable], offset, bytes.len()) {
            self.memory
                .read_slice(&mut bytes[done..done + length], address)?;
            done += length;
        }
        complete(done, bytes.len())
    }

    /// Writes `bytes` at `offset` of the writable buffers.
    ///
    /// # Errors
    /// The buffers are shorter, or not in guest memory. What is may have been
    /// written.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), GuestMemoryError> {
        let mut done = 0;
        for (address, length) in parts(&self.buffers[self.readable..], offset, bytes.len()) {
            self.memory
                .write_slice(&bytes[done..done + length], address)?;
            done += length;
        }
        complete(done, bytes.len())
    }
}

fn total(buffers: &[Buffer]) -> u64 {
    buffers.iter().map(|buffer| u64::from(buffer.length)).sum()
}

fn complete(completed: usize, expected: usize) -> Result<(), GuestMemoryError> {
    if completed == expected {
        Ok(())
    } else {
        Err(GuestMemoryError::PartialBuffer {
            expected,
            completed,
        })
    }
}

/// The parts of the buffers that bytes `offset` to `offset + length` lie in; they
/// end where the buffers do, or where an address overflows.
fn parts(
    buffers: &[Buffer],
    offset: u64,
    length: usize,
) -> impl Iterator<Item = (GuestAddress, usize)> {
    let mut skip = offset;
    let mut left = length;
    buffers
        .iter()
        .map_while(move |buffer| {
            let skipped = skip.min(buffer.length.into());
            skip -= skipped;
            let there = usize::try_from(u64::from(buffer.length) - skipped).ok()?;
            let taken = there.min(left);
            left -= taken;
            let address = buffer.address.0.checked_add(skipped)?;
            Some((GuestAddress(address), taken))
        })
        .filter(|(_, taken)| *taken > 0)
}
