//! Many histories, one after the other.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use snapstore_store::sim::Fault;

use super::draw::Shape;
use super::history::Crew;
use super::plan::Plan;
use super::shrink::shrink;

/// How long a failing history is made shorter.
const SHRINKING: Duration = Duration::from_secs(60);

/// What to run.
#[derive(Clone, Copy, Debug)]
pub struct Campaign {
    /// The first seed.
    pub first_seed: u64,
    /// The most histories.
    pub histories: u64,
    /// The longest time.
    pub time: Duration,
    /// The only shape of histories, if there is to be one.
    pub shape: Option<Shape>,
}

/// How a campaign went.
pub struct Report {
    /// Histories that were run.
    pub histories: u64,
    /// The seed of the first that failed, and why.
    pub failed: Option<(u64, String)>,
    /// The most steps for which the publish lock was held, by operation.
    pub longest_publish: BTreeMap<&'static str, u32>,
}

/// Runs histories until one fails, with a fault put back or none.
///
/// # Errors
/// If the machine does not allow it.
pub fn run(crew: &Crew, campaign: &Campaign, fault: Option<Fault>) -> anyhow::Result<Report> {
    let started = Instant::now();
    let mut report = Report {
        histories: 0,
        failed: None,
        longest_publish: BTreeMap::new(),
    };
    for seed in campaign.first_seed..campaign.first_seed.saturating_add(campaign.histories) {
        if started.elapsed() >= campaign.time {
            break;
        }
        report.histories += 1;
        let outcome = crew.run_history(&Plan::of_shape(campaign.shape, seed), fault, false)?;
        for (name, steps) in outcome.longest_publish {
            let longest = report.longest_publish.entry(name).or_default();
            *longest = (*longest).max(steps);
        }
        if let Some(failure) = outcome.failure {
            report.failed = Some((seed, failure.to_string()));
            break;
        }
    }
    Ok(report)
}

/// Tells the history of a seed, as short as it can be made; `None` if it does not fail.
///
/// # Errors
/// If the machine does not allow it.
pub fn explain(
    crew: &Crew,
    seed: u64,
    shape: Option<Shape>,
    fault: Option<Fault>,
) -> anyhow::Result<Option<String>> {
    let plan = Plan::of_shape(shape, seed);
    let outcome = crew.run_history(&plan, fault, true)?;
    let Some(failure) = outcome.failure else {
        return Ok(None);
    };
    let failing = shrink(crew, &plan, &failure, fault, SHRINKING)?;
    let outcome = crew.run_history(&failing.plan, fault, true)?;
    let mut text = String::new();
    writeln!(text, "The history of seed {seed} fails. Shortened, it is")?;
    write!(text, "{}", failing.plan)?;
    writeln!(text, "What happens:")?;
    for line in outcome.trace {
        writeln!(text, "  {line}")?;
    }
    writeln!(text, "{}", failing.failure)?;
    writeln!(text, "To see it again: make sim SIM_SEED={seed}")?;
    Ok(Some(text))
}

/// How a fault was found.
pub struct Found {
    /// In the how manieth history that the store without the fault gets through.
    pub after: u64,
    /// The seed of it.
    pub seed: u64,
    /// What was violated.
    pub rule: &'static str,
}

/// Puts a fault back and looks for it in the histories of a campaign.
///
/// # Errors
/// If the machine does not allow it.
pub fn hunt(crew: &Crew, fault: Fault, campaign: &Campaign) -> anyhow::Result<Option<Found>> {
    let first = campaign.first_seed;
    for (after, seed) in (1..).zip(first..first.saturating_add(campaign.histories)) {
        let plan = Plan::of_shape(campaign.shape, seed);
        let Some(failure) = crew.run_history(&plan, Some(fault), false)?.failure else {
            continue;
        };
        // What fails without the fault says nothing of it.
        let baseline = crew.run_history(&plan, fault.hidden_by(), false)?;
        if baseline.failure.is_some() {
            continue;
        }
        return Ok(Some(Found {
            after,
            seed,
            rule: failure.rule,
        }));
    }
    Ok(None)
}
