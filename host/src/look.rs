//! Looking at mounts whose servers may not answer.
//!
//! A process that waits for such a server may not even be killed. So a hidden
//! command looks, and whoever started it waits for its answer no longer than
//! `PATIENCE`.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use snapstore_fuse::MountCounters;
use snapstore_vmm::memory::resident_bytes;

use crate::background;
use crate::error::Usage;
use crate::readable::is_readable_within;
use crate::snapshot_files::is_of;
use crate::spec::FAILED;
use crate::starter::Starter;

/// The hidden command's name.
pub const COMMAND: &str = "look-at-mount";
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// The same of counters: who asks for them time and again is not to miss them because the
/// host is busy.
const COUNTERS_PATIENCE: Duration = Duration::from_secs(5);
/// How long a process that was killed may take to end, and how often that is asked.
const END: (Duration, Duration) = (Duration::from_secs(1), Duration::from_millis(5));

const DEAD: &str = "dead\n";
const ALIVE: &str = "alive\n";

/// What is known of a mount.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// Its server answers.
    Serves,
    /// Its server is gone.
    Dead,
    /// Its server does not answer, or nobody could look.
    Silent,
}

/// Asks the server of the mount at `dir`.
pub fn state(dir: &Path) -> State {
    let answer = Look::start([OsString::from("state"), dir.into()]).map(Look::answer);
    match answer {
        Ok(Some(answer)) if answer == DEAD => State::Dead,
        Ok(Some(answer)) if answer == ALIVE => State::Serves,
        Ok(_) => State::Silent,
        Err(error) => {
            tracing::warn!(%error, "a mount cannot be looked at");
            State::Silent
        }
    }
}

/// What the servers of these mounts have counted; `None` of one that does not tell in time,
/// does not tell this user, or is gone. All are asked side by side.
pub fn counters(dirs: &[PathBuf]) -> Vec<Option<MountCounters>> {
    let start = |dir: &PathBuf| {
        let look = Look::start([OsString::from("counters"), dir.into()]);
        let look = look.inspect_err(|error| tracing::warn!(%error, "a mount cannot be looked at"));
        look.ok().map(|look| look.with_patience(COUNTERS_PATIENCE))
    };
    let looks: Vec<_> = dirs.iter().map(start).collect();
    looks
        .into_iter()
        .map(|look| serde_json::from_str(&look?.answer()?).ok())
        .collect()
}

/// A file of a mount.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ShownFile {
    /// Its name.
    pub name: String,
    /// Its length.
    pub size_bytes: u64,
    /// What of it is no hole.
    pub data_bytes: u64,
    /// What of it the kernel has in memory.
    pub cached_bytes: u64,
}

/// The files of a mounted snapshot; `None` if its server does not tell in time.
pub fn files(dir: &Path) -> anyhow::Result<Option<Vec<ShownFile>>> {
    let look = Look::start([OsString::from("files"), dir.into()])?;
    let answer = look.with_patience(COUNTERS_PATIENCE).answer();
    Ok(answer.and_then(|answer| serde_json::from_str(&answer).ok()))
}

fn files_in(dir: &Path) -> anyhow::Result<Vec<ShownFile>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let found = entry.metadata()?;
        if !found.is_file() {
            continue;
        }
        // Who looks is not who uses it.
        let file = fs::OpenOptions::new()
            .read(true)
            .custom_flags(rustix::fs::OFlags::NOATIME.bits().cast_signed())
            .open(entry.path())?;
        files.push(ShownFile {
            name: entry.file_name().to_string_lossy().into_owned(),
            size_bytes: found.len(),
            data_bytes: found.blocks() * 512,
            cached_bytes: resident_bytes(&file, found.len())?,
        });
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(files)
}

/// Whether the server of the mount at `dir` is gone.
pub fn is_dead(dir: &Path) -> bool {
    state(dir) == State::Dead
}

/// The first of these directories that shows the snapshot. All lists are looked
/// at side by side: one whose mount does not answer holds up none of the others
/// for longer than it may take itself.
///
/// A process that waits for something to do looks first, if there is one, at all of them one
/// after the other: mounts that do not answer are rare.
pub fn which_shows(
    id: &str,
    lists: &[Vec<PathBuf>],
    starter: Option<&mut Starter>,
) -> anyhow::Result<Option<PathBuf>> {
    if let Some(starter) = starter
        && starter.is_there()
    {
        let dirs: Vec<_> = lists.iter().flatten().collect();
        let texts: Option<Vec<_>> = dirs.iter().map(|dir| dir.to_str()).collect();
        if let Some(texts) = texts
            && let Some(answer) = starter.look(&[&["which", id], &texts[..]].concat(), PATIENCE)
        {
            let number = answer.parse::<usize>().ok();
            return Ok(number.and_then(|number| dirs.get(number).copied().cloned()));
        }
    }
    let looks: Vec<_> = lists
        .iter()
        .map(|dirs| {
            let dirs = dirs.iter().map(OsString::from);
            Look::start([OsString::from("which"), id.into()].into_iter().chain(dirs))
        })
        .collect::<Result<_, _>>()?;
    let answers: Vec<_> = looks.into_iter().map(Look::answer).collect();
    Ok(answers.into_iter().zip(lists).find_map(|(answer, dirs)| {
        let number: usize = answer?.trim().parse().ok()?;
        dirs.get(number).cloned()
    }))
}

/// A process that looks.
struct Look {
    child: Child,
    output: ChildStdout,
    deadline: Instant,
}

impl Look {
    fn start(arguments: impl IntoIterator<Item = OsString>) -> anyhow::Result<Self> {
        let mut child = background::machine_command()?
            .arg(COMMAND)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start a process that looks at a mount")?;
        let output = child.stdout.take().context("no pipe to a new process")?;
        Ok(Self {
            child,
            output,
            deadline: Instant::now() + PATIENCE,
        })
    }

    /// Waits so long for the answer, counted from now.
    fn with_patience(mut self, patience: Duration) -> Self {
        self.deadline = Instant::now() + patience;
        self
    }

    /// Its answer; `None` if there is none in time.
    fn answer(mut self) -> Option<String> {
        let mut answer = String::new();
        let left = self.deadline.saturating_duration_since(Instant::now());
        if is_readable_within(&self.output, left) && self.output.read_to_string(&mut answer).is_ok()
        {
            // It has said all that it had to, and waits for nothing any more.
            let _ = self.child.wait();
            return Some(answer);
        }
        // While it is there, its mount is in use. One that cannot be killed is left to itself.
        let _ = self.child.kill();
        let killed = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) && killed.elapsed() < END.0 {
            std::thread::sleep(END.1);
        }
        None
    }
}

/// The hidden command.
pub fn run(arguments: &[OsString]) -> anyhow::Result<u8> {
    // One write: it is read at once.
    match io::stdout().write_all(answer(arguments)?.as_bytes()) {
        Ok(()) => Ok(0),
        Err(_) => Ok(FAILED),
    }
}

/// What whoever looks sees, as text.
pub(crate) fn answer(arguments: &[OsString]) -> anyhow::Result<String> {
    Ok(match arguments {
        [what, dir] if what == "state" => {
            let dead = snapstore_fuse::is_dead(dir.as_ref());
            (if dead { DEAD } else { ALIVE }).to_owned()
        }
        [what, id, dirs @ ..] if what == "which" => {
            let id = id.to_string_lossy();
            let shown = dirs.iter().position(|dir| shows(dir.as_ref(), &id));
            shown.map_or_else(String::new, |number| number.to_string())
        }
        [what, dir] if what == "counters" => {
            let counters = MountCounters::of(dir.as_ref())?;
            serde_json::to_string(&counters)?
        }
        [what, dir] if what == "files" => serde_json::to_string(&files_in(dir.as_ref())?)?,
        _ => {
            let message = format!("{COMMAND} is for this program's own use");
            return Err(Usage(message).into());
        }
    })
}

/// Whether the files in a directory are those of the snapshot.
fn shows(dir: &Path, id: &str) -> bool {
    if snapstore_fuse::is_dead(dir) {
        return false;
    }
    let Ok(manifest) = fs::read(dir.join("manifest.json")) else {
        return false;
    };
    is_of(&manifest, id)
}
