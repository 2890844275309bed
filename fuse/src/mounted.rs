//! A mount that this process serves, from its beginning to its end.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use fuser::{BackgroundSession, Config, SessionACL};
use snapstore_store::{NotPinned, Store, check_threads};

use crate::attach::{Access, Attached, attach};
use crate::chores::{Chores, keep_house, wait_for};
use crate::claim::{Claim, Surroundings};
use crate::counters::Counters;
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::server::Server;
use crate::view::{MountTarget, View};
use crate::warm::{Part, Warm};
use crate::writable::{self, Control, Operations, Views, WritableOptions, WritableServer};

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
    /// Whether pages that were touched first in earlier mounts are given to the kernel
    /// before anybody asks for them.
    pub prefetch: bool,
    /// The only bytes of an image that anybody reads, if there is such an image: the others
    /// are not given to the kernel unasked, and nothing is learnt of them.
    pub part: Option<Part>,
    /// The names of the files of the one snapshot that is shown. That of a writable mount is
    /// in its own options.
    pub layout: Layout,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            threads: 2,
            read_ahead_bytes: 128 << 10,
            allow_other: false,
            prefetch: true,
            part: None,
            layout: Layout::default(),
        }
    }
}

/// A live mount, served by threads of this process until it is unmounted.
#[derive(Debug)]
pub struct Mounted {
    session: BackgroundSession,
    attached: Arc<Attached>,
    dir: PathBuf,
    not_pinned: Option<NotPinned>,
    cleared_away: bool,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    ReadOnly {
        warming: Warming,
        /// Dropped, it ends the housekeeping.
        serving: Sender<()>,
        /// What they hold of the store is let go of with them.
        threads: [JoinHandle<()>; 2],
    },
    Writable(Writable),
}

struct Writable {
    views: Arc<Views>,
    control: Arc<Control>,
}

impl fmt::Debug for Writable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writable").finish_non_exhaustive()
    }
}

/// What became of a mount that has ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Ended {
    /// Nothing is left.
    Clean,
    /// What was written and is in no commit is kept there, and on the disk.
    Kept(PathBuf),
    /// It was given up, as was asked for.
    Discarded,
}

/// Dropped, it has what was recorded written.
struct Warming(Arc<Warm>);

impl Drop for Warming {
    fn drop(&mut self) {
        self.0.end();
    }
}

impl fmt::Debug for Warming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Warming").finish_non_exhaustive()
    }
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
    what: &MountTarget,
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
    let cleared_away = claim.cleared_away;
    let view = Arc::new(View::new(store, what, &options.layout)?);
    let failed = |source| Error::Io {
        action: "serve",
        path: dir.to_owned(),
        source,
    };
    // fuser tells of threads that it cannot start only when it is done.
    check_threads(options.threads + MORE_THREADS, STACK_BYTES).map_err(failed)?;
    let elsewhere = match what {
        MountTarget::Foreign(snapshot) => Some(snapshot.clone()),
        MountTarget::Snapshot(_) | MountTarget::AllTags => None,
    };
    let is_foreign = elsewhere.is_some();
    // What is elsewhere is kept there.
    let not_pinned = view.not_pinned().filter(|_| !is_foreign);
    let (chores, answering) = Chores::start(view.clone()).map_err(failed)?;
    let counters = Arc::new(Counters::of(options.read_ahead_bytes, elsewhere.clone()));
    let warm = Warm::start(
        (view.store().clone(), elsewhere),
        counters.clone(),
        // Who brings what is elsewhere knows what is worth bringing before it is asked for.
        options.prefetch && !is_foreign,
        not_pinned.is_none(),
        options.part.clone(),
        options.read_ahead_bytes,
    );
    let warming = Warming(warm.map_err(failed)?);
    let warm = &warming.0;
    let server = Server::new(
        view.clone(),
        chores.clone(),
        warm.clone(),
        counters,
        options.read_ahead_bytes,
    );
    let serve = |connection| {
        let mut config = Config::default();
        config.n_threads = Some(options.threads);
        let acl = if options.allow_other {
            SessionACL::All
        } else {
            SessionACL::Owner
        };
        let session = fuser::Session::from_fd(server, connection, acl, config);
        session
            .and_then(|session| {
                warm.set_notifier(session.notifier());
                session.spawn()
            })
            .map_err(failed)
    };
    let (attached, session) = attach(claim, &path, access(options, false), serve)?;
    let attached = Arc::new(attached);
    let (serving, end) = channel();
    for image in view.images() {
        warm.load_leaves(image);
    }
    let housekeeping = match keep_house(view, chores, warm.clone(), end) {
        Ok(thread) => thread,
        Err(error) => {
            attached.detach()?;
            return Err(failed(error));
        }
    };
    Ok(Mounted {
        session,
        attached,
        dir: dir.to_owned(),
        not_pinned,
        cleared_away,
        kind: Kind::ReadOnly {
            warming,
            serving,
            threads: [answering, housekeeping],
        },
    })
}

fn access(options: &MountOptions, writing: bool) -> Access {
    Access {
        others: options.allow_other,
        writing,
    }
}

/// Mounts clones of a snapshot at `dir` that can be written. When this returns, the mount
/// is usable.
///
/// # Errors
/// As [`mount`]; there can be no overlay in the directory for it; there is none to go on
/// with.
pub fn mount_writable(
    store: Store,
    dir: &Path,
    options: &MountOptions,
    writable: &WritableOptions,
    mut others: Vec<PathBuf>,
    is_dead: &dyn Fn(&Path) -> bool,
) -> Result<Mounted> {
    let path = store.path().to_owned();
    others.push(writable.overlay_dir.clone());
    let around = Surroundings {
        store: path.clone(),
        others,
    };
    let claim = Claim::new(dir, &around, is_dead)?;
    let failed = |source| Error::Io {
        action: "serve",
        path: dir.to_owned(),
        source,
    };
    check_threads(options.threads + MORE_THREADS, STACK_BYTES).map_err(failed)?;
    let views = writable::open(store, &claim.seen.path, writable)?;
    let begun = begin(claim, &path, options, &views, writable.discard, dir);
    if begun.is_err() && writable.snapshot.is_some() {
        // Nobody has written anything.
        views.place.remove()?;
    }
    begun
}

fn begin(
    claim: Claim,
    store: &Path,
    options: &MountOptions,
    views: &Arc<Views>,
    discard: bool,
    dir: &Path,
) -> Result<Mounted> {
    let failed = |source| Error::Io {
        action: "serve",
        path: dir.to_owned(),
        source,
    };
    let cleared_away = claim.cleared_away;
    let control = Control::start(views.clone(), discard)?;
    let server = WritableServer {
        operations: Operations {
            views: views.clone(),
            counters: Counters::new(options.read_ahead_bytes),
        },
        read_ahead_bytes: options.read_ahead_bytes,
    };
    let mut access = access(options, true);
    access.others |= views.shown.owner != writable::user();
    let serve = |connection| {
        let mut config = Config::default();
        config.n_threads = Some(options.threads);
        config.acl = match access.others {
            true => SessionACL::All,
            false => SessionACL::Owner,
        };
        let acl = config.acl;
        let session = fuser::Session::from_fd(server, connection, acl, config);
        session.and_then(fuser::Session::spawn).map_err(failed)
    };
    let (attached, session) = attach(claim, store, access, serve)?;
    attached.let_stores_wait();
    Ok(Mounted {
        session,
        attached: Arc::new(attached),
        dir: dir.to_owned(),
        not_pinned: views.not_pinned(),
        cleared_away,
        kind: Kind::Writable(Writable {
            views: views.clone(),
            control,
        }),
    })
}

impl Writable {
    fn end(self) -> Result<Ended> {
        let ended = self.settle();
        // Not before: a commit that is under way may read pages of the snapshot until then.
        self.views.let_go();
        ended
    }

    /// What becomes of what was written.
    fn settle(&self) -> Result<Ended> {
        let place = &self.views.place;
        let uncommitted = self.views.is_uncommitted();
        if uncommitted && !self.control.discards() {
            // It is kept all the same.
            return match self.views.ends() {
                Ok(()) => Ok(Ended::Kept(place.path().to_owned())),
                Err(error) => Err(Error::NotOnDisk {
                    place: place.path().to_owned(),
                    reason: error.to_string(),
                }),
            };
        }
        place.remove()?;
        Ok(match uncommitted {
            true => Ended::Discarded,
            false => Ended::Clean,
        })
    }
}

/// Threads of a server that answer nothing: fuser's own, those of `chores`, and that of `warm`.
const MORE_THREADS: usize = 4;
/// What a thread's stack has if nothing else is said (`std::thread`).
const STACK_BYTES: usize = 2 << 20;

impl Mounted {
    /// Why nothing that is shown is kept from collection, if that is so.
    #[must_use]
    pub fn not_pinned(&self) -> Option<NotPinned> {
        self.not_pinned
    }

    /// Whether what a dead server had left at its directory was unmounted for it.
    #[must_use]
    pub fn cleared_away(&self) -> bool {
        self.cleared_away
    }

    /// Whether it goes on with a view whose host went down before it was unmounted: what was
    /// written and not brought to the disk is gone.
    #[must_use]
    pub fn lost_unsynced(&self) -> bool {
        match &self.kind {
            Kind::ReadOnly { .. } => false,
            Kind::Writable(writable) => writable.views.lost_unsynced,
        }
    }

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
    pub fn wait(self) -> Result<Ended> {
        let dir = self.dir;
        self.session.join().map_err(|source| Error::Io {
            action: "serve",
            path: dir,
            source,
        })?;
        match self.kind {
            Kind::ReadOnly {
                warming,
                serving,
                threads,
            } => {
                drop((warming, serving));
                // The last of them removes the lease's file.
                wait_for(&threads);
                Ok(Ended::Clean)
            }
            Kind::Writable(writable) => writable.end(),
        }
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
