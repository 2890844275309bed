//! An actor, as the store sees it: what is done before each of its steps, and what is
//! noted after.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};

use rustix::io::Errno;
use snapstore_store::sim::{Observer, StepKind};

use super::{Failure, Killed, Status, World};
use crate::sim::plan::{Class, Mishap};

/// Changes of the disk that a collection makes under one hold of the publish
/// lock, whatever the store holds; it is to take less of a simulated store at
/// once than of a real one.
const MOST_CHANGES: u32 = 20;
/// Files that it removes there.
const MOST_REMOVED: u32 = 2;
/// Entries of the index that a commit looks up there, whatever its pack holds: three
/// chunks, their bases, and once more if the disk is full.
const MOST_LOOKED_UP: u32 = 12;

fn needs_space(kind: StepKind) -> bool {
    use StepKind as K;
    matches!(kind, K::Create | K::Write | K::MakeDir | K::IndexFlush)
}

/// An actor, as the store sees it.
pub struct Actor {
    world: Arc<World>,
    number: usize,
    dead: AtomicBool,
}

impl Actor {
    /// The actor of this number.
    #[must_use]
    pub fn new(world: Arc<World>, number: usize) -> Self {
        Self {
            world,
            number,
            dead: AtomicBool::new(false),
        }
    }

    /// Begins the process anew.
    pub fn revive(&self) {
        self.dead.store(false, Ordering::Relaxed);
    }

    /// Ends the process: what it still does is nothing any more.
    pub fn kill(&self) {
        self.dead.store(true, Ordering::Relaxed);
    }

    fn die(&self) -> ! {
        self.kill();
        resume_unwind(Box::new(Killed))
    }

    fn is_deaf(&self) -> bool {
        std::thread::panicking()
    }

    /// Its number.
    #[must_use]
    pub fn number(&self) -> usize {
        self.number
    }

    /// A step that is none of the store's.
    pub fn pause(&self, what: &'static str) {
        let _ = self.before(StepKind::ReadPack, Path::new(what));
    }
}

fn describe(kind: StepKind, path: &Path, step: u32) -> String {
    format!("{kind:?} {} (step {step})", path.display())
}

impl Observer for Actor {
    fn before(&self, kind: StepKind, path: &Path) -> io::Result<()> {
        if self.is_dead() {
            return Err(io::Error::other("the process has ended"));
        }
        if self.is_deaf() {
            return Ok(());
        }
        let (world, me) = (&*self.world, self.number);
        let path = path.strip_prefix(&world.root).unwrap_or(path);
        let mut shared = world.lock();
        shared.total_steps += 1;
        shared.changes += u64::from(Class::Changes.holds(kind, path));
        let mut step = 0;
        if let Some(running) = &mut shared.actors[me].running {
            running.steps += 1;
            step = running.steps;
        }
        let state = &mut shared.actors[me];
        state.publish_lookups += u32::from(kind == StepKind::IndexGet);
        if let Some(steps) = &mut state.publish_steps
            && Class::Changes.holds(kind, path)
        {
            *steps += 1;
            state.publish_unlinks += u32::from(kind == StepKind::Unlink);
        }
        let what = || describe(kind, path, step);
        if shared.every_step {
            shared.tell(|| format!("    actor {me}: {}", what()));
        }
        let mut shared = world.maybe_preempt(shared, me, kind, path, &what);
        if shared.is_over() {
            drop(shared);
            self.die();
        }
        let op = shared.actors[me].running.as_ref().map(|it| it.op);
        match shared.mishap(&world.plan, me, kind, path) {
            None => {}
            Some(mishap) => {
                shared.tell(|| format!("{mishap:?} in operation {op:?} before {}", what()));
                match mishap {
                    Mishap::Kill => {
                        drop(shared);
                        self.die();
                    }
                    Mishap::PowerCut => {
                        shared.cut = true;
                        drop(shared);
                        self.die();
                    }
                    Mishap::IoError => {
                        shared.refuse(me);
                        // Repair gives up what it cannot read.
                        if kind == StepKind::ReadPack && shared.repairs > 0 {
                            shared.damaged = true;
                            shared.damage_count += 1;
                            shared.firm.clear();
                        }
                        return Err(Errno::IO.into());
                    }
                    Mishap::DiskFull(steps) => {
                        shared.full_until = shared.total_steps + u64::from(steps);
                    }
                }
            }
        }
        if needs_space(kind) && shared.total_steps < shared.full_until {
            shared.refuse(me);
            shared.tell(|| format!("no space for {}", what()));
            return Err(Errno::NOSPC.into());
        }
        Ok(())
    }

    fn changed(&self, path: &Path) {
        let mut shared = self.world.lock();
        shared.disk.changed(path);
        if path.extension().is_some_and(|it| it == "pack") && !path.exists() {
            // The sectors are others' now, and the disk has room again.
            shared.full_until = shared.full_until.min(shared.total_steps);
            let bad = self.world.bad.lock();
            let mut bad = bad.unwrap_or_else(PoisonError::into_inner);
            bad.retain(|(at, _)| at != path);
        }
    }

    fn synced_file(&self, path: &Path) {
        self.world.lock().disk.synced_file(path);
    }

    fn synced_dir(&self, path: &Path) {
        self.world.lock().disk.synced_dir(path);
    }

    fn locked(&self, path: &Path) {
        if path.ends_with("publish") {
            let mut shared = self.world.lock();
            shared.actors[self.number].publish_steps = Some(0);
            shared.actors[self.number].publish_unlinks = 0;
            shared.actors[self.number].publish_lookups = 0;
        }
    }

    fn released(&self, path: &Path) {
        let mut shared = self.world.lock();
        for actor in &mut shared.actors {
            if actor.status == Status::Blocked(path.to_owned()) {
                actor.status = Status::Ready;
            }
        }
        if path.ends_with("publish")
            && let Some(steps) = shared.actors[self.number].publish_steps.take()
            && !self.is_dead()
            && let Some(running) = &shared.actors[self.number].running
        {
            let op = running.op;
            let ops = self.world.plan.actors.iter().flatten();
            let name = ops
                .into_iter()
                .find(|it| it.number == op)
                .map_or("recovery", |it| it.action.name());
            let longest = shared.longest_publish.entry(name).or_default();
            *longest = (*longest).max(steps);
            // On a full disk a collection removes what is dead at once.
            let removed = shared.actors[self.number].publish_unlinks;
            let full = shared.is_refused(self.number);
            let lookups = shared.actors[self.number].publish_lookups;
            let gc = name == "gc" && !full && (steps > MOST_CHANGES || removed > MOST_REMOVED);
            if gc || name == "commit" && lookups > MOST_LOOKED_UP {
                let what = format!(
                    "for {steps} changes of the disk, {removed} files removed, \
                     {lookups} entries looked up"
                );
                shared.tell(|| format!("FAILED the publish lock is held for long: {what}"));
                shared.failure.get_or_insert(Failure {
                    rule: "the publish lock is held for long",
                    what,
                });
            }
        }
        drop(shared);
        if !self.is_dead() {
            // A lock is released by a destructor. What unwinds out of one leaks what the
            // function was about to return, and with it a lease: then the process is
            // dead, and finds that out at its next step.
            let step = AssertUnwindSafe(|| self.before(StepKind::Unlock, path));
            let _ = catch_unwind(step);
        }
    }

    fn wait_for(&self, path: &Path) -> io::Result<()> {
        if self.is_dead() || self.is_deaf() {
            return Err(io::Error::other("the process has ended"));
        }
        let me = self.number;
        let mut shared = self.world.lock();
        shared.actors[me].status = Status::Blocked(path.to_owned());
        shared.tell(|| format!("actor {me} waits for {}", path.display()));
        if let Some(next) = shared.next_after(me)
            && next != me
        {
            shared = self.world.switch(shared, me, next);
        }
        shared.actors[me].status = Status::Ready;
        let over = shared.is_over();
        drop(shared);
        if over {
            self.die();
        }
        Ok(())
    }

    fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Relaxed)
    }

    fn process_id(&self) -> u32 {
        1000 + self.number as u32
    }

    fn choose(&self, below: usize) -> usize {
        self.world.lock().rng.usize(..below)
    }

    fn now_unix_seconds(&self) -> u64 {
        1_800_000_000 + self.world.lock().total_steps / 100
    }

    fn pack_chunks(&self) -> usize {
        self.world.plan.pack_chunks
    }

    fn note_index(&self, number: u64) {
        self.world.lock().indexes.push(number);
    }
}
