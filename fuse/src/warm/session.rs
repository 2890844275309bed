//! What one mount sees of the use of one image, and what it has pushed of it.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, UNIX_EPOCH};

use snapstore_store::{ImageReader, Pushed, Seen, SnapshotId, WorkingSet};

use crate::counters::Counters;
use crate::warm::bits::Bits;
use crate::warm::touch::touched;

/// How long after the first read the touches of pages are recorded.
const RECORDED: Duration = Duration::from_secs(10);
/// Pages that are recorded at most: 128 MiB, if they are of 4 KiB.
const MAX_TOUCHED: usize = 1 << 15;
/// Of longer images nothing is recorded: 64 GiB, if their pages are of 4 KiB.
const MAX_IMAGE_PAGES: u64 = 1 << 24;
/// One page of so many of a set is left out, to see whether it is asked for.
const LEFT_OUT: u64 = 64;
/// So many pages that are asked for outside the set are no reason to doubt it.
const FEW_OUTSIDE: u64 = 16;
/// Pages that the disk is asked for at once, before they are pushed, and once more while they are: so
/// many that it is never idle, and so few that who needs another page waits for few of them.
const ASKED: usize = 16;
/// How long pages are pushed before anybody has opened the file that was looked up.
const LOOKED_UP: Duration = Duration::from_secs(2);

/// Whose image it is, and how it is read.
#[derive(Debug)]
pub(crate) struct Subject {
    pub snapshot: SnapshotId,
    pub image: String,
    pub reader: ImageReader,
    pub page_bytes: u64,
}

pub(crate) struct Session {
    pub subject: Subject,
    counters: Arc<Counters>,
    pub ino: u64,
    pages: u64,
    /// The pages that are asked for here, if others are read elsewhere.
    part: Option<Vec<Range<u32>>>,
    /// Pages that the kernel reads around a fault.
    ahead: u64,
    handles: AtomicU32,
    began: Instant,
    recorder: Mutex<Recorder>,
    recording: AtomicBool,
    /// What the kernel was given, and of that what it did not ask for.
    given: Bits,
    pushed: Bits,
    plan: OnceLock<Plan>,
    /// How many pages of the plan were begun.
    next: AtomicUsize,
}

#[derive(Default)]
struct Recorder {
    began: Option<Instant>,
    touched: Vec<u32>,
    is_touched: Option<Bits>,
    last_end: Option<u64>,
    /// Of what was touched: pages of the set that were left out or not pushed yet, and
    /// pages that are not in it.
    left_out_touched: u64,
    late: u64,
    outside: u64,
    /// Pages that were touched when this was last written.
    written: Option<usize>,
}

/// What a pushing thread does next.
pub(crate) enum Next<'a> {
    Pages {
        /// Those to push.
        now: &'a [u32],
        /// Those that the disk should begin to read.
        ahead: &'a [u32],
    },
    /// It looks again later.
    Later,
    Nothing,
}

/// What there was to push.
pub(crate) struct Plan {
    pub before: Option<WorkingSet>,
    pub pages: Vec<u32>,
    in_set: Bits,
    left_out: Bits,
    left_out_count: u32,
}

impl Plan {
    /// Without `pushes`, or if the set is not trusted, nothing is to be pushed; and never a
    /// page that is not seen here.
    pub fn new(
        before: Option<WorkingSet>,
        pushes: bool,
        image_pages: u64,
        sees: impl Fn(u64) -> bool,
    ) -> Self {
        let recorded = before.as_ref().map(WorkingSet::recorded);
        let since = recorded.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        // Other pages are left out after each recording.
        let number = since.map_or(0, |since| u64::from(since.subsec_nanos()) + since.as_secs());
        let pushes = pushes && before.as_ref().is_some_and(WorkingSet::is_trusted);
        let in_set = Bits::new(image_pages);
        let left_out = Bits::new(image_pages);
        let mut pages = Vec::new();
        let mut left_out_count = 0;
        for page in before.iter().flat_map(WorkingSet::pages) {
            // Beyond the image, or twice: whatever the file says.
            if u64::from(page) >= image_pages || !in_set.set(page.into()) {
                continue;
            }
            if !pushes || !sees(page.into()) {
                continue;
            }
            if is_left_out(page, number) {
                left_out.set(page.into());
                left_out_count += 1;
            } else {
                pages.push(page);
            }
        }
        Self {
            before,
            pages,
            in_set,
            left_out,
            left_out_count,
        }
    }
}

/// The pages of a plan that the disk should begin to read when `most` of them are pushed from
/// `first` on: the window after the one that begins there, and at the start this one, too.
fn asked(first: usize, most: usize, pages: usize) -> Range<usize> {
    let last = (first + most).min(pages);
    let begun = (first.div_ceil(ASKED)..last.div_ceil(ASKED)).next();
    let windows = match begun {
        Some(0) => 0..2,
        Some(window) => window + 1..window + 2,
        None => 0..0,
    };
    (windows.start * ASKED).min(pages)..(windows.end * ASKED).min(pages)
}

/// The pages that these bytes are in.
fn pages_of(bytes: &Range<u64>, page_bytes: u64) -> Range<u32> {
    let page = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
    page(bytes.start / page_bytes)..page(bytes.end.div_ceil(page_bytes))
}

/// Pseudo-random, by the finalizer of SplitMix64.
fn is_left_out(page: u32, number: u64) -> bool {
    let mut mixed = u64::from(page).wrapping_add(number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    (mixed ^ mixed >> 31) % LEFT_OUT == 0
}

impl Session {
    /// `None` for an image that is too long.
    pub fn new(
        subject: Subject,
        ino: u64,
        read_ahead_bytes: u64,
        part: Option<&[Range<u64>]>,
        counters: Arc<Counters>,
    ) -> Option<Self> {
        let page_bytes = subject.page_bytes;
        let part = part.map(|part| part.iter().map(move |bytes| pages_of(bytes, page_bytes)));
        let pages = subject.reader.size_bytes().div_ceil(subject.page_bytes);
        (pages <= MAX_IMAGE_PAGES).then(|| Self {
            ahead: read_ahead_bytes / subject.page_bytes,
            subject,
            counters,
            ino,
            pages,
            part: part.map(Iterator::collect),
            handles: AtomicU32::new(0),
            began: Instant::now(),
            recorder: Mutex::default(),
            recording: AtomicBool::new(true),
            given: Bits::new(pages),
            pushed: Bits::new(pages),
            plan: OnceLock::new(),
            next: AtomicUsize::new(0),
        })
    }

    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Whether a page is asked for here by whoever touches it.
    pub fn sees(&self, page: u64) -> bool {
        self.part.as_ref().is_none_or(|part| {
            let next = part.partition_point(|range| u64::from(range.end) <= page);
            part.get(next)
                .is_some_and(|range| u64::from(range.start) <= page)
        })
    }

    /// A handle is opened. True for the first one.
    pub fn open(&self) -> bool {
        self.handles.fetch_add(1, Ordering::Relaxed) == 0
    }

    /// A handle is closed. True for the last one.
    pub fn close(&self) -> bool {
        self.handles.fetch_sub(1, Ordering::Relaxed) == 1
    }

    fn is_wanted(&self) -> bool {
        self.handles.load(Ordering::Relaxed) > 0 || self.began.elapsed() < LOOKED_UP
    }

    pub fn plan(&self) -> Option<&Plan> {
        self.plan.get()
    }

    pub fn set_plan(&self, plan: Plan) {
        self.counters.sampled_pages(plan.left_out_count);
        // The same thread does all of this.
        let _ = self.plan.set(plan);
    }

    /// The kernel gets these bytes, which somebody asked for. A reader whose use does not
    /// count is one who only looks.
    pub fn asked(&self, bytes: Range<u64>, counts: bool) {
        let page = self.subject.page_bytes;
        let request = bytes.start / page..bytes.end.div_ceil(page).min(self.pages);
        if counts && self.recording.load(Ordering::Relaxed) {
            self.record(&request);
        }
        for page in request {
            self.given.set(page);
        }
    }

    fn record(&self, request: &Range<u64>) {
        if !request.clone().any(|page| self.sees(page)) {
            return;
        }
        let mut recorder = self.recorder();
        let began = *recorder.began.get_or_insert_with(Instant::now);
        if began.elapsed() > RECORDED || recorder.touched.len() >= MAX_TOUCHED {
            self.recording.store(false, Ordering::Relaxed);
            return;
        }
        let is_given = |page| self.given.has(page);
        let pages = touched(request, recorder.last_end, self.ahead, self.pages, is_given);
        recorder.last_end = Some(request.end);
        for page in pages.into_iter().filter(|page| self.sees(*page)) {
            // One that the kernel had let go of was recorded when it had it first.
            if !self.given.has(page) {
                recorder.touch(page, self.pages, self.plan.get(), &self.counters);
            }
        }
    }

    /// Whether the time for recording is over.
    pub fn is_recorded(&self) -> bool {
        let began = self.recorder().began;
        began.is_some_and(|began| began.elapsed() > RECORDED)
    }

    /// The next pages to be pushed, at most so many.
    pub fn next(&self, most: usize) -> Next<'_> {
        let pages = self.plan.get().map_or(&[][..], |plan| &plan.pages);
        let left = self.next.load(Ordering::Relaxed) < pages.len();
        if !left || !self.is_wanted() {
            return Next::Nothing;
        }
        if self.is_doubtful() {
            // Without a recording nothing more will be known.
            return match self.recording.load(Ordering::Relaxed) {
                true => Next::Later,
                false => Next::Nothing,
            };
        }
        let first = self.next.fetch_add(most, Ordering::Relaxed);
        match pages.get(first..) {
            None | Some([]) => Next::Nothing,
            Some(left) => Next::Pages {
                now: &left[..most.min(left.len())],
                ahead: &pages[asked(first, most, pages.len())],
            },
        }
    }

    /// Whether so much else is asked for that the set may be wrong. That changes once its
    /// pages are asked for: those that are left out tell of the others.
    fn is_doubtful(&self) -> bool {
        let recorder = self.recorder();
        let hits = recorder.late + recorder.left_out_touched * LEFT_OUT;
        recorder.outside >= FEW_OUTSIDE && recorder.outside > 2 * hits
    }

    pub fn is_given(&self, page: u64) -> bool {
        self.given.has(page)
    }

    /// The kernel has got a page that nobody asked for.
    pub fn push(&self, page: u64) {
        if self.given.set(page) {
            self.pushed.set(page);
            self.counters.pushed_page();
        }
    }

    /// What was seen, if that is more than when this was last asked. `None` before
    /// anything was read.
    pub fn seen(&self) -> Option<Seen> {
        let mut recorder = self.recorder();
        let count = recorder.touched.len();
        if recorder.began.is_none() || recorder.written == Some(count) {
            return None;
        }
        recorder.written = Some(count);
        let touched = recorder.touched.clone();
        let is_touched = |page: &u64| {
            let bits = recorder.is_touched.as_ref();
            bits.is_some_and(|bits| bits.has(*page))
        };
        let unknown = self.given.all().filter(|page| !is_touched(page));
        let unknown = unknown
            .filter_map(|page| u32::try_from(page).ok())
            .collect();
        let count = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
        Some(Seen {
            touched,
            unknown,
            last: Pushed {
                pushed: count(self.pushed.all().count() as u64),
                left_out: self.plan.get().map_or(0, |plan| plan.left_out_count),
                left_out_touched: count(recorder.left_out_touched),
                outside: count(recorder.outside),
            },
            part: self.part.clone(),
        })
    }

    fn recorder(&self) -> MutexGuard<'_, Recorder> {
        self.recorder.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Recorder {
    fn touch(&mut self, page: u64, pages: u64, plan: Option<&Plan>, counters: &Counters) {
        let bits = self.is_touched.get_or_insert_with(|| Bits::new(pages));
        let Some(number) = u32::try_from(page).ok().filter(|_| bits.set(page)) else {
            return;
        };
        if self.touched.len() < MAX_TOUCHED {
            self.touched.push(number);
        }
        match plan {
            Some(plan) if plan.left_out.has(page) => {
                self.left_out_touched += 1;
                counters.sampled_hit_page();
            }
            Some(plan) if plan.in_set.has(page) => self.late += 1,
            _ => {
                self.outside += 1;
                counters.missed_page();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each page of a plan is asked for once, and before it is pushed.
    #[test]
    fn the_disk_is_asked_for_each_page_before_it_is_pushed() {
        for pages in [0, 1, 8, ASKED - 1, ASKED, ASKED + 1, 5 * ASKED + 3] {
            let mut asked_for = 0;
            for first in (0..pages).step_by(16) {
                let now = asked(first, 16, pages);
                if !now.is_empty() {
                    assert_eq!(now.start, asked_for);
                    asked_for = now.end;
                }
                assert!(asked_for >= (first + 16).min(pages), "{pages}: {first}");
                assert!(asked_for <= first + 2 * ASKED);
            }
            assert_eq!(asked_for, pages);
        }
        // Batches that do not divide a window.
        let asked_for: usize = (0..3 * ASKED)
            .step_by(7)
            .map(|first| asked(first, 7, 3 * ASKED).len())
            .sum();
        assert_eq!(asked_for, 3 * ASKED);
    }
}
