//! The adapter between the kernel's requests and the view.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    KernelConfig, LockOwner, OpenAccMode, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory,
    ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyXattr, Request,
};
use snapstore_store::Region;

use crate::chores::Chores;
use crate::counters::{self, Counters};
use crate::error::{Result, errno};
use crate::requests::{answer_if_any, answer_read, connect};
use crate::table::{Content, File, Node, Numbered, ROOT};
use crate::view::{Entry, Found, View};
use crate::waiting::Waiting;
use crate::warm::{Session, Subject, Warm};

/// Content never changes: what the kernel knows of a file stays true.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);
/// Tags move: the kernel asks again for the directory of a tag.
const TAG_TTL: Duration = Duration::ZERO;
const BLOCK_BYTES: u32 = 4096;
const NAME_MAX: u32 = 255;

/// open(2): who opens a file with it looks at it without using it.
const O_NOATIME: i32 = rustix::fs::OFlags::NOATIME.bits().cast_signed();

/// Answers the kernel.
pub(crate) struct Server {
    view: Arc<View>,
    chores: Chores,
    warm: Arc<Warm>,
    waiting: Waiting,
    counters: Arc<Counters>,
    /// What directories that are open hold, as they were when their reading began.
    lists: Mutex<HashMap<u64, Arc<Vec<Entry>>>>,
    next_list: AtomicU64,
    read_ahead_bytes: u32,
    look: Look,
}

/// What all nodes look like.
#[derive(Clone, Copy)]
struct Look {
    mounted: SystemTime,
    owner: (u32, u32),
}

impl Look {
    fn attributes(self, ino: u64, node: &Node) -> FileAttr {
        let (kind, perm, nlink, size, data, time) = match node {
            Node::Tags => (FileType::Directory, 0o555, 2, 0, 0, self.mounted),
            Node::Dir(dir) => (FileType::Directory, 0o555, 2, 0, 0, dir.created),
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

    /// Tells the kernel of a node.
    fn answer(self, found: Result<Option<Numbered>, Errno>, reply: ReplyEntry) {
        match found {
            Ok(Some((ino, node))) => {
                let is_tag = matches!(node, Node::Dir(_));
                let ttl = if is_tag { TAG_TTL } else { FOREVER };
                reply.entry(&ttl, &self.attributes(ino, &node), Generation(0));
            }
            Ok(None) => reply.error(Errno::ENOENT),
            Err(errno) => reply.error(errno),
        }
    }
}

impl Server {
    pub fn new(
        view: Arc<View>,
        chores: Chores,
        warm: Arc<Warm>,
        counters: Arc<Counters>,
        read_ahead_bytes: u32,
    ) -> Self {
        Self {
            view,
            chores,
            warm,
            waiting: Waiting::default(),
            counters,
            lists: Mutex::default(),
            next_list: AtomicU64::new(1),
            read_ahead_bytes,
            look: Look {
                mounted: SystemTime::now(),
                owner: (
                    rustix::process::getuid().as_raw(),
                    rustix::process::getgid().as_raw(),
                ),
            },
        }
    }

    /// The list of an open directory, made anew when it is read from the beginning.
    fn list(&self, ino: u64, list: u64, offset: u64) -> Result<Arc<Vec<Entry>>, Errno> {
        let known = self.lists().get(&list).filter(|_| offset > 0).cloned();
        if let Some(known) = known {
            return Ok(known);
        }
        let entries = self
            .view
            .entries(ino)
            .map_err(|error| report("list", &error))?;
        let dots = [(ino, "."), (ROOT, "..")].map(|(ino, name)| Entry {
            ino,
            name: name.to_owned(),
            is_dir: true,
        });
        let all = dots.into_iter().chain(entries.ok_or(Errno::ENOTDIR)?);
        let all = Arc::new(all.collect::<Vec<_>>());
        self.lists().insert(list, all.clone());
        Ok(all)
    }

    fn lists(&self) -> MutexGuard<'_, HashMap<u64, Arc<Vec<Entry>>>> {
        self.lists.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to push where one snapshot is shown: whoever looks at its image is about to
    /// use it.
    fn looked_up(&self, parent: INodeNo, node: &Node) {
        if let (ROOT, Node::File(file)) = (parent.0, node)
            && file.session.get().is_none()
            && let Some(session) = self.session(file)
        {
            self.warm.look_up(session);
        }
    }

    /// What is known of the use of an image; `None` for what is none.
    fn session<'a>(&self, file: &'a File) -> Option<&'a Arc<Session>> {
        let session = file.session.get_or_init(|| {
            let (Some(image), Content::Image(reader)) = (&file.image, &file.content) else {
                return None;
            };
            let subject = Subject {
                snapshot: image.snapshot,
                image: image.name.clone(),
                reader: reader.clone(),
                page_bytes: image.page_bytes,
            };
            self.warm.session(subject, file.ino)
        });
        session.as_ref()
    }

    /// Answers a read of what may be elsewhere: at once if it is at hand, else in a thread
    /// that may wait.
    fn read_elsewhere(&self, file: Arc<File>, offset: u64, size: u32, reply: ReplyData) {
        let began = Instant::now();
        let counters = self.counters.clone();
        let failed = move |error: &snapstore_store::Error| {
            counters.read_failed(error);
            report("read", error)
        };
        let at_hand = |buffer: &mut [u8]| {
            let read = file.read_at_hand(buffer, offset);
            read.map_err(|error| failed(&error))
        };
        let Some(reply) = answer_if_any(&self.counters, began, size, reply, at_hand) else {
            return;
        };
        let counters = self.counters.clone();
        self.waiting.give(Box::new(move || {
            let read = |buffer: &mut [u8]| match file.read_at(buffer, offset) {
                Ok(len) => Ok(Some(len)),
                Err(error) => Err(failed(&error)),
            };
            let _ = answer_if_any(&counters, began, size, reply, read);
        }));
    }

    /// The file of this number.
    fn file(&self, ino: INodeNo) -> Result<Arc<File>, Errno> {
        match self.view.node(ino.0) {
            Some(Node::File(file)) => Ok(file),
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
        connect(config, &[], self.read_ahead_bytes);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let Some(name) = name.to_str() else {
            return reply.error(Errno::ENOENT);
        };
        let look = self.look;
        match self.view.lookup(parent.0, name) {
            Ok(Found::Node(found)) => {
                let node = found.1.clone();
                look.answer(Ok(Some(found)), reply);
                self.looked_up(parent, &node);
            }
            Ok(Found::Nothing) => reply.error(Errno::ENOENT),
            // This may wait; who only reads does not wait for it.
            Ok(Found::Unopened) => self.chores.open_tag(
                name,
                Box::new(move |found| {
                    look.answer(found.map_err(|error| report("lookup", &error)), reply);
                }),
            ),
            Err(error) => reply.error(report("lookup", &error)),
        }
    }

    fn forget(&self, _req: &Request, ino: INodeNo, lookups: u64) {
        self.view.forget(ino.0, lookups);
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.view.node(ino.0) {
            Some(node) => reply.attr(&FOREVER, &self.look.attributes(ino.0, &node)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let opened = self.file(ino).and_then(|file| match flags.acc_mode() {
            OpenAccMode::O_RDONLY if self.view.open_file(ino.0) => {
                if let Some(session) = self.session(&file) {
                    self.warm.open(session);
                }
                Ok(())
            }
            // The kernel looks the path up anew.
            OpenAccMode::O_RDONLY => Err(Errno::ESTALE),
            _ => Err(Errno::EROFS),
        });
        match opened {
            // Without KEEP_CACHE every open would drop the pages under running VMs.
            Ok(()) => reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE),
            Err(errno) => reply.error(errno),
        }
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
        if let Ok(file) = self.file(ino)
            && let Some(Some(session)) = file.session.get()
        {
            self.warm.close(session);
        }
        self.view.close_file(ino.0);
        reply.ok();
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let file = match self.file(ino) {
            Ok(file) if file.may_wait() => {
                if let Some(Some(session)) = file.session.get() {
                    // In the order in which they are asked for, not in that of the answers.
                    let counts = flags.0 & O_NOATIME == 0;
                    session.asked(offset..offset.saturating_add(size.into()), counts);
                }
                return self.read_elsewhere(file, offset, size, reply);
            }
            file => file,
        };
        answer_read(&self.counters, size, reply, |buffer| {
            let file = file?;
            let read = file.read_at(buffer, offset);
            let read = read.map_err(|error| {
                self.counters.read_failed(&error);
                report("read", &error)
            })?;
            if let Some(Some(session)) = file.session.get() {
                // Before the answer: what follows it may be the next request.
                let counts = flags.0 & O_NOATIME == 0;
                session.asked(offset..offset + read as u64, counts);
            }
            Ok(read)
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
        let answer = move |file: &File, reply: ReplyLseek| {
            let found = || {
                let offset = u64::try_from(offset).map_err(|_| Errno::ENXIO)?;
                let region = match whence {
                    SEEK_DATA => Region::Data,
                    SEEK_HOLE => Region::Hole,
                    _ => return Err(Errno::EINVAL),
                };
                seek(file, offset, region)
            };
            match found().map(i64::try_from) {
                Ok(Ok(position)) => reply.offset(position),
                Ok(Err(_)) => reply.error(Errno::EOVERFLOW),
                Err(errno) => reply.error(errno),
            }
        };
        match self.file(ino) {
            // Of a long image many leaves may have to be read out of the cache on the disk.
            Ok(file) if file.may_wait() => {
                self.waiting.give(Box::new(move || answer(&file, reply)));
            }
            Ok(file) => answer(&file, reply),
            Err(errno) => reply.error(errno),
        }
    }

    fn opendir(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let list = self.next_list.fetch_add(1, Ordering::Relaxed);
        reply.opened(FileHandle(list), FopenFlags::empty());
    }

    fn readdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let list = match self.list(ino.0, fh.0, offset) {
            Ok(list) => list,
            Err(errno) => return reply.error(errno),
        };
        for (entry, next) in list.iter().zip(1_u64..).filter(|(_, next)| *next > offset) {
            let kind = if entry.is_dir {
                FileType::Directory
            } else {
                FileType::RegularFile
            };
            if reply.add(INodeNo(entry.ino), next, kind, &entry.name) {
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.lists().remove(&fh.0);
        reply.ok();
    }

    fn getxattr(&self, req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        match ino.0 == ROOT && name == counters::ATTRIBUTE {
            true => self.counters.tell(None, req, size, reply),
            false => reply.error(Errno::ENODATA),
        }
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
            // Who maps an image asks for all of its holes before anything else: a round trip each
            // would be more than the guest's first pages take.
            .seek_at_hand(offset, region)
            .map_err(|error| report("seek", &error))?,
        Content::Bytes(_) if offset >= file.size_bytes => None,
        Content::Bytes(_) => Some(match region {
            Region::Data => offset,
            Region::Hole => file.size_bytes,
        }),
    };
    found.ok_or(Errno::ENXIO)
}
