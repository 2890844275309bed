//! Pages that come in their order, as runs.

use std::ops::Range;

use super::kinds::{PageKind, PageRun};

/// A set of pages that is added to in their order, and then asked in their order.
#[derive(Default)]
pub(super) struct Changed {
    ranges: Vec<Range<u64>>,
    at: usize,
}

impl Changed {
    /// Adds a page after all others.
    pub fn add(&mut self, page: u64) {
        match self.ranges.last_mut() {
            Some(last) if last.end == page => last.end += 1,
            _ => self.ranges.push(page..page + 1),
        }
    }

    /// Whether it has a page, which comes after those that were asked for before.
    pub fn has(&mut self, page: u64) -> bool {
        while self
            .ranges
            .get(self.at)
            .is_some_and(|range| range.end <= page)
        {
            self.at += 1;
        }
        let range = self.ranges.get(self.at);
        range.is_some_and(|range| range.contains(&page))
    }

    /// To ask from the first page on again.
    pub fn rewind(&mut self) {
        self.at = 0;
    }
}

/// Makes runs of all pages of an image out of those that are not zero.
pub(super) struct Runs {
    pages: u64,
    /// Sorted.
    working_set: Vec<u32>,
    /// The first of them that is not behind `next`.
    at: usize,
    next: u64,
    runs: Vec<PageRun>,
}

impl Runs {
    pub fn new(pages: u64, working_set: Vec<u32>) -> Self {
        Self {
            pages,
            working_set,
            at: 0,
            next: 0,
            runs: Vec::new(),
        }
    }

    /// The next page that is not zero.
    pub fn page(&mut self, page: u64, kind: PageKind) {
        self.fill(page);
        if page < self.pages {
            self.alike(page + 1, kind);
        }
    }

    pub fn finish(mut self) -> Vec<PageRun> {
        self.fill(self.pages);
        self.runs
    }

    /// All pages up to this one are zero.
    fn fill(&mut self, end: u64) {
        let end = end.min(self.pages);
        while self.next < end {
            self.alike(end, PageKind::Zero);
        }
    }

    /// Pages of one kind, as far as they are alike in the working set, but not beyond `end`.
    fn alike(&mut self, end: u64, kind: PageKind) {
        let recorded = self.working_set.get(self.at).copied().map(u64::from);
        let in_working_set = recorded == Some(self.next);
        let end = match recorded {
            _ if in_working_set => self.next + 1,
            Some(recorded) => recorded.min(end),
            None => end,
        };
        self.at += usize::from(in_working_set);
        let pages = end - self.next;
        match self.runs.last_mut() {
            Some(last) if last.kind == kind && last.in_working_set == in_working_set => {
                last.pages += pages;
            }
            _ => self.runs.push(PageRun {
                first_page: self.next,
                pages,
                kind,
                in_working_set,
            }),
        }
        self.next = end;
    }
}
