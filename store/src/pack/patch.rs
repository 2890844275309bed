//! Patches: the runs of bytes in which a page differs from its base.
//!
//! ```text
//! 2     d9 5b
//! 2     length of what follows, not 0
//! for each run, from the beginning of the page on
//!   v   bytes from the end of the run before (of the page's beginning) to this one
//!   v   length, at least 1
//!       the bytes
//! ```
//! `v` is LEB128 in at most three bytes. A page has the length of its base. To make a patch takes a
//! comparison, and to apply it a copy: a guest that changes some words of a page costs neither
//! a compression nor a decompression more than its base does.

/// So patches are told from other bytes where a footer is lost.
const MAGIC: [u8; 2] = [0xd9, 0x5b];
/// The magic and the length.
const HEAD_LEN: usize = 4;
/// Longer patches are not made: zstd would make less of so many bytes.
const MAX_LEN: usize = 512;
/// Pages are compared by so many bytes, and bytewise where these differ.
const STRIDE: usize = 32;
/// Equal bytes between two differing ones that cost less than the head of another run.
const BRIDGED: usize = 2;

/// Appends the patch that makes `page` of `base`. `false`, and nothing is appended, if it would be
/// too long, or if the pages are equal or of two lengths.
pub(super) fn make(page: &[u8], base: &[u8], out: &mut Vec<u8>) -> bool {
    let start = out.len();
    out.extend_from_slice(&[0; HEAD_LEN]);
    let body = out.len();
    let mut end_of_last = 0;
    let mut is_short = page.len() == base.len();
    for run in Runs::new(page, base) {
        write(out, run.start - end_of_last);
        write(out, run.len());
        is_short = is_short && out.len() - body + run.len() <= MAX_LEN;
        if !is_short {
            break;
        }
        out.extend_from_slice(&page[run.clone()]);
        end_of_last = run.end;
    }
    match u16::try_from(out.len() - body) {
        Ok(len @ 1..) if is_short => {
            out[start..body].copy_from_slice(&head(len));
            true
        }
        _ => {
            out.truncate(start);
            false
        }
    }
}

/// Makes a page of its base: writes it into the beginning of `out`, and returns its length. `None`
/// unless the patch is well-formed, and `out` has room for the page.
pub(super) fn apply(patch: &[u8], base: &[u8], out: &mut [u8]) -> Option<usize> {
    let (head, mut rest) = patch.split_first_chunk()?;
    if body_len(head)? != rest.len() {
        return None;
    }
    let page = out.get_mut(..base.len())?;
    page.copy_from_slice(base);
    let mut at = 0_usize;
    while !rest.is_empty() {
        at = at.checked_add(read(&mut rest)?)?;
        let len = read(&mut rest)?;
        let (bytes, others) = rest.split_at_checked(len)?;
        page.get_mut(at..)?.get_mut(..len)?.copy_from_slice(bytes);
        at += len;
        rest = others;
    }
    Some(base.len())
}

/// The length of the patch that `bytes` begin with, if they hold all of it and it could be one.
pub(crate) fn len(bytes: &[u8]) -> Option<usize> {
    let (head, rest) = bytes.split_first_chunk()?;
    let len = body_len(head)?;
    let mut runs = rest.get(..len)?;
    while !runs.is_empty() {
        read(&mut runs)?;
        let len = read(&mut runs).filter(|len| *len > 0)?;
        runs = runs.get(len..)?;
    }
    Some(HEAD_LEN + len)
}

fn head(len: u16) -> [u8; HEAD_LEN] {
    let [low, high] = len.to_le_bytes();
    [MAGIC[0], MAGIC[1], low, high]
}

fn body_len(head: &[u8; HEAD_LEN]) -> Option<usize> {
    let [magic @ .., low, high] = *head;
    let len = usize::from(u16::from_le_bytes([low, high]));
    (magic == MAGIC && len > 0).then_some(len)
}

/// The runs in which two pages of one length differ.
struct Runs<'a> {
    page: &'a [u8],
    base: &'a [u8],
    at: usize,
}

impl<'a> Runs<'a> {
    fn new(page: &'a [u8], base: &'a [u8]) -> Self {
        Self { page, base, at: 0 }
    }

    /// The first byte from `from` on that differs.
    fn next_difference(&self, from: usize) -> Option<usize> {
        let (page, base) = (self.page.get(from..)?, self.base.get(from..)?);
        let mut at = from;
        for (page, base) in page.chunks(STRIDE).zip(base.chunks(STRIDE)) {
            if page != base {
                let differs = page.iter().zip(base).position(|(one, other)| one != other);
                return differs.map(|position| at + position);
            }
            at += page.len();
        }
        None
    }
}

impl Iterator for Runs<'_> {
    type Item = std::ops::Range<usize>;

    fn next(&mut self) -> Option<Self::Item> {
        let start = self.next_difference(self.at)?;
        let (page, base) = (&self.page[start..], &self.base[start..]);
        let mut len = 0;
        for (position, (one, other)) in page.iter().zip(base).enumerate() {
            if one != other {
                len = position + 1;
            } else if position >= len + BRIDGED {
                break;
            }
        }
        self.at = start + len;
        Some(start..self.at)
    }
}

fn write(out: &mut Vec<u8>, mut value: usize) {
    while value >= 0x80 {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn read(bytes: &mut &[u8]) -> Option<usize> {
    let mut value = 0;
    for shift in [0, 7, 14] {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pack::codec::tests::noise;

    /// A page and its base, which differ by the byte in these places.
    fn differing(len: usize, places: &[usize]) -> (Vec<u8>, Vec<u8>) {
        let base = noise(1, len);
        let mut page = base.clone();
        for place in places {
            page[*place] ^= 0xff;
        }
        (page, base)
    }

    #[test]
    fn what_is_applied_is_what_was_made() {
        let all: Vec<usize> = (0..500).collect();
        let last: Vec<usize> = (3600..4096).collect();
        let cases: [(&[usize], usize); 8] = [
            (&[0], 4 + 3),
            (&[4095], 4 + 4),
            (&[31, 32], 4 + 4),
            // Two equal bytes between them are cheaper than another run, three are not.
            (&[100, 103], 4 + 6),
            (&[100, 104], 4 + 6),
            (&[0, 2000, 4095], 4 + 3 + 4 + 4),
            (&all, 4 + 3 + 500),
            (&last, 4 + 4 + 496),
        ];
        for (places, expected) in cases {
            let (page, base) = differing(4096, places);
            let mut out = b"before".to_vec();
            assert!(make(&page, &base, &mut out), "{places:?}");
            let patch = &out[6..];
            assert_eq!(patch.len(), expected, "{places:?}");
            assert_eq!(len(&out[6..]), Some(expected));
            assert_eq!(len(&[patch, b"more"].concat()), Some(expected));
            let mut back = vec![0xaa; 4100];
            assert_eq!(apply(patch, &base, &mut back), Some(4096));
            assert_eq!(back[..4096], page);
            assert_eq!(back[4096..], [0xaa; 4]);
        }
    }

    #[test]
    fn a_page_of_64_kib_is_patched_at_its_end() {
        let (page, base) = differing(65536, &[65535]);
        let mut patch = Vec::new();
        assert!(make(&page, &base, &mut patch));
        assert_eq!(patch.len(), 4 + 3 + 1 + 1);
        let mut back = vec![0; 65536];
        assert_eq!(apply(&patch, &base, &mut back), Some(65536));
        assert_eq!(back, page);
    }

    #[test]
    fn what_differs_in_much_or_is_longer_has_no_patch() {
        let all: Vec<usize> = (0..513).collect();
        let scattered: Vec<usize> = (0..4096).step_by(20).collect();
        for places in [&all, &scattered] {
            let (page, base) = differing(4096, places);
            let mut out = b"before".to_vec();
            assert!(!make(&page, &base, &mut out));
            assert_eq!(out, b"before");
        }
        let (page, base) = differing(4096, &[]);
        assert!(!make(&page, &base, &mut Vec::new()));
        assert!(!make(&page, &base[..4000], &mut Vec::new()));
    }

    #[test]
    fn what_is_no_patch_is_refused_or_makes_another_page_in_its_room() {
        let (page, base) = differing(4096, &[5, 700, 4000]);
        let mut patch = Vec::new();
        assert!(make(&page, &base, &mut patch));
        for end in 0..patch.len() {
            assert_eq!(apply(&patch[..end], &base, &mut vec![0; 4096]), None);
            assert_eq!(len(&patch[..end]), None, "the first {end} bytes");
        }
        for bit in 0..patch.len() * 8 {
            let mut flipped = patch.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let mut back = vec![0; 4100];
            if let Some(len) = apply(&flipped, &base, &mut back) {
                assert!(len == 4096 && back[..4096] != page);
            }
            assert_eq!(back[4096..], [0; 4]);
        }
        // No room; a run beyond the end; a number that does not end.
        assert_eq!(apply(&patch, &base, &mut vec![0; 4095]), None);
        for body in [&[0x7f, 1, 9][..], &[0xff, 0xff, 0xff, 0], &[0, 5, 1]] {
            let patch = [&head(body.len() as u16)[..], body].concat();
            assert_eq!(apply(&patch, &base[..64], &mut [0; 64]), None);
        }
    }
}
