//! The machine on which a history happens: one actor goes on at a time, and
//! before each of its steps it is decided whether another one goes on instead,
//! or whether something goes wrong.

mod observer;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use fastrand::Rng;
use snapstore_store::SnapshotId;
use snapstore_store::sim::StepKind;

use super::actor::Held;
use super::disk::Disk;
use super::model::Model;
use super::plan::{Action, Class, Mishap, OpNumber, Plan, Preemption, Schedule, Seam};
use super::sets::Sets;
pub use observer::Actor;

/// With what an operation unwinds whose process is killed.
pub struct Killed;

/// Why a history is not as it should be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure {
    /// What was violated, as a word to compare failures by.
    pub rule: &'static str,
    /// What happened.
    pub what: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.rule, self.what)
    }
}

#[derive(Clone, PartialEq, Eq)]
enum Status {
    Ready,
    /// Waits for a lock.
    Blocked(PathBuf),
    Done,
}

/// An operation under way.
pub struct Running {
    /// Which.
    pub op: OpNumber,
    /// How many steps it has begun.
    pub steps: u32,
    /// Per fault of it, how far its moment has come.
    counted: Vec<u32>,
    /// The same per seam.
    seams: Vec<u32>,
    /// Whether a step of it was made to fail.
    pub refused: bool,
}

struct ActorState {
    status: Status,
    /// How many operations of others are to end before it goes on.
    stalled: u32,
    running: Option<Running>,
    /// Steps since the publish lock was taken.
    publish_steps: Option<u32>,
    /// Files removed since.
    publish_unlinks: u32,
    /// Entries of the index looked up since.
    publish_lookups: u32,
}

/// What everybody shares.
pub struct Shared {
    turn: Option<usize>,
    actors: Vec<ActorState>,
    rng: Rng,
    schedule: Rng,
    /// What a crash leaves.
    pub disk: Disk,
    /// What the tags may name.
    pub model: Model,
    /// What the files of working sets may hold.
    pub sets: Sets,
    /// The power has failed.
    pub cut: bool,
    /// Set once, then everybody ends.
    pub failure: Option<Failure>,
    /// What happened, if it is to be told.
    pub trace: Option<Vec<String>>,
    /// Whether every step is told.
    every_step: bool,
    /// Who was overtaken where.
    pub preemptions: Vec<Preemption>,
    /// Steps of all actors.
    pub total_steps: u64,
    /// Until which of them the disk is full.
    pub full_until: u64,
    /// Indexes in memory, to be freed in the end.
    pub indexes: Vec<u64>,
    /// The most steps that the publish lock was held for, by operation.
    pub longest_publish: HashMap<&'static str, u32>,
    /// Pins that are held.
    pub held: Vec<Held>,
    /// How often the store was compared with the model.
    pub checks: u32,
    /// Steps so far that change the disk, and what pins have begun or ended.
    pub changes: u64,
    /// What that was when the store was last compared with the model.
    pub checked_at: u64,
    /// Damage was done to the disk.
    pub damaged: bool,
    /// How often.
    pub damage_count: u32,
    /// Bytes were flipped, and no repair has looked for them since.
    pub flipped: bool,
    /// The index is lost, and no repair has made it anew.
    pub index_lost: bool,
    /// Tags committed after the damage, which it is no excuse for, and what they were set
    /// to: another operation that is under way may have changed them since.
    pub firm: BTreeMap<String, SnapshotId>,
    /// Repairs under way, or ended halfway.
    pub repairs: u32,
    /// Counts repairs that have begun.
    pub repairs_begun: u32,
    /// A repair has ended halfway, and none has succeeded since.
    pub half_repaired: bool,
}

/// A history happening.
pub struct World {
    /// The store's directory.
    pub root: PathBuf,
    plan: Arc<Plan>,
    shared: Mutex<Shared>,
    wake: Vec<Condvar>,
    /// Parts of packs that cannot be read.
    pub bad: Mutex<Vec<(PathBuf, Range<u64>)>>,
}

impl World {
    /// The world of a plan, whose store is at `root`.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub fn new(root: &Path, plan: Arc<Plan>, trace: bool) -> anyhow::Result<Self> {
        let actors = plan.actors.len();
        let seed = match &plan.schedule {
            Schedule::Random { seed, .. } => *seed,
            Schedule::Seams(_) | Schedule::Fixed(_) => 0,
        };
        Ok(Self {
            root: root.to_owned(),
            shared: Mutex::new(Shared {
                turn: None,
                actors: Vec::new(),
                rng: Rng::with_seed(plan.seed),
                schedule: Rng::with_seed(seed),
                disk: Disk::new(root)?,
                model: Model::new(),
                sets: Sets::default(),
                cut: false,
                failure: None,
                trace: trace.then(Vec::new),
                every_step: std::env::var_os("SIM_STEPS").is_some(),
                preemptions: Vec::new(),
                total_steps: 0,
                full_until: 0,
                indexes: Vec::new(),
                longest_publish: HashMap::new(),
                held: Vec::new(),
                checks: 0,
                changes: 0,
                checked_at: 0,
                damaged: false,
                damage_count: 0,
                flipped: false,
                index_lost: false,
                firm: BTreeMap::new(),
                repairs: 0,
                repairs_begun: 0,
                half_repaired: false,
            }),
            wake: (0..actors).map(|_| Condvar::new()).collect(),
            bad: Mutex::default(),
            plan,
        })
    }

    /// What is to happen.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Whether a bad sector is in what is read.
    #[must_use]
    pub fn is_bad(&self, path: &Path, offset: u64, len: usize) -> bool {
        let bad = self.bad.lock().unwrap_or_else(PoisonError::into_inner);
        let end = offset + len as u64;
        bad.iter()
            .any(|(at, sector)| at == path && offset < sector.end && sector.start < end)
    }

    /// What everybody shares. Not to be held across steps.
    pub fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the actors up: the first one has the turn.
    pub fn begin_phase(&self) {
        let mut shared = self.lock();
        shared.cut = false;
        shared.full_until = 0;
        shared.repairs = 0;
        shared.turn = Some(0);
        shared.actors = (0..self.wake.len())
            .map(|_| ActorState {
                status: Status::Ready,
                stalled: 0,
                running: None,
                publish_steps: None,
                publish_unlinks: 0,
                publish_lookups: 0,
            })
            .collect();
    }

    /// Whether somebody collects in this history.
    pub fn may_be_collected(&self) -> bool {
        let mut ops = self.plan.actors.iter().flatten();
        ops.any(|op| matches!(op.action, Action::Gc(_) | Action::Optimize(_)))
    }

    /// Whether somebody upgrades the store in this history.
    pub fn may_be_upgraded(&self) -> bool {
        let mut ops = self.plan.actors.iter().flatten();
        ops.any(|op| matches!(op.action, Action::Upgrade))
    }

    /// Notes a violation; the first one counts.
    pub fn fail(&self, rule: &'static str, what: String) {
        let mut shared = self.lock();
        shared.tell(|| format!("FAILED {rule}: {what}"));
        shared.failure.get_or_insert(Failure { rule, what });
    }

    /// Waits for an actor's first turn.
    pub fn first_turn(&self, actor: usize) {
        let mut shared = self.lock();
        while shared.turn != Some(actor) {
            shared = wait(&self.wake[actor], shared);
        }
    }

    /// An operation begins.
    pub fn begin_op(&self, actor: usize, op: OpNumber) {
        let faults = self.plan.faults.len();
        let seams = match &self.plan.schedule {
            Schedule::Seams(seams) => seams.len(),
            Schedule::Random { .. } | Schedule::Fixed(_) => 0,
        };
        let mut shared = self.lock();
        shared.actors[actor].running = Some(Running {
            op,
            steps: 0,
            counted: vec![0; faults],
            seams: vec![0; seams],
            refused: false,
        });
    }

    /// An operation has ended.
    pub fn end_op(&self, actor: usize) -> Option<Running> {
        let mut shared = self.lock();
        for (other, state) in shared.actors.iter_mut().enumerate() {
            if other != actor {
                state.stalled = state.stalled.saturating_sub(1);
            }
        }
        shared.actors[actor].publish_steps = None;
        shared.actors[actor].running.take()
    }

    /// An actor has nothing more to do.
    pub fn finish(&self, actor: usize) {
        let mut shared = self.lock();
        shared.actors[actor].status = Status::Done;
        match shared.next_after(actor) {
            Some(next) => {
                shared.turn = Some(next);
                self.wake[next].notify_one();
            }
            None => shared.turn = None,
        }
    }

    /// Gives the turn to `next` and waits to get it back.
    fn switch<'a>(
        &'a self,
        mut shared: MutexGuard<'a, Shared>,
        actor: usize,
        next: usize,
    ) -> MutexGuard<'a, Shared> {
        shared.turn = Some(next);
        self.wake[next].notify_one();
        while shared.turn != Some(actor) {
            shared = wait(&self.wake[actor], shared);
        }
        shared
    }

    /// Lets somebody else go on if that is what the schedule says.
    fn maybe_preempt<'a>(
        &'a self,
        mut shared: MutexGuard<'a, Shared>,
        actor: usize,
        kind: StepKind,
        path: &Path,
        what: &dyn Fn() -> String,
    ) -> MutexGuard<'a, Shared> {
        let Some(running) = &shared.actors[actor].running else {
            return shared;
        };
        let (op, step) = (running.op, running.steps);
        let preemption = match &self.plan.schedule {
            Schedule::Random { one_in, .. } => {
                let others = shared.runnable(actor);
                let one_in = match Class::Seams.holds(kind, path) {
                    true => (one_in / 4).max(2),
                    false => *one_in,
                };
                if others.is_empty() || shared.schedule.u32(..one_in) != 0 {
                    None
                } else {
                    let stall = match shared.schedule.u8(..3) {
                        0 => shared.schedule.u32(1..=4),
                        _ => 0,
                    };
                    let by = others[shared.schedule.usize(..others.len())];
                    Some(Preemption {
                        op,
                        step,
                        by,
                        stall,
                    })
                }
            }
            Schedule::Seams(seams) => {
                let found = shared.seam(seams, actor, kind, path);
                let others = shared.runnable(actor);
                let found = found.filter(|_| !others.is_empty());
                found.map(|seam| Preemption {
                    op,
                    step,
                    by: others[seam.by % others.len()],
                    stall: seam.stall,
                })
            }
            Schedule::Fixed(preemptions) => {
                let found = preemptions
                    .iter()
                    .find(|at| at.op == op && at.step == step)
                    .copied();
                found.filter(|at| shared.runnable(actor).contains(&at.by))
            }
        };
        let Some(preemption) = preemption else {
            return shared;
        };
        shared.tell(|| format!("actor {actor} is overtaken before {}", what()));
        shared.preemptions.push(preemption);
        shared.actors[actor].stalled = preemption.stall;
        self.switch(shared, actor, preemption.by)
    }
}

impl Shared {
    /// Adds a line to the trace.
    pub fn tell(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(line());
        }
    }

    /// Chance for something else.
    pub fn fork_rng(&mut self) -> Rng {
        self.rng.fork()
    }

    /// Whether something may be unreadable that `verify` then has to name.
    #[must_use]
    pub fn is_damaged(&self) -> bool {
        self.damaged || self.index_lost
    }

    /// Whether everybody is to end.
    fn is_over(&self) -> bool {
        self.cut || self.failure.is_some()
    }

    /// Others that can go on.
    fn runnable(&self, actor: usize) -> Vec<usize> {
        let others = self.actors.iter().enumerate();
        others
            .filter(|(other, it)| *other != actor && it.status == Status::Ready && it.stalled == 0)
            .map(|(other, _)| other)
            .collect()
    }

    /// Who goes on when `actor` cannot.
    fn next_after(&mut self, actor: usize) -> Option<usize> {
        let count = self.actors.len();
        let order = || (1..=count).map(move |step| (actor + step) % count);
        let ready = |it: &ActorState| it.status == Status::Ready;
        let next = order()
            .find(|other| ready(&self.actors[*other]) && self.actors[*other].stalled == 0)
            .or_else(|| order().find(|other| ready(&self.actors[*other])));
        if let Some(next) = next {
            self.actors[next].stalled = 0;
            return Some(next);
        }
        let blocked = order().find(|other| self.actors[*other].status != Status::Done)?;
        if !self.is_over() {
            let what = "everybody waits for a lock".to_owned();
            self.tell(|| format!("FAILED deadlock: {what}"));
            self.failure = Some(Failure {
                rule: "deadlock",
                what,
            });
        }
        Some(blocked)
    }

    /// What the plan says is to go wrong at this step.
    fn mishap(&mut self, plan: &Plan, actor: usize, kind: StepKind, path: &Path) -> Option<Mishap> {
        let running = self.actors[actor].running.as_mut()?;
        let mut found = None;
        for (fault, counted) in plan.faults.iter().zip(&mut running.counted) {
            if fault.op == running.op && fault.at.has_come(counted, kind, path) {
                found = found.or(Some(fault.mishap));
            }
        }
        found
    }

    /// Where the plan says that this step is overtaken.
    fn seam(&mut self, seams: &[Seam], actor: usize, kind: StepKind, path: &Path) -> Option<Seam> {
        let running = self.actors[actor].running.as_mut()?;
        let mut found = None;
        for (seam, counted) in seams.iter().zip(&mut running.seams) {
            if seam.op == running.op && seam.at.has_come(counted, kind, path) {
                found = found.or(Some(*seam));
            }
        }
        found
    }

    /// Whether a step of what this actor does was made to fail.
    #[must_use]
    pub fn is_refused(&self, actor: usize) -> bool {
        let running = self.actors[actor].running.as_ref();
        running.is_some_and(|running| running.refused)
    }

    fn refuse(&mut self, actor: usize) {
        if let Some(running) = &mut self.actors[actor].running {
            running.refused = true;
        }
    }
}

fn wait<'a>(condition: &Condvar, shared: MutexGuard<'a, Shared>) -> MutexGuard<'a, Shared> {
    condition
        .wait(shared)
        .unwrap_or_else(PoisonError::into_inner)
}
