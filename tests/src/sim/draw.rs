//! Drawing histories from a seed.

use fastrand::Rng;
use snapstore_store::StoreFormat;

use super::content::{FAMILIES, ImageContent, Page, VARIANTS};
use super::plan::{
    Action, Class, Damage, Fault, MANY_CHUNKS, Mishap, Moment, Op, OpNumber, Parent, Plan, Schedule,
};

/// What a history is about.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Focus {
    /// Few pages, so that several commits store the same one in different ways.
    Lineages,
    /// Repair, and what makes it necessary.
    Repair,
    Anything,
}

/// What kind of history it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Shape {
    /// Several processes do anything.
    Anything,
    /// Few operations at the same time, overtaken at few places.
    Race,
    /// An operation is held up while several others are done.
    HeldUp,
    /// The same few images come and go.
    Churn,
    /// A process is killed, and later the power fails.
    Crashes,
    /// What once led to a fault that was put back, or something near to it.
    Known,
}

impl Plan {
    /// The history of a seed: half of them are anything, the other half have the
    /// shapes that lead to trouble most often.
    #[must_use]
    pub fn of_seed(seed: u64) -> Self {
        Self::of_shape(None, seed)
    }

    /// The same with one shape only.
    #[must_use]
    pub fn of_shape(shape: Option<Shape>, seed: u64) -> Self {
        // Seeds that follow each other are to have nothing in common.
        let mut rng = Rng::with_seed(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5bd1_e995);
        let drawn = match rng.u8(..10) {
            0 | 1 => Shape::Race,
            2 => Shape::HeldUp,
            3 | 4 => Shape::Churn,
            5 => Shape::Crashes,
            6 => Shape::Known,
            _ => Shape::Anything,
        };
        let plan = match shape.unwrap_or(drawn) {
            Shape::Race => Self::race(rng),
            Shape::HeldUp => Self::held_up(rng),
            Shape::Known => Self::known(rng),
            Shape::Churn => Self::churn(rng),
            Shape::Crashes => Self::crashes(rng),
            Shape::Anything => Self::anything(rng),
        };
        plan.with_mounts()
    }

    fn anything(mut rng: Rng) -> Self {
        use Focus as F;
        let focus = [
            F::Lineages,
            F::Lineages,
            F::Lineages,
            F::Repair,
            F::Anything,
            F::Anything,
            F::Anything,
            F::Anything,
        ][rng.usize(..8)];
        let few = focus == F::Lineages;
        let repair = focus == F::Repair;
        let mut draft = Draft {
            images: vec![],
            is_pool: false,
            next_op: 0,
            used: vec![],
            tags: rng.u8(2..=if few { 3 } else { 5 }),
            damage: !few && rng.u8(..if repair { 2 } else { 8 }) == 0,
            repair: if repair { 5 } else { rng.u8(..8) / 3 },
            families: [1, 1, 2, 2, 3, FAMILIES][rng.usize(..if few { 2 } else { 6 })],
            variants: [3, 4, 3, 2, 5, VARIANTS][rng.usize(..if few { 3 } else { 6 })],
            stride: if !few && rng.u8(..8) == 0 { 190 } else { 1 },
            most_pages: [1, 1, 2, 3, 3, 4, 6, 8, 24, 200][rng.usize(..if few { 3 } else { 10 })],
            collect: rng.u8(3..=9),
            remove: 4,
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
        let schedule = Schedule::Random {
            seed: draft.rng.u64(..),
            one_in,
        };
        draft.plan(actors, faults, schedule)
    }
}

/// A plan being drawn.
pub(super) struct Draft {
    pub rng: Rng,
    /// Images drawn so far, from which others are made.
    pub images: Vec<ImageContent>,
    /// Whether these are all that there are.
    pub is_pool: bool,
    pub next_op: OpNumber,
    pub tags: u8,
    /// Tags that were committed to, in no order.
    pub used: Vec<u8>,
    pub damage: bool,
    /// Of 32 operations, how many repair.
    pub repair: u8,
    pub families: u8,
    pub variants: u8,
    pub stride: u64,
    pub most_pages: u64,
    /// Of 32 operations, how many collect.
    pub collect: u8,
    /// Of 32 operations, how many remove a tag.
    pub remove: u8,
    /// One of how many commits has a disk.
    pub disk: u8,
}

impl Draft {
    pub fn plan(mut self, actors: Vec<Vec<Op>>, faults: Vec<Fault>, schedule: Schedule) -> Plan {
        let mut plan = Plan {
            actors,
            faults,
            schedule,
            format: StoreFormat::Two,
            pack_chunks: match self.rng.u8(..4) {
                0 => self.rng.usize(1..=6),
                _ => MANY_CHUNKS,
            },
            full_in_the_end: self.rng.u8(..4) == 0,
            seed: self.rng.u64(..),
        };
        if self.rng.u8(..4) == 0 {
            plan.format = StoreFormat::One;
            self.upgrade(&mut plan);
        }
        plan
    }

    /// Has the store upgraded somewhere in the history, or not; mostly something goes
    /// wrong with it.
    fn upgrade(&mut self, plan: &mut Plan) {
        let rng = &mut self.rng;
        for _ in 0..rng.usize(..3) {
            let op = self.next_op;
            self.next_op += 1;
            let actors = plan.actors.len();
            let ops = &mut plan.actors[rng.usize(..actors)];
            let at = rng.usize(ops.len() / 2..=ops.len());
            let upgrade = Op {
                number: op,
                new_process: true,
                action: Action::Upgrade,
            };
            ops.insert(at, upgrade);
            if rng.u8(..4) != 0 {
                let mishaps = [
                    Mishap::Kill,
                    Mishap::PowerCut,
                    Mishap::IoError,
                    Mishap::DiskFull(rng.u32(1..40)),
                ];
                plan.faults.push(Fault {
                    op,
                    at: Moment::new(
                        [Class::Durable, Class::Changes][rng.usize(..2)],
                        rng.u32(1..=30),
                    ),
                    mishap: mishaps[rng.usize(..4)],
                });
            }
        }
    }

    pub fn op(&mut self) -> Op {
        let action = self.action();
        self.op_of(action)
    }

    pub fn op_of(&mut self, action: Action) -> Op {
        let number = self.next_op;
        self.next_op += 1;
        Op {
            number,
            new_process: self.rng.u8(..3) != 0,
            action,
        }
    }

    pub fn action(&mut self) -> Action {
        let tag = self.used_tag();
        if !self.used.is_empty() && self.rng.u8(..32) < self.collect {
            return self.gc();
        }
        if !self.used.is_empty() && self.rng.u8(..32) < self.repair {
            return Action::Repair;
        }
        if !self.used.is_empty() && self.rng.u8(..32) < self.remove {
            return Action::Remove(tag);
        }
        match self.rng.u8(4..32) {
            _ if self.used.is_empty() => self.commit(),
            4..20 => self.commit(),
            20 => Action::Move(self.tag(), tag),
            21..24 => Action::Revive(self.tag(), self.rng.u32(..)),
            24..28 => Action::Read(tag),
            28 => Action::Verify(self.rng.bool()),
            30 => Action::Pin(tag),
            31 if self.damage => {
                let damage = [
                    Damage::LosePack,
                    Damage::FlipByte,
                    Damage::BadSector,
                    Damage::LoseIndex,
                ][self.rng.usize(..4)];
                Action::Damage(damage, self.rng.u32(..))
            }
            _ => Action::Read(tag),
        }
    }

    pub fn gc(&mut self) -> Action {
        match self.rng.u8(..8) {
            0 | 1 => Action::Optimize(None),
            2 => Action::Optimize(Some(self.rng.u32(..30_000))),
            _ => Action::Gc([50, 50, 90, 100][self.rng.usize(..4)]),
        }
    }

    fn tag(&mut self) -> u8 {
        self.rng.u8(..self.tags)
    }

    /// Mostly one that was committed to.
    pub fn used_tag(&mut self) -> u8 {
        if self.used.is_empty() || self.rng.u8(..16) == 0 {
            return self.tag();
        }
        self.used[self.rng.usize(..self.used.len())]
    }

    pub fn commit(&mut self) -> Action {
        let tag = self.tag();
        let parent = match self.rng.u8(..6) {
            1 => Parent::Automatic,
            2.. if !self.used.is_empty() => Parent::Tag(self.used_tag()),
            _ => Parent::Nothing,
        };
        self.used.push(tag);
        let diff = matches!(parent, Parent::Tag(_)) && self.rng.u8(..4) == 0;
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
    pub fn image(&mut self) -> ImageContent {
        if self.is_pool {
            return self.images[self.rng.usize(..self.images.len())].clone();
        }
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

    pub fn faults(&mut self) -> Vec<Fault> {
        let count = [0, 0, 1, 1, 1, 2, 3][self.rng.usize(..7)];
        (0..count)
            .map(|_| {
                let classes = [(Class::Any, 60), (Class::Changes, 24), (Class::Durable, 12)];
                let (class, most) = classes[self.rng.usize(..3)];
                Fault {
                    op: self.rng.u32(..self.next_op),
                    at: Moment::new(class, self.rng.u32(1..=most)),
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
