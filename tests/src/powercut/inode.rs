//! One inode of the disk: what a file or a directory holds now, and what a power cut leaves of it.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::ops::Range;
use std::sync::Arc;
use std::time::SystemTime;

use fuser::FileType;

pub(super) type Entries = BTreeMap<OsString, u64>;

/// Contents of a regular file.
#[derive(Clone, Default)]
pub(super) struct FileBody {
    pub(super) current: Arc<Vec<u8>>,
    pub(super) durable: Arc<Vec<u8>>,
    /// Encloses every byte in which `current` may differ from `durable`.
    pub(super) dirty: Option<Range<usize>>,
}

impl FileBody {
    pub(super) fn touch(&mut self, range: Range<usize>) {
        self.dirty = Some(match self.dirty.take() {
            Some(old) => old.start.min(range.start)..old.end.max(range.end),
            None => range,
        });
    }

    pub(super) fn set_len(&mut self, len: usize) {
        let old = self.current.len();
        if len != old {
            Arc::make_mut(&mut self.current).resize(len, 0);
            // Everything behind a cut is gone, whatever is written there later.
            self.touch(len.min(old)..usize::MAX);
        }
    }

    pub(super) fn write(&mut self, at: usize, data: &[u8]) {
        let end = at + data.len();
        if data.is_empty() {
            return;
        }
        if end > self.current.len() {
            self.set_len(end);
        }
        Arc::make_mut(&mut self.current)[at..end].copy_from_slice(data);
        self.touch(at..end);
    }

    pub(super) fn zero(&mut self, range: Range<usize>) {
        let end = range.end.min(self.current.len());
        if range.start < end {
            Arc::make_mut(&mut self.current)[range.start..end].fill(0);
            self.touch(range.start..end);
        }
    }

    pub(super) fn sync(&mut self) {
        let Some(dirty) = self.dirty.take() else {
            return;
        };
        let len = self.current.len();
        let durable = Arc::make_mut(&mut self.durable);
        durable.resize(len, 0);
        let range = dirty.start.min(len)..dirty.end.min(len);
        durable[range.clone()].copy_from_slice(&self.current[range]);
    }
}

/// Entries of a directory.
#[derive(Clone, Default)]
pub(super) struct DirBody {
    pub(super) parent: u64,
    pub(super) current: Entries,
    pub(super) durable: Entries,
}

#[derive(Clone)]
pub(super) enum Body {
    File(FileBody),
    Dir(DirBody),
}

/// Attributes that are kept whatever was or was not synced.
#[derive(Clone)]
pub(super) struct Meta {
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) atime: SystemTime,
    pub(super) mtime: SystemTime,
    pub(super) ctime: SystemTime,
}

impl Meta {
    pub(super) fn new(mode: u32, uid: u32, gid: u32) -> Self {
        let now = SystemTime::now();
        let (atime, mtime, ctime) = (now, now, now);
        let mode = (mode & 0o7777) as u16;
        Self {
            mode,
            uid,
            gid,
            atime,
            mtime,
            ctime,
        }
    }

    pub(super) fn modified(&mut self) {
        self.mtime = SystemTime::now();
        self.ctime = self.mtime;
    }
}

#[derive(Clone)]
pub(super) struct Node {
    pub(super) meta: Meta,
    pub(super) body: Body,
    /// Number of current directory entries for this inode.
    pub(super) links: u32,
    /// Number of durable directory entries for this inode.
    pub(super) held: u32,
    /// Number of open handles.
    pub(super) opens: u32,
}

impl Node {
    pub(super) fn new(meta: Meta, body: Body) -> Self {
        Self {
            meta,
            body,
            links: 0,
            held: 0,
            opens: 0,
        }
    }

    pub(super) fn is_dir(&self) -> bool {
        matches!(self.body, Body::Dir(_))
    }

    pub(super) fn kind(&self) -> FileType {
        match self.body {
            Body::File(_) => FileType::RegularFile,
            Body::Dir(_) => FileType::Directory,
        }
    }

    /// This inode as a power cut leaves it, without its directory entries.
    pub(super) fn survivor(&self, parent: u64) -> Self {
        let body = match &self.body {
            Body::File(file) => Body::File(FileBody {
                current: file.durable.clone(),
                durable: file.durable.clone(),
                dirty: None,
            }),
            Body::Dir(_) => Body::Dir(DirBody {
                parent,
                ..DirBody::default()
            }),
        };
        Self::new(self.meta.clone(), body)
    }
}
