//! An actor at work: one operation after the other, each judged when it ends.

mod mount;
mod work;

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use snapstore_store::sim::{Observer as _, observe};
use snapstore_store::{Damage, Error, ErrorClass, SnapshotId};

use self::work::{Done, Process, Work};
use super::check::check;
use super::content::Content;
use super::model::tag_name;
use super::plan::{Action, Op};
use super::world::{Actor, Killed, World};

/// A pin that is held.
pub struct Held {
    /// Whose.
    pub actor: usize,
    /// What it pins.
    pub id: SnapshotId,
    /// What that holds.
    pub content: Arc<Content>,
}

/// Does an actor's operations until they are done, or everybody ends. Returns
/// those that are left.
pub fn run(world: &Arc<World>, number: usize, mut ops: VecDeque<Op>) -> VecDeque<Op> {
    let actor = Arc::new(Actor::new(world.clone(), number));
    observe(Some(actor.clone()));
    world.first_turn(number);
    let mut process = Process::default();
    while !is_over(world) {
        let Some(op) = ops.pop_front() else { break };
        if op.new_process {
            end_process(world, &actor, &mut process);
        }
        one(world, &actor, number, &mut process, &op);
    }
    end_process(world, &actor, &mut process);
    observe(None);
    world.finish(number);
    ops
}

fn is_over(world: &World) -> bool {
    let shared = world.lock();
    shared.cut || shared.failure.is_some()
}

/// The kernel closes what the process has open, and nothing else happens.
fn end_process(world: &World, actor: &Actor, process: &mut Process) {
    actor.kill();
    *process = Process::default();
    actor.revive();
    let number = actor.number();
    world.lock().held.retain(|held| held.actor != number);
}

fn one(world: &Arc<World>, actor: &Actor, number: usize, process: &mut Process, op: &Op) {
    let before = Before::new(world);
    world.begin_op(number, op.number);
    world
        .lock()
        .tell(|| format!("actor {number} begins {}: {}", op.number, op.action));
    let mut done = Done::default();
    let result = catch_unwind(AssertUnwindSafe(|| {
        actor.pause("beginning");
        Work {
            world,
            actor,
            number,
            process,
            op,
            done: &mut done,
        }
        .perform()
    }));
    let running = world.end_op(number);
    let refused = running.is_some_and(|it| it.refused);
    let killed = actor.is_dead() || matches!(&result, Err(payload) if payload.is::<Killed>());
    let (told, acknowledged) = match &result {
        Ok(_) if killed => ("killed".to_owned(), false),
        Ok(Ok(())) => ("done".to_owned(), true),
        Ok(Err(error)) => (format!("error: {error}"), false),
        Err(payload) if payload.is::<Killed>() => ("killed".to_owned(), false),
        Err(payload) => {
            let text = payload.downcast_ref::<String>().cloned();
            let text = text.or_else(|| payload.downcast_ref::<&str>().map(|it| (*it).to_owned()));
            let text = text.unwrap_or_else(|| "something".to_owned());
            world.fail("panic", format!("{} panicked: {text}", op.action));
            ("panicked".to_owned(), false)
        }
    };
    world
        .lock()
        .tell(|| format!("actor {number} ends {}: {told}", op.number));
    settle(world, op, &before, done, acknowledged);
    if killed {
        end_process(world, actor, process);
    }
    if matches!(op.action, Action::Repair) {
        let busy = matches!(&result, Ok(Err(Error::Busy { .. })));
        end_repair(world, &before, acknowledged, busy);
    }
    if let Ok(Err(error)) = &result
        && !killed
    {
        before.judge(world, op, error, refused);
    }
    if !is_over(world) {
        check(world, false);
    }
}

/// What was so when an operation began.
struct Before {
    repairs_begun: u32,
    repairing: bool,
    damaged: bool,
    damage_count: u32,
}

impl Before {
    fn new(world: &World) -> Self {
        let shared = world.lock();
        Self {
            repairs_begun: shared.repairs_begun,
            repairing: shared.repairs > 0 || shared.half_repaired,
            damaged: shared.is_damaged(),
            damage_count: shared.damage_count,
        }
    }

    /// An operation that has failed without a reason is a violation.
    fn judge(&self, world: &World, op: &Op, error: &Error, refused: bool) {
        let (repairs, damaged) = {
            let shared = world.lock();
            // Damage that came meanwhile may be repaired by now.
            let came = shared.damage_count != self.damage_count;
            (
                shared.repairs_begun != self.repairs_begun || self.repairing,
                self.damaged || came || shared.is_damaged(),
            )
        };
        let class = error.class();
        if refused {
            // What the disk cannot read of a pack is damage, but nothing else is.
            let is_pack = matches!(
                error,
                Error::Damaged(Damage::Pack { .. } | Damage::Footer { .. } | Damage::Chunk { .. })
            );
            if class == ErrorClass::Damaged && !is_pack && !damaged {
                let what = format!("{}: {error}", op.action);
                world.fail("a refusal is told as damage", what);
            }
            return;
        }
        let diff = matches!(&op.action, Action::Commit { diff: true, .. });
        let expected = match error {
            Error::NotFound { .. } => !matches!(
                op.action,
                Action::Gc(_) | Action::Optimize(_) | Action::Repair | Action::Upgrade
            ),
            Error::NoParentImage { .. } | Error::DiffSize { .. } => diff,
            // A collection has removed what was half written.
            Error::Io { source, .. } if source.kind() == ErrorKind::NotFound => {
                matches!(op.action, Action::Mount(..)) && world.may_be_collected()
            }
            Error::Busy { .. } => matches!(op.action, Action::Repair | Action::Upgrade) || repairs,
            Error::OldFormat { .. } => matches!(op.action, Action::Optimize(_)),
            // It was opened in the format before.
            Error::Upgraded { .. } => world.may_be_upgraded(),
            // A snapshot that has lost its last tag meanwhile.
            Error::Damaged(_) => {
                matches!(op.action, Action::Move(..) | Action::Revive(..)) || damaged
            }
            _ => false,
        };
        if !expected {
            let what = format!("{}: {error}", op.action);
            world.fail("an operation fails without a reason", what);
        }
    }
}

/// Tells the model how an operation has ended.
fn settle(world: &World, op: &Op, before: &Before, done: Done, acknowledged: bool) {
    let mut shared = world.lock();
    if let Some(recording) = done.recording {
        shared.sets.end(recording, false, None);
    }
    for change in done.changes {
        shared
            .model
            .end(change, done.value.clone().filter(|_| acknowledged));
    }
    if !acknowledged {
        return;
    }
    let firm = shared.damage_count == before.damage_count && !shared.flipped;
    match &op.action {
        Action::Commit { tag, diff, .. } => {
            match done.committed.filter(|_| firm && !diff) {
                Some(id) => shared.firm.insert(tag_name(*tag), id),
                None => shared.firm.remove(&tag_name(*tag)),
            };
        }
        Action::Move(to, _) | Action::Revive(to, _) => {
            shared.firm.remove(&tag_name(*to));
        }
        _ => {}
    }
}

fn end_repair(world: &World, before: &Before, acknowledged: bool, busy: bool) {
    let mut shared = world.lock();
    shared.repairs = shared.repairs.saturating_sub(1);
    if acknowledged {
        shared.half_repaired = false;
        // What was damaged while it ran it may have looked at before.
        if shared.damage_count == before.damage_count {
            shared.flipped = false;
            shared.index_lost = false;
        }
    } else if !busy {
        shared.half_repaired = true;
    }
}
