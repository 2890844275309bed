//! Mounts in histories that are about something else. They are drawn by a chance of their
//! own: all that is drawn without them stays what it was.

use std::collections::BTreeSet;

use fastrand::Rng;

use super::content::ImageContent;
use super::plan::{
    Action, Class, Fault, Mishap, Moment, Mounting, Op, OpNumber, Plan, Schedule, Seam,
};

/// One of so many histories has mounts.
const ONE_IN: u8 = 6;
/// One of so many of these is one that a fault was found in.
const ONE_KNOWN_IN: u8 = 8;

impl Plan {
    /// The plan, and in some histories mounts beside it: mostly of the same tag, so that one
    /// pushes what another has recorded.
    pub(super) fn with_mounts(mut self) -> Self {
        let mut rng = Rng::with_seed(self.seed ^ 0x6d6f_756e_7473);
        if rng.u8(..ONE_IN) != 0 {
            return self;
        }
        if rng.u8(..ONE_KNOWN_IN) == 0 {
            return Self::known_of_mounts(rng);
        }
        let ops = || self.actors.iter().flatten();
        let tags: BTreeSet<u8> = ops().filter_map(|op| committed(&op.action)).collect();
        let tags: Vec<u8> = tags.into_iter().collect();
        let first = ops().map(|op| op.number + 1).max().unwrap_or_default();
        let Some(often) = rng.choice(&tags).copied() else {
            return self;
        };
        for number in first..first + rng.u32(2..=6) {
            let tag = match rng.u8(..4) {
                0 => tags[rng.usize(..tags.len())],
                _ => often,
            };
            let op = Op {
                number,
                new_process: rng.bool(),
                action: Action::Mount(tag, Mounting::drawn(&mut rng)),
            };
            let actor = rng.usize(..self.actors.len());
            let ops = &mut self.actors[actor];
            let at = rng.usize(ops.len().min(1)..=ops.len());
            ops.insert(at, op);
            if rng.u8(..3) == 0 {
                self.faults.push(fault(&mut rng, number));
            }
            if let Schedule::Seams(seams) = &mut self.schedule {
                seams.push(seam(&mut rng, number));
            }
        }
        self
    }
}

fn committed(action: &Action) -> Option<u8> {
    match action {
        Action::Commit { tag, .. } => Some(*tag),
        _ => None,
    }
}

/// Mostly at a step that changes the disk, of which there are few: the lease, and the set.
fn fault(rng: &mut Rng, op: OpNumber) -> Fault {
    let at = match rng.u8(..3) {
        0 => Moment::new(Class::Any, rng.u32(1..=60)),
        _ => Moment::new(Class::Changes, rng.u32(1..=16)),
    };
    let mishaps = [
        Mishap::Kill,
        Mishap::Kill,
        Mishap::PowerCut,
        Mishap::PowerCut,
        Mishap::IoError,
        Mishap::DiskFull(rng.u32(1..20)),
    ];
    Fault {
        op,
        at,
        mishap: mishaps[rng.usize(..mishaps.len())],
    }
}

fn seam(rng: &mut Rng, op: OpNumber) -> Seam {
    let (class, most) = [(Class::Any, 80), (Class::Changes, 16)][rng.usize(..2)];
    Seam {
        op,
        at: Moment::new(class, rng.u32(1..=most)),
        by: rng.usize(..2),
        stall: [0, 0, 1, 2][rng.usize(..4)],
    }
}

impl Mounting {
    fn drawn(rng: &mut Rng) -> Self {
        Self {
            touched: (0..rng.usize(1..=6)).map(|_| rng.u8(..)).collect(),
            part: rng.u8(..4) == 0,
            late: rng.u8(..4) == 0,
        }
    }

    /// The pages that are touched in an image, in their order: mostly some that hold something.
    pub(super) fn touched_of(&self, pages: u64, content: Option<&ImageContent>) -> Vec<u32> {
        let data: Vec<u64> = content
            .into_iter()
            .flat_map(|it| it.data.keys().copied())
            .collect();
        let mut touched = Vec::new();
        for which in &self.touched {
            let which = usize::from(*which);
            let page = match which % 8 {
                // A hole, or behind the end.
                0 => which as u64 % (pages + 1),
                _ if data.is_empty() => 0,
                _ => data[which % data.len()],
            };
            let page = u32::try_from(page).unwrap_or(u32::MAX);
            if !touched.contains(&page) {
                touched.push(page);
            }
        }
        touched
    }
}
