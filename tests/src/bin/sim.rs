//! Runs the simulator.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Parser;
use snapstore_store::sim::Fault;
use snapstore_tests::sim::plan::Plan;
use snapstore_tests::sim::{Campaign, Crew, Shape, explain, hunt, run};

/// In how many histories a fault that is put back has to be found.
const MOST_HISTORIES: u64 = 20_000;

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
    /// Only histories of this shape
    #[arg(long, value_enum)]
    shape: Option<Shape>,
    /// Tell the history of the seed as it is, without making it shorter
    #[arg(long)]
    whole: bool,
    /// Put the faults back, or the one of this name, and look for each
    #[arg(long)]
    mutations: Option<Option<String>>,
    /// Put this fault back, for the history of a seed or for all
    #[arg(long)]
    fault: Option<String>,
    /// Go on after a history that fails, and name them all
    #[arg(long)]
    all: bool,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let crew = Crew::new()?;
    let fault = arguments.fault.as_deref().map(named).transpose()?;
    if let Some(name) = &arguments.mutations {
        return mutations(&crew, name.as_deref(), &arguments);
    }
    if let Some(seed) = arguments.seed {
        if arguments.whole {
            let plan = Plan::of_shape(arguments.shape, seed);
            let outcome = crew.run_history(&plan, fault, true)?;
            print!("{plan}");
            for line in outcome.trace {
                println!("{line}");
            }
            return Ok(ExitCode::from(u8::from(outcome.failure.is_some())));
        }
        let told = explain(&crew, seed, arguments.shape, fault)?;
        let failed = told.is_some();
        let passed = || format!("The history of seed {seed} does not fail.");
        println!("{}", told.unwrap_or_else(passed));
        return Ok(ExitCode::from(u8::from(failed)));
    }
    let mut campaign = Campaign {
        first_seed: arguments.from,
        histories: arguments.histories,
        time: Duration::from_secs(arguments.seconds),
        shape: arguments.shape,
    };
    let (mut failed, began) = (false, Instant::now());
    loop {
        let report = run(&crew, &campaign, fault)?;
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
            let told = explain(&crew, seed, arguments.shape, fault)?;
            println!("{}", told.unwrap_or_default());
            break;
        }
        campaign.histories -= report.histories;
        campaign.first_seed = seed + 1;
        campaign.time = Duration::from_secs(arguments.seconds).saturating_sub(began.elapsed());
    }
    Ok(ExitCode::from(u8::from(failed)))
}

fn named(name: &str) -> Result<Fault> {
    let mut known = Fault::FOUND.into_iter().chain(Fault::OF_OLDER_STORES);
    let found = known.find(|fault| format!("{fault:?}") == name);
    found.with_context(|| format!("there is no fault {name}"))
}

/// Looks for each fault and prints a table; the exit code is 1 if one is not found.
fn mutations(crew: &Crew, name: Option<&str>, arguments: &Arguments) -> Result<ExitCode> {
    let faults = match name {
        Some(name) => vec![named(name)?],
        None => Fault::FOUND.to_vec(),
    };
    let campaign = Campaign {
        first_seed: arguments.from,
        histories: arguments.histories.min(MOST_HISTORIES),
        time: Duration::MAX,
        shape: arguments.shape,
    };
    let (mut missed, mut histories) = (0, 0);
    let began = Instant::now();
    println!(
        "{:28} {:>9} {:>7}  {:24} what is violated",
        "fault", "histories", "seconds", "along with"
    );
    for fault in &faults {
        let began = Instant::now();
        let found = hunt(crew, *fault, &campaign)?;
        let seconds = began.elapsed().as_secs_f32();
        let hidden_by = fault
            .hidden_by()
            .map(|it| format!("{it:?}"))
            .unwrap_or_default();
        let (after, what) = match &found {
            Some(found) => (found.after, format!("{} (seed {})", found.rule, found.seed)),
            None => (campaign.histories, "NOT FOUND".to_owned()),
        };
        missed += u32::from(found.is_none());
        histories += after;
        println!(
            "{:28} {after:9} {seconds:7.1}  {hidden_by:24} {what}",
            format!("{fault:?}")
        );
    }
    println!(
        "{} faults put back, {missed} not found; {histories} histories in {:.0} s",
        faults.len(),
        began.elapsed().as_secs_f32()
    );
    Ok(ExitCode::from(u8::from(missed > 0)))
}
