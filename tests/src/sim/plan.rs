//! A history before it happens: who does what, what goes wrong, who overtakes
//! whom. Drawn from a seed, and small enough to be read.

use std::fmt;
use std::path::Path;

use snapstore_store::StoreFormat;
use snapstore_store::sim::StepKind;

use super::content::ImageContent;

/// More than a simulated pack ever holds.
pub const MANY_CHUNKS: usize = 1 << 18;

/// An operation's number, which stays when others are left out.
pub type OpNumber = u32;

/// One operation of a history.
#[derive(Clone, Debug)]
pub struct Op {
    /// Its number.
    pub number: OpNumber,
    /// Whether the process that does it has just begun. Else it is the one that
    /// did the operation before, with what it keeps in memory.
    pub new_process: bool,
    /// What is done.
    pub action: Action,
}

/// What an operation does. Tags are numbers.
#[derive(Clone, Debug)]
pub enum Action {
    /// Commits images under a tag.
    Commit {
        /// The tag, which may be moved.
        tag: u8,
        /// The parent.
        parent: Parent,
        /// The memory, or what of it changes.
        memory: ImageContent,
        /// A disk.
        disk: Option<ImageContent>,
        /// Whether `memory` is only what changes.
        diff: bool,
        /// Whether the snapshot stays pinned after the commit.
        keep: bool,
    },
    /// Removes a tag.
    Remove(u8),
    /// Points the first tag at the snapshot of the second.
    Move(u8, u8),
    /// Points a tag at a snapshot that may have lost its tag; the number says at
    /// which, of how many there ever were.
    Revive(u8, u32),
    /// Collects; packs with a smaller share of live bytes are repacked.
    Gc(u8),
    /// Optimises; with a limit of so many bytes.
    Optimize(Option<u32>),
    /// Verifies; with all bytes or without.
    Verify(bool),
    /// Repairs.
    Repair,
    /// Upgrades the store to the newest format.
    Upgrade,
    /// Pins a tag's snapshot and reads it.
    Read(u8),
    /// Pins a tag's snapshot until the process ends.
    Pin(u8),
    /// Mounts a tag's snapshot: pushes what is recorded of its images, and records.
    Mount(u8, Mounting),
    /// Damages a file of the disk; the number says which, of how many there are.
    Damage(Damage, u32),
}

/// How a mount is used.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mounting {
    /// Which pages are touched, by numbers that mean others in each image.
    pub touched: Vec<u8>,
    /// Whether it sees a part of the image only.
    pub part: bool,
    /// Whether it records when it does not keep the snapshot any more.
    pub late: bool,
}

/// The parent of a commit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Parent {
    /// None.
    Nothing,
    /// What a tag names.
    Tag(u8),
    /// What the store finds.
    Automatic,
}

/// What can happen to a disk by itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Damage {
    /// A pack is gone.
    LosePack,
    /// A byte of a chunk is another one.
    FlipByte,
    /// A part of a pack cannot be read any more.
    BadSector,
    /// The index is gone.
    LoseIndex,
}

/// What goes wrong at a step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mishap {
    /// The process is killed before the step.
    Kill,
    /// The power fails before the step.
    PowerCut,
    /// The step fails with EIO.
    IoError,
    /// There is no space for this many steps of anybody, from this one on.
    DiskFull(u32),
}

/// Which steps of an operation are counted to find the one that goes wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Class {
    /// All.
    Any,
    /// Those that change the disk.
    Changes,
    /// Renames, flushes and removals.
    Durable,
    /// Those before which another process matters most.
    Seams,
    /// Those of this kind at this path of the store, or in it if it ends with a slash.
    At(StepKind, &'static str),
}

/// A step of an operation, by what it does there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Moment {
    /// Which of its steps are counted.
    pub class: Class,
    /// The how manieth of these, from 1 on.
    pub nth: u32,
    /// How many steps of any class after it.
    pub later: u32,
}

impl Moment {
    /// The `nth` step of this class.
    #[must_use]
    pub fn new(class: Class, nth: u32) -> Self {
        Self {
            class,
            nth,
            later: 0,
        }
    }

    /// Whether this step is the one. `counted` is how far it had come, from 0 on.
    #[must_use]
    pub fn has_come(self, counted: &mut u32, kind: StepKind, path: &Path) -> bool {
        if *counted < self.nth && !self.class.holds(kind, path) {
            return false;
        }
        *counted += 1;
        *counted == self.nth + self.later
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.later > 0 {
            write!(f, "{} steps after ", self.later)?;
        }
        write!(f, "its step {} of {:?}", self.nth, self.class)
    }
}

impl Class {
    /// Whether a step of this kind is counted. The path is one in the store.
    #[must_use]
    pub fn holds(self, kind: StepKind, path: &Path) -> bool {
        use StepKind as K;
        let durable = matches!(
            kind,
            K::SyncFile | K::SyncDir | K::Rename | K::Unlink | K::IndexFlush | K::RemoveDir
        );
        match self {
            Self::Any => true,
            Self::At(what, place) => {
                let is_there = match place.ends_with('/') {
                    true => path.starts_with(place),
                    false => path == Path::new(place),
                };
                kind == what && is_there
            }
            Self::Seams => matches!(
                kind,
                K::Lock
                    | K::Unlock
                    | K::Rename
                    | K::Unlink
                    | K::IndexOpen
                    | K::IndexFlush
                    | K::List
            ),
            Self::Durable => durable,
            Self::Changes => {
                durable
                    || matches!(
                        kind,
                        K::Create | K::Write | K::Discard | K::MakeDir | K::IndexPut
                    )
            }
        }
    }
}

/// Something that goes wrong.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// In which operation.
    pub op: OpNumber,
    /// At which of its steps.
    pub at: Moment,
    /// What.
    pub mishap: Mishap,
}

/// An operation is overtaken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Preemption {
    /// Which operation; `None` is between two.
    pub op: OpNumber,
    /// Before which of its steps, from 1 on.
    pub step: u32,
    /// Who goes on instead.
    pub by: usize,
    /// How many operations of others end before it may go on, unless nobody
    /// else can.
    pub stall: u32,
}

/// How it is decided who goes on.
#[derive(Clone, Debug)]
pub enum Schedule {
    /// By chance: one of this many steps is overtaken.
    Random {
        /// What chance is drawn from.
        seed: u64,
        /// On average one of this many steps.
        one_in: u32,
    },
    /// At few places, which are drawn.
    Seams(Vec<Seam>),
    /// At these steps only.
    Fixed(Vec<Preemption>),
}

/// Where an operation is overtaken, by what it does there.
#[derive(Clone, Copy, Debug)]
pub struct Seam {
    /// Which operation.
    pub op: OpNumber,
    /// Before which of its steps.
    pub at: Moment,
    /// Which of those who can goes on instead, modulo their number.
    pub by: usize,
    /// As in [`Preemption`].
    pub stall: u32,
}

/// A whole history.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The operations of each actor.
    pub actors: Vec<Vec<Op>>,
    /// What goes wrong.
    pub faults: Vec<Fault>,
    /// Who goes on when.
    pub schedule: Schedule,
    /// The format that the store begins in.
    pub format: StoreFormat,
    /// After how many chunks a pack is full.
    pub pack_chunks: usize,
    /// Whether the disk is full in the end, and what is dead has to make room.
    pub full_in_the_end: bool,
    /// For what else is drawn: what a power cut takes, what a crash keeps.
    pub seed: u64,
}

impl Plan {
    /// How many operations it has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.actors.iter().map(Vec::len).sum()
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Action {
    /// What it is called.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Commit { .. } => "commit",
            Self::Remove(_) => "rm",
            Self::Move(..) | Self::Revive(..) => "tag",
            Self::Gc(_) => "gc",
            Self::Optimize(_) => "gc --optimize",
            Self::Verify(_) => "verify",
            Self::Repair => "repair",
            Self::Upgrade => "upgrade",
            Self::Read(_) => "read",
            Self::Pin(_) => "pin",
            Self::Mount(..) => "mount",
            Self::Damage(..) => "damage",
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Commit {
                tag,
                parent,
                memory,
                disk,
                diff,
                keep,
            } => {
                write!(f, "commit t{tag}")?;
                match parent {
                    Parent::Tag(parent) => write!(f, " parent t{parent}")?,
                    Parent::Nothing => write!(f, " no parent")?,
                    Parent::Automatic => write!(f, " automatic parent")?,
                }
                write!(f, "{} {memory}", if *diff { " diff" } else { "" })?;
                if let Some(disk) = disk {
                    write!(f, "; disk {disk}")?;
                }
                if *keep {
                    write!(f, "; keep a pin")?;
                }
                Ok(())
            }
            Self::Remove(tag) => write!(f, "rm t{tag}"),
            Self::Move(to, from) => write!(f, "tag t{to} := t{from}"),
            Self::Revive(tag, which) => write!(f, "tag t{tag} := an old snapshot ({which})"),
            Self::Gc(percent) => write!(f, "gc (keep packs of {percent} %)"),
            Self::Optimize(None) => write!(f, "gc --optimize"),
            Self::Optimize(Some(bytes)) => write!(f, "gc --optimize ({bytes} bytes)"),
            Self::Verify(true) => write!(f, "verify --read-data"),
            Self::Verify(false) => write!(f, "verify"),
            Self::Repair => write!(f, "repair"),
            Self::Upgrade => write!(f, "upgrade"),
            Self::Read(tag) => write!(f, "read t{tag}"),
            Self::Pin(tag) => write!(f, "pin t{tag}"),
            Self::Mount(tag, how) => write!(f, "mount t{tag}, {how:?}"),
            Self::Damage(damage, which) => write!(f, "the disk: {damage:?} ({which})"),
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.format == StoreFormat::One {
            writeln!(f, "  in a store of format 1")?;
        }
        for (actor, ops) in self.actors.iter().enumerate() {
            writeln!(f, "  actor {actor}")?;
            for op in ops {
                let process = if op.new_process {
                    ""
                } else {
                    " (same process)"
                };
                writeln!(f, "    {:3}: {}{process}", op.number, op.action)?;
            }
        }
        for fault in &self.faults {
            writeln!(
                f,
                "  in operation {}, at {}: {:?}",
                fault.op, fault.at, fault.mishap
            )?;
        }
        if self.pack_chunks < MANY_CHUNKS {
            writeln!(f, "  packs of {} chunks", self.pack_chunks)?;
        }
        if self.full_in_the_end {
            writeln!(f, "  in the end the disk is full")?;
        }
        match &self.schedule {
            Schedule::Random { one_in, .. } => {
                writeln!(f, "  one in {one_in} steps is overtaken")
            }
            Schedule::Seams(seams) => {
                for seam in seams {
                    writeln!(f, "  operation {} is overtaken at {}", seam.op, seam.at)?;
                }
                Ok(())
            }
            Schedule::Fixed(preemptions) => {
                for at in preemptions {
                    write!(
                        f,
                        "  before step {} of operation {} actor {} goes on",
                        at.step, at.op, at.by
                    )?;
                    if at.stall > 0 {
                        write!(f, ", until {} operations have ended", at.stall)?;
                    }
                    writeln!(f)?;
                }
                Ok(())
            }
        }
    }
}
