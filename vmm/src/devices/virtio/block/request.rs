//! Requests to a block device, virtio 1.2, section 5.2.6.
//!
//! ```text
//! readable   0  type u32, reserved u32, sector u64
//!           16  data to write, or ranges {sector u64, sectors u32, flags u32}
//! writable   0  data that is read
//!         last  status u8
//! ```

use std::io;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::GuestMemoryError;

use super::super::disk::SECTOR_BYTES;
use super::super::{Broken, Chain};
use super::{Answer, Block, MAX_DATA_BYTES, MAX_DISCARD_SECTORS, MAX_RANGES, MAX_ZERO_SECTORS};

const HEADER_BYTES: u64 = 16;
const RANGE_BYTES: u64 = 16;
/// How much goes between disk and guest memory at a time, in bytes.
const PIECE_BYTES: u64 = 128 << 10;

/// Why a request is answered with an error.
enum Failure {
    /// The device has no such request.
    Unsupported,
    /// The driver asked for what cannot be.
    Invalid(&'static str),
    /// The disk failed.
    Disk(io::Error),
    /// What was written is perhaps not durable, and nothing that is done again makes it
    /// so: after a failed fsync(2) the kernel takes the lost pages for written.
    Flush(io::Error),
    /// The request's buffers are not in guest memory.
    Memory(GuestMemoryError),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Disk(error)
    }
}

impl From<GuestMemoryError> for Failure {
    fn from(error: GuestMemoryError) -> Self {
        Self::Memory(error)
    }
}

impl Block {
    /// Does what the request asks, and tells the driver how that went, unless the host
    /// was at fault.
    ///
    /// # Errors
    /// There is no header, or no place for the status.
    pub(super) fn answer(&mut self, chain: &Chain<'_>) -> Result<Answer, Broken> {
        let mut header = [0; HEADER_BYTES as usize];
        chain.read_at(0, &mut header)?;
        let [kind, _, sector_low, sector_high] = words(header);
        let sector = u64::from(sector_high) << 32 | u64::from(sector_low);
        let Some(data_bytes) = chain.writable_bytes().checked_sub(1) else {
            return Err(Broken::Chain("has no place for its status"));
        };
        let done = match kind {
            VIRTIO_BLK_T_IN => self.read(chain, sector, data_bytes),
            VIRTIO_BLK_T_OUT => self.write(chain, sector),
            VIRTIO_BLK_T_FLUSH => self.flush().map(|()| 0),
            VIRTIO_BLK_T_GET_ID => self.identify(chain, data_bytes),
            VIRTIO_BLK_T_DISCARD => self.zero(chain, MAX_DISCARD_SECTORS, 0),
            VIRTIO_BLK_T_WRITE_ZEROES => {
                self.zero(chain, MAX_ZERO_SECTORS, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP)
            }
            _ => Err(Failure::Unsupported),
        };
        let (status, written_bytes) = match done {
            Ok(written_bytes) => (VIRTIO_BLK_S_OK, written_bytes),
            Err(Failure::Disk(error)) if error.kind() != io::ErrorKind::ReadOnlyFilesystem => {
                let done = if kind == VIRTIO_BLK_T_IN {
                    "read"
                } else {
                    "write"
                };
                let disk = self.disk.name();
                return Ok(Answer::HostFailed(format!(
                    "{disk}: cannot {done}: {error}"
                )));
            }
            Err(failure) => (self.status(kind, sector, &failure), 0),
        };
        let status = u8::try_from(status).unwrap_or(u8::MAX);
        chain.write_at(data_bytes, &[status])?;
        Ok(Answer::Done {
            written_bytes: u32::try_from(written_bytes + 1).unwrap_or(u32::MAX),
        })
    }

    fn flush(&self) -> Result<(), Failure> {
        self.disk.flush().map_err(Failure::Flush)
    }

    /// The status for a failure, which the log hears of when it is the host's.
    fn status(&self, kind: u32, sector: u64, failure: &Failure) -> u32 {
        let disk = self.disk.name();
        match failure {
            Failure::Unsupported => return VIRTIO_BLK_S_UNSUPP,
            Failure::Invalid(what) => tracing::debug!(disk, kind, sector, what, "refused"),
            Failure::Memory(error) => tracing::debug!(disk, kind, sector, %error, "refused"),
            // A read-only disk refuses by its mode, which is the driver's doing; all else
            // is the host's.
            Failure::Disk(error) => tracing::debug!(disk, kind, sector, %error, "refused"),
            Failure::Flush(error) => self.flush_failures.log(|more| {
                tracing::warn!(disk, %error, more, "what was written may not be durable");
            }),
        }
        VIRTIO_BLK_S_IOERR
    }

    fn read(&mut self, chain: &Chain<'_>, sector: u64, bytes: u64) -> Result<u64, Failure> {
        let start = self.checked_start(sector, bytes)?;
        self.for_pieces(bytes, |block, at, piece| {
            block.disk.read_at(start + at, piece)?;
            Ok(chain.write_at(at, piece)?)
        })?;
        Ok(bytes)
    }

    fn write(&mut self, chain: &Chain<'_>, sector: u64) -> Result<u64, Failure> {
        let bytes = chain.readable_bytes() - HEADER_BYTES;
        let start = self.checked_start(sector, bytes)?;
        self.for_pieces(bytes, |block, at, piece| {
            chain.read_at(HEADER_BYTES + at, piece)?;
            Ok(block.disk.write_at(start + at, piece)?)
        })?;
        if self.write_through {
            self.flush()?;
        }
        Ok(0)
    }

    /// The disk's name, padded with zeros, as far as there is room.
    fn identify(&self, chain: &Chain<'_>, room_bytes: u64) -> Result<u64, Failure> {
        let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
        for (byte, value) in id.iter_mut().zip(self.disk.name().bytes()) {
            *byte = value;
        }
        let room = usize::try_from(room_bytes)
            .unwrap_or(id.len())
            .min(id.len());
        chain.write_at(0, &id[..room])?;
        Ok(room as u64)
    }

    /// Makes the request's ranges zeros, all or none. A discarded range, too:
    /// what it held must not show, and least of all what is under an overlay.
    fn zero(&self, chain: &Chain<'_>, max_sectors: u32, known_flags: u32) -> Result<u64, Failure> {
        let bytes = chain.readable_bytes() - HEADER_BYTES;
        let ranges = bytes / RANGE_BYTES;
        if !bytes.is_multiple_of(RANGE_BYTES) || !(1..=u64::from(MAX_RANGES)).contains(&ranges) {
            return Err(Failure::Invalid("a number of ranges that is not offered"));
        }
        let mut checked = Vec::new();
        for number in 0..ranges {
            let mut range = [0; RANGE_BYTES as usize];
            chain.read_at(HEADER_BYTES + number * RANGE_BYTES, &mut range)?;
            let [sector_low, sector_high, sectors, flags] = words(range);
            if flags & !known_flags != 0 {
                return Err(Failure::Unsupported);
            }
            if sectors > max_sectors {
                return Err(Failure::Invalid("a longer range than is offered"));
            }
            let sector = u64::from(sector_high) << 32 | u64::from(sector_low);
            let length = u64::from(sectors) * SECTOR_BYTES;
            checked.push((self.start(sector, length)?, length));
        }
        for (start, length) in checked {
            self.disk.zero(start, length)?;
        }
        if self.write_through {
            self.flush()?;
        }
        Ok(0)
    }

    /// Where on the disk the data of a request begins, in bytes.
    fn checked_start(&self, sector: u64, bytes: u64) -> Result<u64, Failure> {
        if !bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(Failure::Invalid("a part of a sector"));
        }
        if bytes > MAX_DATA_BYTES {
            return Err(Failure::Invalid("more data than is offered"));
        }
        self.start(sector, bytes)
    }

    fn start(&self, sector: u64, bytes: u64) -> Result<u64, Failure> {
        let start = sector.checked_mul(SECTOR_BYTES);
        let inside = start.filter(|start| {
            let end = start.checked_add(bytes);
            end.is_some_and(|end| end <= self.disk.size_bytes())
        });
        inside.ok_or(Failure::Invalid("beyond the end of the disk"))
    }

    /// Calls `work` for each piece of the data, with its offset and a buffer.
    fn for_pieces(
        &mut self,
        bytes: u64,
        mut work: impl FnMut(&Self, u64, &mut [u8]) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut at = 0;
        let mut done = Ok(());
        while at < bytes && done.is_ok() {
            let length = PIECE_BYTES.min(bytes - at);
            let piece = usize::try_from(length).unwrap_or(0);
            if buffer.len() < piece {
                buffer.resize(piece, 0);
            }
            done = work(self, at, &mut buffer[..piece]);
            at += length;
        }
        self.buffer = buffer;
        done
    }
}

/// Sixteen bytes as little-endian words.
fn words(bytes: [u8; 16]) -> [u32; 4] {
    let (words, _) = bytes.as_chunks::<4>();
    [0, 1, 2, 3].map(|at| u32::from_le_bytes(words[at]))
}
