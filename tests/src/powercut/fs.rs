//! The kernel's requests, answered from the state of the disk.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use fuser::{
    AccessFlags, BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow,
    WriteFlags,
};
use rustix::fs::{FallocateFlags, OFlags};

use super::Disk;
use super::disk::{BLOCK, BLOCKS, Fallible, Listed, MAX_NAME, Meta, State};

/// The kernel asks again each time.
const TTL: Duration = Duration::ZERO;
/// Inode numbers are never used twice.
const GENERATION: Generation = Generation(0);
/// Closing makes nothing durable, so the kernel need not tell. A process that
/// serves the disk it uses would wait for itself if it were killed.
const OPEN: FopenFlags = FopenFlags::FOPEN_NOFLUSH;
/// Inodes the disk claims to have room for.
const INODES: u64 = 1 << 24;

/// A mounted disk, as seen by the session.
pub(super) struct Mounted {
    disk: Disk,
    /// What an open directory listed when it was last read from the start.
    listings: Mutex<HashMap<u64, Vec<Listed>>>,
    next_handle: AtomicU64,
}

impl Mounted {
    pub(super) fn new(disk: Disk) -> Self {
        Self {
            disk,
            listings: Mutex::default(),
            next_handle: AtomicU64::new(1),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.disk.state()
    }

    fn listings(&self) -> MutexGuard<'_, HashMap<u64, Vec<Listed>>> {
        self.listings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open_inode(&self, ino: INodeNo) -> Fallible<FileHandle> {
        self.state().open(ino.0)?;
        Ok(self.handle())
    }

    fn handle(&self) -> FileHandle {
        FileHandle(self.next_handle.fetch_add(1, Ordering::Relaxed))
    }

    fn make(
        &self,
        req: &Request,
        (parent, name): (INodeNo, &OsStr),
        kind: FileType,
        mode: u32,
    ) -> Fallible<FileAttr> {
        let mut state = self.state();
        let meta = Meta::new(mode, req.uid(), req.gid());
        let ino = state.create(parent.0, name, kind, meta)?;
        if kind == FileType::RegularFile {
            state.open(ino)?;
        }
        state.attr(ino)
    }

    /// Fills the answer with entries from `offset` on, as many as fit.
    fn list(
        &self,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        reply: &mut ReplyDirectory,
    ) -> Fallible<()> {
        let mut listings = self.listings();
        let listing = listings.get_mut(&fh.0).ok_or(Errno::EBADF)?;
        if offset == 0 {
            *listing = self.state().list(ino.0)?;
        }
        for (index, (ino, kind, name)) in (0u64..).zip(listing.iter()) {
            if index >= offset && reply.add(INodeNo(*ino), index + 1, *kind, name) {
                break;
            }
        }
        Ok(())
    }

    fn allocate(&self, ino: INodeNo, offset: u64, length: u64, mode: i32) -> Fallible<()> {
        let mode = FallocateFlags::from_bits_retain(mode as u32);
        let keep_size = mode.contains(FallocateFlags::KEEP_SIZE);
        let mut state = self.state();
        let what = mode.difference(FallocateFlags::KEEP_SIZE);
        if what == FallocateFlags::PUNCH_HOLE || what == FallocateFlags::ZERO_RANGE {
            state.zero(ino.0, offset, length)?;
        } else if !what.is_empty() {
            return Err(Errno::EOPNOTSUPP);
        }
        if keep_size {
            return Ok(());
        }
        state.grow(ino.0, offset, length)
    }
}

fn entry(result: Fallible<FileAttr>, reply: ReplyEntry) {
    match result {
        Ok(attr) => reply.entry(&TTL, &attr, GENERATION),
        Err(error) => reply.error(error),
    }
}

fn empty(result: Fallible<()>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(error),
    }
}

fn attr(result: Fallible<FileAttr>, reply: ReplyAttr) {
    match result {
        Ok(attr) => reply.attr(&TTL, &attr),
        Err(error) => reply.error(error),
    }
}

fn opened(result: Fallible<FileHandle>, reply: ReplyOpen) {
    match result {
        Ok(handle) => reply.opened(handle, OPEN),
        Err(error) => reply.error(error),
    }
}

fn moment(time: TimeOrNow) -> SystemTime {
    match time {
        TimeOrNow::SpecificTime(time) => time,
        TimeOrNow::Now => SystemTime::now(),
    }
}

impl Filesystem for Mounted {
    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let state = self.state();
        let found = state.lookup(parent.0, name);
        entry(found.and_then(|ino| state.attr(ino)), reply);
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        attr(self.state().attr(ino.0), reply);
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let mut state = self.state();
        let mut set = || {
            if let Some(size) = size {
                state.set_len(ino.0, size)?;
            }
            let meta = state.meta_mut(ino.0)?;
            meta.mode = mode.map_or(meta.mode, |mode| (mode & 0o7777) as u16);
            meta.uid = uid.unwrap_or(meta.uid);
            meta.gid = gid.unwrap_or(meta.gid);
            meta.atime = atime.map_or(meta.atime, moment);
            meta.mtime = mtime.map_or(meta.mtime, moment);
            meta.ctime = SystemTime::now();
            state.attr(ino.0)
        };
        attr(set(), reply);
    }

    fn mknod(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        let kind = rustix::fs::FileType::from_raw_mode(mode);
        if kind != rustix::fs::FileType::RegularFile {
            return reply.error(Errno::EPERM);
        }
        let made = self.make(req, (parent, name), FileType::RegularFile, mode);
        // Unlike `create` this does not open the file.
        if let Ok(attr) = &made {
            self.state().release(attr.ino.0);
        }
        entry(made, reply);
    }

    fn mkdir(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let made = self.make(req, (parent, name), FileType::Directory, mode);
        entry(made, reply);
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(self.state().remove(parent.0, name, false), reply);
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(self.state().remove(parent.0, name, true), reply);
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
        if !RenameFlags::RENAME_NOREPLACE.contains(flags) {
            return reply.error(Errno::EINVAL);
        }
        let (from, to) = ((parent.0, name), (newparent.0, newname));
        let renamed = self.state().rename(from, to, flags.is_empty());
        empty(renamed, reply);
    }

    fn link(
        &self,
        _req: &Request,
        ino: INodeNo,
        newparent: INodeNo,
        newname: &OsStr,
        reply: ReplyEntry,
    ) {
        let mut state = self.state();
        let linked = state.link(ino.0, newparent.0, newname);
        entry(linked.and_then(|()| state.attr(ino.0)), reply);
    }

    fn open(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let may = self.state().may_open(ino.0);
        opened(may.and_then(|()| self.open_inode(ino)), reply);
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        // The kernel has looked the name up before, so it is always a new one.
        match self.make(req, (parent, name), FileType::RegularFile, mode) {
            Ok(attr) => {
                reply.created(&TTL, &attr, GENERATION, self.handle(), OPEN);
            }
            Err(error) => reply.error(error),
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
        let state = self.state();
        let may = state.may_read(ino.0);
        match may.and_then(|()| state.read(ino.0, offset, size)) {
            Ok(data) => reply.data(data),
            Err(error) => reply.error(error),
        }
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let mut state = self.state();
        let mut written = state.write(ino.0, offset, data);
        // O_SYNC includes the bit of O_DSYNC.
        if OFlags::from_bits_retain(flags.0 as u32).contains(OFlags::DSYNC) {
            written = written.and_then(|()| state.sync_file(ino.0));
        }
        match written {
            Ok(()) => reply.written(data.len() as u32),
            Err(error) => reply.error(error),
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
        // Only kernels that do not know `OPEN` ask.
        reply.ok();
    }

    fn release(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.state().release(ino.0);
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
        // The size belongs to the data, so fdatasync is no weaker.
        empty(self.state().sync_file(ino.0), reply);
    }

    fn opendir(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let handle = self.open_inode(ino);
        if let Ok(handle) = &handle {
            self.listings().insert(handle.0, Vec::new());
        }
        opened(handle, reply);
    }

    fn readdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        match self.list(ino, fh, offset, &mut reply) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(error),
        }
    }

    fn releasedir(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.listings().remove(&fh.0);
        self.state().release(ino.0);
        reply.ok();
    }

    fn fsyncdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        empty(self.state().sync_dir(ino.0), reply);
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let free = self.state().free_blocks();
        let names = MAX_NAME as u32;
        reply.statfs(BLOCKS, free, free, INODES, INODES, BLOCK, names, BLOCK);
    }

    fn access(&self, _req: &Request, _ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        reply.ok();
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
        empty(self.allocate(ino, offset, length, mode), reply);
    }
}
