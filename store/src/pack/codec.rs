//! How one chunk's payload becomes stored bytes, and back.
//!
//! ```text
//! raw     the payload
//! zstd    one zstd frame
//! delta   32 bytes id of the base chunk, 8 bytes hint where it is stored
//!         (pack number, entry number), one zstd frame that was compressed
//!         with the base's payload as a raw-content dictionary
//! id delta  the same, with that part of the base's payload as dictionary that
//!         its id is the hash of: a node's canonical part
//! patch   the same head, and the runs of bytes in which a page differs from its
//!         base (`patch`)
//! ```
//! Copies of one node may hint at different places of its children. A delta
//! against a whole payload of a node needs just that copy, so none is made any
//! more; those of older stores are read as long as the copy is there.
//! A base is always stored raw or as zstd, so any chunk is at most two decodes
//! away whatever the depth of its chain.

use std::cell::RefCell;

use zstd::zstd_safe::{CCtx, DCtx};

use crate::pack::patch;

/// The zstd level of commits. It takes half of the time of level 1, to read back as well, and
/// 13 % more bytes until `gc --optimize` (docs/decisions/065-commits-compress-fast.md).
const LEVEL: i32 = -1;
/// The level of what is kept. From 12 on zstd looks for the cheapest way to say a page, and takes
/// 180 us for that; decoding takes as long as at any other level (docs/BENCHMARKS.md).
const LEVEL_OF_KEPT: i32 = 12;
/// A delta must be at most this share of the plain encoding to be kept: above
/// it saves too little for the second decode.
pub(crate) const PAGE_DELTA_MAX_PERCENT: usize = 70;
/// The same for tree nodes. Along a chain of steps a node's delta against the
/// same base grows with each; a new base early makes their sum smaller.
pub(crate) const NODE_DELTA_MAX_PERCENT: usize = 30;
/// A chunk that does not shrink below this share is stored raw, which reads
/// fastest.
const RAW_ABOVE_PERCENT: usize = 95;
/// Base id and hint in front of a delta's frame.
pub(crate) const DELTA_HEAD_LEN: usize = 40;
/// A raw-content dictionary that begins so would be taken for a trained one
/// (zstd's format document, "Dictionary Format").
const DICTIONARY_MAGIC: [u8; 4] = [0x37, 0xa4, 0x30, 0xec];

/// How a chunk is stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Encoding {
    Raw,
    Zstd,
    /// Against the base's whole payload.
    Delta,
    /// Against the part of the base's payload that its id is the hash of.
    IdDelta,
    /// Where a page's bytes differ from its base's.
    Patch,
    /// Nothing: what was here when the pack was upgraded could not be read any more,
    /// and nothing needed it. It keeps the numbers of the entries after it.
    Absent,
    /// One that only a newer version knows.
    Unknown(u8),
}

/// What stands for [`Encoding::Absent`].
const ABSENT: u8 = 15;

/// What it takes to read a chunk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Needs {
    /// Its stored bytes. Only such a chunk may be the base of a delta.
    Nothing,
    /// The base that they name, too.
    Base,
    /// Nothing is stored.
    Absent,
    /// A newer version, which knows this encoding.
    Newer(u8),
}

impl Encoding {
    /// Those that a chunk can be decoded from.
    pub const KNOWN: [Self; 5] = [
        Self::Raw,
        Self::Zstd,
        Self::Delta,
        Self::IdDelta,
        Self::Patch,
    ];

    pub fn from_byte(byte: u8) -> Self {
        match byte {
            0 => Self::Raw,
            1 => Self::Zstd,
            2 => Self::Delta,
            3 => Self::IdDelta,
            4 => Self::Patch,
            ABSENT => Self::Absent,
            other => Self::Unknown(other),
        }
    }

    pub fn to_byte(self) -> u8 {
        match self {
            Self::Raw => 0,
            Self::Zstd => 1,
            Self::Delta => 2,
            Self::IdDelta => 3,
            Self::Patch => 4,
            Self::Absent => ABSENT,
            Self::Unknown(byte) => byte,
        }
    }

    /// What a chunk stored so takes to be read. Who reads asks this and nothing else.
    pub fn needs(self) -> Needs {
        match self {
            Self::Raw | Self::Zstd => Needs::Nothing,
            Self::Delta | Self::IdDelta | Self::Patch => Needs::Base,
            Self::Absent => Needs::Absent,
            Self::Unknown(byte) => Needs::Newer(byte),
        }
    }

    /// Whether a chunk stored so decodes without another chunk. Only such a
    /// chunk may be the base of a delta.
    pub fn is_standalone(self) -> bool {
        self.needs() == Needs::Nothing
    }

    /// Whether a chunk stored so needs its base.
    pub fn is_delta(self) -> bool {
        self.needs() == Needs::Base
    }
}

/// A chunk that a delta may be made against.
pub(crate) struct Base<'a> {
    /// The head of the delta: id and hint.
    pub head: [u8; DELTA_HEAD_LEN],
    pub payload: &'a [u8],
    pub patched: Patched,
    /// What the delta is called.
    pub encoding: Encoding,
    /// The largest share of the plain encoding that a delta may have.
    pub max_percent: usize,
}

/// When a delta is a patch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Patched {
    Never,
    /// If that is worthwhile for a chunk of so many bytes, which is what the base takes, and about what
    /// the chunk would take by itself: nothing else is tried.
    AtOnce {
        base_stored_len: usize,
    },
    /// If that is the smallest.
    IfBest,
}

impl Base<'_> {
    fn is_worthwhile(&self, delta_len: usize, plain_len: usize) -> bool {
        delta_len * 100 <= plain_len * self.max_percent
    }

    /// Appends a delta that is a patch, if one can be made.
    fn patch(&self, payload: &[u8], out: &mut Vec<u8>) -> bool {
        let start = out.len();
        out.extend_from_slice(&self.head);
        let is_made = self.patched != Patched::Never && patch::make(payload, self.payload, out);
        if !is_made {
            out.truncate(start);
        }
        is_made
    }
}

thread_local! {
    static COMPRESS: RefCell<CCtx<'static>> = RefCell::new(CCtx::create());
    static DECOMPRESS: RefCell<DCtx<'static>> = RefCell::new(DCtx::create());
}

/// Appends a worthwhile encoding of `payload` to `out`: a patch if that is short, for the time that it
/// saves, else the smallest.
pub(crate) fn encode(payload: &[u8], base: Option<Base<'_>>, out: &mut Vec<u8>) -> Encoding {
    if let Some(base) = &base
        && let Patched::AtOnce { base_stored_len } = base.patched
    {
        let start = out.len();
        if base.patch(payload, out) && base.is_worthwhile(out.len() - start, base_stored_len) {
            return Encoding::Patch;
        }
        out.truncate(start);
    }
    encode_at(LEVEL, payload, base.as_slice(), out)
}

/// The same as small as it gets, of what is to be kept for long: with any of `bases`. What it
/// makes is decoded before it is returned; what would not come back is stored raw.
pub(crate) fn encode_to_keep(payload: &[u8], bases: &[Base<'_>], out: &mut Vec<u8>) -> Encoding {
    let start = out.len();
    let encoding = encode_at(LEVEL_OF_KEPT, payload, bases, out);
    let head = out.get(start..start + DELTA_HEAD_LEN);
    let base = bases.iter().find(|base| Some(&base.head[..]) == head);
    let base = base.filter(|_| encoding.is_delta());
    let mut back = vec![0; payload.len()];
    let dictionary = base.map_or(&[][..], |base| base.payload);
    if decode(&out[start..], encoding, dictionary, &mut back) == Some(payload.len())
        && back == payload
    {
        return encoding;
    }
    out.truncate(start);
    out.extend_from_slice(payload);
    Encoding::Raw
}

fn encode_at(level: i32, payload: &[u8], bases: &[Base<'_>], out: &mut Vec<u8>) -> Encoding {
    let start = out.len();
    COMPRESS.with_borrow_mut(|context| {
        let plain_len = compress(context, level, payload, &[], out);
        let mut best = Encoding::Zstd;
        for base in bases {
            if base.payload.starts_with(&DICTIONARY_MAGIC) {
                continue;
            }
            let mut keep_if_best = |out: &mut Vec<u8>, middle: usize, encoding| {
                let delta_len = out.len() - middle;
                let is_best = best == Encoding::Zstd || delta_len < middle - start;
                if is_best && base.is_worthwhile(delta_len, plain_len.min(payload.len())) {
                    out.drain(start..middle);
                    best = encoding;
                } else {
                    out.truncate(middle);
                }
            };
            let middle = out.len();
            if base.patch(payload, out) {
                keep_if_best(out, middle, Encoding::Patch);
            }
            let middle = out.len();
            out.extend_from_slice(&base.head);
            compress(context, level, payload, base.payload, out);
            keep_if_best(out, middle, base.encoding);
        }
        if best == Encoding::Zstd && plain_len * 100 > payload.len() * RAW_ABOVE_PERCENT {
            out.truncate(start);
            out.extend_from_slice(payload);
            return Encoding::Raw;
        }
        best
    })
}

fn compress(
    context: &mut CCtx<'static>,
    level: i32,
    payload: &[u8],
    dictionary: &[u8],
    out: &mut Vec<u8>,
) -> usize {
    let start = out.len();
    let room = zstd::zstd_safe::compress_bound(payload.len());
    out.resize(start + room, 0);
    let written = context
        .compress_using_dict(&mut out[start..], payload, dictionary, level)
        .expect("compressing into a buffer of the bound's size cannot fail");
    out.truncate(start + written);
    written
}

/// Decodes one zstd frame, with `dictionary` as raw content, into all or the
/// beginning of `out`. Returns the payload's length; `None` if the frame is not
/// valid or its payload is longer than `out`.
pub(crate) fn decompress(frame: &[u8], dictionary: &[u8], out: &mut [u8]) -> Option<usize> {
    DECOMPRESS.with_borrow_mut(|context| context.decompress_using_dict(out, frame, dictionary).ok())
}

/// Decodes stored bytes into all or the beginning of `out`, with the base's
/// payload for a delta. Returns the payload's length; `None` if the bytes do not
/// decode.
pub(crate) fn decode(
    stored: &[u8],
    encoding: Encoding,
    base: &[u8],
    out: &mut [u8],
) -> Option<usize> {
    match encoding {
        Encoding::Raw => {
            out.get_mut(..stored.len())?.copy_from_slice(stored);
            Some(stored.len())
        }
        Encoding::Zstd => decompress(stored, &[], out),
        Encoding::Delta | Encoding::IdDelta => decompress(stored.get(DELTA_HEAD_LEN..)?, base, out),
        Encoding::Patch => patch::apply(stored.get(DELTA_HEAD_LEN..)?, base, out),
        Encoding::Absent | Encoding::Unknown(_) => None,
    }
}

/// How long the chunk is that `bytes` begin with, where these themselves tell; a raw one is
/// taken for a page.
pub(crate) fn stored_len(bytes: &[u8], encoding: Encoding, page_len: usize) -> Option<usize> {
    match encoding {
        Encoding::Raw => Some(page_len),
        Encoding::Zstd => frame_len(bytes),
        Encoding::Delta | Encoding::IdDelta => {
            Some(frame_len(bytes.get(DELTA_HEAD_LEN..)?)? + DELTA_HEAD_LEN)
        }
        Encoding::Patch => Some(patch::len(bytes.get(DELTA_HEAD_LEN..)?)? + DELTA_HEAD_LEN),
        Encoding::Absent | Encoding::Unknown(_) => None,
    }
}

/// The length of the zstd frame that `bytes` begin with.
pub(crate) fn frame_len(bytes: &[u8]) -> Option<usize> {
    zstd::zstd_safe::find_frame_compressed_size(bytes).ok()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn noise(seed: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        blake3::Hasher::new()
            .update(&seed.to_le_bytes())
            .finalize_xof()
            .fill(&mut out);
        out
    }

    fn base(payload: &[u8]) -> Base<'_> {
        Base {
            head: [9; DELTA_HEAD_LEN],
            payload,
            patched: Patched::Never,
            encoding: Encoding::Delta,
            max_percent: PAGE_DELTA_MAX_PERCENT,
        }
    }

    #[test]
    fn each_number_is_of_one_encoding_and_all_that_decode_are_known() {
        for byte in 0..16 {
            let encoding = Encoding::from_byte(byte);
            assert_eq!(encoding.to_byte(), byte);
            let decodes = matches!(encoding.needs(), Needs::Nothing | Needs::Base);
            assert_eq!(Encoding::KNOWN.contains(&encoding), decodes, "{encoding:?}");
        }
    }

    #[test]
    fn noise_is_stored_raw() {
        let page = noise(1, 4096);
        let mut out = b"before".to_vec();
        assert_eq!(encode(&page, None, &mut out), Encoding::Raw);
        assert_eq!(&out[6..], &page);
    }

    #[test]
    fn a_small_change_is_a_small_delta() {
        let old = noise(1, 4096);
        let mut new = old.clone();
        new[100..108].fill(7);
        let mut out = Vec::new();
        assert_eq!(encode(&new, Some(base(&old)), &mut out), Encoding::Delta);
        assert!(out.len() < 120, "{}", out.len());
        assert_eq!(out[..DELTA_HEAD_LEN], [9; DELTA_HEAD_LEN]);
        let mut back = vec![0; 4096];
        assert_eq!(
            decompress(&out[DELTA_HEAD_LEN..], &old, &mut back),
            Some(4096)
        );
        assert_eq!(back, new);
    }

    /// The same, whose page takes so many bytes where it is stored.
    fn patched(payload: &[u8], base_stored_len: usize) -> Base<'_> {
        Base {
            patched: Patched::AtOnce { base_stored_len },
            ..base(payload)
        }
    }

    #[test]
    fn a_page_that_differs_in_few_bytes_is_a_patch_and_in_many_a_delta() {
        let old = noise(1, 4096);
        for (changed, encoding) in [(8, Encoding::Patch), (600, Encoding::Delta)] {
            let mut new = old.clone();
            new[100..100 + changed].copy_from_slice(&noise(2, changed));
            let mut out = b"before".to_vec();
            assert_eq!(encode(&new, Some(patched(&old, 4096)), &mut out), encoding);
            let stored = &out[6..];
            assert_eq!(stored[..DELTA_HEAD_LEN], [9; DELTA_HEAD_LEN]);
            assert_eq!(stored_len(stored, encoding, 4096), Some(stored.len()));
            let mut back = vec![0; 4096];
            assert_eq!(decode(stored, encoding, &old, &mut back), Some(4096));
            assert_eq!(back, new);
        }
    }

    #[test]
    fn no_patch_is_made_of_a_page_that_takes_little_by_itself() {
        let mut new = vec![0; 4096];
        new[100..108].fill(7);
        let old = vec![0; 4096];
        let mut out = Vec::new();
        assert_eq!(
            encode(&new, Some(patched(&old, 20)), &mut out),
            Encoding::Zstd
        );
        assert!(out.len() < 40, "{}", out.len());
    }

    #[test]
    fn what_is_kept_is_a_patch_where_that_is_the_smallest() {
        let old = noise(1, 4096);
        let mut moved = old.clone();
        moved.copy_within(0..400, 2000);
        let mut edited = old.clone();
        edited[100..108].copy_from_slice(&noise(2, 8));
        // What was moved zstd finds in the base.
        for (new, encoding) in [(&moved, Encoding::Delta), (&edited, Encoding::Patch)] {
            let base = Base {
                patched: Patched::IfBest,
                ..base(&old)
            };
            let mut out = Vec::new();
            assert_eq!(encode_to_keep(new, &[base], &mut out), encoding);
        }
    }

    #[test]
    fn the_best_of_several_bases_is_kept() {
        let near = noise(1, 4096);
        let mut far = near.clone();
        far[1000..3000].copy_from_slice(&noise(2, 2000));
        let mut new = near.clone();
        new[100..108].fill(7);
        let bases = [(1, &far), (2, &near), (3, &far)].map(|(number, payload)| Base {
            head: [number; DELTA_HEAD_LEN],
            ..base(payload)
        });
        let mut out = b"before".to_vec();
        assert_eq!(encode_to_keep(&new, &bases, &mut out), Encoding::Delta);
        assert_eq!(out[6..6 + DELTA_HEAD_LEN], [2; DELTA_HEAD_LEN]);
        let mut back = vec![0; 4096];
        assert_eq!(
            decode(&out[6..], Encoding::Delta, &near, &mut back),
            Some(4096)
        );
        assert_eq!(back, new);
        for (payload, encoding) in [
            (noise(3, 4096), Encoding::Raw),
            (vec![1; 4096], Encoding::Zstd),
        ] {
            assert_eq!(encode_to_keep(&payload, &[], &mut Vec::new()), encoding);
        }
    }

    #[test]
    fn a_base_that_looks_like_a_trained_dictionary_is_not_used() {
        let mut old = noise(1, 4096);
        old[..4].copy_from_slice(&DICTIONARY_MAGIC);
        let mut new = old.clone();
        new[200] ^= 1;
        let mut out = Vec::new();
        assert_eq!(encode(&new, Some(base(&old)), &mut out), Encoding::Raw);
    }

    #[test]
    fn a_frame_longer_than_the_room_is_refused() {
        let mut out = Vec::new();
        assert_eq!(encode(&[1; 8192], None, &mut out), Encoding::Zstd);
        assert_eq!(decompress(&out, &[], &mut [0; 4096]), None);
    }
}
