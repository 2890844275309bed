//! Making a history that fails short enough to be understood.

use std::time::{Duration, Instant};

use snapstore_store::sim::Fault;

use super::history::Crew;
use super::plan::{Action, Plan, Schedule};
use super::world::Failure;

/// Schedules that are tried for a history that does not fail with its own.
const SCHEDULES: u64 = 12;

/// A history that fails.
pub struct Failing {
    /// The history.
    pub plan: Plan,
    /// Why.
    pub failure: Failure,
}

/// Leaves out of a failing history what it fails without: operations, faults,
/// pages, and who overtakes whom. Stops after `limit`.
///
/// # Errors
/// If the machine does not allow it.
pub fn shrink(
    crew: &Crew,
    plan: &Plan,
    failure: &Failure,
    fault: Option<Fault>,
    limit: Duration,
) -> anyhow::Result<Failing> {
    let mut shrinker = Shrinker {
        crew,
        fault,
        rule: failure.rule,
        until: Instant::now() + limit,
        best: Failing {
            plan: plan.clone(),
            failure: failure.clone(),
        },
    };
    // From chance to a list, of which parts can be left out.
    if let Some(fixed) = shrinker.fixed(plan)? {
        shrinker.take(fixed)?;
    }
    loop {
        let before = shrinker.size();
        shrinker.drop_ops()?;
        shrinker.drop_faults()?;
        shrinker.drop_preemptions()?;
        shrinker.simplify_ops()?;
        if shrinker.size() == before || Instant::now() > shrinker.until {
            return Ok(shrinker.best);
        }
    }
}

struct Shrinker<'a> {
    crew: &'a Crew,
    fault: Option<Fault>,
    rule: &'static str,
    until: Instant,
    best: Failing,
}

impl Shrinker<'_> {
    fn size(&self) -> (usize, usize, usize, usize) {
        let plan = &self.best.plan;
        let pages = plan.actors.iter().flatten().map(|op| pages(&op.action));
        let preemptions = match &plan.schedule {
            Schedule::Random { .. } | Schedule::Seams(_) => usize::MAX,
            Schedule::Fixed(list) => list.len(),
        };
        (plan.len(), plan.faults.len(), preemptions, pages.sum())
    }

    /// The plan with the list of those who were overtaken when it was run.
    fn fixed(&self, plan: &Plan) -> anyhow::Result<Option<Plan>> {
        let outcome = self.crew.run_history(plan, self.fault, false)?;
        let fails = outcome.failure.is_some_and(|it| it.rule == self.rule);
        let mut plan = plan.clone();
        plan.schedule = Schedule::Fixed(outcome.preemptions);
        Ok(fails.then_some(plan))
    }

    /// Takes a plan if it fails as the first one did.
    fn take(&mut self, plan: Plan) -> anyhow::Result<bool> {
        if Instant::now() > self.until {
            return Ok(false);
        }
        let outcome = self.crew.run_history(&plan, self.fault, false)?;
        match outcome.failure.filter(|it| it.rule == self.rule) {
            Some(failure) => {
                self.best = Failing { plan, failure };
                Ok(true)
            }
            None => Ok(false),
        }
    }

    /// The same, and looks for another schedule if it does not fail.
    fn take_somehow(&mut self, plan: Plan) -> anyhow::Result<bool> {
        if self.take(plan.clone())? {
            return Ok(true);
        }
        for seed in 0..SCHEDULES {
            let mut other = plan.clone();
            other.schedule = Schedule::Random {
                seed,
                one_in: [3, 8, 20, 60][seed as usize % 4],
            };
            if Instant::now() > self.until {
                return Ok(false);
            }
            if let Some(fixed) = self.fixed(&other)?
                && self.take(fixed)?
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn drop_ops(&mut self) -> anyhow::Result<()> {
        let mut actor = 0;
        while actor < self.best.plan.actors.len() {
            // A whole actor first. Others are known by their places.
            if !self.best.plan.actors[actor].is_empty() {
                let mut plan = self.best.plan.clone();
                plan.actors[actor].clear();
                self.take_somehow(plan)?;
            }
            let mut at = self.best.plan.actors[actor].len();
            while at > 0 {
                at -= 1;
                if at < self.best.plan.actors[actor].len() {
                    let mut plan = self.best.plan.clone();
                    plan.actors[actor].remove(at);
                    self.take_somehow(plan)?;
                }
            }
            actor += 1;
        }
        Ok(())
    }

    fn drop_faults(&mut self) -> anyhow::Result<()> {
        let mut at = self.best.plan.faults.len();
        while at > 0 {
            at -= 1;
            let mut plan = self.best.plan.clone();
            plan.faults.remove(at);
            self.take_somehow(plan)?;
        }
        Ok(())
    }

    fn drop_preemptions(&mut self) -> anyhow::Result<()> {
        let Schedule::Fixed(list) = &self.best.plan.schedule else {
            return Ok(());
        };
        let mut part = list.len().div_ceil(2);
        while part > 0 {
            let mut from = 0;
            loop {
                let Schedule::Fixed(list) = &self.best.plan.schedule else {
                    return Ok(());
                };
                if from >= list.len() {
                    break;
                }
                let mut list = list.clone();
                list.drain(from..(from + part).min(list.len()));
                let mut plan = self.best.plan.clone();
                plan.schedule = Schedule::Fixed(list);
                if !self.take(plan)? {
                    from += part;
                }
            }
            part /= 2;
        }
        Ok(())
    }

    fn simplify_ops(&mut self) -> anyhow::Result<()> {
        for actor in 0..self.best.plan.actors.len() {
            for at in 0..self.best.plan.actors[actor].len() {
                self.simplify(actor, at)?;
            }
        }
        Ok(())
    }

    fn simplify(&mut self, actor: usize, at: usize) -> anyhow::Result<()> {
        let change = |plan: &Plan, change: &dyn Fn(&mut Action)| {
            let mut plan = plan.clone();
            change(&mut plan.actors[actor][at].action);
            plan
        };
        let Action::Commit {
            memory, disk, keep, ..
        } = &self.best.plan.actors[actor][at].action
        else {
            return Ok(());
        };
        let slots: Vec<u64> = memory.data.keys().copied().collect();
        if disk.is_some() {
            let plan = change(&self.best.plan, &|action| {
                if let Action::Commit { disk, .. } = action {
                    *disk = None;
                }
            });
            self.take(plan)?;
        } else if *keep {
            let plan = change(&self.best.plan, &|action| {
                if let Action::Commit { keep, .. } = action {
                    *keep = false;
                }
            });
            self.take(plan)?;
        }
        for slot in slots {
            let plan = change(&self.best.plan, &|action| {
                if let Action::Commit { memory, .. } = action {
                    memory.data.remove(&slot);
                }
            });
            self.take(plan)?;
        }
        Ok(())
    }
}

fn pages(action: &Action) -> usize {
    match action {
        Action::Commit { memory, disk, .. } => {
            memory.data.len() + disk.as_ref().map_or(0, |disk| disk.data.len())
        }
        _ => 0,
    }
}
