//! The part of the demonstration that runs virtual machines: a small guest that
//! checks itself is committed while it runs, and every snapshot goes on where
//! it was.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use snapstore_guests::{TABLE, TableModel, TableStep};

use super::program::{Program, say};
use super::report::{MachineRow, Report};
use crate::format::millis;

/// How long the guest may take to print a line.
const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);
/// Lines between two commits, and lines that a restored guest is watched for.
const LINES: u32 = 5;
/// Machines restored at once.
const CLONES: u32 = 10;

/// Ends all machines of the demonstration when it ends.
struct Machines<'a> {
    program: &'a mut Program,
}

impl Drop for Machines<'_> {
    fn drop(&mut self) {
        // Without machines there is nothing to end.
        let _ = self.program.capture(&["stop", "--all"]);
    }
}

/// A snapshot and the guest's lines it lies between.
struct Committed {
    tag: String,
    /// The last line before the commit began and after it returned.
    between: (u32, u32),
}

/// Runs the story.
pub fn run(program: &mut Program, report: &mut Report, dir: &Path) -> anyhow::Result<()> {
    let kernel = write_guest(dir)?;
    let kernel = kernel.to_str().context("the path is not UTF-8")?;
    let mut machines = Machines { program };
    machines.program.run(&[
        "run", "table", "--kernel", kernel, "--mem", "64M", "--detach",
    ])?;
    let mut committed = Vec::new();
    for tag in ["vm", "vm+1", "vm+2"] {
        committed.push(machines.commit(tag, report)?);
    }
    machines.program.run(&["stop", "table"])?;
    for snapshot in &committed {
        machines.restore(snapshot, report)?;
    }
    let head = &committed[committed.len() - 1].tag;
    let count = CLONES.to_string();
    machines
        .program
        .run(&["restore", head, "--name", "clone", "-n", &count, "--detach"])?;
    for number in 1..=CLONES {
        machines.watch(&format!("clone.{number}"))?;
    }
    say(&format!(
        "  {CLONES} clones run side by side, each line as expected"
    ))?;
    machines.program.run(&["ps"])?;
    machines.program.run(&["stop", "--all"])?;
    Ok(())
}

fn write_guest(dir: &Path) -> anyhow::Result<PathBuf> {
    let path = dir.join("table.bin");
    fs::write(&path, TABLE).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

impl Machines<'_> {
    /// Commits the running machine once it has printed some more lines.
    fn commit(&mut self, tag: &str, report: &mut Report) -> anyhow::Result<Committed> {
        let (_, seen) = self.watch("table")?;
        let target = seen + LINES;
        let before = self.wait_for("table", |last| last >= target)?;
        let time = self.program.run(&["commit", tag, "--vm", "table"])?;
        let (_, after) = self.watch("table")?;
        let status = self.program.capture(&["ps", "table", "--json"])?;
        let status: serde_json::Value = serde_json::from_str(&status)?;
        let pause = &status["last_commit"]["timings"]["pause"];
        report.machines.push(MachineRow {
            what: format!("commit {tag} --vm table"),
            time,
            note: format!(
                "stood still for {}",
                millis(pause.as_f64().context("no pause was measured")?)
            ),
        });
        Ok(Committed {
            tag: tag.to_owned(),
            between: (before, after),
        })
    }

    /// Restores a snapshot and checks that it goes on with the next line.
    fn restore(&mut self, snapshot: &Committed, report: &mut Report) -> anyhow::Result<()> {
        let tag = &snapshot.tag;
        let time = self.program.run(&["restore", tag, "--detach"])?;
        let first = self.wait_for_lines(tag)?;
        let (before, after) = snapshot.between;
        if !(before + 1..=after + 1).contains(&first) {
            bail!(
                "{tag} was committed between lines {before} and {after}, \
                 but went on with line {first}"
            );
        }
        say(&format!("  {tag} goes on with line {first}, as expected"))?;
        report.machines.push(MachineRow {
            what: format!("restore {tag}"),
            time,
            note: format!("goes on with line {first}"),
        });
        self.program.run(&["stop", tag])?;
        Ok(())
    }

    fn wait_for_lines(&mut self, name: &str) -> anyhow::Result<u32> {
        let (first, _) = self.watch(name)?;
        self.wait_for(name, |last| last >= first + LINES - 1)?;
        Ok(first)
    }

    fn wait_for(&mut self, name: &str, enough: impl Fn(u32) -> bool) -> anyhow::Result<u32> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let (_, last) = self.watch(name)?;
            if enough(last) {
                return Ok(last);
            }
            if Instant::now() > deadline {
                bail!("the machine {name} prints no more lines");
            }
            std::thread::sleep(POLL);
        }
    }

    /// The first and the last line that a machine has printed, of which there is
    /// at least one. Each must be the one that belongs there.
    fn watch(&mut self, name: &str) -> anyhow::Result<(u32, u32)> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.program.check_interrupted()?;
            let printed = self.program.capture(&["console", name, "--print"])?;
            if let Some(range) = check_lines(name, &printed)? {
                return Ok(range);
            }
            if Instant::now() > deadline {
                bail!("the machine {name} prints nothing");
            }
            std::thread::sleep(POLL);
        }
    }
}

/// Compares what the guest printed with what it should have.
fn check_lines(name: &str, printed: &str) -> anyhow::Result<Option<(u32, u32)>> {
    // The end may be a line that is still being printed, the beginning one that
    // was begun before the snapshot.
    let whole = printed.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let steps: Vec<TableStep> = whole.lines().filter_map(TableStep::parse).collect();
    if let Some(bad) = whole.lines().find(|line| line.contains("BAD")) {
        bail!("the guest {name} found itself damaged: {bad}");
    }
    let (Some(first), Some(last)) = (steps.first(), steps.last()) else {
        return Ok(None);
    };
    let skip = usize::try_from(first.number.saturating_sub(1)).unwrap_or(usize::MAX);
    let expected: Vec<TableStep> = TableModel::new().skip(skip).take(steps.len()).collect();
    if steps != expected {
        bail!("the guest {name} printed other lines than it should have");
    }
    Ok(Some((first.number, last.number)))
}
