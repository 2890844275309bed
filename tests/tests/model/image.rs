//! An image as it should be.

use std::collections::BTreeMap;
use std::sync::Arc;

use snapstore_store::Region;
use snapstore_tests::harness::noise;

use crate::Content;

/// The pages that are not zero.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Model {
    pub pages: u64,
    pub data: BTreeMap<u64, Arc<[u8]>>,
}

impl Model {
    pub fn set(&mut self, page: u64, bytes: Vec<u8>) {
        if bytes.iter().all(|byte| *byte == 0) {
            self.data.remove(&page);
        } else {
            self.data.insert(page, bytes.into());
        }
    }

    pub fn read(&self, page_len: usize, offset: u64, len: usize) -> Vec<u8> {
        let page_bytes = page_len as u64;
        let len = (self.pages * page_bytes)
            .saturating_sub(offset)
            .min(len as u64);
        let mut out = vec![0; len as usize];
        let last = (offset + len).div_ceil(page_bytes);
        for (page, bytes) in self.data.range(offset / page_bytes..last) {
            let start = (page * page_bytes).max(offset);
            let end = ((page + 1) * page_bytes).min(offset + len);
            let in_page = (start - page * page_bytes) as usize;
            let part = &bytes[in_page..in_page + (end - start) as usize];
            out[(start - offset) as usize..(end - offset) as usize].copy_from_slice(part);
        }
        out
    }

    /// Pages that differ, place by place.
    pub fn differences(&self, other: &Self) -> Vec<u64> {
        let mut pages: Vec<u64> = self.data.keys().chain(other.data.keys()).copied().collect();
        pages.sort_unstable();
        pages.dedup();
        pages.retain(|page| self.data.get(page) != other.data.get(page));
        pages
    }

    pub fn seek(&self, page_bytes: u64, offset: u64, region: Region) -> Option<u64> {
        let page = offset / page_bytes;
        let found = match region {
            Region::Data => self.data.range(page..).next().map(|(page, _)| *page)?,
            Region::Hole => (page..self.pages)
                .find(|page| !self.data.contains_key(page))
                .unwrap_or(self.pages),
        };
        Some((found * page_bytes).max(offset))
    }
}

/// The bytes of an edit.
pub fn fill(content: Content, len: usize) -> Vec<u8> {
    match content {
        Content::Zero => vec![0; len],
        Content::Fill(byte) => vec![byte; len],
        Content::Noise(seed) => noise(seed, len),
        Content::Tweaked(seed, at) => {
            let mut bytes = noise(seed, len);
            bytes[at % len] ^= 1;
            bytes
        }
    }
}
