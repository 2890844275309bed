//! Requests under way, and what was waited for in vain; what was brought and could not be
//! kept on the disk.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::lazy::cache::{BLOCK_BYTES, blocks_of};
use crate::lazy::failure::Failure;
use crate::protocol::Name;

/// For so long after somebody waited in vain, who asks for the same gets one attempt, which
/// takes no longer than this: for the kernel a page whose reading ahead has failed is not
/// read yet, and it asks at once for the page alone.
pub const IN_VAIN: Duration = Duration::from_secs(1);
/// What is kept in memory where it cannot be kept on the disk.
const MEMORY_BYTES: usize = 32 << 20;

/// All of them.
#[derive(Debug, Default)]
pub struct Flights {
    pub at: HashMap<(Name, u64), Arc<Flight>>,
    /// How many of them somebody waits for.
    pub demanded: usize,
    /// What was waited for in vain lately, and until when that counts.
    in_vain: VecDeque<(Name, Range<u64>, Instant)>,
    memory: VecDeque<(Name, Held)>,
    memory_bytes: usize,
}

/// A request under way, for consecutive blocks.
#[derive(Debug)]
pub struct Flight {
    pub blocks: Range<u64>,
    pub is_demanded: bool,
    pub outcome: Mutex<Option<Result<Arc<Vec<u8>>, Failure>>>,
    pub landed: Condvar,
}

/// What a flight brought.
#[derive(Clone)]
pub struct Held {
    pub first: u64,
    pub bytes: Arc<Vec<u8>>,
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { first, bytes } = self;
        write!(f, "{} bytes from block {first} on", bytes.len())
    }
}

impl Held {
    /// The blocks of which it has anything.
    pub fn has(&self, block: u64) -> bool {
        let count = (self.bytes.len() as u64).div_ceil(BLOCK_BYTES);
        (self.first..self.first + count).contains(&block)
    }

    /// What it has of a range of the pack.
    pub fn part(&self, range: &Range<u64>) -> &[u8] {
        let start = self.first * BLOCK_BYTES;
        let inside = |at: u64| {
            let at = usize::try_from(at.saturating_sub(start)).unwrap_or(usize::MAX);
            at.min(self.bytes.len())
        };
        &self.bytes[inside(range.start)..inside(range.end)]
    }
}

impl Flights {
    /// These blocks were waited for in vain.
    pub fn note_in_vain(&mut self, name: Name, blocks: Range<u64>) {
        let until = Instant::now() + IN_VAIN;
        self.in_vain.push_back((name, blocks, until));
    }

    /// Whether this block, or one beside it, was waited for in vain a moment ago.
    pub fn was_in_vain(&mut self, name: Name, block: u64) -> bool {
        let now = Instant::now();
        self.in_vain.retain(|(_, _, until)| *until > now);
        let mut lately = self.in_vain.iter();
        lately.any(|(of, blocks, _)| {
            *of == name && (blocks.start..=blocks.end + 1).contains(&(block + 1))
        })
    }

    /// What is in memory of a range, since it is not in the cache.
    pub fn remembered(&self, name: Name, range: &Range<u64>, held: &mut Vec<Held>) {
        let blocks = blocks_of(range);
        let of_pack = self.memory.iter().filter(|(of, _)| *of == name);
        for (_, one) in of_pack {
            let is_known = |block: &u64| held.iter().any(|held| held.has(*block));
            if blocks
                .clone()
                .any(|block| one.has(block) && !is_known(&block))
            {
                held.push(one.clone());
            }
        }
    }

    /// Whether a block is in memory.
    pub fn remembers(&self, name: Name, block: u64) -> bool {
        let mut memory = self.memory.iter();
        memory.any(|(of, held)| *of == name && held.has(block))
    }

    /// Keeps what a flight brought in memory, instead of what was kept for longest.
    pub fn remember(&mut self, name: Name, held: Held) {
        self.memory_bytes += held.bytes.len();
        self.memory.push_back((name, held));
        while self.memory_bytes > MEMORY_BYTES {
            let Some((_, oldest)) = self.memory.pop_front() else {
                break;
            };
            self.memory_bytes -= oldest.bytes.len();
        }
    }

    /// What is in memory of a range is not what it should be.
    pub fn forget(&mut self, name: Name, range: &Range<u64>) {
        let mut gone = 0;
        self.memory.retain(|(of, held)| {
            let goes = *of == name && blocks_of(range).any(|block| held.has(block));
            gone += if goes { held.bytes.len() } else { 0 };
            !goes
        });
        self.memory_bytes -= gone;
    }
}

impl Flight {
    /// `None` if it has not landed until then.
    pub fn wait(&self, until: Instant) -> Option<Result<Arc<Vec<u8>>, Failure>> {
        let mut outcome = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if outcome.is_some() || left.is_zero() {
                return outcome.clone();
            }
            let woken = self.landed.wait_timeout(outcome, left);
            outcome = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
