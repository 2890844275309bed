//! The process of another monitor: who it is, and what it has open.

use std::fs::{self, File, Metadata};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::error::NotFound;
use crate::runtime::began;

/// A process, held so that its number stays its own.
pub struct Peer {
    /// Its number.
    pub pid: u32,
    /// When it began, in clock ticks since the system did.
    pub since: u64,
    _held: OwnedFd,
}

impl Peer {
    /// The process of this number.
    pub fn of(pid: u32) -> anyhow::Result<Self> {
        let raw = i32::try_from(pid)?;
        let gone = || NotFound(format!("there is no process {pid}"));
        let held = Pid::from_raw(raw).and_then(|it| pidfd_open(it, PidfdFlags::empty()).ok());
        let held = held.ok_or_else(gone)?;
        let since = began(raw).ok_or_else(gone)?;
        Ok(Self {
            pid,
            since,
            _held: held,
        })
    }

    /// Something of its own in `/proc`.
    pub fn proc(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{name}", self.pid))
    }

    /// What it was started with, its own name first.
    pub fn arguments(&self) -> anyhow::Result<Vec<String>> {
        let bytes = fs::read(self.proc("cmdline")).map_err(|error| self.hidden(error))?;
        let words = bytes.split(|byte| *byte == 0).map(<[u8]>::to_vec);
        let mut words: Vec<String> = words
            .map(String::from_utf8)
            .collect::<Result<_, _>>()
            .with_context(|| format!("an argument of process {} is no text", self.pid))?;
        words.pop();
        Ok(words)
    }

    /// Its working directory.
    pub fn directory(&self) -> anyhow::Result<PathBuf> {
        fs::read_link(self.proc("cwd")).map_err(|error| self.hidden(error))
    }

    /// Its root directory, if it is another one than that of this process: in a chroot, as a
    /// jailer makes, or in a container.
    pub fn own_root(&self) -> anyhow::Result<Option<PathBuf>> {
        let root = self.proc("root");
        let theirs = fs::metadata(&root).map_err(|error| self.hidden(error))?;
        let ours = fs::metadata("/").context("cannot inspect /")?;
        let is_same = (ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino());
        Ok((!is_same).then_some(root))
    }

    /// The user and the group that it acts as.
    pub fn owner(&self) -> anyhow::Result<(u32, u32)> {
        let status = fs::read_to_string(self.proc("status")).map_err(|error| self.hidden(error))?;
        let effective = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().nth(1)?.parse().ok()
        };
        let both = effective("Uid:").zip(effective("Gid:"));
        both.with_context(|| format!("the kernel does not say whose process {} is", self.pid))
    }

    /// Its program.
    pub fn program(&self) -> anyhow::Result<PathBuf> {
        fs::read_link(self.proc("exe")).map_err(|error| self.hidden(error))
    }

    /// One of its descriptors, opened anew for reading.
    pub fn descriptor(&self, number: u64) -> anyhow::Result<File> {
        let path = self.proc(&format!("fd/{number}"));
        File::open(&path).map_err(|error| self.hidden(error))
    }

    /// The file that it has open under this path, be it removed or not, with the path that
    /// the kernel has for it. What another has put at the path since is not what its
    /// guest uses.
    pub fn open_file(&self, given: &Path) -> anyhow::Result<Option<File>> {
        let path = self.directory()?.join(given);
        // As clones of this program are given files without a name.
        let link = fs::read_link(&path).ok();
        for name in [Some(&path), link.as_ref()].into_iter().flatten() {
            let number = name.strip_prefix("/proc/self/fd").ok();
            if let Some(number) = number.and_then(|it| it.to_str()?.parse().ok()) {
                return self.descriptor(number).map(Some);
            }
        }
        let real = fs::canonicalize(&path).unwrap_or_else(|_| path.clone());
        let removed = {
            let mut name = path.clone().into_os_string();
            name.push(" (deleted)");
            PathBuf::from(name)
        };
        let dir = self.proc("fd");
        for entry in fs::read_dir(&dir).map_err(|error| self.hidden(error))? {
            let link = entry?.path();
            let Ok(target) = fs::read_link(&link) else {
                continue;
            };
            if [&path, &real, &removed].contains(&&target) {
                let file = File::open(&link)
                    .with_context(|| format!("cannot open {}", target.display()))?;
                return Ok(Some(file));
            }
        }
        self.open_within(given)
    }

    /// The same of what is at the path in its own root directory, whichever links lead there.
    fn open_within(&self, path: &Path) -> anyhow::Result<Option<File>> {
        let Some(root) = self.own_root()? else {
            return Ok(None);
        };
        // What the kernel tells begins at the root of a mount namespace, or of ours.
        let seen = fs::read_link(&root).map_err(|error| self.hidden(error))?;
        let dir = self.directory()?;
        let inside = dir.strip_prefix(&seen).unwrap_or(&dir).join(path);
        let inside = inside.strip_prefix("/").unwrap_or(&inside);
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let root = rustix::fs::open(&root, flags, Mode::empty())?;
        let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let Ok(wanted) = openat2(&root, inside, flags, Mode::empty(), how) else {
            return Ok(None);
        };
        let wanted = File::from(wanted).metadata()?;
        for entry in fs::read_dir(self.proc("fd")).map_err(|error| self.hidden(error))? {
            let link = entry?.path();
            let found = fs::metadata(&link).ok();
            let is_it =
                |it: Metadata| it.is_file() && (it.dev(), it.ino()) == (wanted.dev(), wanted.ino());
            if found.is_some_and(is_it) {
                let file = File::open(&link);
                return file.map(Some).map_err(|error| self.hidden(error));
            }
        }
        Ok(None)
    }

    fn hidden(&self, error: std::io::Error) -> anyhow::Error {
        anyhow::Error::from(error).context(format!(
            "cannot look at process {}; it takes its user and the right to trace it \
             (kernel.yama.ptrace_scope), or root",
            self.pid
        ))
    }
}
