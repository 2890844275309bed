//! Entropy for the guest, virtio 1.2, section 5.4.

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::{Broken, Chain, VirtioDevice, VirtioDeviceState, Virtqueue};
use crate::rate::Rate;

const QUEUE_SIZES: [u16; 1] = [64];
/// The most bytes for one request: a driver that asks for more gets no more,
/// which the device may do.
const REQUEST_BYTES: u64 = 64 << 10;
const PIECE_BYTES: usize = 4096;

/// A source of entropy: the host's.
///
/// It has no state. Machines restored from one snapshot get different bytes from
/// the first request on, but share what their kernels had gathered before.
#[derive(Default)]
pub struct Entropy(());

impl Entropy {
    /// A source of entropy.
    #[must_use]
    pub fn new() -> Self {
        Self(())
    }
}

/// Fills the request; returns how many bytes it was given.
fn fill(chain: &Chain<'_>) -> Result<u32, Broken> {
    let wanted = chain.writable_bytes().min(REQUEST_BYTES);
    let mut done: u32 = 0;
    let mut piece = [0; PIECE_BYTES];
    while u64::from(done) < wanted {
        let left = usize::try_from(wanted - u64::from(done)).unwrap_or(PIECE_BYTES);
        let piece = &mut piece[..left.min(PIECE_BYTES)];
        // Blocks only before the host's own generator is ready, at its boot.
        let got = match getrandom(&mut *piece, GetRandomFlags::empty()) {
            Ok(got) => got,
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => {
                static RATE: Rate = Rate::new();
                RATE.log(|more| tracing::warn!(%error, more, "no entropy for the guest"));
                break;
            }
        };
        chain.write_at(done.into(), &piece[..got])?;
        done += u32::try_from(got).unwrap_or(0);
    }
    Ok(done)
}

impl VirtioDevice for Entropy {
    fn id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn process(&mut self, _queue_index: usize, queue: &mut Virtqueue<'_>) -> Result<(), Broken> {
        while let Some(chain) = queue.pop()? {
            let written_bytes = fill(&chain)?;
            queue.push(&chain, written_bytes)?;
        }
        Ok(())
    }

    fn save(&self) -> VirtioDeviceState {
        VirtioDeviceState::Entropy
    }

    fn restore(&mut self, state: &VirtioDeviceState) -> Result<(), &'static str> {
        match state {
            VirtioDeviceState::Entropy => Ok(()),
            _ => Err("kind"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::hostile::{hostile, survive};
    use super::super::testing::Driver;
    use super::super::testing::Part::{Readable, Writable};
    use super::*;

    fn entropy() -> Box<dyn VirtioDevice> {
        Box::new(Entropy::new())
    }

    #[test]
    fn entropy_is_not_what_was_there() {
        let mut driver = Driver::running(entropy());
        let (length, bytes) = driver.request(&[Writable(300)]);
        assert_eq!((length, bytes.len()), (300, 300));
        assert!(bytes.iter().any(|byte| *byte != 0xee));
        let (length, _) = driver.request(&[Writable(40_000), Writable(40_000)]);
        assert_eq!(length, 64 << 10);
        assert_eq!(driver.request(&[Readable(b"nothing to fill")]).0, 0);
    }

    #[test]
    fn restored_entropy_answers() {
        let mut driver = Driver::running(entropy());
        driver.request(&[Writable(8)]);
        driver.transport.quiesce();
        let saved = driver.transport.save();
        let mut driver = driver.restored(entropy(), &saved);
        // One that was lost may have been waited for.
        assert_eq!(driver.interrupts(), 1);
        driver.transport.resume();
        assert_eq!(driver.request(&[Writable(8)]).0, 8);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        #[test]
        fn a_hostile_driver_gets_nowhere(actions in hostile()) {
            survive(&entropy, actions);
        }
    }
}
