//! The pages of a working set, and how one more recording changes them.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::time::SystemTime;

/// Recordings that a page's history goes back.
pub(crate) const HISTORY: u8 = 8;
/// Pages in a file at most, those included of which nothing is known yet.
pub(crate) const MAX_PAGES: usize = 1 << 16;
/// Fewer pages left out tell nothing of the rest.
const ENOUGH_LEFT_OUT: u32 = 8;
/// A mount from which less than this part of the set was read was no restore.
const LEAST_PART: usize = 8;

/// The pages of one image that its users touch first.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WorkingSet {
    pub(crate) recordings: u8,
    pub(crate) recorded: SystemTime,
    pub(crate) last: Pushed,
    pub(crate) pages: Vec<PageUse>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct PageUse {
    pub number: u32,
    pub touched: u8,
    pub known: u8,
}

/// What became of a working set in one mount.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, serde::Serialize)]
pub struct Pushed {
    /// Pages that were given to the kernel before anybody asked for them.
    pub pushed: u32,
    /// Pages of the set that were left out, to see whether they are asked for.
    pub left_out: u32,
    /// How many of these were asked for.
    pub left_out_touched: u32,
    /// Pages asked for that are not in the set.
    pub outside: u32,
}

impl Pushed {
    /// The part of the set that was used, as far as it is known.
    #[must_use]
    pub fn hit_rate(&self) -> Option<f64> {
        let rate = f64::from(self.left_out_touched) / f64::from(self.left_out);
        (self.left_out > 0).then_some(rate)
    }

    /// Whether less than half of what was pushed was used.
    fn is_bad(&self) -> bool {
        self.left_out >= ENOUGH_LEFT_OUT && 2 * self.left_out_touched < self.left_out
    }
}

/// What one mount has seen of an image's use.
#[derive(Clone, Default, Debug)]
pub struct Seen {
    /// Pages that were asked for, each once, in their order.
    pub touched: Vec<u32>,
    /// Pages that the kernel got without being known to be touched: those that were
    /// pushed, and those that it reads around others.
    pub unknown: Vec<u32>,
    /// What became of the set that there was.
    pub last: Pushed,
    /// The pages that could be asked for, ascending, if the others were read elsewhere.
    pub part: Option<Vec<Range<u32>>>,
}

impl Seen {
    /// Whether the page would have been asked for here, had anybody touched it.
    fn could_see(&self, page: u32) -> bool {
        self.part.as_ref().is_none_or(|part| {
            let next = part.partition_point(|range| range.end <= page);
            part.get(next).is_some_and(|range| range.contains(&page))
        })
    }
}

impl PageUse {
    fn is_in_set(self) -> bool {
        self.known > 0 && 2 * self.touched.count_ones() >= u32::from(self.known)
    }

    fn learn(&mut self, touched: bool) {
        self.touched = self.touched << 1 | u8::from(touched);
        self.known = (self.known + 1).min(HISTORY);
    }
}

impl WorkingSet {
    /// The pages of the set, in the order in which they are to be pushed.
    pub fn pages(&self) -> impl Iterator<Item = u32> + '_ {
        let pages = self.pages.iter().filter(|page| page.is_in_set());
        pages.map(|page| page.number)
    }

    /// Whether pushing it was worth it when it was last tried. If not, the next mount
    /// records all there is, and the one after that pushes again. What was recorded of
    /// parts alone is trusted: their pages answer for themselves.
    #[must_use]
    pub fn is_trusted(&self) -> bool {
        self.recordings == 0 || !self.last.is_bad()
    }

    /// When the last recording was made.
    #[must_use]
    pub fn recorded(&self) -> SystemTime {
        self.recorded
    }

    /// How many recordings of the whole image are merged in it, of the last eight.
    #[must_use]
    pub fn recordings(&self) -> u8 {
        self.recordings
    }

    /// What became of it in the mount of the whole image that was recorded last; in that of
    /// a part, if there was no other.
    #[must_use]
    pub fn last(&self) -> Pushed {
        self.last
    }

    /// The set after one more recording. One of a part says nothing of the other pages.
    #[must_use]
    pub fn merged(before: Option<&Self>, seen: &Seen, now: SystemTime) -> Self {
        let known = before.map_or(&[][..], |before| &before.pages);
        let could_see = |page: &&PageUse| seen.could_see(page.number);
        let in_set = known.iter().filter(could_see);
        let in_set = in_set.filter(|page| page.is_in_set()).count();
        if let Some(before) = before.filter(|_| seen.last.pushed == 0)
            && seen.touched.len() < in_set / LEAST_PART
        {
            return before.clone();
        }
        let merged = before.map_or(0, |before| before.recordings);
        let is_whole = seen.part.is_none();
        // Parts are not counted, but the histories of their pages tell of them.
        let longest = known.iter().filter(could_see).map(|page| page.known).max();
        let seen_before = match is_whole {
            true => merged,
            false => merged.max(longest.unwrap_or(0)),
        };
        let mut pages = Merge::new(known, seen).pages(seen_before);
        pages.truncate(MAX_PAGES);
        let last = before.filter(|before| !is_whole && before.recordings > 0);
        Self {
            recordings: (merged + u8::from(is_whole)).min(HISTORY),
            recorded: now,
            last: last.map_or(seen.last, |before| before.last),
            pages,
        }
    }
}

/// Two orders that become one.
struct Merge<'a> {
    known: &'a [PageUse],
    seen: &'a Seen,
    /// Where pages stand among the known ones.
    places: HashMap<u32, usize>,
}

impl<'a> Merge<'a> {
    fn new(known: &'a [PageUse], seen: &'a Seen) -> Self {
        let numbered = known.iter().zip(0..);
        let places = numbered.map(|(page, place)| (page.number, place));
        let places = places.collect();
        Self {
            known,
            seen,
            places,
        }
    }

    /// `before` is how many recordings would have seen a page that is new.
    fn pages(&self, before: u8) -> Vec<PageUse> {
        let touched: HashMap<u32, usize> = self.seen.touched.iter().copied().zip(0..).collect();
        let unknown: BTreeSet<u32> = self.seen.unknown.iter().copied().collect();
        // Where nothing was pushed, all has been seen, and in its order.
        let is_whole = self.seen.part.is_none();
        let all_seen = is_whole && self.seen.last.pushed == 0;
        // A part that was pushed in vain is no reason to doubt the rest, but its own pages.
        let in_vain = !is_whole && self.seen.last.is_bad();
        let mut placed: Vec<((usize, usize), PageUse)> = Vec::new();
        for (place, page) in self.known.iter().enumerate() {
            let mut page = *page;
            let at = touched.get(&page.number);
            if page.known == 0 && at.is_some() {
                continue;
            }
            let is_known = !unknown.contains(&page.number) || in_vain && page.is_in_set();
            if at.is_some() || is_known && self.seen.could_see(page.number) {
                page.learn(at.is_some());
            }
            let place = match at {
                Some(at) if all_seen => (0, *at),
                _ => (place + 1, 0),
            };
            if page.known == 0 || page.touched != 0 {
                placed.push((place, page));
            }
        }
        // A new page stands behind what was touched before it. It was not touched in the
        // recordings before, all of which would have seen it, unless the file says otherwise.
        let mut behind = 0;
        for (at, number) in self.seen.touched.iter().enumerate() {
            let place = self.places.get(number).copied();
            let known = place.map(|place| self.known[place].known);
            if let Some(place) = place.filter(|_| known != Some(0)) {
                behind = place + 1;
                continue;
            }
            let page = PageUse {
                number: *number,
                touched: 1,
                known: known.unwrap_or(before.min(HISTORY - 1)) + 1,
            };
            let place = if all_seen { (0, at) } else { (behind, at + 1) };
            placed.push((place, page));
        }
        placed.sort_by_key(|(place, _)| *place);
        let mut pages: Vec<_> = placed.into_iter().map(|(_, page)| page).collect();
        // Last, so that they are the first that there is no room for.
        let is_new = |page: &u32| !touched.contains_key(page) && !self.places.contains_key(page);
        pages.extend(unknown.into_iter().filter(is_new).map(|number| PageUse {
            number,
            touched: 0,
            known: 0,
        }));
        pages
    }
}

#[cfg(test)]
mod tests;
