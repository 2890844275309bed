//! Histories of the shapes that lead to trouble most often. Each keeps to few
//! images, so that what is committed was often there before, dead or alive, and
//! leaves to chance what goes on around that.

use fastrand::Rng;

use super::content::ImageContent;
use super::draw::Draft;
use super::plan::{Action, Class, Fault, Mishap, Moment, Op, Plan, Schedule, Seam};

/// The most steps of an operation at which it is overtaken, of a kind.
const MOST_SEAMS: u32 = 44;
const MOST_STEPS: u32 = 90;

impl Plan {
    /// A store that somebody has made, then two or three processes that do an
    /// operation or two at the same time and overtake each other at few places:
    /// most races are lost by one or two of these.
    pub(super) fn race(rng: Rng) -> Self {
        let mut draft = Draft::of_few_images(rng, 3);
        let mut first = draft.prologue();
        let racing = draft.next_op;
        let others = draft.rng.usize(1..=2);
        let mut actors: Vec<Vec<Op>> = (0..=others).map(|_| draft.racing()).collect();
        draft.rng.shuffle(&mut actors);
        first.append(&mut actors[0]);
        actors[0] = first;
        let racers: Vec<u32> = (racing..draft.next_op).collect();
        let seams = draft.rng.usize(1..=4);
        let seams = (0..seams).map(|_| draft.seam(&racers)).collect();
        let faults = match draft.rng.u8(..6) {
            0 | 1 => vec![draft.crash(&racers, Mishap::Kill)],
            2 => vec![draft.crash(&racers, Mishap::PowerCut)],
            _ => vec![],
        };
        draft.plan(actors, faults, Schedule::Seams(seams))
    }

    /// An operation is held up somewhere while another process does several, the
    /// last of which are overtaken by it; it may be killed then.
    pub(super) fn held_up(rng: Rng) -> Self {
        let mut draft = Draft::of_few_images(rng, 3);
        let mut first = draft.prologue();
        let held_up = draft.next_op;
        let action = match draft.rng.u8(..8) {
            0 => draft.gc(),
            1 => draft.action(),
            _ => draft.commit(),
        };
        first.push(draft.op_of(action));
        draft.collect = 14;
        let length = draft.rng.usize(2..=6);
        let others: Vec<Op> = (0..length).map(|_| draft.op()).collect();
        let late: Vec<u32> = others.iter().map(|op| op.number).collect();
        let mut seams = vec![draft.seam(&[held_up])];
        seams[0].stall = draft.rng.u32(0..=4);
        seams.push(draft.seam(&late[late.len() / 2..]));
        let mut faults = vec![];
        if draft.rng.bool() {
            faults.push(draft.crash(&[held_up], Mishap::Kill));
        }
        draft.plan(vec![first, others], faults, Schedule::Seams(seams))
    }

    /// One process after the other commits, removes and collects the same few
    /// images again and again, and somebody repairs.
    pub(super) fn churn(rng: Rng) -> Self {
        let mut draft = Draft::of_few_images(rng, 4);
        draft.collect = draft.rng.u8(5..=12);
        draft.remove = draft.rng.u8(4..=12);
        draft.repair = [0, 2, 4, 6][draft.rng.usize(..4)];
        draft.disk = draft.rng.u8(2..=4);
        let length = draft.rng.usize(8..=20);
        let ops = (0..length).map(|_| draft.op()).collect();
        draft.plan(vec![ops], vec![], Schedule::Seams(vec![]))
    }

    /// A process is killed, others go on with what it left, and then the power
    /// fails.
    pub(super) fn crashes(rng: Rng) -> Self {
        let mut draft = Draft::of_few_images(rng, 3);
        let mut ops = draft.prologue();
        let killed = draft.next_op;
        let action = match draft.rng.u8(..8) {
            0..3 => Action::Remove(draft.used_tag()),
            3 => draft.gc(),
            _ => draft.action(),
        };
        ops.push(draft.op_of(action));
        let next = match draft.rng.u8(..3) {
            0 => draft.action(),
            _ => draft.gc(),
        };
        ops.push(draft.op_of(next));
        for _ in 0..draft.rng.usize(0..=3) {
            ops.push(draft.op());
        }
        let mut kill = draft.crash(&[killed], Mishap::Kill);
        kill.at.nth = kill.at.nth.div_ceil(2);
        let late: Vec<u32> = (killed + 1..draft.next_op).collect();
        let cut = draft.crash(&late, Mishap::PowerCut);
        draft.plan(vec![ops], vec![kill, cut], Schedule::Seams(vec![]))
    }
}

impl Draft {
    /// A draft whose images are all made of few pages.
    pub fn of_few_images(mut rng: Rng, most_images: usize) -> Self {
        let mut draft = Self {
            images: vec![],
            is_pool: false,
            next_op: 0,
            used: vec![],
            tags: rng.u8(2..=3),
            damage: false,
            repair: 0,
            families: rng.u8(1..=2),
            variants: rng.u8(2..=3),
            // Each page in a leaf of its own, or not.
            stride: if rng.u8(..4) == 0 { 512 } else { 1 },
            most_pages: rng.u64(1..=3),
            collect: 3,
            remove: 5,
            disk: rng.u8(3..=8),
            rng,
        };
        let count = draft.rng.usize(1..=most_images);
        for _ in 0..20 {
            let image: ImageContent = draft.image();
            let known = draft.images.iter().filter(|it| **it == image).count() > 1;
            if image.data.is_empty() || known {
                draft.images.pop();
            }
            if draft.images.len() == count {
                break;
            }
        }
        draft.is_pool = !draft.images.is_empty();
        draft
    }

    /// What somebody has left behind: often something dead, which is about to be
    /// collected or committed again.
    fn prologue(&mut self) -> Vec<Op> {
        let length = self.rng.usize(1..=5);
        let mut ops: Vec<Op> = (0..length).map(|_| self.op()).collect();
        let dead = match self.rng.u8(..3) {
            0 => vec![],
            1 => vec![self.used_tag()],
            _ => (0..self.tags).collect(),
        };
        for tag in dead {
            ops.push(self.op_of(Action::Remove(tag)));
        }
        ops
    }

    /// What one of several does at the same time.
    fn racing(&mut self) -> Vec<Op> {
        let action = match self.rng.u8(..16) {
            0..7 => self.commit(),
            7..13 => self.gc(),
            13 => Action::Repair,
            _ => self.action(),
        };
        let mut ops = vec![self.op_of(action)];
        if self.rng.u8(..3) == 0 {
            ops.push(self.op());
        }
        ops
    }

    /// A place in one of these operations.
    fn seam(&mut self, ops: &[u32]) -> Seam {
        let (class, most) = match self.rng.bool() {
            true => (Class::Seams, MOST_SEAMS),
            false => (Class::Any, MOST_STEPS),
        };
        Seam {
            op: ops[self.rng.usize(..ops.len())],
            at: Moment::new(class, self.rng.u32(1..=most)),
            by: self.rng.usize(..2),
            stall: [0, 0, 1, 2][self.rng.usize(..4)],
        }
    }

    fn crash(&mut self, ops: &[u32], mishap: Mishap) -> Fault {
        let (class, most) = match self.rng.u8(..4) {
            0 => (Class::Any, MOST_STEPS),
            1 => (Class::Changes, 24),
            _ => (Class::Durable, 10),
        };
        Fault {
            op: ops[self.rng.usize(..ops.len())],
            at: Moment::new(class, self.rng.u32(1..=most)),
            mishap,
        }
    }
}
