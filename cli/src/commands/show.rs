//! `snapstore show`

use std::path::Path;
use std::process::ExitCode;
use std::time::SystemTime;

use serde_json::{Value, json};
use snapstore_store::{Image, Manifest, SnapshotId, Store, WorkingSet};
use snapstore_vmm::state::{CpuNeeds, MAX_STATE_BYTES, MachineState, StateError};

use super::show_mount;
use crate::args::ShowArgs;
use crate::context::Context;
use crate::form::Fields;
use crate::format::{count, counted, duration, size, table, time};

const FIELDS: Fields = Fields {
    rows: "",
    of_row: &["id", "tags", "manifest.", "machine.", "working_sets."],
    of_answer: &[],
};

pub fn run(context: &Context, args: &ShowArgs) -> anyhow::Result<ExitCode> {
    let Some(name) = &args.snapshot else {
        let dir = args.mount.as_deref().unwrap_or(Path::new("."));
        return show_mount::run(context, dir, &args.form);
    };
    let context = &context.listing(&args.form, &FIELDS)?;
    let store = context.open()?;
    let id = store.resolve(name)?;
    let manifest = store.manifest(id)?;
    let tags = store.tags_of(id)?;
    let machine = machine(&store, &manifest);
    let page_bytes = store.page_size().bytes();
    let sets = working_sets(&store, id, &manifest);
    let value = json!({
        "id": id,
        "tags": tags,
        "manifest": manifest,
        "machine": machine.value(),
        "working_sets": sets.iter().map(|(image, set)| set_value(page_bytes, image, set)).collect::<Vec<_>>(),
    });
    context.answer(&value, || {
        let mut out = describe(id, &tags, &manifest, &machine);
        for (image, set) in &sets {
            out += &describe_set(page_bytes, image, set);
        }
        out
    })?;
    Ok(ExitCode::SUCCESS)
}

/// What is known of the machine that a snapshot is of.
enum Machine {
    /// It is of none, or of another monitor's.
    None,
    Needs(CpuNeeds),
    /// Its state is damaged, or was made by a newer program.
    Unreadable(String),
}

impl Machine {
    fn value(&self) -> Value {
        match self {
            Self::None => Value::Null,
            Self::Needs(cpu) => json!({"cpu": cpu}),
            Self::Unreadable(why) => json!({"unreadable": why}),
        }
    }

    fn describe(&self) -> String {
        let needs = match self {
            Self::None => return String::new(),
            Self::Unreadable(why) => return format!("CPU        not known: {why}\n"),
            Self::Needs(needs) => needs,
        };
        let vendor = needs.vendor.as_deref().unwrap_or("any");
        let level = needs.level.as_deref().unwrap_or("no level of x86-64");
        let more = needs.features.iter().chain(&needs.feature_msrs);
        let mut words = vec![format!("{vendor}, {level}")];
        words.extend(more.cloned());
        wrapped("CPU        ", &words)
    }
}

/// A working set, or why that there is cannot be used.
type Recorded = Result<WorkingSet, snapstore_store::Error>;

/// Those that were recorded, by their images.
fn working_sets<'a>(
    store: &Store,
    id: SnapshotId,
    manifest: &'a Manifest,
) -> Vec<(&'a Image, Recorded)> {
    let images = manifest.images.iter();
    images
        .filter_map(|image| {
            let set = store.working_set(id, &image.name).transpose()?;
            Some((image, set))
        })
        .collect()
}

fn set_value(page_bytes: u64, image: &Image, set: &Recorded) -> Value {
    match set {
        Ok(set) => json!({
            "image": image.name,
            "pages": set.pages().count(),
            "bytes": set.pages().count() as u64 * page_bytes,
            "recorded": unix_seconds(set.recorded()),
            "recordings": set.recordings(),
            "last_mount": set.last(),
            "hit_rate": set.last().hit_rate(),
            "trusted": set.is_trusted(),
        }),
        Err(error) => json!({"image": image.name, "unusable": error.to_string()}),
    }
}

fn describe_set(page_bytes: u64, image: &Image, set: &Recorded) -> String {
    let name = image.file_name();
    let set = match set {
        Ok(set) => set,
        Err(error) => return format!("Working set of {name} is not used: {error}\n"),
    };
    let age = SystemTime::now().duration_since(set.recorded());
    let last = set.last();
    let pushed = match last.hit_rate() {
        _ if last.pushed == 0 => "the last mount pushed nothing".to_owned(),
        None => format!("the last mount pushed {} pages", count(last.pushed.into())),
        Some(rate) => format!(
            "the last mount pushed {} pages, of which about {:.0} % were used",
            count(last.pushed.into()),
            rate * 100.0
        ),
    };
    format!(
        "Working set of {name}: {} in {}, of {}, the last one {} ago; {pushed}\n",
        size(set.pages().count() as u64 * page_bytes),
        counted(set.pages().count() as u64, "page"),
        match set.recordings() {
            0 => "recordings of parts".to_owned(),
            whole => counted(whole.into(), "recording"),
        },
        duration(age.unwrap_or_default().as_secs_f64()),
    )
}

fn unix_seconds(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH);
    since.unwrap_or_default().as_secs()
}

/// Words with commas between them, on lines that are indented as the first.
fn wrapped(first: &str, words: &[String]) -> String {
    const COLUMNS: usize = 100;
    let (mut out, mut line) = (String::new(), first.to_owned());
    for (number, word) in words.iter().enumerate() {
        let separator = if number == 0 { "" } else { ", " };
        if line.len() + separator.len() + word.len() > COLUMNS {
            out += &format!("{line},\n");
            line = format!("{:width$}{word}", "", width = first.len());
        } else {
            line += separator;
            line += word;
        }
    }
    out + &line + "\n"
}

fn machine(store: &Store, manifest: &Manifest) -> Machine {
    let Some(image) = manifest.image("vmstate") else {
        return Machine::None;
    };
    if image.size_bytes > MAX_STATE_BYTES {
        return Machine::None;
    }
    let bytes = match store.read_file_image(image, MAX_STATE_BYTES) {
        Ok(bytes) => bytes,
        Err(error) => return Machine::Unreadable(error.to_string()),
    };
    match MachineState::decode(&bytes) {
        Ok(state) => state.cpu_needs().map_or(Machine::None, Machine::Needs),
        Err(snapstore_vmm::Error::State(StateError::NotAState)) => Machine::None,
        Err(error) => Machine::Unreadable(error.to_string()),
    }
}

fn describe(id: SnapshotId, tags: &[String], manifest: &Manifest, machine: &Machine) -> String {
    let parent = manifest
        .parent
        .map_or_else(|| "none".to_owned(), |parent| parent.to_string());
    let mut out = format!(
        "Snapshot   {id}\nTags       {}\nParent     {parent}\nCommitted  {} UTC, adding {} chunks in {}\n",
        tags.join(", "),
        time(manifest.created()),
        count(manifest.added_chunks),
        size(manifest.added_bytes),
    );
    for (key, value) in &manifest.labels {
        out += &format!("Label      {key}={value}\n");
    }
    out += &machine.describe();
    let rows: Vec<_> = manifest
        .images
        .iter()
        .map(|image| {
            vec![
                image.file_name(),
                size(image.size_bytes),
                count(image.nonzero_pages),
                count(image.changed_pages),
            ]
        })
        .collect();
    out + &table(&["FILE", "SIZE", "PAGES IN USE", "CHANGED"], 1, &rows)
}
