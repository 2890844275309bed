//! Letting a history happen.

use std::collections::{HashMap, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use anyhow::{Context as _, ensure};
use snapstore_store::sim::{Fault, bad_sectors, forget_indexes, put_back};
use snapstore_store::{PageSize, Store};

use super::actor;
use super::check::check;
use super::epilogue::epilogue;
use super::plan::{Op, Plan, Preemption};
use super::world::{Failure, World};

/// The most actors that a history has.
const ACTORS: usize = 4;

type Job = Box<dyn FnOnce() + Send>;

/// Threads that stand for processes. Each is a pool of one for parallel work, so
/// that all that an operation does is done by its actor's thread, in an order
/// that is always the same.
pub struct Crew {
    workers: Vec<Sender<Job>>,
}

/// How a history went.
pub struct Outcome {
    /// What was violated.
    pub failure: Option<Failure>,
    /// Who was overtaken where.
    pub preemptions: Vec<Preemption>,
    /// What happened, if it was to be told.
    pub trace: Vec<String>,
    /// How many steps were made.
    pub steps: u64,
    /// The most steps for which the publish lock was held, by operation.
    pub longest_publish: HashMap<&'static str, u32>,
}

impl Crew {
    /// Starts the threads.
    ///
    /// # Errors
    /// If there are none to be had.
    pub fn new() -> anyhow::Result<Self> {
        let mut workers = Vec::new();
        for number in 0..ACTORS {
            let (sender, jobs) = channel::<Job>();
            thread::Builder::new()
                .name(format!("actor {number}"))
                .spawn(move || work(&jobs))
                .context("starting an actor")?;
            workers.push(sender);
        }
        Ok(Self { workers })
    }

    /// Has the actors do their work at the same time; returns what they return.
    fn run<T: Send + 'static>(
        &self,
        work: Vec<Box<dyn FnOnce() -> T + Send>>,
    ) -> anyhow::Result<Vec<T>> {
        let mut results: Vec<Receiver<T>> = Vec::new();
        for (worker, work) in self.workers.iter().zip(work) {
            let (sender, receiver) = channel();
            let job = move || {
                let _ = sender.send(work());
            };
            let sent = worker.send(Box::new(job));
            ensure!(sent.is_ok(), "an actor has gone");
            results.push(receiver);
        }
        results
            .into_iter()
            .map(|result| result.recv().context("an actor has gone"))
            .collect()
    }

    /// Lets the history of a plan happen, with a fault put back or none.
    ///
    /// # Errors
    /// If the machine does not allow it.
    pub fn run_history(
        &self,
        plan: &Plan,
        fault: Option<Fault>,
        trace: bool,
    ) -> anyhow::Result<Outcome> {
        let dir = tempfile::Builder::new()
            .prefix("snapstore-sim-")
            .tempdir_in(memory())?;
        let root = dir.path().join("store");
        Store::create_in_format(&root, PageSize::KIB_4, plan.format)?;
        let plan = Arc::new(plan.clone());
        let world = Arc::new(World::new(&root, plan.clone(), trace)?);
        let first_index = fs::read_to_string(root.join("index/CURRENT"))?;
        world.lock().indexes.push(first_index.trim().parse()?);
        let mut left: Vec<VecDeque<Op>> = plan
            .actors
            .iter()
            .map(|ops| ops.iter().cloned().collect())
            .collect();
        loop {
            left = self.phase(&world, left, fault)?;
            if world.lock().failure.is_some() {
                break;
            }
            let cut = world.lock().cut;
            if !cut {
                break;
            }
            self.power_cut(&world, fault)?;
            if left.iter().all(VecDeque::is_empty) {
                break;
            }
        }
        if world.lock().failure.is_none() {
            let world = world.clone();
            let work = move || as_told(&world, fault, || epilogue(&world));
            self.run(vec![Box::new(work) as Box<dyn FnOnce() + Send>])?;
        }
        let mut shared = world.lock();
        forget_indexes(shared.indexes.drain(..));
        Ok(Outcome {
            failure: shared.failure.take(),
            preemptions: std::mem::take(&mut shared.preemptions),
            trace: shared
                .trace
                .take()
                .unwrap_or_default()
                .into_iter()
                .map(|line| line.replace(&*root.to_string_lossy(), "STORE"))
                .collect(),
            steps: shared.total_steps,
            longest_publish: std::mem::take(&mut shared.longest_publish),
        })
    }

    fn phase(
        &self,
        world: &Arc<World>,
        ops: Vec<VecDeque<Op>>,
        fault: Option<Fault>,
    ) -> anyhow::Result<Vec<VecDeque<Op>>> {
        world.begin_phase();
        let work = ops.into_iter().enumerate().map(|(number, ops)| {
            let world = world.clone();
            let work = move || as_told(&world, fault, || actor::run(&world, number, ops));
            Box::new(work) as Box<dyn FnOnce() -> VecDeque<Op> + Send>
        });
        self.run(work.collect())
    }

    fn power_cut(&self, world: &Arc<World>, fault: Option<Fault>) -> anyhow::Result<()> {
        let mut shared = world.lock();
        shared.tell(|| "the power is back".to_owned());
        shared.held.clear();
        shared.sets.power_cut();
        if shared.repairs > 0 {
            shared.half_repaired = true;
            shared.repairs = 0;
        }
        let mut rng = shared.fork_rng();
        shared.disk.cut(&mut rng)?;
        drop(shared);
        let world = world.clone();
        let work = move || {
            as_told(&world, fault, || check(&world, true));
        };
        self.run(vec![Box::new(work) as Box<dyn FnOnce() + Send>])?;
        Ok(())
    }
}

/// Does something with a fault put back, on the disk as it is.
fn as_told<T>(world: &Arc<World>, fault: Option<Fault>, work: impl FnOnce() -> T) -> T {
    let seen = world.clone();
    put_back(fault);
    bad_sectors(Some(Arc::new(move |path: &Path, offset, len| {
        seen.is_bad(path, offset, len)
    })));
    let done = work();
    bad_sectors(None);
    put_back(None);
    done
}

fn work(jobs: &Receiver<Job>) {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(1)
        .use_current_thread()
        .build();
    // Without the pool parallel work would be done by others, unobserved.
    let Ok(_pool) = pool else { return };
    for job in jobs {
        job();
    }
}

/// A directory in memory, where flushing costs nothing.
fn memory() -> PathBuf {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() {
        memory.to_owned()
    } else {
        std::env::temp_dir()
    }
}
