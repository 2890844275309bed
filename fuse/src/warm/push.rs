//! Giving the kernel the pages of a working set before it asks for them.

use std::io;
use std::num::NonZero;
use std::thread::{available_parallelism, scope, sleep};
use std::time::{Duration, Instant};

use fuser::{INodeNo, Notifier};

use crate::warm::session::{Next, Session};

/// Pages that a thread takes at once: few, so that all work where the first ones are needed.
const BATCH: usize = 16;
/// Until it is looked again whether a set that is in doubt is of use.
const PAUSE: Duration = Duration::from_millis(2);
/// Threads at most.
const MAX_THREADS: usize = 16;
/// Threads more if the disk has to be waited for, and how that is found out: by the time
/// that the first pages take.
const WAITING_THREADS: usize = 6;
const TRIED_BATCHES: usize = 4;
const SLOW_BATCH: Duration = Duration::from_micros(100 * BATCH as u64);

/// Pushes what the session's plan has left, with a thread per core. Returns when all is
/// pushed, nobody has the image open any more, or it turns out to be of no use.
pub(crate) fn push(session: &Session, notifier: &Notifier, has_ended: &(dyn Fn() -> bool + Sync)) {
    let left = session.plan().map_or(0, |plan| plan.pages.len());
    let cores = available_parallelism().map_or(1, NonZero::get);
    let threads = cores.min(left.div_ceil(BATCH)).min(MAX_THREADS);
    let some = |batches| push_some(session, notifier, has_ended, batches);
    let all = || {
        be_patient();
        some(usize::MAX);
    };
    scope(|scope| {
        let start = |count| {
            for _ in 0..count {
                let worker = std::thread::Builder::new().name("push".to_owned());
                // Without it this thread does all.
                let _ = worker.spawn_scoped(scope, all);
            }
        };
        start(threads.saturating_sub(1));
        let began = Instant::now();
        some(TRIED_BATCHES);
        if left > BATCH * TRIED_BATCHES && began.elapsed() > SLOW_BATCH * TRIED_BATCHES as u32 {
            start(WAITING_THREADS);
        }
        some(usize::MAX);
    });
}

fn push_some(session: &Session, notifier: &Notifier, has_ended: &dyn Fn() -> bool, batches: usize) {
    let Ok(page_len) = usize::try_from(session.subject.page_bytes) else {
        return;
    };
    let mut buffer = vec![0; BATCH * page_len];
    for _ in 0..batches {
        let batch = match session.next(BATCH) {
            Next::Pages { now, ahead } => {
                let ahead = ahead.iter().map(|page| u64::from(*page));
                let wanted = ahead.filter(|page| !session.is_given(*page));
                session.subject.reader.ask_for(wanted);
                now
            }
            Next::Later if !has_ended() => {
                sleep(PAUSE);
                continue;
            }
            Next::Later | Next::Nothing => return,
        };
        let reader = &session.subject.reader;
        let batch = batch.iter().map(|page| u64::from(*page));
        let pages: Vec<u64> = batch.filter(|page| !session.is_given(*page)).collect();
        let buffer = &mut buffer[..pages.len() * page_len];
        let mut parts: Vec<(&[u64], &[u8])> = Vec::new();
        let read = reader.read_pages(&pages, buffer);
        if read.is_ok() {
            parts.push((&pages, buffer));
        } else {
            // Whoever needs the one that cannot be read is told.
            for (page, bytes) in pages.chunks(1).zip(buffer.chunks_exact_mut(page_len)) {
                if reader.read_pages(page, bytes).is_ok() {
                    parts.push((page, bytes));
                }
            }
        }
        for (pages, bytes) in parts {
            if has_ended() || store(session, notifier, pages, bytes).is_err() {
                return;
            }
        }
    }
}

/// Gives the kernel pages, those that follow each other at once.
fn store(session: &Session, notifier: &Notifier, pages: &[u64], bytes: &[u8]) -> io::Result<()> {
    let page_bytes = session.subject.page_bytes;
    let end_bytes = session.subject.reader.size_bytes();
    // What was asked for while they were read has its answer.
    let is_wanted = |page| !session.is_given(page);
    for (pages, start_bytes, bytes) in runs(pages, bytes, is_wanted, page_bytes, end_bytes) {
        notifier.store(INodeNo(session.ino), start_bytes, bytes)?;
        pages.iter().for_each(|page| session.push(*page));
    }
    Ok(())
}

/// The runs of wanted pages that follow each other, where each begins, and its part of the bytes.
/// None goes beyond the end of the image: the kernel would make the file longer.
fn runs<'a>(
    pages: &'a [u64],
    bytes: &'a [u8],
    is_wanted: impl Fn(u64) -> bool + 'a,
    page_bytes: u64,
    end_bytes: u64,
) -> impl Iterator<Item = (&'a [u64], u64, &'a [u8])> {
    let len = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
    let mut rest = bytes;
    let mut left = pages;
    std::iter::from_fn(move || {
        loop {
            let (first, others) = left.split_first()?;
            let wants = is_wanted(*first);
            let follows = |(page, at): (&u64, u64)| *page == at && is_wanted(*page) == wants;
            let more = others.iter().zip(first + 1..).take_while(|it| follows(*it));
            let (run, after) = left.split_at(1 + more.count());
            let (bytes, bytes_after) = rest.split_at(run.len() * len(page_bytes));
            (left, rest) = (after, bytes_after);
            if wants {
                let start_bytes = run[0] * page_bytes;
                let room = len(end_bytes.saturating_sub(start_bytes));
                return Some((run, start_bytes, &bytes[..bytes.len().min(room)]));
            }
        }
    })
}

/// Gives this thread the lowest priority: whatever else wants a core gets it.
pub(crate) fn be_patient() {
    const LOWEST: i32 = 19;
    let thread = rustix::thread::gettid();
    // For the kernel a thread's number is that of a process here (setpriority(2)).
    let _ = rustix::process::setpriority_process(Some(thread), LOWEST);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_follow_each_other_are_given_at_once_and_nothing_beyond_the_end() {
        let bytes: Vec<u8> = [9, 3, 4, 5, 7]
            .into_iter()
            .flat_map(|of| [of; 10])
            .collect();
        let pages = [9, 3, 4, 5, 7];
        let found: Vec<_> = runs(&pages, &bytes, |_| true, 10, 98).collect();
        let expected: [(&[u64], u64, &[u8]); 3] = [
            (&[9], 90, &[9; 8]),
            (&[3, 4, 5], 30, &bytes[10..40]),
            (&[7], 70, &[7; 10]),
        ];
        assert_eq!(found, expected);
        // Some of them, or all, may have been asked for meanwhile.
        let found: Vec<_> = runs(&pages, &bytes, |page| page != 4 && page != 7, 10, 98).collect();
        let expected: [(&[u64], u64, &[u8]); 3] = [
            (&[9], 90, &[9; 8]),
            (&[3], 30, &[3; 10]),
            (&[5], 50, &[5; 10]),
        ];
        assert_eq!(found, expected);
        assert_eq!(runs(&pages, &bytes, |_| false, 10, 98).count(), 0);
        assert_eq!(runs(&[], &[], |_| true, 10, 98).count(), 0);
    }
}
