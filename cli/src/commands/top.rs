//! `snapstore top`: what mounts and machines do at the moment, as rates between two looks.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde_json::json;
use snapstore_fuse::{MountCounters, OverlayUse};
use snapstore_host::metrics::{Machine, Mount, machines, mounts};
use snapstore_store::Store;

use crate::args::TopArgs;
use crate::context::Context;
use crate::exit;
use crate::format::{duration, millis, size, table};
use crate::metrics::state_name;

/// What is said of an overlay that has taken nearly all of its room.
pub const NEARLY_FULL: &str = "an overlay is more than 90 % full (--overlay-limit); commit what \
    was written, or mount with a larger one";

/// Clears the terminal, and goes to its first line.
const CLEAR: &str = "\x1b[H\x1b[2J";

/// What there was at one moment.
struct Look {
    when: Instant,
    mounts: Vec<Mount>,
    machines: Vec<Machine>,
}

impl Look {
    fn now(store: &Store) -> anyhow::Result<Self> {
        Ok(Self {
            mounts: mounts(store.path())?,
            machines: machines()?,
            when: Instant::now(),
        })
    }
}

pub fn run(context: &Context, args: &TopArgs) -> anyhow::Result<ExitCode> {
    let context = &context.stopped_by_signals()?;
    let store = context.open()?;
    let goes_on = io::stdout().is_terminal() && !args.once && !context.json();
    let mut before = Look::now(&store)?;
    loop {
        if !wait(context, args.interval) {
            break;
        }
        let after = Look::now(&store)?;
        let (mounts, machines) = (rates(&before, &after), growth(&before, &after));
        if !goes_on {
            let value = json!({"mounts": mounts, "machines": machines});
            context.answer(&value, || describe(&mounts, &machines))?;
            break;
        }
        let shown = format!("{CLEAR}{}", describe(&mounts, &machines));
        let mut out = io::stdout().lock();
        exit::output(out.write_all(shown.as_bytes()).and_then(|()| out.flush()))?;
        before = after;
    }
    Ok(ExitCode::SUCCESS)
}

/// Waits so long. False once a signal has come, which is how one leaves.
fn wait(context: &Context, time: Duration) -> bool {
    const STEP: Duration = Duration::from_millis(50);
    let until = Instant::now() + time;
    while !context.cancel().is_cancelled() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return true;
        }
        std::thread::sleep(left.min(STEP));
    }
    false
}

/// What a mount's server does, a second.
#[derive(serde::Serialize)]
struct MountRates {
    mount: String,
    up: bool,
    faults_per_second: Option<f64>,
    read_bytes_per_second: Option<f64>,
    written_bytes_per_second: Option<f64>,
    /// Of the time between the two looks.
    mean_latency_seconds: Option<f64>,
    /// Of working sets, since the server began.
    hit_rate: Option<f64>,
    pushed_pages: Option<u64>,
    damaged_reads: Option<u64>,
    /// How much room what was written takes, of one that can be written.
    overlay_bytes: Option<u64>,
    /// How full the fullest clone's overlay is, if they have a limit.
    overlay_fill: Option<f64>,
    overlay_nearly_full: bool,
}

#[derive(serde::Serialize)]
struct MachineRates {
    machine: String,
    up: bool,
    state: Option<&'static str>,
    memory_bytes: Option<u64>,
    private_bytes: Option<u64>,
    private_bytes_per_second: Option<f64>,
    commits: Option<u64>,
    mean_pause_seconds: Option<f64>,
    uptime_seconds: Option<f64>,
}

fn rates(before: &Look, after: &Look) -> Vec<MountRates> {
    let counted = before.mounts.iter();
    let counted = counted.filter_map(|mount| Some((&mount.dir, mount.counters.as_ref()?)));
    let counted: BTreeMap<_, _> = counted.collect();
    let seconds = (after.when - before.when).as_secs_f64();
    let rates = after.mounts.iter().map(|mount| {
        let now = mount.counters.as_ref();
        // Of another server nothing can be told yet.
        let then = counted.get(&mount.dir).copied();
        let then = then.filter(|then| now.is_some_and(|now| now.pid == then.pid));
        let grown = |of: fn(&MountCounters) -> u64| Some(of(now?).saturating_sub(of(then?)) as f64);
        let per_second = |of| grown(of).map(|grown| grown / seconds);
        let part = |part: u64, of: u64| (of > 0).then(|| part as f64 / of as f64);
        let took = now
            .zip(then)
            .map(|(now, then)| now.read_seconds - then.read_seconds);
        let overlays = now.and_then(|it| it.overlays.as_ref());
        let reads = grown(|it| it.reads).filter(|reads| *reads > 0.0);
        MountRates {
            mount: mount.dir.to_string_lossy().into_owned(),
            up: now.is_some(),
            faults_per_second: per_second(|it| it.reads),
            read_bytes_per_second: per_second(|it| it.read_bytes),
            written_bytes_per_second: per_second(|it| it.written_bytes),
            mean_latency_seconds: took.zip(reads).map(|(took, reads)| took.max(0.0) / reads),
            hit_rate: now.and_then(|it| part(it.sampled_hit_pages, it.sampled_pages)),
            pushed_pages: now.map(|it| it.pushed_pages),
            damaged_reads: now.map(|it| it.damaged_reads),
            overlay_bytes: overlays.map(|it| it.used_bytes),
            overlay_fill: overlays.and_then(OverlayUse::fill),
            overlay_nearly_full: overlays.is_some_and(OverlayUse::is_nearly_full),
        }
    });
    rates.collect()
}

fn growth(before: &Look, after: &Look) -> Vec<MachineRates> {
    let known = before.machines.iter();
    let known = known.filter_map(|machine| Some((&machine.name, machine.private_bytes?)));
    let known: BTreeMap<_, _> = known.collect();
    let seconds = (after.when - before.when).as_secs_f64();
    let rates = after.machines.iter().map(|machine| {
        let (status, record) = (machine.status.as_ref(), machine.record.as_ref());
        let then = known.get(&machine.name);
        let grown = machine.private_bytes.zip(then);
        let grown = grown.map(|(now, then)| now.saturating_sub(*then) as f64 / seconds);
        let totals = status.map(|status| status.totals);
        let pauses = totals.filter(|totals| totals.freezes > 0);
        let uptime = record.map(snapstore_host::monitors::Record::uptime_seconds);
        MachineRates {
            machine: machine.name.clone(),
            up: status.is_some() || record.is_some(),
            state: status.map(|status| state_name(status.state)),
            memory_bytes: status
                .map(|status| status.memory_bytes)
                .or(record.map(|record| record.memory_bytes)),
            private_bytes: machine.private_bytes,
            private_bytes_per_second: grown,
            commits: totals.map(|totals| totals.commits),
            mean_pause_seconds: pauses.map(|it| it.freeze_pause_seconds / it.freezes as f64),
            uptime_seconds: status.map(|status| status.uptime_seconds).or(uptime),
        }
    });
    rates.collect()
}

/// What is not known.
const UNKNOWN: &str = "-";

fn shown<T>(value: Option<T>, show: impl FnOnce(T) -> String) -> String {
    value.map_or_else(|| UNKNOWN.to_owned(), show)
}

/// How much room what was written takes, and of how much, if that is known.
fn overlay(mount: &MountRates) -> String {
    let bytes = shown(mount.overlay_bytes, size);
    match mount.overlay_fill {
        Some(fill) => format!("{bytes}, {:.0} %", fill * 100.0),
        None => bytes,
    }
}

/// Mounts to which soon nothing more can be written.
fn warnings(mounts: &[MountRates]) -> String {
    let full = mounts.iter().filter(|mount| mount.overlay_nearly_full);
    full.map(|mount| format!("Warning  {}: {NEARLY_FULL}\n", mount.mount))
        .collect()
}

fn describe(mounts: &[MountRates], machines: &[MachineRates]) -> String {
    let bytes = |value: Option<f64>| shown(value, |bytes| size(bytes as u64));
    let mut out = match mounts {
        [] => "No mount of this store and user.\n".to_owned(),
        mounts => {
            let row = |mount: &MountRates| {
                vec![
                    mount.mount.clone(),
                    if mount.up { "up" } else { "down" }.to_owned(),
                    shown(mount.faults_per_second, |rate| format!("{rate:.0}")),
                    shown(mount.mean_latency_seconds, |mean| {
                        format!("{:.0} µs", mean * 1e6)
                    }),
                    bytes(mount.read_bytes_per_second),
                    bytes(mount.written_bytes_per_second),
                    shown(mount.hit_rate, |rate| format!("{:.0} %", rate * 100.0)),
                    shown(mount.pushed_pages, |pages| pages.to_string()),
                    shown(mount.damaged_reads, |reads| reads.to_string()),
                    overlay(mount),
                ]
            };
            let rows: Vec<_> = mounts.iter().map(row).collect();
            let header = [
                "MOUNT",
                "STATE",
                "FAULTS/S",
                "LATENCY",
                "READ/S",
                "WRITTEN/S",
                "HITS",
                "PUSHED",
                "DAMAGED",
                "OVERLAY",
            ];
            table(&header, 2, &rows) + &warnings(mounts)
        }
    };
    out.push('\n');
    if machines.is_empty() {
        return out + "No machine runs.\n";
    }
    let row = |machine: &MachineRates| {
        let state = match machine.state {
            Some(state) => state.replace('_', " "),
            None if machine.up => "up".to_owned(),
            None => "down".to_owned(),
        };
        vec![
            machine.machine.clone(),
            state,
            shown(machine.memory_bytes, size),
            shown(machine.private_bytes, size),
            bytes(machine.private_bytes_per_second),
            shown(machine.commits, |commits| commits.to_string()),
            shown(machine.mean_pause_seconds, millis),
            shown(machine.uptime_seconds, duration),
        ]
    };
    let rows: Vec<_> = machines.iter().map(row).collect();
    let header = [
        "MACHINE",
        "STATE",
        "MEMORY",
        "PRIVATE",
        "PRIVATE/S",
        "COMMITS",
        "PAUSE",
        "UPTIME",
    ];
    out + &table(&header, 2, &rows)
}
