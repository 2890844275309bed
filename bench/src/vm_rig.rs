//! Machines to measure: guests that do as they are told, and the process beside
//! them that they are compared with.

use std::io::BufRead as _;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use snapstore_guests::{TOUCH, TouchCommand, page_sum};

use crate::mounts::Mount;
use crate::tools::read_all;
use crate::vm_frozen::Helper;
use snapstore_tests::vm::{Control, Lab};

/// The first page that a guest is told to touch; the guest itself is below.
pub const FIRST: u32 = 512;
/// The pages of a MiB.
pub const MIB_PAGES: u32 = 256;

/// Why machines cannot be measured here, if they cannot.
#[must_use]
pub fn missing() -> Option<String> {
    ["/dev/kvm", "/dev/fuse"].into_iter().find_map(|device| {
        let opened = std::fs::File::options().read(true).write(true).open(device);
        opened.err().map(|error| format!("{device}: {error}"))
    })
}

/// A store and a runtime directory of a benchmark's own.
///
/// # Errors
/// If they cannot be made.
pub fn lab(bench: &str) -> anyhow::Result<Lab> {
    Lab::with_mounts(bench)?.context("there is no KVM any more")
}

/// Boots a guest that touches pages as it is told.
///
/// # Errors
/// If it does not answer.
pub fn boot(lab: &Lab, name: &str, memory: &str) -> anyhow::Result<Talk> {
    lab.run(name, TOUCH, &["--mem", memory])?;
    lab.wait_for_text(name, "ready")?;
    Talk::to(lab, name)
}

/// Boots such a guest, lets it write so many pages from [`FIRST`] on, and commits
/// it as `tag`, halted if so wanted. Then it is gone.
///
/// # Errors
/// If any of that fails.
pub fn snapshot(lab: &Lab, tag: &str, memory: &str, pages: u32, halt: bool) -> anyhow::Result<()> {
    let mut guest = boot(lab, tag, memory)?;
    guest.write(FIRST, pages, 0)?;
    if halt {
        guest.send(TouchCommand::Halt)?;
        snapstore_tests::vm::eventually("the guest halts", || {
            Ok((lab.ps(tag)?["state"] == "halted").then_some(()))
        })?;
    }
    lab.commit(tag, tag)?;
    lab.stop(tag)
}

/// Mounts a snapshot for as long as the benchmark lasts, and reads it once.
///
/// # Errors
/// If that fails.
pub fn mount(lab: &Lab, tag: &str) -> anyhow::Result<Mount> {
    let mount = Mount::product(&lab.cli, tag, &lab.path(&format!("mnt-{tag}")), &[])?;
    warm(&mount)?;
    Ok(mount)
}

/// Reads all of a mounted memory, so that it comes from the kernel's cache.
///
/// # Errors
/// If it cannot be read.
pub fn warm(mount: &Mount) -> anyhow::Result<()> {
    read_all(&mount.memory(), 1 << 20)?;
    Ok(())
}

/// A `touch` guest that does as it is told; each command tells the seconds that it took.
pub trait Touch {
    /// Gives the guest a command; returns the seconds until the answer.
    ///
    /// # Errors
    /// If the line breaks or the answer is not `answer`.
    fn obey(&mut self, command: TouchCommand, answer: &str) -> anyhow::Result<f64>;

    /// Lets the guest write a word to each of these pages.
    ///
    /// # Errors
    /// As [`Touch::obey`].
    fn write(&mut self, first: u32, count: u32, value: u32) -> anyhow::Result<f64> {
        let command = TouchCommand::Write {
            count,
            first,
            value,
        };
        self.obey(command, &format!("w{count}"))
    }

    /// Lets the guest read a word of each of these pages, which hold what a
    /// write with this value stored.
    ///
    /// # Errors
    /// As [`Touch::obey`].
    fn read(&mut self, first: u32, count: u32, value: u32) -> anyhow::Result<f64> {
        let sum = page_sum(count, first, value);
        self.obey(TouchCommand::Read { count, first }, &format!("r{sum:08x}"))
    }

    /// Lets the guest fill these pages whole.
    ///
    /// # Errors
    /// As [`Touch::obey`].
    fn fill(&mut self, first: u32, count: u32, rounds: u32) -> anyhow::Result<f64> {
        let command = TouchCommand::Fill {
            count,
            first,
            rounds,
        };
        self.obey(command, "b")
    }
}

/// The serial line of a `touch` guest.
pub struct Talk(Control);

impl Talk {
    /// Opens the line of a running guest.
    ///
    /// # Errors
    /// If nobody answers.
    pub fn to(lab: &Lab, name: &str) -> anyhow::Result<Self> {
        let mut control = lab.connect(name)?;
        let reply = control.ask(&json!({"request": "console", "replay": false}))?;
        ensure!(reply["reply"] == "console", "{reply}");
        Ok(Self(control))
    }

    /// Gives the guest a command that has no answer.
    ///
    /// # Errors
    /// If the line breaks.
    pub fn send(&mut self, command: TouchCommand) -> anyhow::Result<()> {
        self.0.send(&command.encode())
    }
}

impl Touch for Talk {
    fn obey(&mut self, command: TouchCommand, answer: &str) -> anyhow::Result<f64> {
        let start = Instant::now();
        self.send(command)?;
        let mut line = String::new();
        self.0.0.read_line(&mut line)?;
        ensure!(line.trim_end() == answer, "the guest answered {line:?}");
        Ok(start.elapsed().as_secs_f64())
    }
}

/// A bare machine with a `touch` guest over this image.
pub struct BareTouch(Helper);

impl BareTouch {
    /// Starts it, and waits until the guest obeys.
    ///
    /// # Errors
    /// If it does not.
    pub fn start(lab: &Lab, memory_bytes: u64, image: &Mount) -> anyhow::Result<Self> {
        let kernel = lab.file("touch.kernel", TOUCH)?;
        let image = image.memory();
        let image = image.to_str().context("a path in UTF-8")?;
        let bytes = memory_bytes.to_string();
        let mut helper = Helper::start(&["bare-vm", "1", &bytes, "1", &kernel, image])?;
        while helper.line()? != "ready" {}
        Ok(Self(helper))
    }

    /// The seconds of a fork(2) of its process, and one more whose child is ended.
    ///
    /// # Errors
    /// If it has ended.
    pub fn fork_and_thaw(&mut self) -> anyhow::Result<f64> {
        let seconds = self.0.ask("fork")?;
        self.0.send("thaw")?;
        self.0.line()?;
        Ok(seconds)
    }
}

impl Touch for BareTouch {
    fn obey(&mut self, command: TouchCommand, answer: &str) -> anyhow::Result<f64> {
        let hex: String = command
            .encode()
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        let start = Instant::now();
        self.0.send(&format!("type {hex}"))?;
        let line = self.0.line()?;
        ensure!(line == answer, "the guest answered {line:?}");
        Ok(start.elapsed().as_secs_f64())
    }
}

/// The seconds of a stage.
///
/// # Errors
/// If the answer has none of that name.
pub fn stage(answer: &Value, name: &str) -> anyhow::Result<f64> {
    let seconds = answer["timings"][name].as_f64();
    seconds.with_context(|| format!("no stage {name} in {answer}"))
}

/// A file in memory, for what is copied; gone with the value.
pub struct MemoryFile(PathBuf);

impl MemoryFile {
    /// A name in tmpfs that nothing has yet.
    #[must_use]
    pub fn new() -> Self {
        Self(format!("/dev/shm/snapstore-bench-{}", std::process::id()).into())
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> String {
        self.0.display().to_string()
    }
}

impl Default for MemoryFile {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for MemoryFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
