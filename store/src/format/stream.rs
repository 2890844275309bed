//! A stream of snapshots: what an export writes and an import reads.
//!
//! ```text
//! header, 64 bytes
//!      0   8  magic SNAPSTRM
//!      8   4  format version, 1
//!     12   4  page size in bytes
//!     16   8  features: who does not know one cannot read the stream
//!     24  16  random identity of the stream
//!     40   8  zero
//!     48  16  first 16 bytes of BLAKE3 of bytes 0..48
//! blocks, of at most 2 MiB of content each
//!      0   8  number of the block, from 0
//!      8   1  encoding, as of a chunk that needs no base: 0 raw, 1 one zstd frame
//!      9   3  zero
//!     12   4  length s of the stored bytes
//!     16   4  length of the content, at least s
//!     20   4  zero
//!     24   8  first 8 bytes of BLAKE3 of identity and bytes 0..24
//!     32   s  the content, encoded
//!   32+s  16  first 16 bytes of BLAKE3 of identity and all bytes of the block before
//! content: records, one after the other
//!   page      1  0    base    the page's bytes
//!   node      1  1    base    4 length    canonical part of a tree node
//!   snapshot  1  2    2 number of tags, then each tag    4 length    manifest
//!   end       1  255  4 number of snapshots    8 number of pages and nodes
//! base: 1 byte, 0 or 1; then, if 1, 32 bytes id of a chunk of the same kind that this
//!       one is like
//! tag:  2 length    UTF-8 bytes
//! ```
//! Numbers are little-endian. What a node or a manifest refers to stands before it. An
//! id is not told but computed. A manifest of version 1 is there with all its bytes,
//! one of a later version with its canonical part. The end is the last record of the
//! last block, and nothing follows.
//!
//! Any bytes may be given to the reader: it checks before it parses, and holds one
//! block.

use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use crate::error::{Damage, Error, IoContext as _, Result};
use crate::format::config::random;
use crate::pack::codec::{self, Encoding};
use crate::page::PageSize;

const MAGIC: [u8; 8] = *b"SNAPSTRM";
const VERSION: u32 = 1;
const HEADER_LEN: usize = 64;
const HEAD_LEN: usize = 32;
const CHECK_LEN: usize = 16;
/// The most content of a block: a manifest, its tags, and room.
pub(crate) const MAX_CONTENT_LEN: usize = 2 << 20;
/// A block of pages is about as long as this.
pub(crate) const BLOCK_LEN: usize = 1 << 20;

const PAGE: u8 = 0;
const NODE: u8 = 1;
const SNAPSHOT: u8 = 2;
const END: u8 = 255;

/// What a stream is made of.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Record<'a> {
    /// A page, and one that it is like.
    Page {
        base: Option<[u8; 32]>,
        bytes: &'a [u8],
    },
    /// The canonical part of a node, and a node that it is like.
    Node {
        base: Option<[u8; 32]>,
        canonical: &'a [u8],
    },
    /// A manifest, and the tags that are to name its snapshot.
    Snapshot {
        tags: Vec<&'a str>,
        manifest: &'a [u8],
    },
    /// The end: how much there was.
    End { snapshots: u32, chunks: u64 },
}

impl Record<'_> {
    /// Appends the record to a block's content.
    pub fn append_to(&self, content: &mut Vec<u8>) {
        match self {
            Self::Page { base, bytes } => {
                content.push(PAGE);
                append_base(content, *base);
                content.extend_from_slice(bytes);
            }
            Self::Node { base, canonical } => {
                content.push(NODE);
                append_base(content, *base);
                append_bytes(content, canonical);
            }
            Self::Snapshot { tags, manifest } => {
                content.push(SNAPSHOT);
                let count = u16::try_from(tags.len()).expect("a snapshot is sent with few tags");
                content.extend_from_slice(&count.to_le_bytes());
                for tag in tags {
                    let len = u16::try_from(tag.len()).expect("tags are short");
                    content.extend_from_slice(&len.to_le_bytes());
                    content.extend_from_slice(tag.as_bytes());
                }
                append_bytes(content, manifest);
            }
            Self::End { snapshots, chunks } => {
                content.push(END);
                content.extend_from_slice(&snapshots.to_le_bytes());
                content.extend_from_slice(&chunks.to_le_bytes());
            }
        }
    }
}

/// The beginning of a page's record: the page follows.
pub(crate) fn append_page_head(content: &mut Vec<u8>, base: Option<[u8; 32]>) {
    content.push(PAGE);
    append_base(content, base);
}

fn append_base(content: &mut Vec<u8>, base: Option<[u8; 32]>) {
    content.push(u8::from(base.is_some()));
    content.extend(base.iter().flatten());
}

fn append_bytes(content: &mut Vec<u8>, bytes: &[u8]) {
    let len = u32::try_from(bytes.len()).expect("nodes and manifests are short");
    content.extend_from_slice(&len.to_le_bytes());
    content.extend_from_slice(bytes);
}

/// Why a block whose checksum matches cannot be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum BadRecord {
    /// A newer version of this program wrote a record of this kind.
    Newer { kind: u8 },
    /// No version did.
    Wrong,
}

/// The records of a block's content.
pub(crate) struct Records<'a> {
    rest: &'a [u8],
    page_len: usize,
}

impl<'a> Records<'a> {
    pub fn new(content: &'a [u8], page_size: PageSize) -> Self {
        Self {
            rest: content,
            page_len: page_size.len(),
        }
    }

    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(len)?;
        self.rest = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn base(&mut self) -> Option<Option<[u8; 32]>> {
        match self.array()? {
            [0_u8] => Some(None),
            [1] => Some(Some(self.array()?)),
            _ => None,
        }
    }

    fn bytes(&mut self) -> Option<&'a [u8]> {
        let len = u32::from_le_bytes(self.array()?);
        self.take(usize::try_from(len).ok()?)
    }

    fn tag(&mut self) -> Option<&'a str> {
        let len = u16::from_le_bytes(self.array()?);
        std::str::from_utf8(self.take(usize::from(len))?).ok()
    }

    /// `None` if the record is cut off or malformed.
    fn parse(&mut self, kind: u8) -> Option<Record<'a>> {
        Some(match kind {
            PAGE => Record::Page {
                base: self.base()?,
                bytes: self.take(self.page_len)?,
            },
            NODE => Record::Node {
                base: self.base()?,
                canonical: self.bytes()?,
            },
            SNAPSHOT => {
                let count = u16::from_le_bytes(self.array()?);
                let tags = (0..count).map(|_| self.tag()).collect::<Option<_>>()?;
                let manifest = self.bytes()?;
                Record::Snapshot { tags, manifest }
            }
            _ => Record::End {
                snapshots: u32::from_le_bytes(self.array()?),
                chunks: u64::from_le_bytes(self.array()?),
            },
        })
    }
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<Record<'a>, BadRecord>;

    fn next(&mut self) -> Option<Self::Item> {
        let (kind, rest) = self.rest.split_first()?;
        self.rest = rest;
        if !matches!(*kind, PAGE | NODE | SNAPSHOT | END) {
            self.rest = &[];
            return Some(Err(BadRecord::Newer { kind: *kind }));
        }
        let record = self.parse(*kind).ok_or(BadRecord::Wrong);
        if record.is_err() {
            self.rest = &[];
        }
        Some(record)
    }
}

/// A block's content, ready to be written.
pub(crate) struct EncodedBlock {
    encoding: Encoding,
    stored: Vec<u8>,
    content_len: usize,
}

impl EncodedBlock {
    pub fn new(content: &[u8]) -> Self {
        debug_assert!(content.len() <= MAX_CONTENT_LEN, "a block is short");
        let mut stored = Vec::new();
        Self {
            encoding: codec::encode(content, None, &mut stored),
            stored,
            content_len: content.len(),
        }
    }
}

/// Writes a stream.
pub(crate) struct StreamWriter<W> {
    out: W,
    label: PathBuf,
    identity: [u8; 16],
    next_block: u64,
    /// How many bytes were written.
    pub len_bytes: u64,
}

impl<W: Write> StreamWriter<W> {
    pub fn new(out: W, label: &Path, page_size: PageSize) -> Result<Self> {
        let identity = random("stream")?;
        let mut header = MAGIC.to_vec();
        header.extend_from_slice(&VERSION.to_le_bytes());
        header.extend_from_slice(&page_size.as_u32().to_le_bytes());
        header.extend_from_slice(&[0; 8]);
        header.extend_from_slice(&identity);
        header.extend_from_slice(&[0; 8]);
        let check = blake3::hash(&header);
        header.extend_from_slice(&check.as_bytes()[..CHECK_LEN]);
        let mut writer = Self {
            out,
            label: label.to_owned(),
            identity,
            next_block: 0,
            len_bytes: 0,
        };
        writer.write(&header)?;
        Ok(writer)
    }

    pub fn write_block(&mut self, block: &EncodedBlock) -> Result<()> {
        let len = |len: usize| u32::try_from(len).expect("a block is short").to_le_bytes();
        let mut head = self.next_block.to_le_bytes().to_vec();
        head.extend_from_slice(&[block.encoding.to_byte(), 0, 0, 0]);
        head.extend_from_slice(&len(block.stored.len()));
        head.extend_from_slice(&len(block.content_len));
        head.extend_from_slice(&[0; 4]);
        let check = head_check(&self.identity, &head);
        head.extend_from_slice(&check);
        let check = block_check(&self.identity, &head, &block.stored);
        self.write(&head)?;
        self.write(&block.stored)?;
        self.write(&check)?;
        self.next_block += 1;
        Ok(())
    }

    pub fn flush(&mut self) -> Result<()> {
        self.out.flush().context("write", &self.label)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).context("write", &self.label)?;
        self.len_bytes += bytes.len() as u64;
        Ok(())
    }
}

fn head_check(identity: &[u8; 16], head: &[u8]) -> [u8; 8] {
    let hash = blake3::hash(&[identity, head].concat());
    let mut check = [0; 8];
    check.copy_from_slice(&hash.as_bytes()[..8]);
    check
}

fn block_check(identity: &[u8; 16], head: &[u8], stored: &[u8]) -> [u8; CHECK_LEN] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(identity).update(head).update(stored);
    let mut check = [0; CHECK_LEN];
    check.copy_from_slice(&hasher.finalize().as_bytes()[..CHECK_LEN]);
    check
}

/// Reads a stream.
pub(crate) struct StreamReader<R> {
    from: R,
    label: PathBuf,
    identity: [u8; 16],
    next_block: u64,
    /// Where the block begins that was read last.
    block_start: u64,
    /// How many bytes were read.
    pub len_bytes: u64,
    /// In bytes, as the header says.
    pub page_bytes: u32,
}

const CUT: &str = "it was cut off: more has to follow here";
const FLIPPED: &str = "its bytes do not match their checksum";

/// Whether this is an error of a stream of which more was to come, and what came is whole.
pub(crate) fn has_ended_early(error: &Error) -> bool {
    match error {
        Error::Damaged(Damage::Stream { reason, .. }) => *reason == CUT,
        Error::Io { .. } => true,
        _ => false,
    }
}

impl<R: Read> StreamReader<R> {
    /// Reads and checks the header.
    ///
    /// # Errors
    /// [`Error::NotAStream`]; [`Error::Newer`]; [`Damage::Stream`]; I/O errors.
    pub fn new(from: R, label: &Path) -> Result<Self> {
        let mut reader = Self {
            from,
            label: label.to_owned(),
            identity: [0; 16],
            next_block: 0,
            block_start: 0,
            len_bytes: 0,
            page_bytes: 0,
        };
        let mut header = [0; HEADER_LEN];
        let read = reader.read(&mut header)?;
        // Nothing at all is what is left of a stream whose writer never began.
        if read < MAGIC.len() && header[..read] == MAGIC[..read] {
            return Err(reader.damaged(CUT));
        }
        if header[..8] != MAGIC {
            return Err(Error::NotAStream {
                path: reader.label.clone(),
            });
        }
        if read < HEADER_LEN {
            return Err(reader.damaged(CUT));
        }
        if blake3::hash(&header[..48]).as_bytes()[..CHECK_LEN] != header[48..] {
            return Err(reader.damaged(FLIPPED));
        }
        let number = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| header[at + byte]));
        if number(8) != VERSION {
            return Err(Error::newer(
                &reader.label,
                "stream format version",
                number(8),
            ));
        }
        let features = u64::from(number(16)) | u64::from(number(20)) << 32;
        if features != 0 {
            let bit = features.trailing_zeros();
            return Err(Error::newer(&reader.label, "stream feature bit", bit));
        }
        reader.page_bytes = number(12);
        reader.identity.copy_from_slice(&header[24..40]);
        Ok(reader)
    }

    /// The content of the next block.
    pub fn next_block(&mut self) -> Result<Vec<u8>> {
        self.block_start = self.len_bytes;
        let mut head = [0; HEAD_LEN];
        self.read_exact(&mut head)?;
        if head_check(&self.identity, &head[..24]) != head[24..] {
            return Err(self.damaged(FLIPPED));
        }
        let number = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| head[at + byte]));
        let place = u64::from(number(0)) | u64::from(number(4)) << 32;
        if place != self.next_block {
            return Err(self.damaged("it is not the block that has to follow"));
        }
        let len = |at| usize::try_from(number(at)).unwrap_or(usize::MAX);
        let (stored_len, content_len) = (len(12), len(16));
        if stored_len > content_len || content_len > MAX_CONTENT_LEN {
            return Err(self.damaged("it is longer than a block can be"));
        }
        let mut stored = vec![0; stored_len];
        self.read_exact(&mut stored)?;
        let mut check = [0; CHECK_LEN];
        self.read_exact(&mut check)?;
        if block_check(&self.identity, &head, &stored) != check {
            return Err(self.damaged(FLIPPED));
        }
        self.next_block += 1;
        match Encoding::from_byte(head[8]) {
            encoding if encoding.is_standalone() => {
                let mut content = vec![0; content_len];
                match codec::decode(&stored, encoding, &[], &mut content) {
                    Some(len) if len == content_len => Ok(content),
                    _ => Err(self.damaged("it does not decode")),
                }
            }
            other => {
                let encoding = u32::from(other.to_byte());
                Err(Error::newer(&self.label, "a block in encoding", encoding))
            }
        }
    }

    /// That nothing follows.
    pub fn check_end(&mut self) -> Result<()> {
        self.block_start = self.len_bytes;
        match self.read(&mut [0])? {
            0 => Ok(()),
            _ => Err(self.damaged("something follows its end")),
        }
    }

    /// What is wrong with the block that was read last.
    pub fn damaged(&self, reason: &'static str) -> Error {
        Damage::Stream {
            path: self.label.clone(),
            offset_bytes: self.block_start,
            reason,
        }
        .into()
    }

    fn read_exact(&mut self, bytes: &mut [u8]) -> Result<()> {
        match self.read(bytes)? == bytes.len() {
            true => Ok(()),
            false => Err(self.damaged(CUT)),
        }
    }

    /// Reads as much as there is.
    fn read(&mut self, bytes: &mut [u8]) -> Result<usize> {
        let mut read = 0;
        while read < bytes.len() {
            match self.from.read(&mut bytes[read..]) {
                Ok(0) => break,
                Ok(more) => read += more,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("read", &self.label),
            }
        }
        self.len_bytes += read as u64;
        Ok(read)
    }
}
