//! Histories of the simulator: docs/TESTING.md, "The simulator".

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use snapstore_tests::sim::plan::Plan;
use snapstore_tests::sim::{Campaign, Crew, explain, run};

/// How many histories are run unless `SIM_HISTORIES` says otherwise: about a
/// minute and a half of one core.
const HISTORIES: u64 = 6000;

#[test]
fn what_was_acknowledged_is_kept_in_every_history() -> Result<()> {
    let histories = match std::env::var("SIM_HISTORIES") {
        Ok(number) => number.parse()?,
        Err(_) => HISTORIES,
    };
    let crew = Crew::new()?;
    let campaign = Campaign {
        first_seed: 0,
        histories,
        time: Duration::MAX,
        shape: None,
    };
    let report = run(&crew, &campaign, None)?;
    println!("{} histories", report.histories);
    for (name, steps) in &report.longest_publish {
        println!("the publish lock was held for {steps} steps of {name}");
    }
    if let Some((seed, _)) = report.failed {
        println!("{}", explain(&crew, seed, None, None)?.unwrap_or_default());
        bail!("the history of seed {seed} fails; it is told above");
    }
    Ok(())
}

/// Without it a failure could not be looked into.
#[test]
fn a_seed_gives_the_same_history_again() -> Result<()> {
    let crew = Crew::new()?;
    for seed in 0..40 {
        let plan = Plan::of_seed(seed);
        let first = crew.run_history(&plan, None, true)?;
        let second = crew.run_history(&plan, None, true)?;
        ensure!(!first.trace.is_empty() && first.steps > 0);
        ensure!(first.trace == second.trace, "seed {seed}");
        ensure!(first.steps == second.steps, "seed {seed}");
    }
    Ok(())
}
