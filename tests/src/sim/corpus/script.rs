//! How a history is written down, and what is near to it.

use std::collections::BTreeMap;

use fastrand::Rng;
use snapstore_store::StoreFormat;

use crate::sim::content::{ImageContent, Page};
use crate::sim::draw::Draft;
use crate::sim::plan::{Action, Class, Fault, MANY_CHUNKS, Mishap, Moment, Op, Parent, Seam};

/// A history being written down.
pub(super) struct Script {
    pub(super) actors: Vec<Vec<Op>>,
    pub(super) seams: Vec<Seam>,
    pub(super) faults: Vec<Fault>,
    pub(super) pack_chunks: usize,
    /// If it is about one.
    pub(super) format: Option<StoreFormat>,
}

impl Script {
    pub(super) fn of<const N: usize>(actors: [Vec<Action>; N]) -> Self {
        let mut numbers = 0..;
        let mut op = |action| Op {
            number: numbers.next().unwrap_or_default(),
            new_process: true,
            action,
        };
        let actors = actors.map(|actions| actions.into_iter().map(&mut op).collect());
        Self {
            actors: actors.into(),
            seams: vec![],
            faults: vec![],
            pack_chunks: MANY_CHUNKS,
            format: None,
        }
    }

    /// The store begins in format 1.
    pub(super) fn in_format_1(mut self) -> Self {
        self.format = Some(StoreFormat::One);
        self
    }

    /// The operation is done by the process that did the one before.
    pub(super) fn same_process(mut self, number: u32) -> Self {
        for op in self.actors.iter_mut().flatten() {
            op.new_process &= op.number != number;
        }
        self
    }

    /// The operation is overtaken before the `nth` step of this class, until others have
    /// ended as many as `stall`.
    pub(super) fn overtaken(mut self, op: u32, class: Class, nth: u32, stall: u32) -> Self {
        self.seams.push(Seam {
            op,
            at: Moment::new(class, nth),
            by: 0,
            stall,
        });
        self
    }

    pub(super) fn ends(mut self, op: u32, class: Class, nth: u32, mishap: Mishap) -> Self {
        self.faults.push(Fault {
            op,
            at: Moment::new(class, nth),
            mishap,
        });
        self
    }

    pub(super) fn change(&mut self, draft: &mut Draft) {
        let rng = &mut draft.rng;
        let actor = rng.usize(..self.actors.len());
        let length = self.actors[actor].len();
        match rng.u8(..6) {
            0 if length > 1 => {
                let at = rng.usize(..length);
                self.actors[actor].remove(at);
            }
            1 => {
                let at = rng.usize(..=length);
                let op = draft.op();
                self.actors[actor].insert(at, op);
            }
            2 if !self.faults.is_empty() => {
                let at = rng.usize(..self.faults.len());
                let fault = &mut self.faults[at];
                fault.at = near(rng, fault.at);
            }
            3 => self.pack_chunks = rng.usize(1..=4),
            _ if !self.seams.is_empty() => {
                let at = rng.usize(..self.seams.len());
                let seam = &mut self.seams[at];
                seam.at = near(rng, seam.at);
                seam.stall = rng.u32(0..=seam.stall + 1);
            }
            _ => {}
        }
    }
}

/// A moment near to this one: the step is named, so that it is found wherever it moves,
/// and what is near is counted from there.
fn near(rng: &mut Rng, at: Moment) -> Moment {
    match rng.u8(..3) {
        0 => Moment {
            nth: (at.nth + rng.u32(0..=2)).saturating_sub(1).max(1),
            ..at
        },
        _ => Moment {
            later: rng.u32(1..=8),
            ..at
        },
    }
}

/// Pages of these families and variants, each `stride` pages from the one before.
pub(super) fn image(stride: u64, pages: &[(u8, u8)]) -> ImageContent {
    let slots = (0..).map(|slot| slot * stride);
    let pages = pages
        .iter()
        .map(|(family, variant)| Page::new(*family, *variant));
    let data: BTreeMap<u64, Page> = slots.zip(pages).collect();
    ImageContent {
        pages: data.len() as u64 * stride,
        data,
    }
}

pub(super) fn commit(tag: u8, parent: Parent, memory: &[(u8, u8)], disk: &[(u8, u8)]) -> Action {
    Action::Commit {
        tag,
        parent,
        memory: image(1, memory),
        disk: (!disk.is_empty()).then(|| image(1, disk)),
        diff: false,
        keep: false,
    }
}
