//! A history before it happens: who does what, what goes wrong, who overtakes
//! whom. Drawn from a seed, and small enough to be read.

use std::fmt;

use fastrand::Rng;
use snapstore_store::sim::StepKind;

use super::content::{FAMILIES, ImageContent, Page, VARIANTS};

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
        /// The tag of the parent, if there is to be one.
        parent: Option<u8>,
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
    /// Verifies; with all bytes or without.
    Verify(bool),
    /// Repairs.
    Repair,
    /// Pins a tag's snapshot and reads it.
    Read(u8),
    /// Pins a tag's snapshot until the process ends.
    Pin(u8),
    /// Damages a file of the disk; the number says which, of how many there are.
    Damage(Damage, u32),
}

/// What can happen to a disk by itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Damage {
    /// A pack is gone.
    LosePack,
    /// A byte of a chunk is another one.
    FlipByte,
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
}

impl Class {
    /// Whether a step of this kind is counted.
    #[must_use]
    pub fn holds(self, kind: StepKind) -> bool {
        use StepKind as K;
        let durable = matches!(
            kind,
            K::SyncFile | K::SyncDir | K::Rename | K::Unlink | K::IndexFlush | K::RemoveDir
        );
        match self {
            Self::Any => true,
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
    /// Which of its steps are counted.
    pub class: Class,
    /// At the how manieth of these, from 1 on.
    pub nth: u32,
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
    /// At these steps only.
    Fixed(Vec<Preemption>),
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
    /// For what else is drawn: what a power cut takes, what a crash keeps.
    pub seed: u64,
}

impl Plan {
    /// The history of a seed.
    #[must_use]
    pub fn of_seed(seed: u64) -> Self {
        // Seeds that follow each other are to have nothing in common.
        let mut rng = Rng::with_seed(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5bd1_e995);
        let focus = [
            Focus::Lineages,
            Focus::Lineages,
            Focus::Lineages,
            Focus::Repair,
            Focus::Anything,
            Focus::Anything,
            Focus::Anything,
            Focus::Anything,
        ][rng.usize(..8)];
        let few = focus == Focus::Lineages;
        let repair = focus == Focus::Repair;
        let mut draft = Draft {
            images: vec![],
            next_op: 0,
            used: vec![],
            tags: rng.u8(2..=if few { 3 } else { 5 }),
            damage: !few && rng.u8(..if repair { 2 } else { 8 }) == 0,
            repair: if repair { 5 } else { rng.u8(..8) / 3 },
            families: [1, 1, 2, 2, 3, FAMILIES][rng.usize(..if few { 2 } else { 6 })],
            variants: [3, 4, 3, 2, 5, VARIANTS][rng.usize(..if few { 3 } else { 6 })],
            stride: if !few && rng.u8(..12) == 0 { 190 } else { 1 },
            most_pages: [1, 1, 2, 3, 3, 4, 6, 8, 24, 200][rng.usize(..if few { 3 } else { 10 })],
            collect: rng.u8(3..=9),
            disk: rng.u8(2..=8),
            rng,
        };
        let actors = if few { 3 } else { draft.rng.usize(1..=4) };
        let length = match actors {
            1 => 4..=16,
            _ if few => 2..=5,
            _ => 2..=7,
        };
        let actors: Vec<Vec<Op>> = (0..actors)
            .map(|_| {
                let length = draft.rng.usize(length.clone());
                (0..length).map(|_| draft.op()).collect()
            })
            .collect();
        let faults = draft.faults();
        let one_in = [3, 8, 20, 60][draft.rng.usize(..4)];
        Self {
            actors,
            faults,
            schedule: Schedule::Random {
                seed: draft.rng.u64(..),
                one_in,
            },
            seed: draft.rng.u64(..),
        }
    }

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

/// What a history is about.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Focus {
    /// Few pages, so that several commits store the same one in different ways.
    Lineages,
    /// Repair, and what makes it necessary.
    Repair,
    Anything,
}

/// A plan being drawn.
struct Draft {
    rng: Rng,
    /// Images drawn so far, from which others are made.
    images: Vec<ImageContent>,
    next_op: OpNumber,
    tags: u8,
    /// Tags that were committed to, in no order.
    used: Vec<u8>,
    damage: bool,
    /// Of 32 operations, how many repair.
    repair: u8,
    families: u8,
    variants: u8,
    stride: u64,
    most_pages: u64,
    /// Of 32 operations, how many collect.
    collect: u8,
    /// One of how many commits has a disk.
    disk: u8,
}

impl Draft {
    fn op(&mut self) -> Op {
        let number = self.next_op;
        self.next_op += 1;
        Op {
            number,
            new_process: self.rng.u8(..3) != 0,
            action: self.action(),
        }
    }

    fn action(&mut self) -> Action {
        let tag = self.used_tag();
        if !self.used.is_empty() && self.rng.u8(..32) < self.collect {
            return Action::Gc([50, 50, 90, 100][self.rng.usize(..4)]);
        }
        if !self.used.is_empty() && self.rng.u8(..32) < self.repair {
            return Action::Repair;
        }
        match self.rng.u8(..32) {
            _ if self.used.is_empty() => self.commit(),
            0..16 => self.commit(),
            16..20 => Action::Remove(tag),
            20 => Action::Move(self.tag(), tag),
            21..24 => Action::Revive(self.tag(), self.rng.u32(..)),
            24..28 => Action::Read(tag),
            28 => Action::Verify(self.rng.bool()),
            30 => Action::Pin(tag),
            31 if self.damage => {
                let damage = [Damage::LosePack, Damage::FlipByte][self.rng.usize(..2)];
                Action::Damage(damage, self.rng.u32(..))
            }
            _ => Action::Read(tag),
        }
    }

    fn tag(&mut self) -> u8 {
        self.rng.u8(..self.tags)
    }

    /// Mostly one that was committed to.
    fn used_tag(&mut self) -> u8 {
        if self.used.is_empty() || self.rng.u8(..16) == 0 {
            return self.tag();
        }
        self.used[self.rng.usize(..self.used.len())]
    }

    fn commit(&mut self) -> Action {
        let tag = self.tag();
        let mut parent = None;
        if !self.used.is_empty() && self.rng.u8(..3) != 0 {
            parent = Some(self.used_tag());
        }
        self.used.push(tag);
        let diff = parent.is_some() && self.rng.u8(..4) == 0;
        let memory = if diff { self.changes() } else { self.image() };
        let disk = (self.rng.u8(..self.disk) == 0).then(|| self.image());
        Action::Commit {
            tag,
            parent,
            memory,
            disk,
            diff,
            keep: self.rng.u8(..8) == 0,
        }
    }

    fn page(&mut self) -> Page {
        Page::new(self.rng.u8(..self.families), self.rng.u8(..self.variants))
    }

    /// An image drawn before, often with changes, or a new one.
    fn image(&mut self) -> ImageContent {
        let mut image = match self.rng.u8(..5) {
            1.. if !self.images.is_empty() => {
                self.images[self.rng.usize(..self.images.len())].clone()
            }
            _ => {
                let pages = self.rng.u64(1..=self.most_pages);
                let mut image = ImageContent {
                    pages: pages * self.stride,
                    data: Default::default(),
                };
                for slot in 0..pages {
                    if self.rng.u8(..8) != 0 {
                        image.data.insert(slot * self.stride, self.page());
                    }
                }
                image
            }
        };
        if self.rng.u8(..4) != 0 {
            for _ in 0..self.rng.usize(1..=3) {
                self.change(&mut image);
            }
        }
        self.images.push(image.clone());
        image
    }

    /// Mostly to another page of the same family, which makes a delta.
    fn change(&mut self, image: &mut ImageContent) {
        let slot = self.rng.u64(..image.pages / self.stride) * self.stride;
        let old = image.data.get(&slot).copied();
        match (self.rng.u8(..8), old) {
            (0, _) => {
                image.data.remove(&slot);
            }
            (1.., Some(old)) => {
                let page = Page::new(old.family(), self.rng.u8(..self.variants));
                image.data.insert(slot, page);
            }
            _ => {
                let page = self.page();
                image.data.insert(slot, page);
            }
        }
    }

    /// Changes for a diff against an image of the size of one drawn before.
    fn changes(&mut self) -> ImageContent {
        let base = self.image();
        let mut changes = ImageContent {
            pages: base.pages,
            data: Default::default(),
        };
        for _ in 0..self.rng.usize(1..=3) {
            let slot = self.rng.u64(..base.pages / self.stride) * self.stride;
            let page = self.page();
            changes.data.insert(slot, page);
        }
        changes
    }

    fn faults(&mut self) -> Vec<Fault> {
        let count = [0, 0, 1, 1, 1, 2, 3][self.rng.usize(..7)];
        (0..count)
            .map(|_| {
                let class = [Class::Any, Class::Changes, Class::Durable][self.rng.usize(..3)];
                let most = match class {
                    Class::Any => 60,
                    Class::Changes => 24,
                    Class::Durable => 12,
                };
                Fault {
                    op: self.rng.u32(..self.next_op),
                    class,
                    nth: self.rng.u32(1..=most),
                    mishap: match self.rng.u8(..8) {
                        0..3 => Mishap::Kill,
                        3..6 => Mishap::PowerCut,
                        6 => Mishap::IoError,
                        _ => Mishap::DiskFull(self.rng.u32(1..40)),
                    },
                }
            })
            .collect()
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
            Self::Verify(_) => "verify",
            Self::Repair => "repair",
            Self::Read(_) => "read",
            Self::Pin(_) => "pin",
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
                    Some(parent) => write!(f, " parent t{parent}")?,
                    None => write!(f, " no parent")?,
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
            Self::Verify(true) => write!(f, "verify --read-data"),
            Self::Verify(false) => write!(f, "verify"),
            Self::Repair => write!(f, "repair"),
            Self::Read(tag) => write!(f, "read t{tag}"),
            Self::Pin(tag) => write!(f, "pin t{tag}"),
            Self::Damage(damage, which) => write!(f, "the disk: {damage:?} ({which})"),
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
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
                "  in operation {}, at its step {} of {:?}: {:?}",
                fault.op, fault.nth, fault.class, fault.mishap
            )?;
        }
        match &self.schedule {
            Schedule::Random { one_in, .. } => {
                writeln!(f, "  one in {one_in} steps is overtaken")
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
