//! What nobody waits for yet, read by threads of their own, after all that somebody waits
//! for.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;

use crate::lazy::blocks::{AHEAD_BLOCKS, Blocks, PackRef};

/// Requests ahead that are under way at once.
const THREADS: usize = 4;
/// Requests that are remembered; older ones are of readers who are elsewhere by now.
const REMEMBERED: usize = 64;

type Job = (Arc<PackRef>, Range<u64>);

#[derive(Debug, Default)]
struct Queue {
    jobs: VecDeque<Job>,
    ended: bool,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    work: Condvar,
}

/// The threads. They end some time after this.
#[derive(Debug)]
pub struct Ahead {
    shared: Arc<Shared>,
}

impl Ahead {
    pub fn start(blocks: &Arc<Blocks>) -> io::Result<Self> {
        let ahead = Self {
            shared: Arc::default(),
        };
        for _ in 0..THREADS {
            let (blocks, shared) = (blocks.clone(), ahead.shared.clone());
            Builder::new()
                .name("ahead".to_owned())
                .spawn(move || shared.work(&blocks))?;
        }
        Ok(ahead)
    }

    /// Has these blocks read some time.
    pub fn give(&self, pack: &Arc<PackRef>, blocks: Range<u64>) {
        let mut queue = self.shared.queue();
        let mut start = blocks.start;
        while start < blocks.end {
            let end = blocks.end.min(start + AHEAD_BLOCKS);
            queue.jobs.push_back((pack.clone(), start..end));
            start = end;
        }
        while queue.jobs.len() > REMEMBERED {
            queue.jobs.pop_front();
        }
        drop(queue);
        self.shared.work.notify_all();
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.shared.queue().ended = true;
        self.shared.work.notify_all();
    }
}

impl Shared {
    fn work(&self, blocks: &Blocks) {
        let mut queue = self.queue();
        loop {
            if queue.ended {
                return;
            }
            let Some((pack, range)) = queue.jobs.pop_front() else {
                let woken = self.work.wait(queue);
                queue = woken.unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(queue);
            // A flight may bring a part of it only.
            while blocks.read_ahead(&pack, range.clone()) {}
            queue = self.queue();
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
