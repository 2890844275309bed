//! The adapter between the kernel's requests and the clones of a writable mount.
//!
//! The kernel writes through: a write(2) that has returned was here. What is stored through
//! a shared mapping the kernel keeps until fsync(2), msync(2), or its own time; then it
//! comes here as a write.

use std::ffi::OsStr;
use std::io;
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, Errno, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate,
    ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs,
    ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use snapstore_store::Region;

use super::operations::{Answer, BLOCK_BYTES, Operations};
use super::views::Node;
use crate::counters;
use crate::requests::{answer_read, connect};
use crate::table::ROOT;

const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);
const NAME_MAX: u32 = 255;

pub(crate) struct WritableServer {
    pub operations: Operations,
    pub read_ahead_bytes: u32,
}

impl WritableServer {
    fn tell(&self, found: Answer<Option<Node>>, reply: ReplyEntry) {
        match found {
            Ok(Some(node)) => {
                self.operations.views.told(&node);
                // A shared image may become the clone's own.
                let ttl = match node {
                    Node::Shared(_) => Duration::ZERO,
                    _ => FOREVER,
                };
                let attributes = self.operations.attributes(node.ino(), &node);
                reply.entry_with_ttls(&FOREVER, &ttl, &attributes, Generation(0));
            }
            Ok(None) => reply.error(Errno::ENOENT),
            Err(errno) => reply.error(errno),
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
        // No file has bits that a write would have to clear: without this the kernel
        // asks for capabilities with each write.
        let wanted = [InitFlags::FUSE_HANDLE_KILLPRIV_V2];
        connect(config, &wanted, self.read_ahead_bytes);
        Ok(())
    }

    fn lookup(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = self.operations.lookup(parent, name, req.pid());
        self.tell(found, reply);
    }

    fn forget(&self, _req: &Request, ino: INodeNo, lookups: u64) {
        self.operations.views.forget(ino.0, lookups);
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.operations.node(ino) {
            Ok(node) => reply.attr(&FOREVER, &self.operations.attributes(ino.0, &node)),
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
        let set = self.operations.node(ino).and_then(|node| {
            self.operations
                .set_attributes(&node, mode, (uid, gid), size, mtime)?;
            Ok(self.operations.attributes(ino.0, &node))
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
            SOCKET => {
                self.operations
                    .new_file((req.uid(), req.gid()), parent, name, mode & !umask, true)
            }
            REGULAR => {
                self.operations
                    .new_file((req.uid(), req.gid()), parent, name, mode & !umask, false)
            }
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
        match self
            .operations
            .new_file((req.uid(), req.gid()), parent, name, mode & !umask, false)
        {
            Ok(node) => {
                self.operations.views.told(&node);
                let attributes = self.operations.attributes(node.ino(), &node);
                let flags = FopenFlags::FOPEN_KEEP_CACHE;
                reply.created(&FOREVER, &attributes, Generation(0), FileHandle(0), flags);
            }
            Err(errno) => reply.error(errno),
        }
    }

    /// mkdir(2) has this error for a filesystem without other directories.
    fn mkdir(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EPERM);
    }

    fn rmdir(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let done = self.operations.unlink(parent, name);
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
        let to = (newparent, newname);
        let done = self.operations.rename((parent, name), to, flags);
        empty(done, reply);
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let writes = flags.acc_mode() != OpenAccMode::O_RDONLY;
        let opened = self.operations.node(ino);
        match opened.and_then(|node| self.operations.open(&node, writes, req.pid())) {
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
        answer_read(&self.operations.counters, size, reply, |buffer| {
            let node = self.operations.node(ino)?;
            self.operations.read(&node, buffer, offset)
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
            .operations
            .node(ino)
            .and_then(|node| self.operations.write(&node, offset, data, cached));
        let done = written.is_ok().then_some(data.len());
        self.operations.counters.write(done);
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
        let done = self
            .operations
            .node(ino)
            .and_then(|node| self.operations.sync(&node));
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
        let done = self
            .operations
            .node(ino)
            .and_then(|node| self.operations.sync(&node));
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
            .operations
            .node(ino)
            .and_then(|node| self.operations.zero(&node, offset, length, mode));
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
        let found = self.operations.node(ino).and_then(|node| {
            let offset = u64::try_from(offset).map_err(|_| Errno::ENXIO)?;
            let region = match whence {
                SEEK_DATA => Region::Data,
                SEEK_HOLE => Region::Hole,
                _ => return Err(Errno::EINVAL),
            };
            self.operations
                .seek(&node, offset, region)?
                .ok_or(Errno::ENXIO)
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
        let entries = match self.operations.entries(ino.0) {
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

    fn getxattr(&self, req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        if ino.0 == ROOT && name == counters::ATTRIBUTE {
            let overlays = Some(self.operations.views.overlay_use());
            return self.operations.counters.tell(overlays, req, size, reply);
        }
        match self.operations.extended(ino, name) {
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
        match rustix::fs::statvfs(self.operations.views.overlays()) {
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
