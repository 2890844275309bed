use std::time::UNIX_EPOCH;

use super::*;

fn seen(touched: &[u32], unknown: &[u32], pushed: u32) -> Seen {
    Seen {
        touched: touched.to_vec(),
        unknown: unknown.to_vec(),
        last: Pushed {
            pushed,
            ..Pushed::default()
        },
        part: None,
    }
}

fn after(recordings: &[Seen]) -> WorkingSet {
    let mut set = None;
    for seen in recordings {
        set = Some(WorkingSet::merged(set.as_ref(), seen, UNIX_EPOCH));
    }
    set.expect("a recording")
}

fn pages(recordings: &[Seen]) -> Vec<u32> {
    after(recordings).pages().collect()
}

#[test]
fn the_first_recording_is_the_set_in_its_order() {
    assert_eq!(pages(&[seen(&[9, 2, 5], &[3], 0)]), [9, 2, 5]);
}

#[test]
fn what_half_of_the_recordings_touched_is_the_set() {
    let one = seen(&[1, 2], &[], 0);
    let other = seen(&[1, 3], &[], 0);
    assert_eq!(pages(&[one.clone(), other.clone()]), [1, 3, 2]);
    // 3 in one of three, 2 in two.
    assert_eq!(pages(&[one.clone(), other.clone(), one.clone()]), [1, 2]);
    // Only the last eight count.
    let many = [vec![one; 8], vec![other; 5]].concat();
    assert_eq!(pages(&many), [1, 3]);
}

#[test]
fn of_what_was_pushed_nothing_is_known() {
    let first = seen(&[1, 2, 3], &[], 0);
    let pushed = seen(&[], &[1, 3], 2);
    // 2 was left out and not asked for, once, twice.
    assert_eq!(pages(&[first.clone(), pushed.clone()]), [1, 2, 3]);
    assert_eq!(pages(&[first, pushed.clone(), pushed]), [1, 3]);
}

#[test]
fn what_was_read_around_others_is_in_the_set_once_it_is_asked_for() {
    let first = seen(&[1], &[2, 3], 0);
    let second = seen(&[2], &[1], 1);
    assert_eq!(pages(&[first.clone(), second.clone()]), [2, 1]);
    let third = seen(&[4], &[1, 2], 2);
    // 3 was not asked for; 4 in one of three.
    let set = after(&[first, second, third]);
    assert_eq!(set.pages().collect::<Vec<_>>(), [2, 1]);
    assert!(set.pages.iter().all(|page| page.number != 3));
}

#[test]
fn a_new_page_stands_behind_what_was_touched_before_it() {
    let first = seen(&[10, 20, 30], &[15], 0);
    let second = seen(&[20, 15], &[10, 30], 2);
    assert_eq!(pages(&[first, second]), [10, 20, 15, 30]);
}

#[test]
fn a_look_at_few_pages_changes_nothing() {
    let all: Vec<u32> = (0..100).collect();
    let set = after(&[seen(&all, &[], 0)]);
    let looked = WorkingSet::merged(Some(&set), &seen(&[7], &[], 0), UNIX_EPOCH);
    assert_eq!(looked, set);
}

#[test]
fn a_set_that_is_not_used_is_not_trusted_until_it_was_recorded_anew() {
    let all: Vec<u32> = (0..100).collect();
    let mut wrong = seen(&[200], &all[10..], 90);
    wrong.last.left_out = 10;
    wrong.last.left_out_touched = 4;
    let first = seen(&all, &[], 0);
    let set = after(&[first.clone(), wrong.clone()]);
    assert!(!set.is_trusted());
    assert_eq!(set.last().hit_rate(), Some(0.4));
    assert!(after(&[first, wrong, seen(&all, &[], 0)]).is_trusted());
}

#[test]
fn there_is_a_most_of_pages() {
    let touched: Vec<u32> = (0..40_000).collect();
    let unknown: Vec<u32> = (40_000..100_000).collect();
    let set = after(&[seen(&touched, &unknown, 0)]);
    assert_eq!(set.pages.len(), MAX_PAGES);
    assert_eq!(set.pages().collect::<Vec<_>>(), touched);
}

fn of_part(seen: Seen, part: std::ops::Range<u32>) -> Seen {
    Seen {
        part: Some(vec![part]),
        ..seen
    }
}

#[test]
fn a_recording_of_a_part_says_nothing_of_the_rest() {
    let all: Vec<u32> = (0..100).collect();
    let whole = seen(&all, &[], 0);
    let part = of_part(seen(&[90, 95], &[], 0), 90..200);
    let before = after(std::slice::from_ref(&whole));
    let set = after(&[vec![whole.clone()], vec![part.clone(); 9]].concat());
    let rest: Vec<u32> = set.pages().filter(|page| *page < 90).collect();
    assert_eq!(rest, all[..90]);
    let of_part: Vec<u32> = set.pages().filter(|page| *page >= 90).collect();
    assert_eq!(of_part, [90, 95], "the others are not touched any more");
    assert_eq!((set.recordings(), set.last()), (1, before.last()));
    // An eighth of the part is enough to count, and less is not.
    let little = self::of_part(seen(&[99], &[], 0), 50..100);
    assert_eq!(
        WorkingSet::merged(Some(&before), &little, UNIX_EPOCH),
        before
    );
}

#[test]
fn a_set_of_parts_becomes_that_of_the_whole() {
    let part = of_part(seen(&[7, 5], &[], 0), 5..10);
    let set = after(&[part.clone(), part.clone()]);
    assert_eq!(set.pages().collect::<Vec<_>>(), [7, 5]);
    assert_eq!(set.recordings(), 0);
    // What is new in the third recording of a part was not touched in two.
    let more = of_part(seen(&[6], &[7, 5], 2), 5..10);
    assert_eq!(pages(&[part.clone(), part.clone(), more]), [7, 5]);
    // The first recording of the whole is the first that has seen the rest.
    let whole = seen(&[100, 101], &[7, 5], 2);
    let set = after(&[part.clone(), part, whole]);
    let pages: BTreeSet<u32> = set.pages().collect();
    assert_eq!(pages, BTreeSet::from([5, 7, 100, 101]));
    assert_eq!(set.recordings(), 1);
}

#[test]
fn a_part_that_was_pushed_in_vain_does_not_make_the_rest_doubtful() {
    let all: Vec<u32> = (0..100).collect();
    let mut bad = of_part(seen(&[60], &all[60..], 40), 50..100);
    bad.last.left_out = 10;
    bad.last.left_out_touched = 1;
    let whole = seen(&all, &[], 0);
    let once = after(&[whole.clone(), bad.clone()]);
    assert!(once.is_trusted());
    assert_eq!(once.pages().count(), 100, "half of two is enough");
    let set = after(&[whole, bad.clone(), bad.clone()]);
    assert!(set.is_trusted());
    let left: Vec<u32> = set.pages().collect();
    assert_eq!(left, [&all[..50], &[60]].concat());
    // Nor those of later parts, where there are only such.
    let of_parts = after(&[of_part(seen(&all[50..], &[], 0), 50..100), bad]);
    assert!(of_parts.is_trusted());
    assert_eq!(of_parts.last().hit_rate(), Some(0.1));
}
