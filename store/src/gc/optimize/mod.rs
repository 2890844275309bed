//! Optimising: what commits wrote cheaply is kept small, and near to what is read with it.
//!
//! In rounds, each of some packs that were not optimised yet:
//!
//! 1. mark, as a collection does;
//! 2. write what is live in these packs into new ones, in the order in which it is read
//!    and better encoded ([`arrange`]). Nothing leads there yet;
//! 3. condemn the packs, as a collection does that will repack them;
//! 4. make the index lead to what was written ([`enter`]);
//! 5. collect: what is dead now is deleted as ever. There is no other way to delete.
//!
//! What is written is charged to the store's account, and known as optimised
//! ([`crate::gc::rewrites`]): a second optimisation leaves it alone, and all of them write
//! a bounded number of bytes. A round that is killed is lost, and no other one: its packs are
//! dead, and what it had condemned is condemned or revived by the next collection. One whose
//! time is over ends with what it has written until then, and the next one goes on there.
//!
//! Packs are condemned only once their copies are written, which takes long: until then
//! commits deduplicate against them as ever.

mod arrange;
mod encode;
mod enter;
mod report;
mod similar;

use std::collections::BTreeSet;
use std::time::Instant;

use crate::error::{Error, Result};
use crate::format::config::StoreFormat;
use crate::gc::mark::Reachability;
use crate::gc::plan::{Decision, GcPlan};
use crate::gc::rewrites::Ledger;
use crate::gc::{GcOptions, GcReport, Merging, mark_roots};
use crate::pack::PackNumber;
use crate::placement::Moved;
use crate::progress::Progress;
use crate::sim;
use crate::store::Store;
use arrange::{Arrangement, Limits, Means, in_order};
pub use report::{OptimizeOptions, OptimizeReport, OptimizeStop};
use similar::Similar;

/// Live bytes that a round takes on.
const ROUND_BYTES: u64 = 1 << 30;

/// Few in the simulator, whose stores are small.
fn round_bytes() -> u64 {
    match sim::is_simulated() {
        true => 8 << 10,
        false => ROUND_BYTES,
    }
}

impl Store {
    /// Rewrites what commits wrote so that it takes less and is read faster, and frees what
    /// nothing needs. What was optimised before is left alone.
    ///
    /// # Errors
    /// As [`Store::gc`]. [`Error::OldFormat`] if the store has to be upgraded first.
    pub fn optimize(
        &self,
        options: OptimizeOptions,
        progress: &dyn Progress,
    ) -> Result<OptimizeReport> {
        let span = tracing::debug_span!("optimize");
        let _entered = span.enter();
        let until = options.within.map(|within| Instant::now() + within);
        let _collect = match options.dry_run {
            true => self.collect_lock_to_read()?,
            false => Some(self.collect_lock()?),
        };
        if self.format() == StoreFormat::One || self.is_upgrading() {
            let path = self.layout.config();
            return Err(Error::OldFormat { path });
        }
        let mut report = OptimizeReport::default();
        while self.optimize_some(options, until, progress, &mut report)? {}
        report.waiting_for.sort();
        report.waiting_for.dedup();
        Ok(report)
    }

    /// One round; returns whether there may be another one.
    fn optimize_some(
        &self,
        options: OptimizeOptions,
        until: Option<Instant>,
        progress: &dyn Progress,
        report: &mut OptimizeReport,
    ) -> Result<bool> {
        // In this order, as a collection looks at them.
        let numbers = self.chunks.packs().published()?;
        let roots = self.roots()?;
        let mut reach = Reachability::of_store(&self.chunks)?;
        let mut marked = BTreeSet::new();
        mark_roots(&mut reach, &roots, &mut marked, progress)?;
        self.cancel.check()?;
        let mut plan = GcPlan::make(self.chunks.packs(), &numbers, reach.marks(), 0)?;
        plan.spare_marked(reach.marks(), reach.exact());
        let mut ledger = Ledger::read(&self.layout)?;
        ledger.see(&plan);
        let sources = choose(&mut plan, &ledger, &reach, options.dry_run, report);
        (report.committed_bytes, report.rewritten_bytes) =
            (ledger.committed_bytes(), ledger.rewritten_bytes());
        if options.dry_run || sources.is_empty() {
            return Ok(false);
        }
        let is_late = until.is_some_and(|until| Instant::now() >= until);
        if is_late {
            report.stopped_by = Some(OptimizeStop::Time);
            for pack in plan.with(Decision::Repack) {
                report.put_off(pack);
            }
            return Ok(false);
        }
        let asked = options.most_bytes.unwrap_or(u64::MAX);
        let limits = Limits {
            until,
            allowance: ledger.allowance(&plan),
            asked_bytes: asked.saturating_sub(report.written_bytes),
        };
        let mut similar = Similar::new();
        let live_chunks = plan.with(Decision::Repack).map(|pack| pack.live_chunks);
        progress.begin("rewrite", live_chunks.sum());
        let mut arrangement = Arrangement::new(Means {
            store: self,
            places: reach.places(),
            ledger: &mut ledger,
            sources: &sources,
            hints: !reach.needs_one_copy(),
            limits,
            similar: &mut similar,
            progress,
        });
        for id in in_order(&self.chunks, &roots)? {
            arrangement.add_snapshot(id)?;
            if arrangement.stopped_by.is_some() {
                break;
            }
        }
        arrangement.finish()?;
        let Arrangement {
            sealed,
            arranged,
            damaged,
            stopped_by,
            written_bytes,
            ..
        } = arrangement;
        let moved: Vec<Moved> = arranged
            .into_iter()
            .map(|(key, chunk)| chunk.moved(key))
            .collect();
        report.written_bytes += written_bytes;
        report.not_copied.extend(damaged);
        let mut condemning = GcReport {
            plan,
            ..GcReport::default()
        };
        self.condemn_planned(&mut reach, &mut marked, &mut condemning)?;
        drop(reach);
        // From here on the index may lead to them.
        sealed.iter().for_each(|pack| pack.keep());
        let entered = enter::enter(self, &moved, &sources)?;
        drop(sealed);
        tracing::debug!(packs = sources.len(), bytes = written_bytes, "rewritten");
        let is_whole = stopped_by.is_none() && entered.waiting_for.is_empty();
        if is_whole {
            ledger.keep(&sources)?;
        }
        let collected = self.collect(
            GcOptions {
                dry_run: false,
                keep_percent: match is_whole {
                    true => GcOptions::default().keep_percent,
                    false => 0,
                },
            },
            Merging::No,
            &crate::Silent,
        )?;
        let ledger = Ledger::read(&self.layout)?;
        report.rewritten_bytes = ledger.rewritten_bytes();
        report.freed_bytes += collected.freed_bytes - written_bytes.cast_signed();
        report.waiting_for.extend(entered.waiting_for);
        report.waiting_for.extend(collected.waiting_for);
        if is_whole {
            return Ok(true);
        }
        report.stopped_by = stopped_by.or(Some(OptimizeStop::Writers));
        (report.left_packs, report.left_bytes) = (0, 0);
        for pack in &collected.plan.packs {
            if pack.decision == Decision::Delete || ledger.is_kept(pack) {
                continue;
            }
            if sources.contains(&pack.number) {
                report.put_off(pack);
            } else {
                report.left_packs += 1;
                report.left_bytes += pack.live_bytes;
            }
        }
        Ok(false)
    }
}

/// Chooses the packs of the next round, as many as are allowed, and plans to repack them.
/// All for a plan that is only told.
fn choose(
    plan: &mut GcPlan,
    ledger: &Ledger,
    reach: &Reachability<'_>,
    all: bool,
    report: &mut OptimizeReport,
) -> BTreeSet<PackNumber> {
    let mut allowance = ledger.allowance(plan);
    let mut chosen = BTreeSet::new();
    let mut bytes = 0;
    (report.left_packs, report.left_bytes, report.stopped_by) = (0, 0, None);
    for pack in &mut plan.packs {
        let is_there = pack.decision == Decision::Keep && pack.mergeable && pack.live_chunks > 0;
        if !is_there || ledger.is_kept(pack) || reach.exact().contains(&pack.number) {
            continue;
        }
        let is_allowed = pack.live_bytes <= allowance;
        if !is_allowed || bytes >= round_bytes() && !all {
            report.left_packs += 1;
            report.left_bytes += pack.live_bytes;
            if !is_allowed {
                report.stopped_by = Some(OptimizeStop::Allowance);
            }
            continue;
        }
        allowance -= pack.live_bytes;
        bytes += pack.live_bytes;
        report.packs += 1;
        report.pack_bytes += pack.file_bytes;
        pack.decision = Decision::Repack;
        chosen.insert(pack.number);
    }
    if all {
        report.written_bytes = bytes;
    }
    chosen
}
