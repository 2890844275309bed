//! What the server of a view and a commit say to each other, over a UNIX socket: JSON, each
//! after its length in 4 bytes, little-endian. Descriptors follow what names them, each
//! with a byte of its own.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use snapstore_overlay::{Content, Extent};

/// The longest message: the extents of an image of which every other page was written.
const MAX_BYTES: u32 = 1 << 30;

#[derive(Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub(crate) enum Request {
    /// What is there?
    Status,
    /// Freezes a clone. It stays frozen until it is committed, or the connection ends.
    Freeze { clone: u32 },
    /// What was frozen last on this connection is this snapshot, which is durable.
    Committed { id: String },
    /// Once it is unmounted, what is in no commit is kept, or not.
    AtEnd { keep: bool },
    /// Has all that was written so far on the disk.
    Sync,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Answer {
    Status(Status),
    Frozen(FrozenView),
    Done,
    Refused { message: String, busy: bool },
}

/// What a writable view has.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// The store's directory.
    #[serde(with = "crate::path_json")]
    pub store: PathBuf,
    /// Where what is written is kept.
    #[serde(with = "crate::path_json")]
    pub overlays: PathBuf,
    /// Whether the clones are directories of the mount, or its root is the only one.
    pub is_many: bool,
    /// The clones, in order.
    pub clones: Vec<CloneStatus>,
}

/// What a clone has.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CloneStatus {
    /// The snapshot that it is made from.
    pub base: String,
    /// The names of images that were opened for writing, and of files, as the mount shows them.
    pub writable: Vec<String>,
    /// Bytes of images that were written and are in no commit.
    pub uncommitted_bytes: u64,
    /// Whether anything is in no commit.
    pub is_uncommitted: bool,
    /// Whether files are that are no images, or names.
    #[serde(default)]
    pub has_uncommitted_files: bool,
}

/// A clone at one instant, without its descriptors.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FrozenView {
    /// The snapshot that it is made from.
    pub base: String,
    /// The images that were written. Their overlays' descriptors follow, in order.
    pub images: Vec<FrozenImage>,
    /// All files. The descriptors of those that are not the base's follow, in order.
    pub files: Vec<FrozenFileInfo>,
}

/// What was written to an image.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FrozenImage {
    /// Its name in the store.
    pub name: String,
    /// Its name in the view.
    pub file_name: String,
    /// Its length.
    pub size_bytes: u64,
    /// Runs of bytes: where they are in the image, how many, and where in the overlay; those
    /// that are nowhere are zeros.
    pub extents: Vec<(u64, u64, Option<u64>)>,
}

/// A file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FrozenFileInfo {
    /// Its name.
    pub name: String,
    /// Its length.
    pub size_bytes: u64,
    /// Whether it was written since the last commit.
    pub is_fresh: bool,
    /// Whether it is as the base has it.
    pub is_base: bool,
}

/// An extent as it is sent.
pub(crate) fn sent(extent: &Extent) -> (u64, u64, Option<u64>) {
    let place = match extent.content {
        Content::Zeros => None,
        Content::Overlay { file_offset } => Some(file_offset),
    };
    (extent.image_offset, extent.length, place)
}

pub(crate) fn send<T: Serialize>(stream: &mut UnixStream, message: &T) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    let len = u32::try_from(bytes.len()).map_err(io::Error::other)?;
    if len > MAX_BYTES {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    stream.write_all(&len.to_le_bytes())?;
    stream.write_all(&bytes)
}

/// The next message; `None` once the other side is gone.
pub(crate) fn receive<T: DeserializeOwned>(stream: &mut UnixStream) -> io::Result<Option<T>> {
    let mut len = [0; 4];
    match stream.read_exact(&mut len) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let len = u32::from_le_bytes(len);
    if len > MAX_BYTES {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut bytes = Vec::new();
    stream.take(len.into()).read_to_end(&mut bytes)?;
    if bytes.len() as u64 != u64::from(len) {
        return Ok(None);
    }
    Ok(Some(serde_json::from_slice(&bytes)?))
}

pub(crate) fn send_fd(stream: &UnixStream, fd: impl AsFd) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds = [fd.as_fd()];
    if !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::other("no room for a descriptor"));
    }
    let bytes = [IoSlice::new(&[0])];
    rustix::io::retry_on_intr(|| sendmsg(stream, &bytes, &mut ancillary, SendFlags::NOSIGNAL))?;
    Ok(())
}

pub(crate) fn receive_fd(stream: &UnixStream) -> io::Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    rustix::io::retry_on_intr(|| {
        let mut bytes = [IoSliceMut::new(&mut byte)];
        recvmsg(stream, &mut bytes, &mut ancillary, RecvFlags::CMSG_CLOEXEC)
    })?;
    let fd = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    fd.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}
