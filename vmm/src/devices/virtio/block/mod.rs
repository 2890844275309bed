//! The block device, virtio 1.2, section 5.2: one queue over a [`Disk`].

mod request;
#[cfg(test)]
mod tests;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::disk::{DISK_BLOCK_BYTES, SECTOR_BYTES};
use crate::rate::Rate;

use super::{Broken, Disk, VirtioDevice, VirtioDeviceState, Virtqueue};

const QUEUE_SIZE: u16 = 128;
const QUEUE_SIZES: [u16; 1] = [QUEUE_SIZE];
/// The most buffers of data in a request: with header and status as many as the
/// queue holds.
const MAX_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// The longest buffer of a request, in bytes.
const MAX_SEGMENT_BYTES: u32 = 64 << 10;
/// The most data of a request, in bytes.
const MAX_DATA_BYTES: u64 = MAX_SEGMENTS as u64 * MAX_SEGMENT_BYTES as u64;
/// The most ranges of a discard or write-zeroes request.
const MAX_RANGES: u32 = 16;
/// The most sectors of a range that is discarded: 1 GiB.
const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// The most sectors of a range that is zeroed, which may have to be written:
/// 4 MiB.
const MAX_ZERO_SECTORS: u32 = 1 << 13;
const CONFIG_BYTES: usize = 60;

/// What became of a request.
enum Answer {
    /// The driver was told how it went.
    Done {
        /// How many bytes were written to the request.
        written_bytes: u32,
    },
    /// The host could not do it, for the cause that is told. It may be half done, and
    /// is to be done once more.
    HostFailed(String),
}

/// A virtio block device.
pub struct Block {
    disk: Disk,
    /// The driver cannot ask for a flush, so that each write is one.
    write_through: bool,
    /// On the way between disk and guest memory.
    buffer: Vec<u8>,
    /// What the host failed in.
    fault: Option<String>,
    flush_failures: Rate,
}

impl Block {
    /// A block device with this disk.
    #[must_use]
    pub fn new(disk: Disk) -> Self {
        Self {
            disk,
            write_through: true,
            buffer: Vec::new(),
            fault: None,
            flush_failures: Rate::default(),
        }
    }

    fn capacity_sectors(&self) -> u64 {
        self.disk.size_bytes() / SECTOR_BYTES
    }

    /// `struct virtio_blk_config`, virtio 1.2, section 5.2.4, up to the members
    /// for what is not offered.
    fn config(&self) -> [u8; CONFIG_BYTES] {
        let mut config = [0; CONFIG_BYTES];
        let mut put = |offset: usize, bytes: &[u8]| {
            config[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        let exponent = (DISK_BLOCK_BYTES / SECTOR_BYTES).trailing_zeros();
        put(0, &self.capacity_sectors().to_le_bytes());
        put(8, &MAX_SEGMENT_BYTES.to_le_bytes());
        put(12, &MAX_SEGMENTS.to_le_bytes());
        // blk_size, then the topology: physical blocks, and the least and best
        // sizes of access, in blocks.
        put(20, &u32::try_from(SECTOR_BYTES).unwrap_or(0).to_le_bytes());
        put(24, &exponent.to_le_bytes()[..1]);
        put(26, &(1_u16 << exponent).to_le_bytes());
        put(28, &(1_u32 << exponent).to_le_bytes());
        put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &MAX_RANGES.to_le_bytes());
        put(44, &(1_u32 << exponent).to_le_bytes());
        put(48, &MAX_ZERO_SECTORS.to_le_bytes());
        put(52, &MAX_RANGES.to_le_bytes());
        // write_zeroes_may_unmap
        put(56, &[1]);
        config
    }
}

impl VirtioDevice for Block {
    fn id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let common = [
            VIRTIO_BLK_F_SIZE_MAX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
        ];
        let writable = [
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_DISCARD,
            VIRTIO_BLK_F_WRITE_ZEROES,
        ];
        let by_access: &[u32] = if self.disk.is_read_only() {
            &[VIRTIO_BLK_F_RO]
        } else {
            &writable
        };
        let all = common.iter().chain(by_access);
        all.fold(0, |features, bit| features | 1 << bit)
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        let rest = usize::try_from(offset).ok().and_then(|at| config.get(at..));
        for (byte, value) in data.iter_mut().zip(rest.unwrap_or_default()) {
            *byte = *value;
        }
    }

    fn negotiated(&mut self, features: u64) {
        self.write_through = features & 1 << VIRTIO_BLK_F_FLUSH == 0;
    }

    fn process(&mut self, _queue_index: usize, queue: &mut Virtqueue<'_>) -> Result<(), Broken> {
        while let Some(chain) = queue.pop()? {
            match self.answer(&chain)? {
                Answer::Done { written_bytes } => queue.push(&chain, written_bytes)?,
                Answer::HostFailed(what) => {
                    queue.put_back();
                    self.fault = Some(what);
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn take_fault(&mut self) -> Option<String> {
        self.fault.take()
    }

    fn reset(&mut self) {
        self.write_through = true;
    }

    fn save(&self) -> VirtioDeviceState {
        VirtioDeviceState::Block {
            capacity_sectors: self.capacity_sectors(),
            read_only: self.disk.is_read_only(),
        }
    }

    fn restore(&mut self, state: &VirtioDeviceState) -> Result<(), &'static str> {
        let VirtioDeviceState::Block {
            capacity_sectors,
            read_only,
        } = state
        else {
            return Err("kind");
        };
        if *capacity_sectors != self.capacity_sectors() {
            return Err("the size of its disk");
        }
        if *read_only != self.disk.is_read_only() {
            return Err("whether its disk can be written");
        }
        Ok(())
    }

    fn disk(&self) -> Option<&Disk> {
        Some(&self.disk)
    }
}
