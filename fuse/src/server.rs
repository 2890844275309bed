//! The adapter between the kernel's requests and the view.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, ReplyAttr,
    ReplyData, ReplyDirectory, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, Request, SessionACL,
};
use snapstore_store::{Region, Store};

use crate::attach::{Attached, attach};
use crate::claim::{Claim, Surroundings};
use crate::error::{Error, Result, errno};
use crate::view::{Content, File, Node, ROOT, View, What};

/// Content never changes: what the kernel knows of a file stays true.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);
/// Tags move: the kernel asks again for the directory of a tag.
const TAG_TTL: Duration = Duration::ZERO;
const BLOCK_BYTES: u32 = 4096;
const NAME_MAX: u32 = 255;

thread_local! {
    static REPLY: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// How to serve a mount.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// Threads that answer requests.
    pub threads: usize,
    /// How much the kernel reads around a fault and ahead of a reader, in
    /// bytes; the kernel's limit is 128 KiB.
    pub read_ahead_bytes: u32,
    /// Whether other users may read the mount.
    pub allow_other: bool,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            threads: 2,
            read_ahead_bytes: 128 << 10,
            allow_other: false,
        }
    }
}

/// A live mount, served by threads of this process until it is unmounted.
#[derive(Debug)]
pub struct Mounted {
    session: BackgroundSession,
    attached: Arc<Attached>,
    dir: PathBuf,
}

/// Undoes one mount.
#[derive(Clone, Debug)]
pub struct Undo {
    attached: Arc<Attached>,
}

/// Mounts `what` of a store at `dir`. When this returns, the mount is usable.
/// `others` are places that it must not hide, and `is_dead` tells whether the
/// server of a mount is gone (see [`crate::is_dead`]).
///
/// # Errors
/// [`Error::NoFuse`] without `/dev/fuse`; [`Error::AlreadyMounted`];
/// [`Error::HidesStore`]; [`Error::Store`] if there is no such snapshot; I/O errors.
pub fn mount(
    store: Store,
    what: &What,
    dir: &Path,
    options: &MountOptions,
    others: Vec<PathBuf>,
    is_dead: &dyn Fn(&Path) -> bool,
) -> Result<Mounted> {
    let path = store.path().to_owned();
    let around = Surroundings {
        store: path.clone(),
        others,
    };
    let claim = Claim::new(dir, &around, is_dead)?;
    let server = Server {
        view: View::new(store, what)?,
        read_ahead_bytes: options.read_ahead_bytes,
        mounted: SystemTime::now(),
        owner: (
            rustix::process::getuid().as_raw(),
            rustix::process::getgid().as_raw(),
        ),
    };
    let failed = |source| Error::Io {
        action: "serve",
        path: dir.to_owned(),
        source,
    };
    let serve = |connection| {
        let mut config = Config::default();
        config.n_threads = Some(options.threads);
        let acl = if options.allow_other {
            SessionACL::All
        } else {
            SessionACL::Owner
        };
        // fuser tells of threads that it cannot start only when it is done.
        find_threads(options.threads + 1).map_err(failed)?;
        let session = fuser::Session::from_fd(server, connection, acl, config);
        session.and_then(fuser::Session::spawn).map_err(failed)
    };
    let (attached, session) = attach(claim, &path, options.allow_other, serve)?;
    Ok(Mounted {
        session,
        attached: Arc::new(attached),
        dir: dir.to_owned(),
    })
}

/// Whether so many threads can be started.
fn find_threads(count: usize) -> io::Result<()> {
    let (hold, held) = std::sync::mpsc::sync_channel::<()>(0);
    let held = Arc::new(Mutex::new(held));
    let started: io::Result<Vec<_>> = (0..count)
        .map(|_| {
            let held = held.clone();
            std::thread::Builder::new().spawn(move || {
                // Until nobody can send any more.
                let _ = held.lock().map(|held| held.recv());
            })
        })
        .collect();
    drop(hold);
    for thread in started? {
        let _ = thread.join();
    }
    Ok(())
}

impl Mounted {
    /// What undoes this mount, from another thread.
    #[must_use]
    pub fn undo(&self) -> Undo {
        Undo {
            attached: self.attached.clone(),
        }
    }

    /// Serves until the file system is unmounted, by whomever.
    ///
    /// # Errors
    /// If the connection to the kernel breaks.
    pub fn wait(self) -> Result<()> {
        let dir = self.dir;
        self.session.join().map_err(|source| Error::Io {
            action: "serve",
            path: dir,
            source,
        })
    }
}

impl Undo {
    /// Undoes the mount if it is still there: it disappears at once, and ends when
    /// its last user lets go of it. Any other mount at its path stays.
    ///
    /// # Errors
    /// If the operating system refuses.
    pub fn detach(&self) -> Result<()> {
        self.attached.detach()
    }
}

struct Server {
    view: View,
    read_ahead_bytes: u32,
    mounted: SystemTime,
    owner: (u32, u32),
}

impl Server {
    fn attributes(&self, ino: u64, node: &Node) -> FileAttr {
        let (kind, perm, nlink, size, data, time) = match node {
            Node::Tags => (FileType::Directory, 0o555, 2, 0, 0, self.mounted),
            Node::Snapshot { created, .. } => (FileType::Directory, 0o555, 2, 0, 0, *created),
            Node::File(file) => (
                FileType::RegularFile,
                0o444,
                1,
                file.size_bytes,
                file.data_bytes,
                file.created,
            ),
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
            perm,
            nlink,
            uid: self.owner.0,
            gid: self.owner.1,
            rdev: 0,
            blksize: BLOCK_BYTES,
            flags: 0,
        }
    }

    /// Runs `answer` on the file of this number.
    fn with_file<T>(
        &self,
        ino: INodeNo,
        answer: impl FnOnce(&File) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        match self.view.node(ino.0).as_deref() {
            Some(Node::File(file)) => answer(file),
            Some(_) => Err(Errno::EISDIR),
            None => Err(Errno::ENOENT),
        }
    }
}

/// Damage is logged once, here, where it becomes an errno.
fn report(what: &'static str, error: &snapstore_store::Error) -> Errno {
    tracing::error!(%error, "{what} failed");
    errno(error)
}

impl Filesystem for Server {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Absent on old kernels: then things are slower, not wrong.
        let wanted = [
            InitFlags::FUSE_ASYNC_READ,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_MAX_PAGES,
        ];
        for flag in wanted {
            let _ = config.add_capabilities(flag);
        }
        if let Err(limit) = config.set_max_readahead(self.read_ahead_bytes) {
            let _ = config.set_max_readahead(limit);
        }
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = name
            .to_str()
            .map_or(Ok(None), |name| self.view.lookup(parent.0, name));
        match found {
            Ok(Some(ino)) => match self.view.node(ino) {
                Some(node) => {
                    let is_tag = matches!(*node, Node::Snapshot { .. });
                    let attributes = self.attributes(ino, &node);
                    let ttl = if is_tag { TAG_TTL } else { FOREVER };
                    reply.entry(&ttl, &attributes, Generation(0));
                }
                None => reply.error(Errno::ENOENT),
            },
            Ok(None) => reply.error(Errno::ENOENT),
            Err(error) => reply.error(report("lookup", &error)),
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.view.node(ino.0) {
            Some(node) => reply.attr(&FOREVER, &self.attributes(ino.0, &node)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let opened = self.with_file(ino, |_| match flags.acc_mode() {
            OpenAccMode::O_RDONLY => Ok(()),
            _ => Err(Errno::EROFS),
        });
        match opened {
            // Without KEEP_CACHE every open would drop the pages under running VMs.
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
            let read = self.with_file(ino, |file| {
                file.read_at(&mut buffer[..size], offset)
                    .map_err(|error| report("read", &error))
            });
            match read {
                Ok(len) => reply.data(&buffer[..len]),
                Err(errno) => reply.error(errno),
            }
        });
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
        let found = self.with_file(ino, |file| {
            let offset = u64::try_from(offset).map_err(|_| Errno::ENXIO)?;
            let region = match whence {
                SEEK_DATA => Region::Data,
                SEEK_HOLE => Region::Hole,
                _ => return Err(Errno::EINVAL),
            };
            seek(file, offset, region)
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
        let entries = match self.view.entries(ino.0) {
            Ok(Some(entries)) => entries,
            Ok(None) => return reply.error(Errno::ENOTDIR),
            Err(error) => return reply.error(report("list", &error)),
        };
        let dots = [(ino.0, "."), (ROOT, "..")].map(|(ino, name)| crate::view::Entry {
            ino,
            name: name.to_owned(),
            is_dir: true,
        });
        let all = dots.into_iter().chain(entries).zip(1_u64..);
        for (entry, next) in all.filter(|(_, next)| *next > offset) {
            let kind = if entry.is_dir {
                FileType::Directory
            } else {
                FileType::RegularFile
            };
            if reply.add(INodeNo(entry.ino), next, kind, entry.name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        // Free space is that of the disk the store is on: none of it can be
        // used through a read-only mount, but `df` shows what commits have left.
        match rustix::fs::statvfs(self.view.store().path()) {
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

fn seek(file: &File, offset: u64, region: Region) -> Result<u64, Errno> {
    let found = match &file.content {
        Content::Image(image) => image
            .seek(offset, region)
            .map_err(|error| report("seek", &error))?,
        Content::Bytes(_) if offset >= file.size_bytes => None,
        Content::Bytes(_) => Some(match region {
            Region::Data => offset,
            Region::Hole => file.size_bytes,
        }),
    };
    found.ok_or(Errno::ENXIO)
}
