//! The adapter between the kernel's requests and the clones of a writable mount.
//!
//! The kernel writes through: a write(2) that has returned was here. What is stored through
//! a shared mapping the kernel keeps until fsync(2), msync(2), or its own time; then it
//! comes here as a write.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen,
    ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use rustix::fs::FallocateFlags;
use snapstore_store::{ReadAt as _, Region};

use super::clone::ViewClone;
use super::file::{ExtraFile, Look};
use super::views::{Node, Views};
use crate::table::ROOT;

const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);
const BLOCK_BYTES: u32 = 4096;
const NAME_MAX: u32 = 255;
/// The directories' attributes that name the snapshot, and where the overlay is kept.
pub(crate) const BASE_ATTRIBUTE: &str = "user.snapstore.base";
pub(crate) const PLACE_ATTRIBUTE: &str = "user.snapstore.view";

thread_local! {
    static REPLY: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

pub(crate) struct WritableServer {
    pub views: Arc<Views>,
    pub read_ahead_bytes: u32,
}

type Answer<T> = Result<T, Errno>;

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

impl WritableServer {
    fn node(&self, ino: INodeNo) -> Answer<Node> {
        self.views.node(ino.0).ok_or(Errno::ENOENT)
    }

    fn clone_dir(&self, ino: INodeNo) -> Answer<Arc<ViewClone>> {
        self.views.clone_of(ino.0).ok_or(Errno::EPERM)
    }

    fn attributes(&self, ino: u64, node: &Node) -> FileAttr {
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

    fn tell(&self, found: Answer<Option<Node>>, reply: ReplyEntry) {
        match found {
            Ok(Some(node)) => {
                self.views.told(&node);
                // A shared image may become the clone's own.
                let ttl = match node {
                    Node::Shared(_) => Duration::ZERO,
                    _ => FOREVER,
                };
                let attributes = self.attributes(node.ino(), &node);
                reply.entry_with_ttls(&FOREVER, &ttl, &attributes, Generation(0));
            }
            Ok(None) => reply.error(Errno::ENOENT),
            Err(errno) => reply.error(errno),
        }
    }

    fn open_node(&self, node: &Node, writes: bool, who: u32) -> Answer<()> {
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

    fn new_file(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        socket: bool,
    ) -> Answer<Node> {
        let clone = self.clone_dir(parent)?;
        let name = name_of(name)?;
        // A mount of the snapshot shows what it is made of under that name.
        if name == "manifest.json" || clone.is_of_image(name) && clone.image(name).is_none() {
            return Err(Errno::EPERM);
        }
        let look = Look {
            size_bytes: 0,
            mode: mode & 0o777,
            owner: (req.uid(), req.gid()),
            modified: SystemTime::now(),
        };
        let made = self.views.create(&clone, name, look, socket);
        made.map_err(|error| failed("create", &error))
    }

    fn read_node(&self, node: &Node, out: &mut [u8], offset: u64) -> Answer<usize> {
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
            _ => failed("read", &error),
        })
    }

    fn write_node(&self, node: &Node, offset: u64, data: &[u8], cached: bool) -> Answer<()> {
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

    fn resize(&self, node: &Node, size: u64) -> Answer<()> {
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

    fn sync_node(&self, node: &Node) -> Answer<()> {
        let synced = match node {
            Node::Image(_, image) => image.sync(),
            Node::File(clone, file) => file.sync().and_then(|()| clone.sync_names()),
            Node::Clone(clone) => clone.sync_names(),
            _ => Ok(()),
        };
        synced.map_err(|error| failed("sync", &error))
    }

    fn zero(&self, node: &Node, offset: u64, length: u64, mode: i32) -> Answer<()> {
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

    fn seek(&self, node: &Node, offset: u64, region: Region) -> Answer<Option<u64>> {
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

    fn entries(&self, ino: u64) -> Answer<Vec<(u64, FileType, String)>> {
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
                for (shared, own) in &clone.images {
                    let ino = if own.is_own() { own.ino } else { shared.ino };
                    entries.push((ino, FileType::RegularFile, own.file_name.clone()));
                }
                for (name, named) in clone.names() {
                    let node = self.views.node_of(&clone, named);
                    let kind = match node {
                        Node::Socket(_) => FileType::Socket,
                        _ => FileType::RegularFile,
                    };
                    entries.push((node.ino(), kind, name));
                }
            }
            _ => return Err(Errno::ENOTDIR),
        }
        Ok(entries)
    }

    fn set_attributes(
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

    fn extended(&self, ino: INodeNo, name: &OsStr) -> Answer<Vec<u8>> {
        let path = |path: &Path| path.as_os_str().as_bytes().to_vec();
        let node = self.node(ino)?;
        match (node, name_of(name)?) {
            (Node::Clone(clone), BASE_ATTRIBUTE) => Ok(clone.base_id().to_string().into_bytes()),
            (Node::Clone(clone), PLACE_ATTRIBUTE) => Ok(path(clone.dir())),
            (Node::Clones, PLACE_ATTRIBUTE) => Ok(path(self.views.overlays())),
            _ => Err(Errno::NO_XATTR),
        }
    }
}

fn empty(done: Answer<()>, reply: ReplyEmpty) {
    match done {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno),
    }
}

impl Filesystem for WritableServer {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = [
            InitFlags::FUSE_ASYNC_READ,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_MAX_PAGES,
            // No file has bits that a write would have to clear: without this the kernel
            // asks for capabilities with each write.
            InitFlags::FUSE_HANDLE_KILLPRIV_V2,
        ];
        for flag in wanted {
            let _ = config.add_capabilities(flag);
        }
        if let Err(limit) = config.set_max_readahead(self.read_ahead_bytes) {
            let _ = config.set_max_readahead(limit);
        }
        Ok(())
    }

    fn lookup(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = name_of(name).and_then(|name| {
            let found = self.views.lookup(parent.0, name, req.pid());
            found.map_err(|error| failed("lookup", &error))
        });
        self.tell(found, reply);
    }

    fn forget(&self, _req: &Request, ino: INodeNo, lookups: u64) {
        self.views.forget(ino.0, lookups);
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.node(ino) {
            Ok(node) => reply.attr(&FOREVER, &self.attributes(ino.0, &node)),
            Err(errno) => reply.error(errno),
        }
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let set = self.node(ino).and_then(|node| {
            self.set_attributes(&node, mode, (uid, gid), size, mtime)?;
            Ok(self.attributes(ino.0, &node))
        });
        match set {
            Ok(attributes) => reply.attr(&FOREVER, &attributes),
            Err(errno) => reply.error(errno),
        }
    }

    fn mknod(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        const FORMAT: u32 = 0o170_000;
        const SOCKET: u32 = 0o140_000;
        const REGULAR: u32 = 0o100_000;
        let made = match mode & FORMAT {
            SOCKET => self.new_file(req, parent, name, mode & !umask, true),
            REGULAR => self.new_file(req, parent, name, mode & !umask, false),
            _ => Err(Errno::EPERM),
        };
        self.tell(made.map(Some), reply);
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        match self.new_file(req, parent, name, mode & !umask, false) {
            Ok(node) => {
                self.views.told(&node);
                let attributes = self.attributes(node.ino(), &node);
                let flags = FopenFlags::FOPEN_KEEP_CACHE;
                reply.created(&FOREVER, &attributes, Generation(0), FileHandle(0), flags);
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let done = self.clone_dir(parent).and_then(|clone| {
            let name = name_of(name)?;
            if clone.image(name).is_some() {
                return Err(Errno::EPERM);
            }
            clone.unlink(name).map_err(|error| failed("unlink", &error))
        });
        empty(done, reply);
    }

    fn rename(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let done = self.clone_dir(parent).and_then(|clone| {
            if parent != newparent {
                return Err(Errno::EXDEV);
            }
            let replaces = match flags {
                flags if flags.is_empty() => true,
                RenameFlags::RENAME_NOREPLACE => false,
                _ => return Err(Errno::EINVAL),
            };
            let (from, to) = (name_of(name)?, name_of(newname)?);
            if clone.is_of_image(from) || clone.is_of_image(to) || to == "manifest.json" {
                return Err(Errno::EPERM);
            }
            let renamed = clone.rename(from, to, replaces);
            renamed.map_err(|error| failed("rename", &error))
        });
        empty(done, reply);
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let writes = flags.acc_mode() != OpenAccMode::O_RDONLY;
        let opened = self.node(ino);
        match opened.and_then(|node| self.open_node(&node, writes, req.pid())) {
            Ok(()) => reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE),
            Err(errno) => reply.error(errno),
        }
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let Ok(size) = usize::try_from(size) else {
            return reply.error(Errno::EINVAL);
        };
        REPLY.with_borrow_mut(|buffer| {
            if buffer.len() < size {
                buffer.resize(size, 0);
            }
            let node = self.node(ino);
            let read = node.and_then(|node| self.read_node(&node, &mut buffer[..size], offset));
            match read {
                Ok(len) => reply.data(&buffer[..len]),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let cached = write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        let written = self
            .node(ino)
            .and_then(|node| self.write_node(&node, offset, data, cached));
        match (written, u32::try_from(data.len())) {
            (Ok(()), Ok(len)) => reply.written(len),
            (Ok(()), Err(_)) => reply.error(Errno::EINVAL),
            (Err(errno), _) => reply.error(errno),
        }
    }

    fn flush(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn fsync(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        let done = self.node(ino).and_then(|node| self.sync_node(&node));
        empty(done, reply);
    }

    fn fsyncdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        let done = self.node(ino).and_then(|node| self.sync_node(&node));
        empty(done, reply);
    }

    fn fallocate(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let done = self
            .node(ino)
            .and_then(|node| self.zero(&node, offset, length, mode));
        empty(done, reply);
    }

    fn lseek(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        // The kernel forwards only these two (lseek(2), Linux UAPI values).
        const SEEK_DATA: i32 = 3;
        const SEEK_HOLE: i32 = 4;
        let found = self.node(ino).and_then(|node| {
            let offset = u64::try_from(offset).map_err(|_| Errno::ENXIO)?;
            let region = match whence {
                SEEK_DATA => Region::Data,
                SEEK_HOLE => Region::Hole,
                _ => return Err(Errno::EINVAL),
            };
            self.seek(&node, offset, region)?.ok_or(Errno::ENXIO)
        });
        match found.map(i64::try_from) {
            Ok(Ok(position)) => reply.offset(position),
            Ok(Err(_)) => reply.error(Errno::EOVERFLOW),
            Err(errno) => reply.error(errno),
        }
    }

    fn readdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let entries = match self.entries(ino.0) {
            Ok(entries) => entries,
            Err(errno) => return reply.error(errno),
        };
        let rest = entries.iter().zip(1_u64..);
        for ((ino, kind, name), next) in rest.filter(|(_, next)| *next > offset) {
            if reply.add(INodeNo(*ino), next, *kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        match self.extended(ino, name) {
            Err(errno) => reply.error(errno),
            Ok(value) => match u32::try_from(value.len()) {
                Ok(len) if size == 0 => reply.size(len),
                Ok(len) if len <= size => reply.data(&value),
                _ => reply.error(Errno::ERANGE),
            },
        }
    }

    fn listxattr(&self, _req: &Request, _ino: INodeNo, size: u32, reply: ReplyXattr) {
        match size {
            0 => reply.size(0),
            _ => reply.data(&[]),
        }
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        match rustix::fs::statvfs(self.views.overlays()) {
            Ok(disk) => {
                let scale = |blocks: u64| blocks * disk.f_frsize / u64::from(BLOCK_BYTES);
                reply.statfs(
                    scale(disk.f_blocks),
                    scale(disk.f_bfree),
                    scale(disk.f_bavail),
                    disk.f_files,
                    disk.f_ffree,
                    BLOCK_BYTES,
                    NAME_MAX,
                    BLOCK_BYTES,
                );
            }
            Err(_) => reply.error(Errno::EIO),
        }
    }
}
