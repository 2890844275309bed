//! `commit --pid`: the memory of a process that mapped a mounted image for itself, as other
//! monitors do.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context as _, ensure};

use crate::{Fixture, PAGE};
use snapstore_tests::harness::{noise, skipped};

/// Maps a file privately in two parts, and writes to the pages that it is told.
const MONITOR: &str = "
import mmap, os, sys
file = os.open(sys.argv[1], os.O_RDONLY)
size = os.fstat(file).st_size
half = size // 2
parts = [mmap.mmap(file, half, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE, offset=at)
         for at in (0, half)]
print('mapped', flush=True)
for line in sys.stdin:
    if line.strip() == 'spin':
        print('spins', flush=True)
        page = 0
        while True:
            parts[0][(page % (half // 4096)) * 4096] = page % 251
            page += 1
    page, fill = map(int, line.split())
    at = page * 4096
    parts[at // half][at % half:at % half + 4096] = bytes([fill]) * 4096
    print('written', flush=True)
";

struct Monitor {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Monitor {
    fn start(memory: &Path) -> anyhow::Result<Self> {
        let mut process = Command::new("python3")
            .args(["-c", MONITOR])
            .arg(memory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = process.stdin.take().context("no input")?;
        let output = BufReader::new(process.stdout.take().context("no output")?);
        let mut monitor = Self {
            process,
            input,
            output,
        };
        monitor.hear("mapped")?;
        Ok(monitor)
    }

    fn hear(&mut self, word: &str) -> anyhow::Result<()> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        ensure!(line.trim() == word, "it says {line:?}");
        Ok(())
    }

    fn write(&mut self, page: usize, fill: u8) -> anyhow::Result<()> {
        writeln!(self.input, "{page} {fill}")?;
        self.hear("written")
    }

    fn pid(&self) -> String {
        self.process.id().to_string()
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn fixture(test: &str) -> anyhow::Result<Option<Fixture>> {
    if Command::new("python3").arg("--version").output().is_err() {
        skipped(test, "there is no python3 to be a monitor");
        return Ok(None);
    }
    Fixture::new(test)
}

#[test]
fn what_another_monitor_changed_is_committed() -> anyhow::Result<()> {
    let Some(mut fixture) = fixture("what_another_monitor_changed_is_committed")? else {
        return Ok(());
    };
    let mut memory = noise(1, 64 * PAGE);
    fixture.commit("base", &memory, &[])?;
    let state = fixture.file("state", b"of another monitor")?;
    // Of one snapshot, and in a directory of all tags.
    for (tag, dir) in [(Some("base"), "one"), (None, "all")] {
        let (dir, _) = fixture.mount(tag, dir)?;
        let file = match tag {
            Some(_) => dir.join("memory.bin"),
            None => dir.join("base/memory.bin"),
        };
        let mut monitor = Monitor::start(&file)?;
        let mut expected = memory.clone();
        for (page, fill) in [(0, 7), (31, 0), (32, 9), (63, 1)] {
            monitor.write(page, fill)?;
            expected[page * PAGE..(page + 1) * PAGE].fill(fill);
        }
        let name = format!("step-{}", tag.unwrap_or("all"));
        let pid = monitor.pid();
        let arguments = ["commit", &name, "--pid", &pid, "--vmstate", &state];
        let answer = fixture.cli.json(&arguments)?;
        assert_eq!(answer["images"][0]["changed_pages"], 4, "{answer}");
        assert_eq!(answer["parent_tag"], "base", "{answer}");
        let (shown, _) = fixture.mount(Some(&name), &format!("{name}.mnt"))?;
        assert!(
            std::fs::read(shown.join("memory.bin"))? == expected,
            "other bytes"
        );
        assert!(std::fs::read(shown.join("vmstate"))? == b"of another monitor");
        // It goes on; the next commit has all that it changed since it was restored.
        monitor.write(5, 5)?;
        expected[5 * PAGE..6 * PAGE].fill(5);
        let name = format!("{name}+1");
        let answer = fixture.cli.json(&["commit", &name, "--pid", &pid])?;
        assert_eq!(answer["images"][0]["changed_pages"], 5, "{answer}");
        let (shown, _) = fixture.mount(Some(&name), &format!("{name}.mnt"))?;
        assert!(
            std::fs::read(shown.join("memory.bin"))? == expected,
            "other bytes"
        );
    }
    memory.clear();
    Ok(())
}

#[test]
fn a_process_that_cannot_be_committed_is_told_so() -> anyhow::Result<()> {
    let Some(mut fixture) = fixture("a_process_that_cannot_be_committed_is_told_so")? else {
        return Ok(());
    };
    fixture.commit("base", &noise(1, 64 * PAGE), &[])?;
    let own = std::process::id().to_string();
    let said = fixture.cli.fails(3, &["commit", "x", "--pid", &own])?;
    assert!(said.contains("has not mapped memory.bin"), "{said}");
    let said = fixture.cli.fails(3, &["commit", "x", "--pid", "4194304"])?;
    assert!(said.contains("no process"), "{said}");
    fixture
        .cli
        .fails(2, &["commit", "x", "--pid", &own, "--parent", "base"])?;
    // A guest that runs has no state that goes with its memory.
    let (dir, _) = fixture.mount(Some("base"), "mnt")?;
    let mut monitor = Monitor::start(&dir.join("memory.bin"))?;
    writeln!(monitor.input, "spin")?;
    monitor.hear("spins")?;
    let pid = monitor.pid();
    let output = fixture.cli.run(&["commit", "x", "--pid", &pid])?;
    // Once all its pages are its own, only their bytes tell.
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        !output.status.success() && (said.contains("pause the guest") || said.contains("changed")),
        "{said}"
    );
    fixture.cli.fails(3, &["show", "x"])?;
    Ok(())
}
