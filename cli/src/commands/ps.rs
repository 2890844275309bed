//! `snapstore ps`

use std::fs;
use std::process::ExitCode;
use std::time::Duration;

use serde::Serialize;
use serde_json::json;
use snapstore_host::monitors::Record;
use snapstore_host::runtime::{KILLED, Runtime, VmDir};
use snapstore_host::start::for_each;
use snapstore_vmm::Error;
use snapstore_vmm::control::{Client, RunState, Seconds, Status};

use crate::args::PsArgs;
use crate::context::Context;
use crate::form::Fields;
use crate::format::{duration, millis, size, table};

/// One machine, running or badly ended.
#[derive(Serialize)]
struct Entry {
    /// Of a machine without a status, which has it, too.
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(flatten)]
    status: Option<Status>,
    /// Its share of the memory it uses: pages used by several processes count in
    /// parts (proc(5), `smaps_rollup`, Pss).
    pss_bytes: Option<u64>,
    /// Why it ended.
    ending: Option<String>,
    /// Of one without a status: `starting`, `not_answering`, `dead`, or `running` under
    /// another monitor.
    #[serde(skip_serializing_if = "Option::is_none", rename = "state")]
    silent: Option<&'static str>,
    /// What is known of one of another monitor.
    #[serde(flatten)]
    machine: Option<Record>,
}

/// How long a machine may take to say how it is. Nobody is kept waiting by one.
const PATIENCE: Duration = Duration::from_secs(1);

const FIELDS: Fields = Fields {
    rows: "machines",
    of_row: &[
        "name",
        "state",
        "pid",
        "trouble",
        "cpus",
        "memory_bytes",
        "pss_bytes",
        "networks.",
        "origin.",
        "uptime_seconds",
        "reseeded",
        "console_bytes",
        "start.",
        "confinement.",
        "totals.",
        "last_commit.",
        "ending",
        "monitor",
        "version",
        "since",
        "snapshot",
        "tag",
        "shared_memory",
        "api",
        "paths.",
    ],
    of_answer: &[],
};

pub fn run(context: &Context, args: &PsArgs) -> anyhow::Result<ExitCode> {
    let context = &context.listing(&args.form, &FIELDS)?;
    let runtime = Runtime::open()?;
    if let Some(name) = &args.name {
        let vm = runtime.running(name)?;
        let entry = look(&vm).ok_or_else(|| vm.is_starting())?;
        context.answer(&entry, || describe(&entry))?;
        return Ok(ExitCode::SUCCESS);
    }
    let entries = for_each(&runtime.vms()?, |vm| Ok(look(vm)))?;
    let entries: Vec<Entry> = entries.into_iter().flatten().collect();
    context.answer(&json!({"machines": entries}), || match args.quiet {
        true => names(&entries),
        false => list(&entries),
    })?;
    Ok(ExitCode::SUCCESS)
}

/// `None` for a machine that is just ending.
fn look(vm: &VmDir) -> Option<Entry> {
    if let Some(record) = Record::of(vm) {
        return Some(Entry {
            name: None,
            status: None,
            pss_bytes: pss_bytes(record.pid),
            ending: None,
            silent: Some("running"),
            machine: Some(record),
        });
    }
    let status = Client::connect(&vm.socket())
        .map(|client| client.with_patience(PATIENCE))
        .and_then(|mut client| client.status());
    if let Ok(status) = status {
        return Some(Entry {
            name: None,
            pss_bytes: pss_bytes(status.pid),
            ending: None,
            silent: None,
            machine: None,
            status: Some(status),
        });
    }
    if vm.is_running()
        && let Err(Error::NoAnswer { .. } | Error::Refused { .. }) = status
    {
        return Some(Entry {
            name: Some(vm.name.clone()),
            status: None,
            pss_bytes: None,
            ending: None,
            silent: Some("not_answering"),
            machine: None,
        });
    }
    if vm.is_reserved() {
        return Some(Entry {
            name: Some(vm.name.clone()),
            status: None,
            pss_bytes: None,
            ending: None,
            silent: Some("starting"),
            machine: None,
        });
    }
    if vm.is_running() || !vm.exists() || vm.has_ended_in_order() {
        return None;
    }
    Some(Entry {
        name: Some(vm.name.clone()),
        status: None,
        pss_bytes: None,
        ending: Some(vm.ending().unwrap_or_else(|| KILLED.to_owned())),
        silent: Some("dead"),
        machine: None,
    })
}

fn pss_bytes(pid: u32) -> Option<u64> {
    // Waits for whoever changes the process's memory, which may hang.
    let (sender, rollup) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        sender.send(fs::read_to_string(format!("/proc/{pid}/smaps_rollup")))
    });
    let rollup = rollup.recv_timeout(PATIENCE).ok()?.ok()?;
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

fn names(entries: &[Entry]) -> String {
    let names = entries
        .iter()
        .filter_map(|entry| row(entry).into_iter().next());
    names.collect::<Vec<_>>().join("\n")
}

fn list(entries: &[Entry]) -> String {
    if entries.is_empty() {
        return "No machine runs.".to_owned();
    }
    let rows: Vec<Vec<String>> = entries.iter().map(row).collect();
    table(
        &[
            "NAME", "STATE", "SNAPSHOT", "PID", "VCPUS", "MEMORY", "PSS", "UPTIME",
        ],
        3,
        &rows,
    )
}

fn row(entry: &Entry) -> Vec<String> {
    if let Some(machine) = &entry.machine {
        return vec![
            machine.name.clone(),
            machine.monitor.name().to_owned(),
            machine.tag.clone(),
            machine.pid.to_string(),
            machine
                .cpus
                .map_or_else(|| "?".to_owned(), |cpus| cpus.to_string()),
            size(machine.memory_bytes),
            entry.pss_bytes.map_or_else(|| "?".to_owned(), size),
            duration(machine.uptime_seconds()),
        ];
    }
    let Some(status) = &entry.status else {
        let ending = entry.ending.as_deref().unwrap_or_default();
        // A process may have said much; at the end, why it ended.
        let reason = ending.lines().last().unwrap_or_default().to_owned();
        let name = entry.name.clone().unwrap_or_default();
        let state = entry.silent.unwrap_or_default().replace('_', " ");
        let mut row = match entry.ending {
            Some(_) => vec![name, state, reason],
            None => vec![name, state, "-".to_owned()],
        };
        row.resize(8, String::new());
        return row;
    };
    vec![
        status.name.clone(),
        state_name(status.state).to_owned(),
        status.origin.tag.clone().unwrap_or_else(|| "-".to_owned()),
        status.pid.to_string(),
        status.cpus.to_string(),
        size(status.memory_bytes),
        entry.pss_bytes.map_or_else(|| "?".to_owned(), size),
        duration(status.uptime_seconds),
    ]
}

fn state_name(state: RunState) -> &'static str {
    match state {
        RunState::Starting => "starting",
        RunState::Running => "running",
        RunState::Paused => "paused",
        RunState::Halted => "halted",
        RunState::IoError => "i/o error",
        RunState::Stopping => "stopping",
        RunState::Ended => "ended",
    }
}

fn describe(entry: &Entry) -> String {
    let mut out = list(std::slice::from_ref(entry));
    if let Some(machine) = &entry.machine {
        out += &format!(
            "\nMonitor:     {} {}\nApi:         {}\n",
            machine.monitor,
            machine.version,
            machine.api.display()
        );
        for (name, path) in &machine.paths {
            out += &format!("{:<12} {}\n", format!("{name}:"), path.display());
        }
    }
    let Some(status) = &entry.status else {
        return out;
    };
    if let Some(trouble) = &status.trouble {
        out += &format!("\nStands still, for the host failed it: {trouble}");
    }
    out += &format!("\nStart:       {}\n", stages(&status.start));
    let confinement = status.confinement.as_ref();
    let confinement = confinement.map_or_else(|| "not at all".to_owned(), ToString::to_string);
    out += &format!("Confined:    {confinement}\n");
    for network in &status.networks {
        out += &format!(
            "Network:     {} on {}{}\n",
            network.mac,
            network.tap.as_deref().unwrap_or("no tap"),
            if network.link_up { "" } else { ", link down" }
        );
    }
    if let Some(commit) = &status.last_commit {
        out += &format!(
            "Last commit: {} ({})\n",
            commit.tag,
            stages(&commit.timings)
        );
    }
    out
}

fn stages(seconds: &Seconds) -> String {
    let stages = seconds
        .iter()
        .map(|(name, seconds)| format!("{} {}", name.replace('_', " "), millis(*seconds)));
    stages.collect::<Vec<_>>().join(", ")
}
