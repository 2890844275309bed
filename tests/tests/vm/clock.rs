//! The guest's kvmclock stands while its machine does, across pauses and snapshots.
//!
//! Nothing is timed here: what the guest's clock went on by is held between bounds that
//! the host measured around each command.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use snapstore_guests::CLOCK;
use snapstore_tests::vm::{Lab, eventually};

/// Long against what a command takes, so that a clock that went on is found.
const PAUSE: Duration = Duration::from_secs(3);

/// What the guest's clock said, between two moments of the host.
struct Reading {
    asked: Instant,
    nanos: u64,
    told: Instant,
}

fn readings(lab: &Lab, name: &str) -> Result<Vec<u64>> {
    let console = lab.console(name)?;
    let whole = console.lines().filter_map(|line| line.strip_prefix("t "));
    whole
        .filter(|digits| digits.len() == 16)
        .map(|digits| u64::from_str_radix(digits, 16).context("no number"))
        .collect()
}

fn ask(lab: &Lab, name: &str) -> Result<Reading> {
    let before = readings(lab, name)?.len();
    let asked = Instant::now();
    lab.type_in(name, b"t")?;
    let nanos = eventually("the guest tells the time", || {
        Ok(readings(lab, name)?.get(before).copied())
    })?;
    let told = Instant::now();
    Ok(Reading { asked, nanos, told })
}

/// Clocks of guest and host may differ by one in a thousand, and are read to some
/// microseconds.
fn slack(span: Duration) -> Duration {
    span / 1000 + Duration::from_millis(1)
}

fn went_on(first: &Reading, second: &Reading) -> Result<Duration> {
    let nanos = second.nanos.checked_sub(first.nanos);
    Ok(Duration::from_nanos(nanos.context("the clock went back")?))
}

#[test]
fn the_clock_stands_while_the_machine_is_paused() -> Result<()> {
    let Some(lab) = Lab::new("the_clock_stands_while_the_machine_is_paused")? else {
        return Ok(());
    };
    lab.run("clock", CLOCK, &[])?;
    lab.wait_for_text("clock", "waiting\n")?;
    for _ in 0..2 {
        let first = ask(&lab, "clock")?;
        let pausing = Instant::now();
        lab.cli.ok(&["pause", "clock"])?;
        let paused = Instant::now();
        std::thread::sleep(PAUSE);
        // A second pause of a machine that stands changes nothing.
        lab.cli.ok(&["pause", "clock"])?;
        let resuming = Instant::now();
        lab.cli.ok(&["resume", "clock"])?;
        let resumed = Instant::now();
        let second = ask(&lab, "clock")?;
        let ran = went_on(&first, &second)?;
        let most = (second.told - first.asked) - (resuming - paused);
        let least = (second.asked - first.told).saturating_sub(resumed - pausing);
        ensure!(ran <= most + slack(most), "{ran:?}, at most {most:?}");
        ensure!(ran + slack(ran) >= least, "{ran:?}, at least {least:?}");
    }
    lab.finish()
}

#[test]
fn the_clock_of_a_restored_machine_goes_on_where_it_was_committed() -> Result<()> {
    let test = "the_clock_of_a_restored_machine_goes_on_where_it_was_committed";
    let Some(lab) = Lab::with_mounts(test)? else {
        return Ok(());
    };
    lab.run("clock", CLOCK, &[])?;
    lab.wait_for_text("clock", "waiting\n")?;
    let first = ask(&lab, "clock")?;
    lab.commit("base", "clock")?;
    let committed = Instant::now();
    // The one that was committed did not stand.
    let still = ask(&lab, "clock")?;
    let least = still.asked - first.told;
    let ran = went_on(&first, &still)?;
    ensure!(ran + slack(ran) >= least, "{ran:?}, at least {least:?}");
    // Committed once more, while it is paused.
    lab.cli.ok(&["pause", "clock"])?;
    let paused = Instant::now();
    std::thread::sleep(PAUSE);
    lab.commit("paused", "clock")?;
    lab.stop("clock")?;
    for (tag, from, until) in [("base", &first, committed), ("paused", &still, paused)] {
        lab.restore(tag, &["--paused"])?;
        std::thread::sleep(PAUSE);
        let resuming = Instant::now();
        lab.cli.ok(&["resume", tag])?;
        let second = ask(&lab, tag)?;
        let ran = went_on(from, &second)?;
        let most = (until - from.asked) + (second.told - resuming);
        ensure!(
            ran <= most + slack(most),
            "{tag}: {ran:?}, at most {most:?}"
        );
    }
    lab.finish()
}
