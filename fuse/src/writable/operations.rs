//! What the kernel's requests do to the nodes of a writable mount, and with which errno
//! they fail.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use fuser::{Errno, FileAttr, FileType, INodeNo, RenameFlags, TimeOrNow};
use rustix::fs::FallocateFlags;
use snapstore_store::{ReadAt as _, Region};

use super::clone::ViewClone;
use super::file::{ExtraFile, Look};
use super::views::{Node, Views};
use crate::counters::Counters;
use crate::table::ROOT;

pub(super) const BLOCK_BYTES: u32 = 4096;
/// The directories' attributes that name the snapshot, and where the overlay is kept.
pub(super) const BASE_ATTRIBUTE: &str = "user.snapstore.base";
pub(super) const PLACE_ATTRIBUTE: &str = "user.snapstore.view";

/// The nodes, and what can be done to them.
pub(crate) struct Operations {
    pub views: Arc<Views>,
    pub counters: Counters,
}

pub(super) type Answer<T> = Result<T, Errno>;

/// What went wrong below is logged once, here, where it becomes an errno.
fn failed(what: &'static str, error: &io::Error) -> Errno {
    if error.raw_os_error().is_some() {
        return Errno::from_i32(error.raw_os_error().unwrap_or_default());
    }
    let store = error.get_ref();
    if let Some(store) = store.and_then(|it| it.downcast_ref::<snapstore_store::Error>()) {
        tracing::error!(%error, "{what} failed");
        return crate::error::errno(store);
    }
    match error.kind() {
        io::ErrorKind::StorageFull => Errno::ENOSPC,
        io::ErrorKind::NotFound => Errno::ENOENT,
        io::ErrorKind::AlreadyExists => Errno::EEXIST,
        io::ErrorKind::FileTooLarge => Errno::EFBIG,
        // An image ends where it ends.
        io::ErrorKind::UnexpectedEof => Errno::EFBIG,
        io::ErrorKind::ReadOnlyFilesystem => Errno::EROFS,
        _ => {
            tracing::error!(%error, "{what} failed");
            Errno::EIO
        }
    }
}

fn name_of(name: &OsStr) -> Answer<&str> {
    name.to_str().ok_or(Errno::EINVAL)
}

impl Operations {
    pub fn node(&self, ino: INodeNo) -> Answer<Node> {
        self.views.node(ino.0).ok_or(Errno::ENOENT)
    }

    pub fn clone_dir(&self, ino: INodeNo) -> Answer<Arc<ViewClone>> {
        self.views.clone_of(ino.0).ok_or(Errno::EPERM)
    }

    /// What a name in a clone's directory stands for; `None` if for nothing.
    fn usual<'a>(&'a self, name: &'a OsStr) -> Answer<Option<&'a str>> {
        Ok(self.views.shown.layout.usual(name_of(name)?))
    }

    pub fn attributes(&self, ino: u64, node: &Node) -> FileAttr {
        let shown = &self.views.shown;
        let readers = (shown.mode & 0o444) >> 2;
        let dir_mode = shown.mode | readers;
        let file = |look: &Look| (look.size_bytes, look.size_bytes, look.modified, look.owner);
        let (kind, mode, (size, data, time, owner)) = match node {
            Node::Clones => {
                let time = self.views.clones.first().map(|clone| clone.created);
                let time = time.unwrap_or(SystemTime::UNIX_EPOCH);
                (FileType::Directory, dir_mode, (0, 0, time, shown.owner))
            }
            Node::Clone(clone) => {
                let look = (0, 0, clone.created, shown.owner);
                (FileType::Directory, dir_mode, look)
            }
            Node::Shared(image) => {
                let look = (
                    image.size_bytes,
                    image.data_bytes,
                    image.created,
                    shown.owner,
                );
                (FileType::RegularFile, shown.mode, look)
            }
            Node::Image(_, image) => {
                let (size, data) = (image.size_bytes, image.data_bytes());
                let look = (size, data, image.modified(), shown.owner);
                (FileType::RegularFile, shown.mode, look)
            }
            Node::File(_, it) => (FileType::RegularFile, it.look().mode, file(&it.look())),
            Node::Socket(it) => (FileType::Socket, it.look().mode, file(&it.look())),
        };
        FileAttr {
            ino: INodeNo(ino),
            size,
            blocks: data.div_ceil(512),
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind,
            perm: u16::try_from(mode & 0o777).unwrap_or_default(),
            nlink: if kind == FileType::Directory { 2 } else { 1 },
            uid: owner.0,
            gid: owner.1,
            rdev: 0,
            blksize: BLOCK_BYTES,
            flags: 0,
        }
    }

    pub fn open(&self, node: &Node, writes: bool, who: u32) -> Answer<()> {
        match node {
            Node::Shared(image) if writes => {
                self.views.wants_to_write(who, image.ino);
                Err(Errno::ESTALE)
            }
            Node::Shared(_) | Node::Image(..) | Node::File(..) => Ok(()),
            Node::Socket(_) => Err(Errno::ENXIO),
            Node::Clones | Node::Clone(_) => Err(Errno::EISDIR),
        }
    }

    pub fn new_file(
        &self,
        owner: (u32, u32),
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        socket: bool,
    ) -> Answer<Node> {
        let clone = self.clone_dir(parent)?;
        let name = self.usual(name)?.ok_or(Errno::EPERM)?;
        // A mount of the snapshot shows what it is made of under that name.
        if name == "manifest.json" || clone.is_of_image(name) && clone.image(name).is_none() {
            return Err(Errno::EPERM);
        }
        let look = Look {
            size_bytes: 0,
            mode: mode & 0o777,
            owner,
            modified: SystemTime::now(),
        };
        let made = self.views.create(&clone, name, look, socket);
        made.map_err(|error| failed("create", &error))
    }

    pub fn read(&self, node: &Node, out: &mut [u8], offset: u64) -> Answer<usize> {
        let read = match node {
            Node::Shared(image) => {
                let left = image.size_bytes.saturating_sub(offset);
                let len = usize::try_from(left).map_or(out.len(), |left| left.min(out.len()));
                let read = image.reader.read_exact_at(&mut out[..len], offset);
                read.map(|()| len)
            }
            Node::Image(_, image) => image.read_at(out, offset),
            Node::File(_, file) => file.read_at(out, offset),
            _ => return Err(Errno::EISDIR),
        };
        // An overlay that is cut short is damage, and no end of the image.
        read.map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => Errno::EIO,
            _ => {
                let store = error.get_ref().and_then(|it| it.downcast_ref());
                store.inspect(|error| self.counters.read_failed(error));
                failed("read", &error)
            }
        })
    }

    pub fn write(&self, node: &Node, offset: u64, data: &[u8], cached: bool) -> Answer<()> {
        let written = match node {
            Node::Image(clone, image) => {
                let _writing = clone.writing();
                image.write_at(offset, data, cached)
            }
            Node::File(clone, file) => {
                let _writing = clone.writing();
                file.write_at(clone.path_of(file).as_deref(), offset, data)
            }
            _ => return Err(Errno::EROFS),
        };
        written.map_err(|error| failed("write", &error))
    }

    pub fn resize(&self, node: &Node, size: u64) -> Answer<()> {
        match node {
            Node::File(clone, file) => {
                let _writing = clone.writing();
                let resized = file.set_len(clone.path_of(file).as_deref(), size);
                resized.map_err(|error| failed("truncate", &error))
            }
            // As a sealed memfd answers.
            Node::Image(_, image) if image.size_bytes != size => Err(Errno::EPERM),
            Node::Shared(image) if image.size_bytes != size => Err(Errno::EPERM),
            Node::Image(..) | Node::Shared(_) => Ok(()),
            _ => Err(Errno::EISDIR),
        }
    }

    pub fn sync(&self, node: &Node) -> Answer<()> {
        let synced = match node {
            Node::Image(_, image) => image.sync(),
            Node::File(clone, file) => file.sync().and_then(|()| clone.sync_names()),
            Node::Clone(clone) => clone.sync_names(),
            _ => Ok(()),
        };
        synced.map_err(|error| failed("sync", &error))
    }

    pub fn zero(&self, node: &Node, offset: u64, length: u64, mode: i32) -> Answer<()> {
        let mode = FallocateFlags::from_bits_retain(mode.cast_unsigned());
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let zero = FallocateFlags::ZERO_RANGE;
        let keeps = mode.contains(FallocateFlags::KEEP_SIZE);
        if mode != punch && mode.difference(FallocateFlags::KEEP_SIZE) != zero {
            // Room that a write is sure to have cannot be had.
            return Err(Errno::EOPNOTSUPP);
        }
        let end = offset.checked_add(length).ok_or(Errno::EFBIG)?;
        let zeroed = match node {
            Node::Image(clone, image) => {
                if end > image.size_bytes && !keeps {
                    return Err(Errno::EPERM);
                }
                let end = end.min(image.size_bytes);
                let _writing = clone.writing();
                image.zero(offset.min(end), end.saturating_sub(offset))
            }
            Node::File(clone, file) => {
                let _writing = clone.writing();
                let path = clone.path_of(file);
                let size = file.look().size_bytes;
                let grown = match end > size && !keeps {
                    true => file.set_len(path.as_deref(), end),
                    false => Ok(()),
                };
                let inside = end.min(file.look().size_bytes).saturating_sub(offset);
                grown.and_then(|()| match inside {
                    0 => Ok(()),
                    inside => file.zero(path.as_deref(), offset, inside),
                })
            }
            _ => return Err(Errno::EROFS),
        };
        zeroed.map_err(|error| failed("make zeros", &error))
    }

    pub fn seek(&self, node: &Node, offset: u64, region: Region) -> Answer<Option<u64>> {
        let whole = |size: u64| match region {
            _ if offset >= size => None,
            Region::Data => Some(offset),
            Region::Hole => Some(size),
        };
        let found = match node {
            Node::Shared(image) => image.reader.seek(offset, region).map_err(io::Error::other),
            Node::Image(_, image) => image.seek(offset, region),
            Node::File(_, file) => Ok(whole(file.look().size_bytes)),
            _ => return Err(Errno::EISDIR),
        };
        found.map_err(|error| failed("seek", &error))
    }

    pub fn entries(&self, ino: u64) -> Answer<Vec<(u64, FileType, String)>> {
        let mut entries = vec![
            (ino, FileType::Directory, ".".to_owned()),
            (ROOT, FileType::Directory, "..".to_owned()),
        ];
        match self.views.node(ino) {
            Some(Node::Clones) => {
                let clones = self.views.clones.iter();
                entries
                    .extend(clones.map(|it| (it.ino, FileType::Directory, it.number.to_string())));
            }
            Some(Node::Clone(clone)) => {
                let shown = |name: &str| self.views.shown.layout.shown(name).to_owned();
                for (shared, own) in &clone.images {
                    let ino = if own.is_own() { own.ino } else { shared.ino };
                    entries.push((ino, FileType::RegularFile, shown(&own.file_name)));
                }
                for (name, named) in clone.names() {
                    let node = self.views.node_of(&clone, named);
                    let kind = match node {
                        Node::Socket(_) => FileType::Socket,
                        _ => FileType::RegularFile,
                    };
                    entries.push((node.ino(), kind, shown(&name)));
                }
            }
            _ => return Err(Errno::ENOTDIR),
        }
        Ok(entries)
    }

    pub fn set_attributes(
        &self,
        node: &Node,
        mode: Option<u32>,
        owner: (Option<u32>, Option<u32>),
        size: Option<u64>,
        modified: Option<TimeOrNow>,
    ) -> Answer<()> {
        if let Some(size) = size {
            self.resize(node, size)?;
        }
        let file: &ExtraFile = match node {
            Node::File(_, file) | Node::Socket(file) => file,
            // Times of images are those of their last writes.
            _ if mode.is_some() || owner != (None, None) => return Err(Errno::EPERM),
            _ => return Ok(()),
        };
        if let Some(mode) = mode {
            file.set_mode(mode);
        }
        file.set_owner(owner.0, owner.1);
        match modified {
            Some(TimeOrNow::Now) => file.set_modified(SystemTime::now()),
            Some(TimeOrNow::SpecificTime(time)) => file.set_modified(time),
            None => {}
        }
        Ok(())
    }

    pub fn extended(&self, ino: INodeNo, name: &OsStr) -> Answer<Vec<u8>> {
        let path = |path: &Path| path.as_os_str().as_bytes().to_vec();
        let node = self.node(ino)?;
        match (node, name_of(name)?) {
            (Node::Clone(clone), BASE_ATTRIBUTE) => Ok(clone.base_id().to_string().into_bytes()),
            // It stays what it is when the clone goes on as another snapshot's child.
            (Node::Shared(image), BASE_ATTRIBUTE) => Ok(image.snapshot.to_string().into_bytes()),
            (Node::Clone(clone), PLACE_ATTRIBUTE) => Ok(path(clone.dir())),
            (Node::Clones, PLACE_ATTRIBUTE) => Ok(path(self.views.overlays())),
            _ => Err(Errno::NO_XATTR),
        }
    }

    pub fn lookup(&self, parent: INodeNo, name: &OsStr, who: u32) -> Answer<Option<Node>> {
        let Some(name) = self.usual(name)? else {
            return Ok(None);
        };
        let found = self.views.lookup(parent.0, name, who);
        found.map_err(|error| failed("lookup", &error))
    }

    pub fn unlink(&self, parent: INodeNo, name: &OsStr) -> Answer<()> {
        let clone = self.clone_dir(parent)?;
        let name = self.usual(name)?.ok_or(Errno::ENOENT)?;
        if clone.image(name).is_some() {
            return Err(Errno::EPERM);
        }
        clone.unlink(name).map_err(|error| failed("unlink", &error))
    }

    pub fn rename(
        &self,
        (parent, name): (INodeNo, &OsStr),
        (new_parent, new_name): (INodeNo, &OsStr),
        flags: RenameFlags,
    ) -> Answer<()> {
        let clone = self.clone_dir(parent)?;
        if parent != new_parent {
            return Err(Errno::EXDEV);
        }
        let replaces = match flags {
            flags if flags.is_empty() => true,
            RenameFlags::RENAME_NOREPLACE => false,
            _ => return Err(Errno::EINVAL),
        };
        let from = self.usual(name)?.ok_or(Errno::ENOENT)?;
        let to = self.usual(new_name)?.ok_or(Errno::EPERM)?;
        if clone.is_of_image(from) || clone.is_of_image(to) || to == "manifest.json" {
            return Err(Errno::EPERM);
        }
        let renamed = clone.rename(from, to, replaces);
        renamed.map_err(|error| failed("rename", &error))
    }
}
