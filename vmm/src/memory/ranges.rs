//! Arithmetic on sets of bytes, each a list of ranges.
//!
//! A list is *normal* if its ranges are not empty, ascend and neither overlap
//! nor touch. Every function returns normal lists and, but for [`coalesce`],
//! expects them.

use std::ops::Range;

use super::host_slot::HostSlot;

/// Makes a list normal.
#[must_use]
pub fn coalesce(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.retain(|range| range.start < range.end);
    ranges.sort_unstable_by_key(|range| range.start);
    let mut normal: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        push(&mut normal, range);
    }
    normal
}

/// Adds a range that begins no earlier than the list's last one.
pub(crate) fn push(normal: &mut Vec<Range<u64>>, range: Range<u64>) {
    match normal.last_mut() {
        Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
        _ => normal.push(range),
    }
}

/// What is in either list.
#[must_use]
pub fn union(a: &[Range<u64>], b: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut all = Vec::with_capacity(a.len() + b.len());
    let (mut left, mut right) = (a.iter().peekable(), b.iter().peekable());
    loop {
        let next = match (left.peek(), right.peek()) {
            (Some(l), Some(r)) if l.start <= r.start => left.next(),
            (Some(_), None) => left.next(),
            (_, Some(_)) => right.next(),
            (None, None) => return all,
        };
        if let Some(range) = next {
            push(&mut all, range.clone());
        }
    }
}

/// What is in both lists.
#[must_use]
pub fn intersect(a: &[Range<u64>], b: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut both = Vec::new();
    let (mut i, mut j) = (0, 0);
    while let (Some(l), Some(r)) = (a.get(i), b.get(j)) {
        let common = l.start.max(r.start)..l.end.min(r.end);
        if common.start < common.end {
            both.push(common);
        }
        if l.end <= r.end {
            i += 1;
        } else {
            j += 1;
        }
    }
    both
}

/// The list with its smallest gaps closed, so that it has no more than so many ranges, or
/// about: gaps of one length go together.
#[must_use]
pub fn fewer(list: &[Range<u64>], most: usize) -> Vec<Range<u64>> {
    let surplus = list.len().saturating_sub(most.max(1));
    if surplus == 0 {
        return list.to_vec();
    }
    let gap = |pair: &[Range<u64>]| pair[1].start - pair[0].end;
    let mut gaps: Vec<u64> = list.windows(2).map(gap).collect();
    let (_, &mut closed, _) = gaps.select_nth_unstable(surplus - 1);
    let mut fewer: Vec<Range<u64>> = Vec::with_capacity(most);
    for range in list {
        match fewer.last_mut() {
            Some(last) if range.start - last.end <= closed => last.end = range.end,
            _ => fewer.push(range.clone()),
        }
    }
    fewer
}

/// A part of a range of image offsets that lies in one slot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Piece {
    /// Its image offsets.
    pub image: Range<u64>,
    /// Where it begins in the guest's physical address space.
    pub guest_address: u64,
    /// Where it begins in the address space of the process that maps the slot.
    pub host_address: u64,
}

/// The list's parts in each of the slots, in the slots' order; what is in none is left
/// out.
pub fn by_slot(slots: &[HostSlot], list: &[Range<u64>]) -> Vec<Piece> {
    let mut pieces = Vec::with_capacity(list.len() + slots.len());
    for slot in slots {
        let whole = slot.image_offset..slot.image_offset.saturating_add(slot.length);
        for range in list {
            let image = range.start.max(whole.start)..range.end.min(whole.end);
            if image.start < image.end {
                let into = image.start - whole.start;
                pieces.push(Piece {
                    guest_address: slot.guest_address.saturating_add(into),
                    host_address: slot.host_address.saturating_add(into),
                    image,
                });
            }
        }
    }
    pieces
}

/// How many bytes a list covers.
#[must_use]
pub fn total_bytes(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn any_ranges() -> impl Strategy<Value = Vec<Range<u64>>> {
        proptest::collection::vec((0_u64..200, 0_u64..20).prop_map(|(s, n)| s..s + n), 0..20)
    }

    fn bytes(ranges: &[Range<u64>]) -> BTreeSet<u64> {
        ranges.iter().cloned().flatten().collect()
    }

    fn is_normal(ranges: &[Range<u64>]) -> bool {
        ranges.iter().all(|r| r.start < r.end) && ranges.windows(2).all(|w| w[0].end < w[1].start)
    }

    #[test]
    fn touching_ranges_become_one() {
        assert_eq!(coalesce(vec![4..8, 0..4, 9..9]), vec![0..8]);
        assert_eq!(union(&[0..4], &[4..8]), vec![0..8]);
        assert!(intersect(&[0..4], &[4..8]).is_empty());
    }

    #[test]
    fn the_smallest_gaps_are_closed() {
        let list = [0..1, 3..4, 5..6, 9..10];
        assert_eq!(fewer(&list, 4), list);
        assert_eq!(fewer(&list, 3), [0..1, 3..6, 9..10]);
        assert_eq!(fewer(&list, 2), [0..6, 9..10]);
        assert_eq!(fewer(&list, 1), vec![0..10]);
        assert_eq!(fewer(&list, 0), vec![0..10]);
        assert!(fewer(&[], 0).is_empty());
    }

    proptest! {
        #[test]
        fn fewer_ranges_cover_the_same(list in any_ranges(), most in 1_usize..20) {
            let list = coalesce(list);
            let fewer = fewer(&list, most);
            prop_assert!(is_normal(&fewer) && fewer.len() <= most.max(list.len().min(1)));
            prop_assert_eq!(intersect(&fewer, &list), list);
        }

        #[test]
        fn sets_of_bytes_are_the_model(a in any_ranges(), b in any_ranges()) {
            let (set_a, set_b) = (bytes(&a), bytes(&b));
            let (a, b) = (coalesce(a), coalesce(b));
            prop_assert!(is_normal(&a));
            prop_assert_eq!(bytes(&a), set_a.clone());
            prop_assert_eq!(total_bytes(&a), set_a.len() as u64);
            let (either, both) = (union(&a, &b), intersect(&a, &b));
            prop_assert!(is_normal(&either) && is_normal(&both));
            prop_assert_eq!(bytes(&either), &set_a | &set_b);
            prop_assert_eq!(bytes(&both), &set_a & &set_b);
        }
    }
}
