//! What nobody waits for yet, read by threads of their own, after all that somebody waits
//! for: first the working set, then what follows readers who go on in order, and when there
//! is nothing else to do, the rest, one request at a time.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::Duration;

use crate::lazy::blocks::{AHEAD_BLOCKS, Blocks, Brought, PackRef};
use crate::lazy::counts::Cause;
use crate::lazy::fill::{Fill, Step};
use crate::lazy::recorded::Touched;

/// Requests ahead that are under way at once.
const THREADS: usize = 4;
/// Requests that are remembered; older ones are of readers who are elsewhere by now.
const REMEMBERED: usize = 64;
/// What is asked for first of a working set.
const FIRST_BLOCKS: u64 = 2;
/// How often a part of the working set is tried that does not come; then it is left to
/// those who need it.
const ATTEMPTS: u8 = 5;
/// Until a bucket that does not answer is asked again.
const PAUSE: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Job {
    pack: Arc<PackRef>,
    blocks: Range<u64>,
    failed: u8,
    /// What is to be brought next, of a leaf whose record this is.
    then: Option<Touched>,
}

#[derive(Debug, Default)]
struct Queue {
    working_set: VecDeque<Job>,
    ahead: VecDeque<Job>,
    /// `None` while a thread is at it, and when it is done.
    fill: Option<Fill>,
    fills: bool,
    /// Threads that bring something else than the fill.
    busy: usize,
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
        queue.ahead.extend(jobs(pack, blocks));
        while queue.ahead.len() > REMEMBERED {
            queue.ahead.pop_front();
        }
        drop(queue);
        self.shared.work.notify_all();
    }

    /// Has these blocks read before all others that nobody waits for.
    pub fn give_working_set(&self, pack: &Arc<PackRef>, blocks: Range<u64>) {
        // The first ones are small: who begins needs little, and soon.
        let mut queue = self.shared.queue();
        let (mut start, mut len) = (blocks.start, FIRST_BLOCKS);
        while start < blocks.end {
            let end = blocks.end.min(start + len);
            queue.working_set.extend(jobs(pack, start..end));
            (start, len) = (end, AHEAD_BLOCKS.min(len * 2));
        }
        drop(queue);
        self.shared.work.notify_all();
    }

    /// Has these pages read after that: of each leaf the record, and then what was touched.
    pub fn give_touched(&self, touched: Vec<Touched>) {
        let mut queue = self.shared.queue();
        queue
            .working_set
            .extend(touched.into_iter().filter_map(|one| {
                let (pack, blocks) = one.record()?;
                Some(Job {
                    pack,
                    blocks,
                    failed: 0,
                    then: Some(one),
                })
            }));
        drop(queue);
        self.shared.work.notify_all();
    }

    /// Whether there is something of the rest that is still to be read.
    pub fn fills(&self) -> bool {
        self.shared.queue().fills
    }

    /// Has all the rest read when there is nothing else to do.
    pub fn give_fill(&self, fill: Fill) {
        let mut queue = self.shared.queue();
        (queue.fill, queue.fills) = (Some(fill), true);
        drop(queue);
        self.shared.work.notify_all();
    }
}

fn jobs(pack: &Arc<PackRef>, blocks: Range<u64>) -> impl Iterator<Item = Job> {
    let step = usize::try_from(AHEAD_BLOCKS).expect("a request is of few blocks");
    blocks.clone().step_by(step).map(move |start| Job {
        pack: pack.clone(),
        blocks: start..blocks.end.min(start + AHEAD_BLOCKS),
        failed: 0,
        then: None,
    })
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
            let next = match queue.working_set.pop_front() {
                Some(job) => Some((job, Cause::WorkingSet)),
                None => queue.ahead.pop_front().map(|job| (job, Cause::Ahead)),
            };
            if let Some((job, cause)) = next {
                queue.busy += 1;
                drop(queue);
                let then = job.then.clone();
                let failed = self.bring(blocks, job, cause);
                let next = match (&failed, then) {
                    (None, Some(then)) if blocks.has_room() => then.pages(blocks),
                    _ => Vec::new(),
                };
                queue = self.queue();
                queue.busy -= 1;
                queue.working_set.extend(failed);
                for (pack, blocks) in next.iter().rev() {
                    let jobs: Vec<Job> = jobs(pack, blocks.clone()).collect();
                    jobs.into_iter()
                        .rev()
                        .for_each(|job| queue.working_set.push_front(job));
                }
                if !next.is_empty() {
                    self.work.notify_all();
                }
                if queue.busy == 0 {
                    // The fill may have its turn.
                    self.work.notify_all();
                }
                continue;
            }
            let fill = match queue.busy {
                0 => queue.fill.take(),
                _ => None,
            };
            if let Some(mut fill) = fill {
                drop(queue);
                let step = fill.step(blocks);
                queue = self.queue();
                queue.fills = step != Step::Done;
                queue.fill = queue.fills.then_some(fill);
                if step != Step::Unanswered {
                    continue;
                }
                // All others wait as well, until there is something to do.
                queue = self.pause(queue, PAUSE * 10);
                continue;
            }
            let woken = self.work.wait(queue);
            queue = woken.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Brings some blocks. Those of the working set that did not come are tried again.
    fn bring(&self, blocks: &Blocks, mut job: Job, cause: Cause) -> Option<Job> {
        loop {
            // A flight may bring a part of it only.
            match blocks.bring(&job.pack, job.blocks.clone(), cause) {
                Brought::Some => {}
                Brought::All => return None,
                Brought::Nothing => break,
            }
        }
        job.failed += 1;
        if cause != Cause::WorkingSet || job.failed == ATTEMPTS {
            return None;
        }
        drop(self.pause(self.queue(), PAUSE));
        Some(job)
    }

    fn pause<'a>(&self, queue: MutexGuard<'a, Queue>, pause: Duration) -> MutexGuard<'a, Queue> {
        let woken = self
            .work
            .wait_timeout_while(queue, pause, |queue| !queue.ended);
        woken.unwrap_or_else(PoisonError::into_inner).0
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
