//! Runs the simulator.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Parser;
use snapstore_tests::sim::plan::Plan;
use snapstore_tests::sim::{Campaign, Crew, explain, run};

/// Lets random histories of a store happen and checks each after every
/// operation.
#[derive(Parser)]
struct Arguments {
    /// Run the history of this seed only, and tell what happens
    #[arg(long, env = "SIM_SEED")]
    seed: Option<u64>,
    /// The first seed of those that are run
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// The most histories to run
    #[arg(long, env = "SIM_HISTORIES", default_value_t = u64::MAX)]
    histories: u64,
    /// The longest time to run them, in seconds
    #[arg(long, default_value_t = u64::MAX)]
    seconds: u64,
    /// Tell the history of the seed as it is, without making it shorter
    #[arg(long)]
    whole: bool,
    /// Go on after a history that fails, and name them all
    #[arg(long)]
    all: bool,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let crew = Crew::new()?;
    if let Some(seed) = arguments.seed {
        if arguments.whole {
            let plan = Plan::of_seed(seed);
            let outcome = crew.run_history(&plan, None, true)?;
            print!("{plan}");
            for line in outcome.trace {
                println!("{line}");
            }
            return Ok(ExitCode::from(u8::from(outcome.failure.is_some())));
        }
        println!("{}", explain(&crew, seed, None)?);
        return Ok(ExitCode::SUCCESS);
    }
    let mut campaign = Campaign {
        first_seed: arguments.from,
        histories: arguments.histories,
        time: Duration::from_secs(arguments.seconds),
        fault: None,
    };
    let (mut failed, began) = (false, Instant::now());
    loop {
        let report = run(&crew, &campaign)?;
        println!("{} histories", report.histories);
        for (name, steps) in &report.longest_publish {
            println!("the publish lock was held for {steps} steps of {name}");
        }
        let Some((seed, failure)) = report.failed else {
            break;
        };
        failed = true;
        println!("seed {seed}: {failure}");
        if !arguments.all {
            println!("{}", explain(&crew, seed, None)?);
            break;
        }
        campaign.histories -= report.histories;
        campaign.first_seed = seed + 1;
        campaign.time = Duration::from_secs(arguments.seconds).saturating_sub(began.elapsed());
    }
    Ok(ExitCode::from(u8::from(failed)))
}
