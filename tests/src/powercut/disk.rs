//! What the disk holds: all inodes, each with its current and its durable state (`inode`).

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::ffi::{OsStr, OsString};
use std::ops::Range;
use std::path::Path;
use std::time::SystemTime;

use fuser::{Errno, FileAttr, FileType, INodeNo};

pub(super) use super::inode::Meta;
use super::inode::{Body, DirBody, Entries, FileBody, Node};
use super::{Lost, Refused};

/// Block size reported to the kernel.
pub(super) const BLOCK: u32 = 4096;
/// Number of blocks the disk claims to have (16 GiB).
pub(super) const BLOCKS: u64 = 1 << 22;
/// Longest file: contents are held in memory without holes.
const MAX_FILE: u64 = 1 << 30;
/// Longest name in a directory.
pub(super) const MAX_NAME: usize = 255;

pub(super) const ROOT: u64 = INodeNo::ROOT.0;

pub(super) type Fallible<T> = Result<T, Errno>;

/// One line of a directory listing.
pub(super) type Listed = (u64, FileType, OsString);

/// All inodes of a disk.
#[derive(Clone)]
pub(super) struct State {
    nodes: BTreeMap<u64, Node>,
    next: u64,
    /// What fails, of files that are whole.
    refused: BTreeMap<u64, Refused>,
}

impl State {
    pub(super) fn new() -> Self {
        let root = DirBody {
            parent: ROOT,
            ..DirBody::default()
        };
        let mut root = Node::new(Meta::new(0o755, 0, 0), Body::Dir(root));
        (root.links, root.held) = (1, 1);
        Self {
            nodes: BTreeMap::from([(ROOT, root)]),
            next: ROOT + 1,
            refused: BTreeMap::new(),
        }
    }

    fn node(&self, ino: u64) -> Fallible<&Node> {
        self.nodes.get(&ino).ok_or(Errno::ENOENT)
    }

    fn node_mut(&mut self, ino: u64) -> Fallible<&mut Node> {
        self.nodes.get_mut(&ino).ok_or(Errno::ENOENT)
    }

    fn dir(&self, ino: u64) -> Fallible<&DirBody> {
        match &self.node(ino)?.body {
            Body::Dir(dir) => Ok(dir),
            Body::File(_) => Err(Errno::ENOTDIR),
        }
    }

    fn dir_mut(&mut self, ino: u64) -> Fallible<(&mut DirBody, &mut Meta)> {
        let node = self.node_mut(ino)?;
        match &mut node.body {
            Body::Dir(dir) => Ok((dir, &mut node.meta)),
            Body::File(_) => Err(Errno::ENOTDIR),
        }
    }

    fn file_mut(&mut self, ino: u64) -> Fallible<(&mut FileBody, &mut Meta)> {
        let node = self.node_mut(ino)?;
        match &mut node.body {
            Body::File(file) => Ok((file, &mut node.meta)),
            Body::Dir(_) => Err(Errno::EISDIR),
        }
    }

    pub(super) fn meta_mut(&mut self, ino: u64) -> Fallible<&mut Meta> {
        Ok(&mut self.node_mut(ino)?.meta)
    }

    pub(super) fn lookup(&self, parent: u64, name: &OsStr) -> Fallible<u64> {
        if name.len() > MAX_NAME {
            return Err(Errno::ENAMETOOLONG);
        }
        let found = self.dir(parent)?.current.get(name).copied();
        found.ok_or(Errno::ENOENT)
    }

    /// From now on the file at this path, from the root, cannot be opened or read.
    pub(super) fn refuse(&mut self, path: &Path, refused: Refused) -> Fallible<()> {
        let mut ino = ROOT;
        for name in path {
            ino = self.lookup(ino, name)?;
        }
        self.refused.insert(ino, refused);
        Ok(())
    }

    /// Whether the file may be opened.
    pub(super) fn may_open(&self, ino: u64) -> Fallible<()> {
        match self.refused.get(&ino) {
            Some(Refused::Open(errno)) => Err(Errno::from_i32(errno.raw_os_error())),
            _ => Ok(()),
        }
    }

    /// Whether the file may be read.
    pub(super) fn may_read(&self, ino: u64) -> Fallible<()> {
        match self.refused.get(&ino) {
            Some(Refused::Read(errno)) => Err(Errno::from_i32(errno.raw_os_error())),
            _ => Ok(()),
        }
    }

    pub(super) fn attr(&self, ino: u64) -> Fallible<FileAttr> {
        let node = self.node(ino)?;
        let (size, nlink) = match &node.body {
            Body::File(file) => (file.current.len() as u64, node.links),
            Body::Dir(_) if node.links == 0 => (0, 0),
            Body::Dir(dir) => {
                let below = dir.current.values().filter_map(|ino| self.nodes.get(ino));
                let dirs = below.filter(|node| node.is_dir()).count() as u32;
                (u64::from(BLOCK), 2 + dirs)
            }
        };
        Ok(FileAttr {
            ino: INodeNo(ino),
            size,
            blocks: size.div_ceil(u64::from(BLOCK)) * u64::from(BLOCK / 512),
            atime: node.meta.atime,
            mtime: node.meta.mtime,
            ctime: node.meta.ctime,
            crtime: node.meta.ctime,
            kind: node.kind(),
            perm: node.meta.mode,
            nlink,
            uid: node.meta.uid,
            gid: node.meta.gid,
            rdev: 0,
            blksize: BLOCK,
            flags: 0,
        })
    }

    /// Blocks not taken by current file contents.
    pub(super) fn free_blocks(&self) -> u64 {
        let blocks = |node: &Node| match &node.body {
            Body::File(file) => file.current.len().div_ceil(BLOCK as usize) as u64,
            Body::Dir(_) => 1,
        };
        BLOCKS.saturating_sub(self.nodes.values().map(blocks).sum())
    }

    pub(super) fn list(&self, ino: u64) -> Fallible<Vec<Listed>> {
        let dir = self.dir(ino)?;
        let dots = [(ino, "."), (dir.parent, "..")];
        let dots = dots.map(|(ino, name)| (ino, FileType::Directory, OsString::from(name)));
        let mut all = Vec::from(dots);
        for (name, &ino) in &dir.current {
            all.push((ino, self.node(ino)?.kind(), name.clone()));
        }
        Ok(all)
    }

    /// Adds an entry whose name is known to be free.
    fn attach(&mut self, parent: u64, name: &OsStr, ino: u64) -> Fallible<()> {
        let (dir, meta) = self.dir_mut(parent)?;
        dir.current.insert(name.to_owned(), ino);
        meta.modified();
        let node = self.node_mut(ino)?;
        node.links += 1;
        node.meta.ctime = SystemTime::now();
        if let Body::Dir(dir) = &mut node.body {
            dir.parent = parent;
        }
        Ok(())
    }

    /// Removes an entry; the inode stays as long as something else needs it.
    fn detach(&mut self, parent: u64, name: &OsStr) -> Fallible<u64> {
        let (dir, meta) = self.dir_mut(parent)?;
        let ino = dir.current.remove(name).ok_or(Errno::ENOENT)?;
        meta.modified();
        let node = self.node_mut(ino)?;
        node.links -= 1;
        node.meta.ctime = SystemTime::now();
        Ok(ino)
    }

    fn vacant(&self, parent: u64, name: &OsStr) -> Fallible<()> {
        match self.lookup(parent, name) {
            Ok(_) => Err(Errno::EEXIST),
            Err(error) if i32::from(error) == i32::from(Errno::ENOENT) => {
                let dir = self.node(parent)?;
                if dir.links == 0 {
                    return Err(Errno::ENOENT);
                }
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    pub(super) fn create(
        &mut self,
        parent: u64,
        name: &OsStr,
        kind: FileType,
        meta: Meta,
    ) -> Fallible<u64> {
        self.vacant(parent, name)?;
        let body = match kind {
            FileType::RegularFile => Body::File(FileBody::default()),
            FileType::Directory => Body::Dir(DirBody::default()),
            _ => return Err(Errno::EPERM),
        };
        let ino = self.next;
        self.next += 1;
        self.nodes.insert(ino, Node::new(meta, body));
        self.attach(parent, name, ino)?;
        Ok(ino)
    }

    pub(super) fn link(&mut self, ino: u64, parent: u64, name: &OsStr) -> Fallible<()> {
        self.vacant(parent, name)?;
        if self.node(ino)?.is_dir() {
            return Err(Errno::EPERM);
        }
        self.attach(parent, name, ino)
    }

    /// Whether the entry can be removed by `unlink` (or `rmdir`, with `dir`).
    fn removable(&self, ino: u64, dir: bool) -> Fallible<()> {
        match (&self.node(ino)?.body, dir) {
            (Body::File(_), true) => Err(Errno::ENOTDIR),
            (Body::Dir(_), false) => Err(Errno::EISDIR),
            (Body::Dir(dir), true) if !dir.current.is_empty() => Err(Errno::ENOTEMPTY),
            _ => Ok(()),
        }
    }

    pub(super) fn remove(&mut self, parent: u64, name: &OsStr, dir: bool) -> Fallible<()> {
        let ino = self.lookup(parent, name)?;
        self.removable(ino, dir)?;
        self.detach(parent, name)?;
        self.reap(ino);
        Ok(())
    }

    pub(super) fn rename(
        &mut self,
        (from, name): (u64, &OsStr),
        (to, new_name): (u64, &OsStr),
        replace: bool,
    ) -> Fallible<()> {
        let ino = self.lookup(from, name)?;
        match self.lookup(to, new_name) {
            Ok(_) if !replace => return Err(Errno::EEXIST),
            Ok(old) if old == ino => return Ok(()),
            Ok(old) => {
                self.removable(old, self.node(ino)?.is_dir())?;
                self.detach(to, new_name)?;
                self.reap(old);
            }
            Err(_) => self.vacant(to, new_name)?,
        }
        self.detach(from, name)?;
        self.attach(to, new_name, ino)
    }

    pub(super) fn open(&mut self, ino: u64) -> Fallible<()> {
        self.node_mut(ino)?.opens += 1;
        Ok(())
    }

    pub(super) fn release(&mut self, ino: u64) {
        if let Ok(node) = self.node_mut(ino) {
            node.opens = node.opens.saturating_sub(1);
        }
        self.reap(ino);
    }

    /// The bytes at `offset`, fewer than `size` at the end of the file.
    pub(super) fn read(&self, ino: u64, offset: u64, size: u32) -> Fallible<&[u8]> {
        let Body::File(file) = &self.node(ino)?.body else {
            return Err(Errno::EISDIR);
        };
        let len = file.current.len();
        let start = usize::try_from(offset).map_or(len, |start| start.min(len));
        let end = start.saturating_add(size as usize).min(len);
        Ok(&file.current[start..end])
    }

    pub(super) fn write(&mut self, ino: u64, offset: u64, data: &[u8]) -> Fallible<()> {
        let range = extent(offset, data.len() as u64)?;
        let (file, meta) = self.file_mut(ino)?;
        file.write(range.start, data);
        meta.modified();
        Ok(())
    }

    pub(super) fn set_len(&mut self, ino: u64, len: u64) -> Fallible<()> {
        let len = extent(len, 0)?.start;
        let (file, meta) = self.file_mut(ino)?;
        file.set_len(len);
        meta.modified();
        Ok(())
    }

    /// Makes the file at least `offset + len` bytes long.
    pub(super) fn grow(&mut self, ino: u64, offset: u64, len: u64) -> Fallible<()> {
        let end = extent(offset, len)?.end;
        let (file, meta) = self.file_mut(ino)?;
        if end > file.current.len() {
            file.set_len(end);
            meta.modified();
        }
        Ok(())
    }

    /// Overwrites a range with zeros, up to the end of the file.
    pub(super) fn zero(&mut self, ino: u64, offset: u64, len: u64) -> Fallible<()> {
        let range = extent(
            offset.min(MAX_FILE),
            len.min(MAX_FILE - offset.min(MAX_FILE)),
        )?;
        let (file, meta) = self.file_mut(ino)?;
        file.zero(range);
        meta.modified();
        Ok(())
    }

    /// Makes contents and size of a file durable, but no directory entry.
    pub(super) fn sync_file(&mut self, ino: u64) -> Fallible<()> {
        self.file_mut(ino)?.0.sync();
        Ok(())
    }

    /// Makes the entries of a directory durable, but not what they refer to.
    pub(super) fn sync_dir(&mut self, ino: u64) -> Fallible<()> {
        let (dir, _) = self.dir_mut(ino)?;
        let new: Vec<u64> = dir.current.values().copied().collect();
        let old = std::mem::replace(&mut dir.durable, dir.current.clone());
        for ino in new {
            self.node_mut(ino)?.held += 1;
        }
        old.into_values().for_each(|ino| self.unhold(ino));
        Ok(())
    }

    fn unhold(&mut self, ino: u64) {
        if let Ok(node) = self.node_mut(ino) {
            node.held -= 1;
        }
        self.reap(ino);
    }

    /// Forgets an inode which neither an entry nor an open handle needs.
    fn reap(&mut self, ino: u64) {
        let unused = |node: &Node| node.links == 0 && node.held == 0 && node.opens == 0;
        if self.nodes.get(&ino).is_some_and(unused)
            && let Some(node) = self.nodes.remove(&ino)
            && let Body::Dir(dir) = node.body
        {
            dir.durable.into_values().for_each(|ino| self.unhold(ino));
        }
    }

    /// The disk that the next boot finds.
    pub(super) fn after_power_cut(&self, lost: Lost) -> Self {
        match lost {
            Lost::All => self.survivors(|dir| &dir.durable),
            Lost::DataOnly => self.survivors(|dir| &dir.current),
            Lost::Nothing => {
                let mut state = self.clone();
                state.nodes.values_mut().for_each(|node| node.opens = 0);
                for &ino in self.nodes.keys() {
                    state.reap(ino);
                }
                state
            }
        }
    }

    /// What can be reached through the chosen entries, with durable contents.
    fn survivors(&self, entries: impl Fn(&DirBody) -> &Entries) -> Self {
        let mut new = Self::new();
        new.next = self.next;
        let mut dirs = HashSet::from([ROOT]);
        let mut queue = VecDeque::from([ROOT]);
        while let Some(ino) = queue.pop_front() {
            let Ok(old) = self.dir(ino) else { continue };
            let mut kept = Entries::new();
            for (name, &child) in entries(old) {
                let Some(node) = self.nodes.get(&child) else {
                    continue;
                };
                // A directory moved between two others of which only the new
                // one was synced is found twice, but has one place only.
                if node.is_dir() {
                    if !dirs.insert(child) {
                        continue;
                    }
                    queue.push_back(child);
                }
                kept.insert(name.clone(), child);
                let copy = new.nodes.entry(child);
                let copy = copy.or_insert_with(|| node.survivor(ino));
                copy.links += 1;
                copy.held += 1;
            }
            if let Ok((dir, _)) = new.dir_mut(ino) {
                dir.current = kept.clone();
                dir.durable = kept;
            }
        }
        if let (Ok(root), Ok(old)) = (new.meta_mut(ROOT), self.node(ROOT)) {
            root.clone_from(&old.meta);
        }
        new
    }
}

/// The byte range of an access, if a file can be that long.
fn extent(offset: u64, len: u64) -> Fallible<Range<usize>> {
    let end = offset.checked_add(len).filter(|&end| end <= MAX_FILE);
    let end = end.ok_or(Errno::EFBIG)?;
    Ok(offset as usize..end as usize)
}
