//! Reads that have to wait for whoever has the pages, in threads of their own: those that
//! answer the kernel go on meanwhile.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;

/// Reads that wait at once; more are begun when one of these is done.
const MAX_THREADS: usize = 64;

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
    ended: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    work: Condvar,
}

/// Threads that may wait, as many as are needed. They end some time after this.
#[derive(Default)]
pub(crate) struct Waiting {
    shared: Arc<Shared>,
}

impl Waiting {
    /// Has this done by a thread that may wait.
    pub fn give(&self, job: Job) {
        let mut queue = lock(&self.shared);
        queue.jobs.push_back(job);
        if queue.idle >= queue.jobs.len() || queue.threads == MAX_THREADS {
            drop(queue);
            self.shared.work.notify_one();
            return;
        }
        queue.threads += 1;
        drop(queue);
        let shared = self.shared.clone();
        let started = Builder::new()
            .name("waiting".to_owned())
            .spawn(move || shared.work());
        if started.is_err() {
            // Another one does it, or this one.
            let mut queue = lock(&self.shared);
            queue.threads -= 1;
            let left = (queue.threads == 0)
                .then(|| queue.jobs.pop_front())
                .flatten();
            drop(queue);
            if let Some(job) = left {
                job();
            }
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        lock(&self.shared).ended = true;
        self.shared.work.notify_all();
    }
}

impl Shared {
    fn work(&self) {
        let mut queue = lock(self);
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                drop(queue);
                job();
                queue = lock(self);
                continue;
            }
            if queue.ended {
                queue.threads -= 1;
                return;
            }
            queue.idle += 1;
            let woken = self.work.wait(queue);
            queue = woken.unwrap_or_else(PoisonError::into_inner);
            queue.idle -= 1;
        }
    }
}

fn lock(shared: &Shared) -> MutexGuard<'_, Queue> {
    shared.queue.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn one_that_waits_holds_up_no_other() {
        let waiting = Waiting::default();
        let (release, wait) = channel::<()>();
        let (done, answers) = channel();
        let slow = done.clone();
        waiting.give(Box::new(move || {
            let _ = wait.recv();
            let _ = slow.send("slow");
        }));
        for _ in 0..10 {
            let done = done.clone();
            waiting.give(Box::new(move || {
                let _ = done.send("quick");
            }));
            assert_eq!(answers.recv(), Ok("quick"));
        }
        drop(release);
        assert_eq!(answers.recv(), Ok("slow"));
    }
}
