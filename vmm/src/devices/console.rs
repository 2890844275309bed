//! The console: what the guest printed last, for any number of readers.
//!
//! A ring of the newest bytes. The guest never waits for a reader: one that is
//! too slow misses the oldest bytes, and is told how many.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How much of the guest's output is kept, in bytes.
const KEPT_BYTES: usize = 64 << 10;

/// The newest output of the guest.
#[derive(Default)]
pub struct Console {
    ring: Mutex<Ring>,
    changed: Condvar,
}

#[derive(Default)]
struct Ring {
    bytes: VecDeque<u8>,
    /// Bytes ever written.
    written: u64,
    closed: bool,
}

impl Ring {
    fn start(&self) -> u64 {
        self.written - self.bytes.len() as u64
    }
}

/// A part of the output.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Output {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Where to go on reading.
    pub next: u64,
    /// Bytes before these that were lost because the reader was too slow.
    pub missed: u64,
}

impl Console {
    /// An empty console.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds output.
    pub fn write(&self, bytes: &[u8]) {
        let mut ring = self.lock();
        ring.written += bytes.len() as u64;
        ring.bytes.extend(bytes);
        let excess = ring.bytes.len().saturating_sub(KEPT_BYTES);
        ring.bytes.drain(..excess);
        drop(ring);
        self.changed.notify_all();
    }

    /// No more output will come.
    pub fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// Bytes written since the machine began.
    pub fn written(&self) -> u64 {
        self.lock().written
    }

    /// Output from position `from` on (0: all that is kept). Waits for some up
    /// to `wait`; an empty answer is for nothing new. `None`: closed, and all
    /// was read.
    pub fn read(&self, from: u64, wait: Duration) -> Option<Output> {
        let ring = self.lock();
        let (ring, _) = self
            .changed
            .wait_timeout_while(ring, wait, |ring| ring.written <= from && !ring.closed)
            .unwrap_or_else(PoisonError::into_inner);
        if ring.written <= from {
            return (!ring.closed).then_some(Output {
                bytes: Vec::new(),
                next: ring.written,
                missed: 0,
            });
        }
        let start = ring.start();
        let skip = usize::try_from(from.saturating_sub(start)).unwrap_or(usize::MAX);
        Some(Output {
            bytes: ring.bytes.iter().skip(skip).copied().collect(),
            next: ring.written,
            missed: start.saturating_sub(from),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_follows_the_output() {
        let console = Console::new();
        console.write(b"one ");
        let first = console.read(0, Duration::ZERO).unwrap();
        assert_eq!((first.bytes.as_slice(), first.next), (&b"one "[..], 4));
        console.write(b"two");
        let second = console.read(first.next, Duration::ZERO).unwrap();
        assert_eq!((second.bytes.as_slice(), second.missed), (&b"two"[..], 0));
        let nothing = console.read(second.next, Duration::ZERO).unwrap();
        assert!(nothing.bytes.is_empty());
        console.close();
        assert_eq!(console.read(second.next, Duration::ZERO), None);
    }

    #[test]
    fn a_slow_reader_misses_the_oldest_bytes_and_is_told() {
        let console = Console::new();
        console.write(&vec![b'a'; KEPT_BYTES]);
        console.write(b"xyz");
        let output = console.read(0, Duration::ZERO).unwrap();
        assert_eq!(output.missed, 3);
        assert_eq!(output.bytes.len(), KEPT_BYTES);
        assert!(output.bytes.ends_with(b"axyz"));
    }
}
