//! Where what is written to a view is kept, so that it is found again.
//!
//! ```text
//! OVERLAYS/snapstore-view-XXXXXX/
//!   view.json     what is shown, and where; replaced when it is gone on with
//!   ended.json    its server ended in order: all is on the disk
//!   lock          its server keeps it locked (flock(2))
//!   commits       who reads what was frozen keeps it locked, shared
//!   control.sock  the server's socket
//!   N/            one for each clone
//!     state.json  what its base is, and where the journals begin; replaced as a whole
//!     IMAGE.data, IMAGE.*.journal     the overlay of an image
//!     files/NAME  files that are no images
//!     gone/NAME   files of the base that were removed
//! ```
//!
//! `state.json` is replaced before anything that the old one leads to is given up.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::record::{CHECKED, Record, parse, replace, sync_dir};
use super::state::{Ended, State, boot};
use super::trust::{changeable_by_others, user};
use crate::error::{Error, Result, cannot};
use crate::layout::Layout;

const PREFIX: &str = "snapstore-view-";
const VIEW: &str = "view.json";
/// How long a server may take to end once its mount is gone.
const PATIENCE: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(10);

/// The most clones that a view can have.
pub const MOST_CLONES: u32 = 10_000;

/// What a view shows, and where.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Shown {
    pub version: u32,
    #[serde(with = "crate::path_json")]
    pub store: PathBuf,
    #[serde(with = "crate::path_json")]
    pub dir: PathBuf,
    /// The snapshot that every clone began with.
    pub snapshot: String,
    /// How many clones; without it the mount's root is the only one.
    pub count: Option<u32>,
    pub owner: (u32, u32),
    pub mode: u32,
    pub limit_bytes: Option<u64>,
    #[serde(default)]
    pub layout: Layout,
    /// The boot in which its last server began.
    pub boot: String,
}

impl Record for Shown {
    fn version(&self) -> u32 {
        self.version
    }
}

/// The directory of a view.
#[derive(Debug)]
pub(crate) struct Place {
    dir: PathBuf,
    _lock: File,
}

impl Place {
    /// A new one in a directory for overlays. What an earlier view of the same directory
    /// left is in its way, unless nobody ever wrote anything there.
    pub fn create(overlays: &Path, shown: &Shown) -> Result<Self> {
        stays(overlays)?;
        for (place, _) in of_dir(overlays, &shown.dir)? {
            let left = Self::locked(place)?;
            if left.has_something()? {
                return Err(Error::ViewLeft {
                    dir: shown.dir.clone(),
                    place: left.dir,
                });
            }
            left.remove()?;
        }
        for _ in 0..1000 {
            let dir = overlays.join(format!("{PREFIX}{}", random_name(overlays)?));
            match DirBuilder::new().mode(0o700).create(&dir) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(cannot("make an overlay in", overlays, error)),
                Ok(()) => {
                    let place = Self::locked(dir)?;
                    replace(&place.dir, VIEW, shown)?;
                    sync_dir(overlays)?;
                    return Ok(place);
                }
            }
        }
        let taken = io::ErrorKind::AlreadyExists.into();
        Err(cannot("make an overlay in", overlays, taken))
    }

    /// The one that shows something at `dir`, and whose server has ended.
    pub fn find(overlays: &Path, dir: &Path) -> Result<(Self, Shown)> {
        stays(overlays)?;
        let mut found = of_dir(overlays, dir)?;
        let none = || Error::NoView {
            dir: dir.to_owned(),
            overlays: overlays.to_owned(),
        };
        let Some((place, shown)) = found.pop() else {
            return Err(nameless(overlays)?.unwrap_or_else(none));
        };
        if let Some((other, _)) = found.pop() {
            return Err(Error::TwoViews {
                dir: dir.to_owned(),
                places: [place, other],
            });
        }
        if shown.version > CHECKED {
            return Err(Error::NewerView { place });
        }
        Ok((Self::locked(place)?, shown))
    }

    fn locked(dir: PathBuf) -> Result<Self> {
        let exclusive = FlockOperation::NonBlockingLockExclusive;
        // A server that has unmounted may not be quite at its end.
        let Some(lock) = lock(&dir.join("lock"), exclusive)? else {
            return Err(Error::ViewServed { place: dir });
        };
        // What a commit reads would be written to again. No other one begins: there is
        // no server.
        if lock_of_commits(&dir, exclusive)?.is_none() {
            return Err(Error::ViewCommitted { place: dir });
        }
        Ok(Self { dir, _lock: lock })
    }

    /// Whether anybody wrote something there.
    fn has_something(&self) -> Result<bool> {
        let failed = |error| cannot("list", &self.dir, error);
        for clone in fs::read_dir(&self.dir).map_err(failed)? {
            let clone = clone.map_err(failed)?.path();
            if !clone.is_dir() {
                continue;
            }
            for entry in fs::read_dir(&clone).map_err(failed)? {
                let entry = entry.map_err(failed)?.path();
                let is_empty =
                    entry.is_dir() && fs::read_dir(&entry).map_err(failed)?.next().is_none();
                if !is_empty {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// The directory of a clone, made if it is not there.
    pub fn clone_dir(&self, number: u32) -> Result<PathBuf> {
        let dir = self.dir.join(number.to_string());
        for part in [dir.clone(), dir.join("files"), dir.join("gone")] {
            match DirBuilder::new().mode(0o700).create(&part) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(cannot("make", &part, error));
                }
                _ => {}
            }
        }
        Ok(dir)
    }

    /// It is gone on with: all that is found of it is on the disk.
    pub fn goes_on(&self, shown: &Shown) -> Result<()> {
        replace(&self.dir, VIEW, shown)?;
        Ended::forget(&self.dir)
    }

    /// Removes all of it, what was written first: where that is without a description, the
    /// description was lost.
    pub fn remove(&self) -> Result<()> {
        for number in numbers(&self.dir)? {
            let clone = self.dir.join(number.to_string());
            fs::remove_dir_all(&clone).map_err(|error| cannot("remove", &clone, error))?;
        }
        fs::remove_dir_all(&self.dir).map_err(|error| cannot("remove", &self.dir, error))
    }
}

impl Shown {
    pub fn new(store: &Path, dir: &Path, snapshot: String) -> Self {
        Self {
            version: CHECKED,
            store: store.to_owned(),
            dir: dir.to_owned(),
            snapshot,
            count: None,
            owner: user(),
            mode: 0o644,
            limit_bytes: None,
            layout: Layout::default(),
            boot: boot(),
        }
    }
}

impl Shown {
    /// Of the view in `place`; `None` if it is just made or removed.
    pub fn of(place: &Path) -> Result<Option<Self>> {
        let path = place.join(VIEW);
        let damaged = |reason: String| Error::ViewDamaged {
            place: place.to_owned(),
            reason,
        };
        let bytes = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(|error| cannot("read", &path, error))?,
        };
        let shown: Self = parse(&bytes).map_err(damaged)?;
        let count = shown.count.unwrap_or(1);
        if !(1..=MOST_CLONES).contains(&count) {
            return Err(damaged(format!("{count} clones cannot be")));
        }
        // Where the number was less, what was written to the last ones would be passed over.
        let beyond = numbers(place)?.into_iter().find(|number| *number >= count);
        if let Some(beyond) = beyond {
            return Err(damaged(format!(
                "it tells of {count} clones, and there is one with the number {beyond}"
            )));
        }
        Ok(Some(shown))
    }
}

/// The numbers of the clones that have a directory there.
fn numbers(place: &Path) -> Result<Vec<u32>> {
    let listed = |error| cannot("list", place, error);
    let mut found = Vec::new();
    let entries = match fs::read_dir(place) {
        // It is just removed.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        other => other.map_err(listed)?,
    };
    for entry in entries {
        let name = entry.map_err(listed)?.file_name();
        found.extend(name.to_str().and_then(|name| name.parse::<u32>().ok()));
    }
    Ok(found)
}

/// Those that show something at `dir`.
fn of_dir(overlays: &Path, dir: &Path) -> Result<Vec<(PathBuf, Shown)>> {
    let mut found = Vec::new();
    for place in all(overlays)? {
        match Shown::of(&place)? {
            Some(shown) if shown.dir == dir => found.push((place, shown)),
            _ => {}
        }
    }
    Ok(found)
}

/// What to say of one that has lost its description: it may be the one that is looked for. Where
/// no clone has a state, there is nothing to go on with: it was just made, or removed in part.
fn nameless(overlays: &Path) -> Result<Option<Error>> {
    for place in all(overlays)? {
        let has_state = |number: &u32| State::is_there(&place.join(number.to_string()));
        if !place.join(VIEW).exists() && numbers(&place)?.iter().any(has_state) {
            let reason = "it is missing".to_owned();
            return Ok(Some(Error::ViewDamaged { place, reason }));
        }
    }
    Ok(None)
}

/// Keeps the view in `dir` from being gone on with as long as a commit reads it. `None`: its
/// server is older and knows no such lock.
pub(super) fn lock_for_commit(dir: &Path) -> Result<Option<File>> {
    if !dir.join("commits").exists() {
        return Ok(None);
    }
    match lock_of_commits(dir, FlockOperation::NonBlockingLockShared)? {
        // Somebody goes on with it, who has it for a moment only.
        None => Err(Error::ViewServed {
            place: dir.to_owned(),
        }),
        lock => Ok(lock),
    }
}

fn lock_of_commits(dir: &Path, how: FlockOperation) -> Result<Option<File>> {
    lock(&dir.join("commits"), how)
}

/// The file, locked; `None` if somebody else has it locked for longer than a moment.
fn lock(path: &Path, how: FlockOperation) -> Result<Option<File>> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|error| cannot("open", path, error))?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        match flock(&file, how) {
            Ok(()) => return Ok(Some(file)),
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => std::thread::sleep(PAUSE),
            Err(Errno::WOULDBLOCK) => return Ok(None),
            Err(errno) => return Err(cannot("lock", path, errno.into())),
        }
    }
}

/// That nobody else can put something in the place of what is in a directory for overlays:
/// its files are opened by their names.
fn stays(overlays: &Path) -> Result<()> {
    let changeable = changeable_by_others(overlays);
    let changeable = changeable.map_err(|error| cannot("inspect", overlays, error))?;
    changeable.map_or(Ok(()), |path| {
        Err(Error::OverlaysOfOthers {
            overlays: overlays.to_owned(),
            path,
        })
    })
}

/// All that this user has made. In a directory that others can write to they may put
/// anything under such a name, and what is believed of it would be done with the rights
/// of whoever believes it.
pub(super) fn all(overlays: &Path) -> Result<Vec<PathBuf>> {
    let failed = |error| cannot("list", overlays, error);
    let user = rustix::process::geteuid().as_raw();
    let mut found = Vec::new();
    for entry in fs::read_dir(overlays).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        // Not what a link leads to.
        let is_own = entry
            .metadata()
            .is_ok_and(|it| it.is_dir() && it.uid() == user && it.mode() & 0o077 == 0);
        if is_own {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

fn random_name(overlays: &Path) -> Result<String> {
    let mut bytes = [0; 6];
    File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut bytes))
        .map_err(|error| cannot("make an overlay in", overlays, error))?;
    Ok(bytes.map(|byte| format!("{byte:02x}")).concat())
}
