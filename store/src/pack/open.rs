//! Opening a pack: of which version it is, and where its footer is.

use std::cmp::Ordering;
use std::fs::{File, Metadata};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use crate::durable;
use crate::error::{Damage, Error, IoContext as _, Result, cannot_read, is_unreadable};
use crate::format::entry::{self, ENTRY_LEN};
use crate::format::pack_v1;
use crate::format::pack_v2::{self, Description, SEAL_MAGIC, Seal};
use crate::keys::Keys;
use crate::pack::reader::{Footer, FooterBlocks, Frame, PackReader, Stamp};
use crate::pack::{PackIdentity, PackNumber};
use crate::page::PageSize;
use crate::regular::{self, Opened};
use crate::sim::{self, StepKind};

/// The first seal of a pack is not looked for further from its end: no footer is
/// longer.
const FOOTER_MAX_BYTES: u64 = 16 << 20;
/// What is searched at a time, and lost at once if the disk cannot read it.
const SEARCH_BYTES: u64 = 4096;

/// A file that may be a pack.
struct Candidate<'a> {
    file: File,
    path: &'a Path,
    len: u64,
}

/// A footer, where it is, and what identifies it.
struct Found {
    footer: Footer,
    frame: Frame,
    identity: PackIdentity,
    fingerprint: u64,
}

impl PackReader {
    /// Opens the sealed pack at `path`; `None` if there is no such file.
    ///
    /// # Errors
    /// [`Error::Newer`] for a pack of a newer format; [`Damage::Pack`] if
    /// its footer cannot be found, if it is another store's, or if the disk cannot read
    /// it; [`Error::Denied`]; I/O errors.
    pub fn open(
        path: &Path,
        number: PackNumber,
        page_size: PageSize,
        keys: &Keys,
        blocks: Arc<FooterBlocks>,
    ) -> Result<Option<Self>> {
        let Some((candidate, metadata)) = Candidate::open(path)? else {
            return Ok(None);
        };
        let found = candidate.find(number, page_size, keys)?;
        Ok(Some(
            candidate.reader(found, &metadata, number, page_size, blocks),
        ))
    }

    /// Opens a pack of version 2 that was cut off among its chunks, for whoever looks for
    /// these by their content: it has no entry. `None` if the file at `path` is no such.
    ///
    /// # Errors
    /// As [`PackReader::open`].
    pub fn open_unsealed(
        path: &Path,
        number: PackNumber,
        page_size: PageSize,
        keys: &Keys,
        blocks: Arc<FooterBlocks>,
    ) -> Result<Option<Self>> {
        let Some((candidate, metadata)) = Candidate::open(path)? else {
            return Ok(None);
        };
        let found = candidate.find_unsealed(page_size, keys)?;
        Ok(found.map(|found| candidate.reader(found, &metadata, number, page_size, blocks)))
    }
}

impl<'a> Candidate<'a> {
    /// `None` if there is no such file.
    fn open(path: &'a Path) -> Result<Option<(Self, Metadata)>> {
        sim::before(StepKind::OpenPack, path).context("open", path)?;
        let damaged = |reason| Damage::Pack {
            path: path.to_owned(),
            reason,
        };
        let file = match regular::open(path) {
            Ok(Opened::File(file)) => file,
            Ok(Opened::Absent) => return Ok(None),
            Ok(Opened::Odd(reason)) => return Err(damaged(reason).into()),
            Err(error) => return Err(cannot_read("open", path, error, damaged)),
        };
        let metadata = file.metadata().context("inspect", path)?;
        let len = metadata.len();
        Ok(Some((Self { file, path, len }, metadata)))
    }

    fn reader(
        self,
        found: Found,
        metadata: &Metadata,
        number: PackNumber,
        page_size: PageSize,
        blocks: Arc<FooterBlocks>,
    ) -> PackReader {
        PackReader {
            number,
            file_len: self.len,
            file: self.file,
            stamp: Stamp {
                identity: found.identity,
                device: metadata.dev(),
                inode: metadata.ino(),
            },
            frame: found.frame,
            footer: found.footer,
            fingerprint: found.fingerprint,
            page_len: page_size.len(),
            blocks,
            sound: OnceLock::new(),
            path: self.path.to_owned(),
        }
    }

    fn find(&self, number: PackNumber, page_size: PageSize, keys: &Keys) -> Result<Found> {
        if self.len < (pack_v1::HEADER_LEN + pack_v1::SEAL_LEN) as u64 {
            return Err(self.damaged("too short for a pack"));
        }
        let mut header = [0; pack_v2::HEADER_LEN];
        let header_is_read = self.read(&mut header, 0)?;
        match pack_v2::read_header(&header) {
            pack_v2::Header::Whole(said) => return self.find_two(Some(said), page_size, keys),
            pack_v2::Header::Torn => return self.find_two(None, page_size, keys),
            pack_v2::Header::Other => {}
        }
        let (head, _) = header
            .split_first_chunk::<{ pack_v1::HEADER_LEN }>()
            .expect("it is longer");
        let header_is_right = match pack_v1::check_header(head, number, page_size) {
            pack_v1::Header::Right => true,
            pack_v1::Header::Foreign => {
                return Err(self.damaged("it belongs to another number or page size"));
            }
            pack_v1::Header::Newer(found) => {
                return Err(Error::newer(self.path, "format version", found));
            }
            // Its seals tell of which version it is.
            pack_v1::Header::Damaged => {
                if let Ok(Some(_)) = self.seal_of_two(None) {
                    return self.find_two(None, page_size, keys);
                }
                false
            }
        };
        if !header_is_read {
            return Err(self.damaged("the disk cannot read its header"));
        }
        self.find_one(*head, header_is_right)
    }

    fn find_one(&self, header: [u8; pack_v1::HEADER_LEN], header_is_right: bool) -> Result<Found> {
        let mut seal = [0; pack_v1::SEAL_LEN];
        if !self.read(&mut seal, self.len - pack_v1::SEAL_LEN as u64)? {
            return Err(self.damaged("the disk cannot read its seal"));
        }
        let frame = self.footer_of_one(&seal)?;
        // The seal's checksum is of header and footer too.
        let hash = blake3::hash(&seal);
        let (identity, rest) = hash.as_bytes().split_first_chunk().expect("32 bytes");
        let (fingerprint, _) = rest.split_first_chunk().expect("16 bytes");
        Ok(Found {
            footer: Footer::One {
                header,
                header_is_right,
                seal,
            },
            frame: Frame {
                chunks_start: pack_v1::HEADER_LEN as u64,
                chunks_end: frame.footer_offset,
                entry_count: frame.entry_count,
            },
            identity: PackIdentity(*identity),
            fingerprint: u64::from_le_bytes(*fingerprint),
        })
    }

    /// Where the footer is. A seal with one flipped bit still tells.
    fn footer_of_one(&self, seal: &[u8; pack_v1::SEAL_LEN]) -> Result<pack_v1::Frame> {
        let candidates = pack_v1::Frame::candidates(seal, self.len);
        if let [only] = candidates[..]
            && pack_v1::has_seal_magic(seal)
        {
            return Ok(only);
        }
        for frame in candidates {
            let mut first = [0; ENTRY_LEN];
            durable::read_at(&self.file, self.path, &mut first, frame.footer_offset)?;
            if entry::offset_in(&first) as usize == pack_v1::HEADER_LEN {
                return Ok(frame);
            }
        }
        Err(self.damaged("it has no whole seal"))
    }

    fn find_two(
        &self,
        header: Option<Description>,
        page_size: PageSize,
        keys: &Keys,
    ) -> Result<Found> {
        let Some((seal, is_last)) = self.seal_of_two(header.map(|it| it.identity))? else {
            return Err(self.damaged("it has no whole seal"));
        };
        let mut problems = Vec::new();
        match seal.file_len.cmp(&self.len) {
            Ordering::Less => problems.push("there are bytes after its end"),
            Ordering::Equal => {}
            Ordering::Greater => problems.push("its end is cut off"),
        }
        match header {
            None => problems.push("its header is damaged; its seals serve"),
            Some(said) if said != seal.pack => {
                return Err(self.damaged("its header and its seal are of different packs"));
            }
            Some(_) => {}
        }
        if !is_last && seal.file_len <= self.len {
            problems.push("its last seal is damaged; the first one serves");
        }
        self.check_of_store(&seal.pack, page_size, keys)?;
        let hash = blake3::hash(&seal.to_bytes());
        let (fingerprint, _) = hash.as_bytes().split_first_chunk().expect("32 bytes");
        Ok(Found {
            frame: Frame {
                chunks_start: pack_v2::HEADER_LEN as u64,
                chunks_end: seal.chunks_end(),
                entry_count: seal.entry_count,
            },
            identity: seal.pack.identity,
            footer: Footer::Two { seal, problems },
            fingerprint: u64::from_le_bytes(*fingerprint),
        })
    }

    /// What is there of a pack of version 2 that was cut off among its chunks: no seal and
    /// no entry. `None` if it is something else.
    fn find_unsealed(&self, page_size: PageSize, keys: &Keys) -> Result<Option<Found>> {
        let mut header = [0; pack_v2::HEADER_LEN];
        if self.len < header.len() as u64 || !self.read(&mut header, 0)? {
            return Ok(None);
        }
        let pack_v2::Header::Whole(pack) = pack_v2::read_header(&header) else {
            return Ok(None);
        };
        if self.seal_of_two(Some(pack.identity))?.is_some() {
            return Ok(None);
        }
        self.check_of_store(&pack, page_size, keys)?;
        Ok(Some(Found {
            frame: Frame {
                chunks_start: pack_v2::HEADER_LEN as u64,
                chunks_end: self.len,
                entry_count: 0,
            },
            identity: pack.identity,
            footer: Footer::Two {
                seal: Seal::new(pack, self.len, 0),
                problems: Vec::new(),
            },
            fingerprint: 0,
        }))
    }

    /// That a pack of version 2 is one of this store.
    fn check_of_store(&self, pack: &Description, page_size: PageSize, keys: &Keys) -> Result<()> {
        if pack.page_size != page_size {
            return Err(self.damaged("it has pages of another size than the store"));
        }
        match keys.check_of(pack.identity.0) {
            Some(check) if check == pack.key_check => Ok(()),
            Some(_) => Err(self.damaged("it is of another store: its keys are not of this one")),
            // This process has opened the store before the upgrade.
            None => Err(Error::Upgraded {
                path: self.path.to_owned(),
            }),
        }
    }

    /// A whole seal of version 2, and whether it is the last one; of a pack of this
    /// identity if that is known. Then the file may have another length than the seal
    /// says: a guest, whose pages are in it, does not know the identity.
    fn seal_of_two(&self, identity: Option<PackIdentity>) -> Result<Option<(Seal, bool)>> {
        let mut bytes = [0; pack_v2::SEAL_LEN];
        let Some(last) = self.len.checked_sub(pack_v2::SEAL_LEN as u64) else {
            return Ok(None);
        };
        if self.read(&mut bytes, last)?
            && let Some(seal) = Seal::from_bytes(&bytes).filter(|it| it.file_len == self.len)
        {
            return Ok(Some((seal, true)));
        }
        // What a guest has stored may look like a seal, but not like one that says
        // that it is where it is, in a file of this length or of this identity.
        let is_of_this = |seal: &Seal| match identity {
            Some(identity) => identity == seal.pack.identity,
            None => seal.file_len == self.len,
        };
        let mut window =
            vec![0; usize::try_from(SEARCH_BYTES).expect("small") + SEAL_MAGIC.len() - 1];
        let mut end = self.len;
        while end > 0 && self.len - end < FOOTER_MAX_BYTES {
            let start = end.saturating_sub(SEARCH_BYTES);
            let len = usize::try_from(self.len - start).unwrap_or(usize::MAX);
            let len = len.min(window.len());
            if self.read(&mut window[..len], start)? {
                let places = window[..len].windows(SEAL_MAGIC.len());
                for (skip, _) in (0..).zip(places).filter(|(_, it)| it == SEAL_MAGIC) {
                    let at = start + skip;
                    if at + pack_v2::SEAL_LEN as u64 <= self.len
                        && self.read(&mut bytes, at)?
                        && let Some(seal) = Seal::from_bytes(&bytes).filter(is_of_this)
                    {
                        let is_last = seal.file_len == at + pack_v2::SEAL_LEN as u64;
                        if is_last || seal.chunks_end() == at {
                            return Ok(Some((seal, is_last)));
                        }
                    }
                }
            }
            end = start;
        }
        Ok(None)
    }

    /// Returns whether the disk can read it.
    fn read(&self, buffer: &mut [u8], offset: u64) -> Result<bool> {
        match durable::read_at(&self.file, self.path, buffer, offset) {
            Err(Error::Io { source, .. }) if is_unreadable(&source) => Ok(false),
            other => other.map(|()| true),
        }
    }

    fn damaged(&self, reason: &'static str) -> Error {
        Damage::Pack {
            path: self.path.to_owned(),
            reason,
        }
        .into()
    }
}
