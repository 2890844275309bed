//! What a working set's file says.
//!
//! ```text
//!   1  how many recordings of the whole image are merged in it, 0 to 8
//!   8  seconds, 4 nanoseconds since 1970 of the last one
//!      of the mount of the whole image that was recorded last, or of a part, if all were:
//!   4    pages that were pushed
//!   4    pages of the set that were left out to see whether they are asked for
//!   4    how many of these were
//!   4    pages asked for that were not in the set
//!   4  number of pages; for each, in the order in which they were first touched:
//!        4  its number
//!        1  of its last 8 recordings those in which it was touched, the latest in bit 0
//!        1  of how many recordings that is known, 0 to 8
//! ```
//! in a sealed file, of version 2 if no recording is of the whole image. Numbers are little-endian.

use std::time::{Duration, UNIX_EPOCH};

use crate::format::sealed_file::Format;
use crate::working_set::set::{HISTORY, MAX_PAGES, PageUse, Pushed, WorkingSet};

/// With a recording of the whole image.
pub(crate) const VERSION_1: Format = Format {
    magic: *b"SNAPWSET",
    version: 1,
};
/// With recordings of parts alone, which the first programs take for malformed.
pub(crate) const VERSION_2: Format = Format {
    magic: *b"SNAPWSET",
    version: 2,
};

/// As what a set is kept.
pub(crate) fn format_of(set: &WorkingSet) -> &'static Format {
    match set.recordings {
        0 => &VERSION_2,
        _ => &VERSION_1,
    }
}

const PAGE_LEN: usize = 6;

pub(crate) fn encode(set: &WorkingSet) -> Vec<u8> {
    let recorded = set.recorded.duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut bytes = vec![set.recordings];
    bytes.extend_from_slice(&recorded.as_secs().to_le_bytes());
    bytes.extend_from_slice(&recorded.subsec_nanos().to_le_bytes());
    let Pushed {
        pushed,
        left_out,
        left_out_touched,
        outside,
    } = set.last;
    let count = u32::try_from(set.pages.len()).expect("a bounded number of pages");
    for number in [pushed, left_out, left_out_touched, outside, count] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    for page in &set.pages {
        bytes.extend_from_slice(&page.number.to_le_bytes());
        bytes.extend_from_slice(&[page.touched, page.known]);
    }
    bytes
}

/// `None` if it is malformed.
pub(crate) fn decode(payload: &[u8]) -> Option<WorkingSet> {
    let ([recordings], rest) = payload.split_first_chunk()?;
    let (seconds, rest) = rest.split_first_chunk()?;
    let (nanoseconds, rest) = rest.split_first_chunk()?;
    let (numbers, rest) = rest.split_first_chunk::<20>()?;
    let number = |at: usize| {
        let bytes = numbers[4 * at..4 * at + 4].try_into().expect("four bytes");
        u32::from_le_bytes(bytes)
    };
    let nanoseconds = u32::from_le_bytes(*nanoseconds);
    let since = Duration::from_secs(u64::from_le_bytes(*seconds));
    let since = since.checked_add(Duration::from_nanos(nanoseconds.into()))?;
    let pages = rest.chunks_exact(PAGE_LEN);
    let count = usize::try_from(number(4)).ok()?;
    if !pages.remainder().is_empty() || pages.len() != count || count > MAX_PAGES {
        return None;
    }
    let pages: Vec<PageUse> = pages
        .map(|bytes| PageUse {
            number: u32::from_le_bytes(bytes[..4].try_into().expect("four bytes")),
            touched: bytes[4],
            known: bytes[5],
        })
        .collect();
    let known = pages.iter().all(|page| page.known <= HISTORY);
    let recorded = UNIX_EPOCH.checked_add(since)?;
    (known && *recordings <= HISTORY).then_some(WorkingSet {
        recordings: *recordings,
        recorded,
        last: Pushed {
            pushed: number(0),
            left_out: number(1),
            left_out_touched: number(2),
            outside: number(3),
        },
        pages,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> WorkingSet {
        WorkingSet {
            recordings: 3,
            recorded: UNIX_EPOCH + Duration::new(7, 9),
            last: Pushed {
                pushed: 1,
                left_out: 2,
                left_out_touched: 3,
                outside: 4,
            },
            pages: [(5, 1, 1), (2, 0b101, 3)]
                .map(|(number, touched, known)| PageUse {
                    number,
                    touched,
                    known,
                })
                .into(),
        }
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        let bytes = encode(&example());
        assert_eq!(decode(&bytes), Some(example()));
        // As every program of this version has written it.
        let golden = "03070000000000000009000000010000000200000003000000040000000200000005000000\
                      0101020000000503";
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, golden);
    }

    /// The first programs take a set without a recording for malformed: to them it is newer.
    #[test]
    fn a_set_of_parts_alone_is_of_another_version() {
        assert_eq!(format_of(&example()).version, 1);
        let parts = WorkingSet {
            recordings: 0,
            ..example()
        };
        assert_eq!(format_of(&parts).version, 2);
        assert_eq!(decode(&encode(&parts)), Some(parts));
    }

    #[test]
    fn what_is_malformed_is_nothing() {
        let good = encode(&example());
        for len in 0..good.len() {
            assert_eq!(decode(&good[..len]), None, "{len} bytes");
        }
        assert_eq!(decode(&[&good[..], &[0]].concat()), None);
        for (at, byte) in [(0, 9), (29, 9), (good.len() - 1, 9), (8, 0xff)] {
            let mut bad = good.clone();
            bad[at] = byte;
            assert_eq!(decode(&bad), None, "byte {at}");
        }
    }
}
