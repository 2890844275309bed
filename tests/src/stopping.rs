//! Processes that are stopped in the middle of what they do.

use std::fs;
use std::io::Read as _;
use std::path::PathBuf;
use std::process::{Child, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::crashing::{Check, Expected, assert_holds, expect};
use crate::harness::Cli;

const PATIENCE: Duration = Duration::from_secs(60);

/// A store of a test's own, and what it should hold.
pub struct Scene {
    dir: TempDir,
    /// The store.
    pub cli: Cli,
    /// What it should hold.
    pub expected: Expected,
}

impl Scene {
    /// An empty store.
    ///
    /// # Errors
    /// If the program cannot be run.
    pub fn new() -> Result<Self> {
        let dir = TempDir::new()?;
        let cli = Cli::new(&dir.path().join("store"));
        cli.ok(&["init"])?;
        Ok(Self {
            dir,
            cli,
            expected: Expected::new(),
        })
    }

    /// A file beside the store.
    ///
    /// # Errors
    /// I/O errors.
    pub fn file(&self, name: &str, bytes: &[u8]) -> Result<PathBuf> {
        let path = self.dir.path().join(name);
        fs::write(&path, bytes)?;
        Ok(path)
    }

    /// Commits a memory image.
    ///
    /// # Errors
    /// If the commit fails.
    pub fn commit(&mut self, tag: &str, memory: &[u8], more: &[&str]) -> Result<()> {
        self.begin(tag, memory, more, 0)?.succeed()
    }

    /// Starts a commit, which is expected to succeed, and to be stopped before
    /// this step unless it ends earlier; 0 is no step.
    ///
    /// # Errors
    /// If the program cannot be run.
    pub fn begin(&mut self, tag: &str, memory: &[u8], more: &[&str], stop: u32) -> Result<Running> {
        let path = self.file(tag, memory)?;
        expect(&mut self.expected, tag, &path);
        let shown = path.display().to_string();
        let arguments = [&["commit", tag, "--memory", &shown], more].concat();
        Running::start(&self.cli, &arguments, stop)
    }

    /// Removes tags, if nobody holds the lock. Returns whether that worked.
    ///
    /// # Errors
    /// If it fails otherwise.
    pub fn remove(&mut self, tags: &[&str]) -> Result<bool> {
        let removed = self.unless_busy(&[&["rm"], tags].concat())?;
        if removed {
            self.expected.retain(|tag, _| !tags.contains(&tag.as_str()));
        }
        Ok(removed)
    }

    /// Runs the program. Returns whether the store was not busy.
    ///
    /// # Errors
    /// If it fails otherwise.
    pub fn unless_busy(&self, arguments: &[&str]) -> Result<bool> {
        let all = [&["--lock-timeout", "0.1"], arguments].concat();
        let output = self.cli.run(&all)?;
        match output.status.code() {
            Some(0) => Ok(true),
            Some(5) => Ok(false),
            _ => bail!("{arguments:?}: {output:?}"),
        }
    }

    /// Everything is there and whole.
    ///
    /// # Errors
    /// What is not.
    pub fn holds(&self) -> Result<()> {
        assert_holds(&self.cli, &self.expected)
    }

    /// The end of every test: all is there, and all can be freed.
    ///
    /// # Errors
    /// What is not as it should be.
    pub fn finish(&self) -> Result<()> {
        self.holds()?;
        Check::holds(&self.expected).run(self.cli.store())
    }
}

/// A program under way. It is killed if a test ends early.
pub struct Running(Child);

impl Running {
    /// Starts the program and, unless `stop` is 0, waits until it is stopped
    /// before that step or has ended.
    ///
    /// # Errors
    /// If the program cannot be run.
    pub fn start(cli: &Cli, arguments: &[&str], stop: u32) -> Result<Self> {
        let mut command = cli.command(arguments)?;
        if stop > 0 {
            command.env("SNAPSTORE_STOP_AT_STEP", stop.to_string());
        }
        let child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let running = Self(child);
        if stop > 0 {
            running.wait_until(&['T', 'Z'])?;
        }
        Ok(running)
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// Whether it has ended.
    ///
    /// # Errors
    /// If it has been waited for.
    pub fn has_ended(&self) -> Result<bool> {
        Ok(self.state()? == 'Z')
    }

    fn state(&self) -> Result<char> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.0.id()))?;
        let (_, fields) = stat.rsplit_once(") ").context("no state")?;
        fields.chars().next().context("no state")
    }

    fn wait_until(&self, states: &[char]) -> Result<()> {
        let started = Instant::now();
        while !states.contains(&self.state()?) {
            ensure!(started.elapsed() < PATIENCE, "it neither stops nor ends");
            sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Whether it is stopped.
    ///
    /// # Errors
    /// If it has been waited for.
    pub fn is_stopped(&self) -> Result<bool> {
        Ok(self.state()? == 'T')
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// If it has been waited for.
    pub fn send(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_child(&self.0);
        Ok(kill_process(pid, signal)?)
    }

    /// Lets it go on, and waits for its end.
    ///
    /// # Errors
    /// If it does not end.
    pub fn output(mut self) -> Result<Output> {
        self.send(Signal::CONT)?;
        self.wait_until(&['Z'])?;
        let mut output = Output {
            status: self.0.wait()?,
            stdout: Vec::new(),
            stderr: Vec::new(),
        };
        if let Some(mut pipe) = self.0.stdout.take() {
            pipe.read_to_end(&mut output.stdout)?;
        }
        if let Some(mut pipe) = self.0.stderr.take() {
            pipe.read_to_end(&mut output.stderr)?;
        }
        Ok(output)
    }

    /// Lets it go on, and waits for its end, which must be a success.
    ///
    /// # Errors
    /// If it is none.
    pub fn succeed(self) -> Result<()> {
        let output = self.output()?;
        ensure!(output.status.success(), "{output:?}");
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
