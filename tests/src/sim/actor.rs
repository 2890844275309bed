//! An actor at work: one operation after the other, each judged when it ends.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use snapstore_store::sim::{Observer as _, observe};
use snapstore_store::{
    CommitRequest, Damage, Error, ErrorClass, GcOptions, InputKind, OptimizeOptions, ParentChoice,
    Pin, Silent, SnapshotId, Store,
};

use super::check::{check, describe_findings, reads_as};
use super::content::{self, Content, ImageContent};
use super::damage;
use super::model::{Change, Value, tag_name};
use super::plan::{Action, Op, Parent};
use super::world::{Actor, Killed, World};

/// What a process keeps from one operation to the next.
#[derive(Default)]
struct Process {
    store: Option<Store>,
    pins: Vec<Pin>,
}

/// A pin that is held.
pub struct Held {
    /// Whose.
    pub actor: usize,
    /// What it pins.
    pub id: SnapshotId,
    /// What that holds.
    pub content: Arc<Content>,
}

/// What an operation has done, if it was acknowledged.
#[derive(Default)]
struct Done {
    /// Changes of tags that may still fail, and what they came to.
    changes: Vec<Change>,
    value: Option<Vec<Value>>,
    /// What it has committed.
    committed: Option<SnapshotId>,
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

/// An operation being done.
struct Work<'a> {
    world: &'a Arc<World>,
    actor: &'a Actor,
    number: usize,
    process: &'a mut Process,
    op: &'a Op,
    done: &'a mut Done,
}

impl Work<'_> {
    fn perform(&mut self) -> Result<(), Error> {
        match &self.op.action {
            Action::Repair => {
                {
                    let mut shared = self.world.lock();
                    shared.repairs += 1;
                    shared.repairs_begun += 1;
                }
                Store::repair(&self.world.root, &Silent).map(|_| ())
            }
            Action::Upgrade => Store::upgrade(&self.world.root, false, &Silent).map(|_| ()),
            Action::Damage(kind, which) => {
                damage::inflict(self.world, *kind, *which);
                Ok(())
            }
            action => {
                let store = match self.process.store.take() {
                    Some(store) => store,
                    None => Store::open(&self.world.root)?,
                };
                let result = self.with_store(&store, action);
                let upgraded = matches!(result, Err(Error::Upgraded { .. }));
                self.process.store = Some(store).filter(|_| !upgraded);
                result
            }
        }
    }

    fn with_store(&mut self, store: &Store, action: &Action) -> Result<(), Error> {
        match action {
            Action::Commit {
                tag,
                parent,
                memory,
                disk,
                diff,
                keep,
            } => {
                let images = Images {
                    memory,
                    disk: disk.as_ref(),
                    diff: *diff,
                };
                self.commit(store, *tag, *parent, &images, *keep)
            }
            Action::Remove(tag) => {
                let name = tag_name(*tag);
                self.begin(&name, vec![None]);
                store.remove_tags(&[name])
            }
            Action::Move(to, from) => self.retag(store, &tag_name(*to), &tag_name(*from)),
            Action::Revive(tag, which) => {
                let found = self.world.lock().model.any(*which);
                let name = tag_name(*tag);
                let id = found.ok_or_else(|| Error::NotFound { name: name.clone() })?;
                let content = self.content_of(store, id);
                self.begin(&name, vec![content]);
                store.set_tag(&name, id, true)
            }
            Action::Gc(keep_percent) => {
                let options = GcOptions {
                    keep_percent: *keep_percent,
                    ..GcOptions::default()
                };
                store.gc(options, &Silent).map(|_| ())
            }
            Action::Optimize(most_bytes) => {
                let options = OptimizeOptions {
                    most_bytes: most_bytes.map(u64::from),
                    ..OptimizeOptions::default()
                };
                store.optimize(options, &Silent).map(|_| ())
            }
            Action::Verify(read_data) => {
                let report = store.verify(*read_data, &Silent)?;
                let shared = self.world.lock();
                // What the disk cannot read is damage.
                let refused = shared.is_refused(self.number);
                let excused = shared.is_damaged() || refused;
                drop(shared);
                if !report.findings.is_empty() && !excused {
                    let what = describe_findings(&report.findings);
                    self.world.fail("verify cries wolf", what);
                }
                Ok(())
            }
            Action::Read(tag) => self.read(store, &tag_name(*tag)),
            Action::Pin(tag) => {
                let (id, pin) = store.pin(&tag_name(*tag))?;
                self.hold(store, id, pin);
                Ok(())
            }
            Action::Repair | Action::Upgrade | Action::Damage(..) => Ok(()),
        }
    }

    fn begin(&mut self, tag: &str, values: Vec<Value>) {
        let mut shared = self.world.lock();
        let change = shared.model.begin(self.op.number, tag, values.clone());
        self.done.changes.push(change);
        self.done.value = Some(values);
    }

    fn commit(
        &mut self,
        store: &Store,
        tag: u8,
        parent: Parent,
        images: &Images<'_>,
        keep: bool,
    ) -> Result<(), Error> {
        let mut choice = match parent {
            Parent::Tag(parent) => ParentChoice::Named(tag_name(parent)),
            Parent::Nothing => ParentChoice::Nothing,
            Parent::Automatic => ParentChoice::Automatic,
        };
        let mut base = None;
        if let Parent::Tag(parent) = parent
            && images.diff
        {
            // By its id, so that what the changes apply to is known.
            let name = tag_name(parent);
            let found = self.quietly(|| store.tag(&name))?;
            let id = found.ok_or(Error::NotFound { name })?;
            choice = ParentChoice::Named(id.to_string());
            let content = self.content_of(store, id);
            base = Some(content.ok_or(Error::NotFound {
                name: id.to_string(),
            })?);
        }
        let content = Arc::new(images.content(base.as_deref()));
        self.begin(&tag_name(tag), vec![Some(content.clone())]);
        let request = CommitRequest {
            tag: tag_name(tag),
            replace: true,
            parent: choice,
            inputs: images.inputs(),
            keep,
            ..CommitRequest::default()
        };
        let committed = store.commit(&request, &Silent)?;
        self.done.committed = Some(committed.id);
        let mut shared = self.world.lock();
        shared.model.know(committed.id, content.clone());
        if let Some(pin) = committed.pin {
            shared.held.push(Held {
                actor: self.number,
                id: committed.id,
                content,
            });
            drop(shared);
            self.process.pins.push(pin);
        }
        Ok(())
    }

    fn retag(&mut self, store: &Store, to: &str, from: &str) -> Result<(), Error> {
        let id = store.resolve(from)?;
        let Some(content) = self.content_of(store, id) else {
            // It has been collected since, or the disk has lost it.
            return Err(Error::NotFound {
                name: from.to_owned(),
            });
        };
        self.begin(to, vec![Some(content)]);
        store.set_tag(to, id, true)
    }

    fn read(&mut self, store: &Store, tag: &str) -> Result<(), Error> {
        let (id, pin) = store.pin(tag)?;
        let excused = self.world.lock().is_damaged();
        let actor = self.actor;
        let content = store
            .manifest(id)
            .map_err(anyhow::Error::from)
            .and_then(|manifest| content::read(store, &manifest, &mut || actor.pause("a page")));
        drop(pin);
        match content {
            Ok(content) => {
                let known = self.world.lock().model.content(id);
                if let Some(known) = known.filter(|known| **known != content) {
                    let what = format!("{tag} is {content:?} and not {known:?}");
                    self.world.fail("wrong bytes", what);
                }
                Ok(())
            }
            Err(error) => match error.downcast::<Error>() {
                Ok(error) => Err(error),
                Err(_) if excused => Ok(()),
                Err(error) => {
                    self.world.fail("wrong bytes", format!("{tag}: {error}"));
                    Ok(())
                }
            },
        }
    }

    fn hold(&mut self, store: &Store, id: SnapshotId, pin: Pin) {
        self.process.pins.push(pin);
        let Some(content) = self.content_of(store, id) else {
            return;
        };
        self.world.lock().held.push(Held {
            actor: self.number,
            id,
            content,
        });
    }

    /// What a snapshot holds, which is nobody's step.
    fn content_of(&self, store: &Store, id: SnapshotId) -> Option<Arc<Content>> {
        if let Some(known) = self.world.lock().model.content(id) {
            return Some(known);
        }
        let content = self.quietly(|| reads_as(store, id)).ok()?;
        let content = Arc::new(content);
        self.world.lock().model.know(id, content.clone());
        Some(content)
    }

    /// Does something that is none of the history's steps.
    fn quietly<T>(&self, work: impl FnOnce() -> T) -> T {
        snapstore_store::sim::unobserved(work)
    }
}

/// What a commit is given.
struct Images<'a> {
    memory: &'a ImageContent,
    disk: Option<&'a ImageContent>,
    diff: bool,
}

impl Images<'_> {
    fn inputs(&self) -> Vec<snapstore_store::Input> {
        let kind = if self.diff {
            InputKind::Diff
        } else {
            InputKind::Full
        };
        let disk = self.disk.map(|disk| disk.input("disk0", InputKind::Full));
        let memory = self.memory.input("memory", kind);
        std::iter::once(memory).chain(disk).collect()
    }

    /// What the snapshot is to hold.
    fn content(&self, base: Option<&Content>) -> Content {
        let mut content = base.cloned().unwrap_or_default();
        let old = content.get("memory").cloned();
        let memory = match old {
            Some(old) => old.with(self.memory),
            None => self.memory.clone(),
        };
        content.insert("memory".to_owned(), memory);
        if let Some(disk) = self.disk {
            content.insert("disk0".to_owned(), disk.clone());
        }
        content
    }
}
