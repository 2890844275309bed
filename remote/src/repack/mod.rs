//! A collection of a bucket, and then what no collection frees: packs of which only a part is
//! needed. That part is written anew, as a push does it ([`crate::protocol::repack`]), and a
//! second collection deletes what is old.
//!
//! `options` says how much, `usage` what is needed of a pack, `plan` which packs are worth it,
//! `snapshot` which snapshots need them, `read` what is in
//! them, `damage` what cannot be read, `build` what becomes of the rest.

mod build;
mod damage;
mod options;
mod plan;
mod read;
mod snapshot;
mod usage;

use serde::Serialize;
use snapstore_store::{PageSize, Progress};

use self::build::Build;
use self::damage::{Damage, told};
pub use self::options::RepackOptions;
use self::plan::Plan;
use self::read::Reader;
use self::snapshot::Snapshot;
use crate::error::{Error, Result};
use crate::protocol::{self, Collected, Heads, Options, RefKey};
use crate::remote::{Remote, block_on, who};
use crate::verify::Finding;

/// About so much is written in one session: a collection elsewhere waits for its end, and what
/// a host that is killed has done by then is done again.
const SESSION_BYTES: u64 = 1 << 30;

/// So many sessions at most in one collection.
const MOST_SESSIONS: u32 = 1 << 10;

/// What was repacked, or would be.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Repacked {
    /// Packs that are needed no more, since what was needed of them is in new ones.
    pub packs: u64,
    /// How long they are.
    pub packs_bytes: u64,
    /// How much of them was needed.
    pub needed_bytes: u64,
    /// Snapshots that have new heads.
    pub snapshots: u64,
    /// Pages that were copied.
    pub pages: u64,
    /// Bytes of packs that were read.
    pub read_bytes: u64,
    /// Bytes of packs, heads and hooks that were written.
    pub written_bytes: u64,
    /// Repacks that were given up, and were finished.
    pub finished: u64,
    /// Packs that are partly needed, and stay: for the limit, or since it costs too much.
    pub left: u64,
    /// What is damaged or gone: nothing that needs it was repacked.
    pub damaged: Vec<Finding>,
    /// Whether something of it was written that nobody needs.
    #[serde(skip)]
    gave_up: bool,
}

/// What a collection did, and the repack in it.
#[derive(Debug, Default)]
pub struct Gc {
    /// What was deleted.
    pub collected: Collected,
    /// What was repacked.
    pub repacked: Repacked,
    /// Why the runs of hooks were not tidied, if they were not. The next collection does it.
    pub untidied: Option<Error>,
    /// What ended the repack before its time, or the collection after it.
    pub failed: Option<Error>,
}

impl Remote {
    /// Collects what no tag and no view needs, and repacks packs that are partly needed.
    ///
    /// What fails once it was collected is told beside what was done: tags name what they named
    /// before.
    ///
    /// # Errors
    /// As [`protocol::collect`].
    pub fn gc(&self, options: RepackOptions, progress: &(dyn Progress + Sync)) -> Result<Gc> {
        let dry_run = options.dry_run;
        let mut heads = Heads::default();
        let (collected, tidied) = self.collect_with(Options { dry_run }, &mut heads)?;
        let mut gc = Gc {
            collected,
            untidied: tidied.err(),
            ..Gc::default()
        };
        // What is old could not be deleted then.
        if options.percent == 0 || gc.collected.not_deleted.is_some() {
            return Ok(gc);
        }
        let done = self.repack(&options, &mut heads, &mut gc.repacked, progress);
        gc.failed = done.err();
        let repacked = &gc.repacked;
        let leaves_something =
            repacked.packs > 0 && !dry_run || repacked.finished > 0 || repacked.gave_up;
        if leaves_something && gc.failed.is_none() {
            match self.collect_with(Options::default(), &mut heads) {
                Ok((then, tidied)) => {
                    gc.collected.add(then);
                    gc.untidied = tidied.err();
                }
                Err(error) => gc.failed = Some(error),
            }
        }
        Ok(gc)
    }

    fn repack(
        &self,
        options: &RepackOptions,
        heads: &mut Heads,
        done: &mut Repacked,
        progress: &(dyn Progress + Sync),
    ) -> Result<()> {
        let mut damage = Damage::default();
        let repacked = self.repack_but(options, heads, (done, &mut damage), progress);
        done.damaged = damage.findings;
        repacked
    }

    /// The same, but for what is damaged.
    fn repack_but(
        &self,
        options: &RepackOptions,
        heads: &mut Heads,
        (done, damage): (&mut Repacked, &mut Damage),
        progress: &(dyn Progress + Sync),
    ) -> Result<()> {
        let page_size = PageSize::from_bytes(self.page_bytes()?)?;
        let who = who();
        if !options.dry_run {
            done.finished = block_on(protocol::finish_cut_off(self, &who))?;
        }
        for _ in 0..MOST_SESSIONS {
            let mut reader = Reader::new(self, page_size);
            let left_bytes = options.most_bytes.saturating_sub(done.written_bytes);
            let most = match options.dry_run {
                true => (u64::MAX, left_bytes),
                false => (SESSION_BYTES, left_bytes),
            };
            let plan = Plan::of(&mut reader, heads, options, most, damage)?;
            done.left = plan.left + damage.passed.len() as u64;
            if plan.looks_on {
                done.read_bytes += reader.read_bytes();
                continue;
            }
            if plan.is_empty() || options.dry_run {
                done.read_bytes += reader.read_bytes();
                done.plans(&plan);
                done.snapshots += plan.snapshots.len() as u64;
                break;
            }
            let records: Vec<RefKey> = plan.snapshots.iter().map(|it| it.record.clone()).collect();
            let mut work = Build::new(&plan, &mut reader, progress);
            let result = block_on(protocol::repack(self, &records, &who, &mut work));
            done.pages += work.pages;
            done.written_bytes += work.written_bytes;
            let wrong = work.wrong.take();
            done.read_bytes += reader.read_bytes();
            match (result, wrong) {
                (Ok(written), _) => {
                    done.snapshots += written.len() as u64;
                    // What was changed meanwhile may need the old packs yet.
                    let is_all = written.len() == records.len();
                    if is_all {
                        done.plans(&plan);
                    }
                    if !plan.has_more || !is_all {
                        break;
                    }
                }
                (Err(_), Some((error, packs))) => {
                    done.gave_up = true;
                    let mut tags = Vec::new();
                    for Snapshot {
                        record, packs: of, ..
                    } in &plan.snapshots
                    {
                        let is_needed = packs.iter().any(|pack| of.contains(pack));
                        // If none counts any more, nothing is damaged.
                        if is_needed && snapshot::counts(self, record)? {
                            tags.push(record.tag.clone());
                        }
                    }
                    if !tags.is_empty() {
                        damage.add(told(&error), tags);
                        damage.packs.extend(packs);
                    }
                }
                (Err(error), None) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

impl Repacked {
    fn plans(&mut self, plan: &Plan) {
        self.packs += plan.packs.len() as u64;
        for one in plan.packs.values() {
            self.packs_bytes += one.len_bytes;
            self.needed_bytes += one.needed_bytes;
        }
    }
}
