//! All clones of a writable mount, and the nodes that the kernel knows of them.
//!
//! An image that nobody has opened for writing is one node for all clones, so that they
//! share its pages. The kernel opens a node by its number, which does not say whose clone
//! it is: opening a shared one for writing fails as stale, the kernel looks the name up
//! anew, and by who asks this is known to be what it wants to write.

use std::collections::{BTreeSet, HashMap};
use std::io::ErrorKind;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use snapstore_store::{NotPinned, Pin, SnapshotId, Store};

use super::clone::{CloneOf, Named, SharedImage, ViewClone};
use super::file::{ExtraFile, Look};
use super::image::WritableImage;
use super::place::{Place, Shown};
use super::record::{CHECKED, sync_dir};
use super::state::{Ended, State, boot};
use crate::counters::OverlayUse;
use crate::error::{Result, cannot};
use crate::table::ROOT;

/// Processes that are about to write are few; what is older than so many is forgotten.
const MOST_PENDING: usize = 1024;

/// A directory or file.
#[derive(Clone)]
pub(crate) enum Node {
    /// The list of clones.
    Clones,
    Clone(Arc<ViewClone>),
    Shared(Arc<SharedImage>),
    Image(Arc<ViewClone>, Arc<WritableImage>),
    File(Arc<ViewClone>, Arc<ExtraFile>),
    Socket(Arc<ExtraFile>),
}

impl Node {
    pub fn ino(&self) -> u64 {
        match self {
            Self::Clones => ROOT,
            Self::Clone(clone) => clone.ino,
            Self::Shared(image) => image.ino,
            Self::Image(_, image) => image.ino,
            Self::File(_, file) | Self::Socket(file) => file.ino,
        }
    }
}

pub(crate) struct Views {
    pub store: Store,
    pub shown: Shown,
    pub place: Place,
    pub clones: Vec<Arc<ViewClone>>,
    nodes: RwLock<HashMap<u64, Known>>,
    pending: Mutex<Vec<(u32, u64)>>,
    /// None once the mount has ended.
    pin: Mutex<Option<Pin>>,
    /// What the shared images are of; it is pinned as long as this lives.
    first: Vec<SnapshotId>,
    last_ino: AtomicU64,
    /// The host went down before the view ended in order: what was not on the disk is gone.
    pub lost_unsynced: bool,
}

struct Known {
    node: Node,
    lookups: u64,
}

impl Views {
    /// Makes the clones, or finds them again.
    pub fn open(store: Store, mut shown: Shown, place: Place, again: bool) -> Result<Self> {
        let in_order = again && Ended::is_of(place.path())?;
        let lost_unsynced = again && !in_order && shown.boot != boot();
        let mut pin = store.empty_pin()?;
        let last_ino = AtomicU64::new(ROOT);
        let next = || last_ino.fetch_add(1, Ordering::Relaxed) + 1;
        let mut shared: HashMap<[u8; 32], Arc<SharedImage>> = HashMap::new();
        let mut first = Vec::new();
        let mut clones = Vec::new();
        let made = shown.layout.made.iter();
        let made: Vec<(String, Arc<[u8]>)> = made
            .map(|(name, text)| (name.clone(), Arc::from(text.as_bytes())))
            .collect();
        for number in 0..shown.count.unwrap_or(1) {
            let dir = place.clone_dir(number)?;
            let state = State::read(&dir)?.unwrap_or_else(|| State {
                base: shown.snapshot.clone(),
                boot: shown.boot.clone(),
                ..State::default()
            });
            let id = pin.add(&store, &state.base)?;
            if !first.contains(&id) {
                first.push(id);
            }
            let of = CloneOf {
                store: &store,
                id,
                manifest: store.manifest(id)?,
                state,
                owner: shown.owner,
                mode: shown.mode,
                limit_bytes: shown.limit_bytes,
                most_files: most_files(shown.count),
                made: &made,
            };
            let known = Mutex::new(&mut shared);
            let share = |image: &snapstore_store::Image, manifest: &snapstore_store::Manifest| {
                let mut known = lock(&known);
                let made = known.entry(image.content_key()).or_insert_with(|| {
                    let page_bytes = store.page_size().bytes();
                    Arc::new(SharedImage {
                        ino: next(),
                        snapshot: id,
                        reader: store.image_reader(image),
                        size_bytes: image.size_bytes,
                        data_bytes: (image.nonzero_pages * page_bytes).min(image.size_bytes),
                        created: manifest.created(),
                    })
                });
                made.clone()
            };
            let clone = ViewClone::open(number, dir, of, &next, &share)?;
            if again {
                clone.find_again(in_order)?;
            }
            clones.push(Arc::new(clone));
        }
        // The names of the clones' directories.
        sync_dir(place.path())?;
        if again {
            (shown.version, shown.boot) = (CHECKED, boot());
            // Once all that is found is on the disk, and before anything more is written.
            place.goes_on(&shown)?;
        }
        Ok(Self {
            store,
            place,
            clones,
            nodes: RwLock::default(),
            pending: Mutex::default(),
            pin: Mutex::new(Some(pin)),
            first,
            last_ino,
            shown,
            lost_unsynced,
        })
    }

    /// Has all that was written so far on the disk.
    pub fn sync(&self) -> Result<()> {
        self.clones.iter().try_for_each(|clone| clone.sync())
    }

    /// Has all of it on the disk, and then, that it is so. Nobody writes any more.
    pub fn ends(&self) -> Result<()> {
        let mut states = BTreeSet::new();
        for clone in &self.clones {
            if clone.ends()? {
                states.insert(clone.number);
            }
        }
        Ended::write(self.place.path(), states)
    }

    /// Why nothing that is shown is kept from collection, if that is so.
    pub fn not_pinned(&self) -> Option<NotPinned> {
        lock(&self.pin).as_ref().and_then(Pin::not_pinned)
    }

    /// Keeps nothing from collection any more, and leaves no lease: the mount has ended, and its
    /// server is about to.
    pub fn let_go(&self) {
        lock(&self.pin).take();
    }

    fn root(&self) -> Node {
        match (self.shown.count, self.clones.first()) {
            (None, Some(clone)) => Node::Clone(clone.clone()),
            _ => Node::Clones,
        }
    }

    /// The node of a number that the kernel was told of.
    pub fn node(&self, ino: u64) -> Option<Node> {
        if ino == ROOT {
            return Some(self.root());
        }
        let nodes = self.nodes.read().unwrap_or_else(PoisonError::into_inner);
        nodes.get(&ino).map(|known| known.node.clone())
    }

    /// Counts that the kernel was told of a node.
    pub fn told(&self, node: &Node) {
        let mut nodes = self.nodes.write().unwrap_or_else(PoisonError::into_inner);
        let known = nodes.entry(node.ino()).or_insert_with(|| Known {
            node: node.clone(),
            lookups: 0,
        });
        known.lookups += 1;
    }

    pub fn forget(&self, ino: u64, lookups: u64) {
        let mut nodes = self.nodes.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = nodes.get_mut(&ino) {
            known.lookups = known.lookups.saturating_sub(lookups);
            if known.lookups == 0 {
                nodes.remove(&ino);
            }
        }
    }

    /// The clone of a directory.
    pub fn clone_of(&self, dir: u64) -> Option<Arc<ViewClone>> {
        match self.node(dir) {
            Some(Node::Clone(clone)) => Some(clone),
            _ => None,
        }
    }

    /// The node of a name, for the thread `who`.
    pub fn lookup(&self, dir: u64, name: &str, who: u32) -> std::io::Result<Option<Node>> {
        let clone = match self.node(dir) {
            Some(Node::Clones) => {
                let clone = self.clones.iter();
                let mut clone = clone.filter(|clone| clone.number.to_string() == name);
                return Ok(clone.next().map(|clone| Node::Clone(clone.clone())));
            }
            Some(Node::Clone(clone)) => clone,
            _ => return Ok(None),
        };
        if let Some((shared, own)) = clone.image(name) {
            if !own.is_own() && self.take_pending(who, shared.ino) {
                own.make_own()?;
            }
            return Ok(Some(match own.is_own() {
                true => Node::Image(clone.clone(), own.clone()),
                false => Node::Shared(shared.clone()),
            }));
        }
        Ok(clone.named(name).map(|named| self.node_of(&clone, named)))
    }

    pub fn node_of(&self, clone: &Arc<ViewClone>, named: Named) -> Node {
        match named {
            Named::File(file) => Node::File(clone.clone(), file),
            Named::Socket(file) => Node::Socket(file),
        }
    }

    /// A thread wants to write to a shared image: it will look the name up again.
    pub fn wants_to_write(&self, who: u32, ino: u64) {
        let mut pending = lock(&self.pending);
        if pending.len() >= MOST_PENDING {
            pending.remove(0);
        }
        pending.push((who, ino));
    }

    fn take_pending(&self, who: u32, ino: u64) -> bool {
        let mut pending = lock(&self.pending);
        let found = pending.iter().position(|it| *it == (who, ino));
        found.map(|at| pending.remove(at)).is_some()
    }

    /// Makes a file, or a socket.
    pub fn create(
        &self,
        clone: &Arc<ViewClone>,
        name: &str,
        look: Look,
        socket: bool,
    ) -> std::io::Result<Node> {
        let ino = self.last_ino.fetch_add(1, Ordering::Relaxed) + 1;
        let named = clone.create(name, look, ino, socket)?;
        Ok(self.node_of(clone, named))
    }

    /// A freeze of a clone is a snapshot that is durable: the clone goes on as its child.
    pub fn committed(&self, clone: &ViewClone, number: u64, id: &str) -> Result<()> {
        let mut pin = lock(&self.pin);
        let ended = || {
            cannot(
                "commit from",
                self.place.path(),
                ErrorKind::NotConnected.into(),
            )
        };
        let pin = pin.as_mut().ok_or_else(ended)?;
        let before = clone.base_id();
        let id = pin.add(&self.store, id)?;
        let manifest = self.store.manifest(id)?;
        clone.rebase(&self.store, number, id, manifest)?;
        let is_needed = self.first.contains(&before)
            || self.clones.iter().any(|clone| clone.base_id() == before);
        if !is_needed {
            pin.remove(before)?;
        }
        Ok(())
    }

    /// Where what is written is kept.
    pub fn overlays(&self) -> &Path {
        self.place.path()
    }

    /// How much room it takes.
    pub fn overlay_use(&self) -> OverlayUse {
        let used = || self.clones.iter().map(|clone| clone.overlay_bytes());
        OverlayUse {
            used_bytes: used().fold(0, u64::saturating_add),
            fullest_bytes: used().max().unwrap_or(0),
            limit_bytes: self.shown.limit_bytes,
        }
    }

    /// Whether something is in no commit.
    pub fn is_uncommitted(&self) -> bool {
        self.clones.iter().any(|clone| clone.uncommitted().1)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How many files that are no images each of the clones may have: a share of the process's
/// descriptors, so that no clone takes those of another.
fn most_files(count: Option<u32>) -> usize {
    const MOST: u64 = 1024;
    const LEAST: u64 = 16;
    /// For the store, the kernel's connection, and images.
    const OTHERS: u64 = 256;
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let share = limit.unwrap_or(u64::MAX).saturating_sub(OTHERS) / u64::from(count.unwrap_or(1));
    usize::try_from(share.clamp(LEAST, MOST)).unwrap_or(usize::MAX)
}
