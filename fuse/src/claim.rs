//! The right to mount on a directory: it is looked at, and held until the mount
//! is there, so that of several who want it one gets it.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::io::Errno;
use snapstore_store::mount_id;

use crate::error::{Error, Result, cannot};
use crate::mountpoint::{Seen, ours};

/// How long somebody else may take to mount or unmount.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(5);

/// What must stay to be seen.
#[derive(Clone, Debug, Default)]
pub struct Surroundings {
    /// The store: nothing is mounted on it, on what holds it, or inside of it.
    /// Its server would wait for itself, and not even SIGKILL would end that.
    pub store: PathBuf,
    /// What else is not to be hidden.
    pub others: Vec<PathBuf>,
}

/// A directory that nobody else mounts a snapshot on while this lives.
pub(crate) struct Claim {
    /// The directory below the mount.
    pub seen: Seen,
    pub lock: DirLock,
    /// Whether a mount was there whose server was gone.
    pub cleared_away: bool,
}

/// A lock on the directory below a mount: whoever mounts or unmounts there has it.
#[derive(Debug, Default)]
pub(crate) struct DirLock {
    dir: Option<OwnedFd>,
}

impl DirLock {
    /// Of a directory that this user may not read, or where there are no such
    /// locks, there is none. Then what is found after mounting decides alone.
    fn of(seen: &Seen) -> Self {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Self {
            dir: rustix::fs::openat(&seen.fd, ".", flags, Mode::empty()).ok(),
        }
    }

    /// Whether it was free in time.
    pub fn acquire(&self) -> bool {
        let Some(dir) = &self.dir else { return true };
        let deadline = Instant::now() + PATIENCE;
        loop {
            match flock(dir, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) if Instant::now() < deadline => std::thread::sleep(PAUSE),
                Err(Errno::WOULDBLOCK) => return false,
                _ => return true,
            }
        }
    }

    pub fn release(&self) {
        if let Some(dir) = &self.dir {
            let _ = flock(dir, FlockOperation::Unlock);
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.lock.release();
    }
}

impl Claim {
    /// Claims `dir`, and clears away a mount of ours there whose server is gone,
    /// as `is_dead` says.
    pub fn new(dir: &Path, around: &Surroundings, is_dead: &dyn Fn(&Path) -> bool) -> Result<Self> {
        fs::File::open("/dev/fuse").map_err(|source| match source.raw_os_error() {
            Some(_) if is_exhausted(&source) => cannot("open", "/dev/fuse".as_ref(), source),
            _ => Error::NoFuse { source },
        })?;
        let busy = || Error::AlreadyMounted {
            path: dir.to_owned(),
        };
        let deadline = Instant::now() + PATIENCE;
        let mut cleared_away = false;
        while Instant::now() < deadline {
            let seen = look_at(dir)?;
            if ours(&seen)? {
                if !is_dead(&seen.path) {
                    return Err(busy());
                }
                tracing::warn!(dir = %dir.display(), "unmounting what a dead server left");
                seen.detach()?;
                cleared_away = true;
                continue;
            }
            around.stay_visible(&seen)?;
            let lock = DirLock::of(&seen);
            if !lock.acquire() {
                return Err(busy());
            }
            let claim = Self {
                seen,
                lock,
                cleared_away,
            };
            // Somebody may have mounted there, or moved the directory away.
            if look_at(dir)?.is_same(&claim.seen)? {
                return Ok(claim);
            }
        }
        Err(busy())
    }
}

/// Makes sure that `dir` can be mounted on, as [`crate::mount`] does.
///
/// # Errors
/// [`Error::NoFuse`], [`Error::NotADirectory`], [`Error::AlreadyMounted`],
/// [`Error::HidesStore`], [`Error::Hides`].
pub fn prepare(dir: &Path, around: &Surroundings, is_dead: &dyn Fn(&Path) -> bool) -> Result<()> {
    Claim::new(dir, around, is_dead).map(drop)
}

/// Descriptors or memory are used up, which says nothing of what was to be opened.
pub(crate) fn is_exhausted(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    matches!(errno, Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM))
}

fn look_at(dir: &Path) -> Result<Seen> {
    Seen::at(dir).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Error::NotADirectory {
            path: dir.to_owned(),
        },
        _ => cannot("inspect", dir, source),
    })
}

/// What a directory is, whatever path leads there.
type Identity = (u64, u64);

fn identity(dir: impl AsFd) -> io::Result<Identity> {
    let stat = rustix::fs::fstat(dir)?;
    Ok((stat.st_dev, stat.st_ino))
}

impl Seen {
    fn is_same(&self, other: &Self) -> Result<bool> {
        let same = identity(&self.fd)
            .and_then(|ours| Ok(ours == identity(&other.fd)? && self.mount == other.mount));
        same.map_err(|source| cannot("inspect", &self.path, source))
    }
}

impl Surroundings {
    /// Refuses a directory under which something would disappear.
    fn stay_visible(&self, dir: &Seen) -> Result<()> {
        let failed = |source| cannot("inspect", &dir.path, source);
        let target = identity(&dir.fd).map_err(failed)?;
        let refused = || Error::HidesStore {
            path: dir.path.clone(),
            store: self.store.clone(),
        };
        if ways_to(&self.store).map_err(failed)?.contains(&target) {
            return Err(refused());
        }
        let store = Seen::at(&self.store).and_then(|store| identity(&store.fd));
        if store.is_ok_and(|store| ancestors(&dir.fd).contains(&store)) {
            return Err(refused());
        }
        for other in &self.others {
            if ways_to(other).map_err(failed)?.contains(&target) {
                return Err(Error::Hides {
                    path: dir.path.clone(),
                    hidden: other.clone(),
                });
            }
        }
        Ok(())
    }
}

/// The directories that a path leads through: those that it names, and those
/// above the place that it leads to.
fn ways_to(path: &Path) -> io::Result<Vec<Identity>> {
    let absolute = std::path::absolute(path)?;
    let open = |dir: &Path| rustix::fs::open(dir, LOOKED_AT, Mode::empty()).ok();
    let named = absolute.ancestors().filter_map(open);
    let mut ways: Vec<_> = named.filter_map(|dir| identity(&dir).ok()).collect();
    if let Some(place) = open(&absolute) {
        ways.extend(ancestors(&place));
    }
    Ok(ways)
}

/// How a directory is opened of which nothing is asked.
const LOOKED_AT: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// A directory and all above it, as far as this user may go up.
fn ancestors(dir: &OwnedFd) -> Vec<Identity> {
    let mut found = Vec::new();
    let mut last: Option<(Identity, OwnedFd)> = None;
    let mut next = rustix::fs::openat(dir, ".", LOOKED_AT, Mode::empty());
    while let Ok(dir) = next {
        let Ok(here) = identity(&dir) else { break };
        // The root is above itself. What looks the same on another mount is not.
        if let Some((_, last)) = last.as_ref().filter(|(last, _)| *last == here) {
            match (mount_id(last), mount_id(&dir)) {
                (Ok(below), Ok(above)) if below != above => {}
                _ => break,
            }
        }
        found.push(here);
        next = rustix::fs::openat(&dir, "..", LOOKED_AT, Mode::empty());
        last = Some((here, dir));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn around(store: &Path) -> Surroundings {
        Surroundings {
            store: store.to_owned(),
            others: Vec::new(),
        }
    }

    #[test]
    fn what_would_hide_the_store_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        for dir in ["a/store/packs", "b", "c", "store2"] {
            fs::create_dir_all(path(dir)).unwrap();
        }
        std::os::unix::fs::symlink(path("a"), path("b/link")).unwrap();
        std::os::unix::fs::symlink(path("a/store"), path("c/way")).unwrap();
        let check = |store: &str, dir: &str| {
            let seen = Seen::at(&path(dir)).unwrap();
            around(&path(store)).stay_visible(&seen)
        };
        for (store, dir) in [
            ("a/store", "a/store"),
            ("a/store", "a"),
            ("a/store", "."),
            ("a/store", "/"),
            ("a/store", "a/store/packs"),
            ("a/store", "b/link"),
            ("a/store", "b/link/store/packs"),
            ("b/link/store", "b"),
            ("b/link/store", "a"),
            ("c/way", "c"),
            ("c/way", "a"),
        ] {
            let checked = check(store, dir);
            assert!(
                matches!(checked, Err(Error::HidesStore { .. })),
                "{store} under {dir}: {checked:?}"
            );
        }
        check("a/store", "b").unwrap();
        check("a/store", "c").unwrap();
        check("a/store", "store2").unwrap();
    }

    #[test]
    fn other_places_may_be_beside_a_mount_and_above_it_only() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        for dir in ["store", "run/mounts/id", "mnt"] {
            fs::create_dir_all(path(dir)).unwrap();
        }
        let mut around = around(&path("store"));
        around.others = vec![path("run"), path("not/there")];
        let check = |dir: &str| around.stay_visible(&Seen::at(&path(dir)).unwrap());
        assert!(matches!(check("run"), Err(Error::Hides { .. })));
        check("run/mounts/id").unwrap();
        check("mnt").unwrap();
    }

    #[test]
    fn one_of_two_has_a_claim() {
        if fs::File::open("/dev/fuse").is_err() {
            println!("SKIPPED one_of_two_has_a_claim: no /dev/fuse");
            return;
        }
        let root = tempfile::tempdir().unwrap();
        let around = around(&root.path().join("store"));
        let dir = root.path().join("mnt");
        fs::create_dir(&dir).unwrap();
        let claim = Claim::new(&dir, &around, &|_| false).unwrap();
        let other = DirLock::of(&claim.seen).dir.unwrap();
        let locked = flock(&other, FlockOperation::NonBlockingLockExclusive);
        assert_eq!(locked, Err(Errno::WOULDBLOCK));
        drop(claim);
        flock(&other, FlockOperation::NonBlockingLockExclusive).unwrap();
    }
}
