//! What manifests of all versions are made of: numbers, texts, and why bytes are none.

use std::collections::BTreeMap;

use crate::id::SnapshotId;
use crate::manifest::{ImageRole, MAX_IMAGES, MAX_LABELS};
use crate::page::PageSize;

/// Why bytes are no manifest that this program reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Malformed {
    /// A newer version of this program wrote them.
    Newer { version: u32 },
    /// They have a field that has to be understood, and that only a newer version
    /// knows.
    NewerField { number: u16 },
    /// No version did.
    Wrong(&'static str),
}

pub(super) const CUT: Malformed = Malformed::Wrong("it is cut off, or not text where text is");

pub(super) fn put_text(out: &mut Vec<u8>, text: &str) {
    let len = u32::try_from(text.len()).expect("names are checked to be short");
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

pub(super) fn put_count(out: &mut Vec<u8>, count: usize) {
    let count = u16::try_from(count).expect("counts are checked to be small");
    out.extend_from_slice(&count.to_le_bytes());
}

/// Bytes that are read from the beginning.
pub(super) struct Input<'a>(pub &'a [u8]);

impl Input<'_> {
    pub fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    pub fn u8(&mut self) -> Option<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    pub fn text(&mut self) -> Option<String> {
        let len = usize::try_from(self.u32()?).ok()?;
        let (text, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(std::str::from_utf8(text).ok()?.to_owned())
    }
}

/// What both versions have alike.
impl Input<'_> {
    pub fn page_size(&mut self, expected: PageSize) -> Result<(), Malformed> {
        if self.u32().ok_or(CUT)? == expected.as_u32() {
            return Ok(());
        }
        Err(Malformed::Wrong("its page size is not the store's"))
    }

    pub fn parent(&mut self) -> Result<Option<SnapshotId>, Malformed> {
        match self.u8().ok_or(CUT)? {
            0 => Ok(None),
            1 => Ok(Some(SnapshotId::from_bytes(self.array().ok_or(CUT)?))),
            _ => Err(Malformed::Wrong(
                "whether it has a parent is neither 0 nor 1",
            )),
        }
    }

    pub fn image_count(&mut self) -> Result<usize, Malformed> {
        let count = usize::from(self.u16().ok_or(CUT)?);
        if count > MAX_IMAGES {
            return Err(Malformed::Wrong("it has more than 256 images"));
        }
        Ok(count)
    }

    pub fn role(&mut self) -> Result<ImageRole, Malformed> {
        match self.u8().ok_or(CUT)? {
            0 => Ok(ImageRole::Memory),
            1 => Ok(ImageRole::Disk),
            2 => Ok(ImageRole::File),
            _ => Err(Malformed::Wrong("an image has a role that there is not")),
        }
    }

    /// Whether an image has a root.
    pub fn has_root(&mut self) -> Result<bool, Malformed> {
        match self.u8().ok_or(CUT)? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Malformed::Wrong(
                "whether an image has a root is neither 0 nor 1",
            )),
        }
    }

    pub fn labels(&mut self) -> Result<BTreeMap<String, String>, Malformed> {
        let count = usize::from(self.u16().ok_or(CUT)?);
        if count > MAX_LABELS {
            return Err(Malformed::Wrong("it has more than 1024 labels"));
        }
        let mut labels = BTreeMap::new();
        for _ in 0..count {
            let (key, value) = (self.text().ok_or(CUT)?, self.text().ok_or(CUT)?);
            if labels
                .last_key_value()
                .is_some_and(|(last, _)| *last >= key)
            {
                return Err(Malformed::Wrong("its labels are not sorted"));
            }
            labels.insert(key, value);
        }
        Ok(labels)
    }
}
