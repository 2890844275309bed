//! The simplest FUSE server there can be: one file, answered from memory; what is written
//! to it is thrown away. What it takes is what FUSE takes; the rest of the product's time is
//! its own.

use std::ffi::OsStr;
use std::io::{self, Write as _};
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::Context as _;
use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyWrite, Request, WriteFlags,
};

/// The file's name, the same as in the product's mounts.
pub const FILE: &str = "memory.bin";
/// What the program prints once the mount is usable.
pub const READY: &str = "ready";
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);
const INO: u64 = 2;

struct Server {
    content: Vec<u8>,
    read_ahead: u32,
    can_write: bool,
}

/// Shows `file` in `dir` until it is unmounted.
///
/// # Errors
/// If that fails.
pub fn serve(file: &Path, dir: &Path, read_ahead: u32, can_write: bool) -> anyhow::Result<()> {
    let server = Server {
        content: std::fs::read(file)?,
        read_ahead,
        can_write,
    };
    let mut config = Config::default();
    let access = match can_write {
        true => MountOption::RW,
        false => MountOption::RO,
    };
    config.mount_options = vec![access, MountOption::NoAtime];
    config.n_threads = Some(2);
    let session = fuser::Session::new(server, dir, &config).context("cannot mount")?;
    let session = session.spawn()?;
    let mut out = io::stdout();
    writeln!(out, "{READY}")?;
    out.flush()?;
    Ok(session.join()?)
}

impl Server {
    fn attributes(&self, ino: u64) -> FileAttr {
        let is_file = ino == INO;
        FileAttr {
            ino: INodeNo(ino),
            size: if is_file {
                self.content.len() as u64
            } else {
                0
            },
            blocks: 0,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if is_file {
                FileType::RegularFile
            } else {
                FileType::Directory
            },
            perm: match (is_file, self.can_write) {
                (true, true) => 0o644,
                (true, false) => 0o444,
                (false, _) => 0o555,
            },
            nlink: 1,
            uid: rustix::process::getuid().as_raw(),
            gid: rustix::process::getgid().as_raw(),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for Server {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let flags = [
            InitFlags::FUSE_ASYNC_READ,
            InitFlags::FUSE_MAX_PAGES,
            // As the product: else the kernel asks for capabilities with each write.
            InitFlags::FUSE_HANDLE_KILLPRIV_V2,
        ];
        for flag in flags {
            let _ = config.add_capabilities(flag);
        }
        if let Err(limit) = config.set_max_readahead(self.read_ahead) {
            let _ = config.set_max_readahead(limit);
        }
        Ok(())
    }

    fn lookup(&self, _req: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == FILE {
            reply.entry(&FOREVER, &self.attributes(INO), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&FOREVER, &self.attributes(ino.0));
    }

    fn open(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
    }

    fn read(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let rest = usize::try_from(offset)
            .ok()
            .and_then(|start| self.content.get(start..));
        let rest = rest.unwrap_or_default();
        reply.data(&rest[..rest.len().min(size as usize)]);
    }

    fn write(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match u32::try_from(data.len()) {
            Ok(len) => reply.written(len),
            Err(_) => reply.error(Errno::EINVAL),
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
}
