//! Going through the footer of a pack, entry by entry.

use crate::error::Result;
use crate::format::entry::ENTRY_LEN;
use crate::format::pack_v2::BLOCK_ENTRIES;
use crate::pack::codec::Encoding;
use crate::pack::reader::{PackReader, SCAN_BLOCKS, Slot};
use crate::pack::{EntryNumber, PackVersion};

impl PackReader {
    /// All chunks, in file order. A damaged block of the footer is an error, after
    /// which it goes on; that of a damaged footer of version 1 is the last item.
    pub fn scan(&self) -> Scan<'_> {
        Scan {
            pack: self,
            bytes: Vec::new(),
            first: 0,
            next: 0,
            has_unknown: false,
            unknown_kind: None,
        }
    }
}

/// Goes through a footer. See [`PackReader::scan`].
pub(crate) struct Scan<'a> {
    pack: &'a PackReader,
    bytes: Vec<u8>,
    /// The number of the first entry in `bytes`.
    first: u32,
    next: u32,
    has_unknown: bool,
    unknown_kind: Option<u8>,
}

impl Scan<'_> {
    /// Whether a chunk of a kind or an encoding that only a newer version knows
    /// has been passed.
    pub fn has_unknown(&self) -> bool {
        self.has_unknown
    }

    /// A kind that only a newer version knows, if a chunk of one has been passed.
    pub fn unknown_kind(&self) -> Option<u8> {
        self.unknown_kind
    }

    /// Reads the entries from `next` on; skips those that are damaged.
    fn fill(&mut self) -> Result<()> {
        self.first = self.next;
        let entries = match self.pack.version() {
            PackVersion::One => self
                .pack
                .read_entries(self.next, SCAN_BLOCKS * BLOCK_ENTRIES + 1),
            PackVersion::Two => self.pack.read_block(self.next / BLOCK_ENTRIES),
        };
        match entries {
            Ok(bytes) => {
                self.bytes = bytes;
                Ok(())
            }
            Err(error) => {
                self.next = match self.pack.version() {
                    PackVersion::One => self.pack.frame.entry_count,
                    PackVersion::Two => self.next + BLOCK_ENTRIES,
                };
                Err(error)
            }
        }
    }

    fn begins_a_run(&self) -> bool {
        self.next.is_multiple_of(match self.pack.version() {
            PackVersion::One => SCAN_BLOCKS * BLOCK_ENTRIES,
            PackVersion::Two => BLOCK_ENTRIES,
        })
    }
}

impl Iterator for Scan<'_> {
    type Item = Result<Slot>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.next < self.pack.frame.entry_count {
            if self.begins_a_run()
                && let Err(error) = self.fill()
            {
                return Some(Err(error));
            }
            let number = EntryNumber(self.next);
            let slot = self
                .pack
                .slot_in(&self.bytes, self.next - self.first, number);
            self.next += 1;
            if slot.is_some_and(|slot| slot.entry.encoding == Encoding::Absent) {
                continue;
            }
            self.has_unknown |=
                slot.is_none_or(|slot| matches!(slot.entry.encoding, Encoding::Unknown(_)));
            match slot {
                Some(slot) => return Some(Ok(slot)),
                None => {
                    let at = (number.0 - self.first) as usize * ENTRY_LEN;
                    let kind = self.bytes.get(at + 20).map(|byte| byte & 0xf);
                    self.unknown_kind = self.unknown_kind.or(kind);
                }
            }
        }
        None
    }
}
