//! Real virtual machines, run by the program: a store and a runtime directory of a
//! test's own, and what the guests of `snapstore-guests` say.

mod control;
mod process;
mod steps;

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use snapstore_store::Store;
use tempfile::TempDir;

use crate::harness::{Cli, skipped};
pub use control::Control;
pub use process::{eventually, kill, names, runs, signal};
pub use steps::{assert_within, steps};

use process::PATIENCE;

/// Where the `table` guest keeps the number of its step: guest physical.
const STEP_ADDRESS: u64 = 0x1f_1000;

/// A store and a runtime directory; all machines end with it.
pub struct Lab {
    dir: TempDir,
    /// The program on this store.
    pub cli: Cli,
}

impl Lab {
    /// `None`, and a line that says so, where there is no KVM.
    ///
    /// # Errors
    /// If the program cannot be run.
    pub fn new(test: &str) -> Result<Option<Self>> {
        if let Err(error) = fs::File::options().read(true).write(true).open("/dev/kvm") {
            skipped(test, &format!("/dev/kvm: {error}"));
            return Ok(None);
        }
        let dir = tempfile::tempdir()?;
        let runtime = dir.path().join("run");
        let cli = Cli::new(&dir.path().join("store"))
            .with_env("SNAPSTORE_RUNTIME_DIR", &runtime.display().to_string());
        let lab = Self { dir, cli };
        lab.cli.ok(&["init"])?;
        Ok(Some(lab))
    }

    /// The same where snapshots can also be mounted, and so restored.
    ///
    /// # Errors
    /// As [`Lab::new`].
    pub fn with_mounts(test: &str) -> Result<Option<Self>> {
        if let Err(error) = fs::File::open("/dev/fuse") {
            skipped(test, &format!("/dev/fuse: {error}"));
            return Ok(None);
        }
        Self::new(test)
    }

    /// The same machines, with another store.
    ///
    /// # Errors
    /// If it cannot be created.
    pub fn use_store(&mut self, path: &Path) -> Result<()> {
        self.cli = Cli::new(path).with_env("SNAPSTORE_RUNTIME_DIR", &self.runtime_text());
        self.cli.ok(&["init"])?;
        Ok(())
    }

    /// A path beside the store.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Where the machines are.
    #[must_use]
    pub fn runtime(&self) -> PathBuf {
        self.path("run")
    }

    fn runtime_text(&self) -> String {
        self.runtime().display().to_string()
    }

    /// The directory of a machine.
    #[must_use]
    pub fn vm_dir(&self, name: &str) -> PathBuf {
        self.runtime().join("vms").join(name)
    }

    /// Writes a file; returns its path as text.
    ///
    /// # Errors
    /// I/O errors.
    pub fn file(&self, name: &str, bytes: &[u8]) -> Result<String> {
        let path = self.path(name);
        fs::write(&path, bytes)?;
        Ok(path.display().to_string())
    }

    /// Starts a detached machine with this guest.
    ///
    /// # Errors
    /// If it does not start.
    pub fn run(&self, name: &str, guest: &[u8], more: &[&str]) -> Result<()> {
        let kernel = self.file(&format!("{name}.kernel"), guest)?;
        let mut arguments = vec!["run", name, "--kernel", &kernel, "--detach"];
        if !more.contains(&"--mem") {
            arguments.extend(["--mem", "16M"]);
        }
        arguments.extend(more);
        self.cli.json(&arguments)?;
        Ok(())
    }

    /// Restores detached machines; returns their names.
    ///
    /// # Errors
    /// If they do not start.
    pub fn restore(&self, snapshot: &str, more: &[&str]) -> Result<Vec<String>> {
        let arguments = [&["restore", snapshot, "--detach"], more].concat();
        let answer = self.cli.json(&arguments)?;
        let machines = answer["machines"].as_array().context("no machines")?;
        let names = machines.iter().map(|machine| machine["name"].as_str());
        let names: Option<Vec<_>> = names.map(|name| name.map(ToOwned::to_owned)).collect();
        names.context("a machine without a name")
    }

    /// Commits a machine.
    ///
    /// # Errors
    /// If that fails.
    pub fn commit(&self, tag: &str, vm: &str) -> Result<Value> {
        self.cli.json(&["commit", tag, "--vm", vm])
    }

    /// Ends a machine.
    ///
    /// # Errors
    /// If it does not end.
    pub fn stop(&self, name: &str) -> Result<()> {
        self.cli.ok(&["stop", name]).map(drop)
    }

    /// What a machine printed last.
    ///
    /// # Errors
    /// If it does not run.
    pub fn console(&self, name: &str) -> Result<String> {
        let output = self.cli.run(&["console", name, "--print"])?;
        ensure!(output.status.success(), "console {name}: {output:?}");
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Waits until a machine has printed this.
    ///
    /// # Errors
    /// If it never does.
    pub fn wait_for_text(&self, name: &str, text: &str) -> Result<String> {
        eventually(&format!("{name} prints {text:?}"), || {
            let said = self.console(name)?;
            Ok(said.contains(text).then_some(said))
        })
    }

    /// The steps that a `table` guest has printed, which must follow each other
    /// and be those of the model.
    ///
    /// # Errors
    /// What else it printed.
    pub fn steps(&self, name: &str) -> Result<Vec<u32>> {
        steps(&self.console(name)?).with_context(|| format!("machine {name}"))
    }

    /// Waits for at least so many good steps.
    ///
    /// # Errors
    /// As [`Lab::steps`].
    pub fn wait_for_steps(&self, name: &str, count: usize) -> Result<Vec<u32>> {
        eventually(&format!("{name} prints {count} steps"), || {
            let steps = self.steps(name)?;
            Ok((steps.len() >= count).then_some(steps))
        })
    }

    /// Waits until a `table` guest is beyond this step.
    ///
    /// # Errors
    /// As [`Lab::steps`].
    pub fn wait_beyond(&self, name: &str, step: u32) -> Result<u32> {
        eventually(&format!("{name} is beyond step {step}"), || {
            Ok(self
                .steps(name)?
                .last()
                .copied()
                .filter(|last| *last > step))
        })
    }

    /// A machine as `ps` tells.
    ///
    /// # Errors
    /// If it does not run.
    pub fn ps(&self, name: &str) -> Result<Value> {
        self.cli.json(&["ps", name])
    }

    /// All machines, running or dead.
    ///
    /// # Errors
    /// If they cannot be listed.
    pub fn machines(&self) -> Result<Vec<Value>> {
        let listed = self.cli.json(&["ps"])?;
        Ok(listed["machines"].as_array().context("no list")?.clone())
    }

    /// Its process, once it answers: where much runs that may take a while.
    ///
    /// # Errors
    /// If it does not run.
    pub fn pid(&self, name: &str) -> Result<u32> {
        let pid = eventually(
            "it tells its process",
            || Ok(self.ps(name)?["pid"].as_u64()),
        )?;
        Ok(u32::try_from(pid)?)
    }

    /// Waits until `ps` says why a machine has died.
    ///
    /// # Errors
    /// If it does not die.
    pub fn wait_for_death(&self, name: &str) -> Result<String> {
        eventually(&format!("{name} dies"), || {
            let machines = self.machines()?;
            let entry = machines.iter().find(|entry| entry["name"] == name);
            Ok(entry.and_then(|entry| entry["ending"].as_str().map(ToOwned::to_owned)))
        })
    }

    /// A connection to a machine's control socket.
    ///
    /// # Errors
    /// If nobody listens.
    pub fn connect(&self, name: &str) -> Result<Control> {
        let stream = UnixStream::connect(self.vm_dir(name).join("control.sock"))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Control(BufReader::new(stream)))
    }

    /// Types into a machine's serial line.
    ///
    /// # Errors
    /// If that breaks.
    pub fn type_in(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let mut control = self.connect(name)?;
        let reply = control.ask(&json!({"request": "console", "replay": false}))?;
        ensure!(reply["reply"] == "console", "{reply}");
        control.0.get_mut().write_all(bytes)?;
        Ok(())
    }

    /// The bytes at `offset` of a snapshot's image.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn stored(&self, tag: &str, image: &str, offset: u64, len: usize) -> Result<Vec<u8>> {
        let store = Store::open(self.cli.store())?;
        let manifest = store.manifest(store.resolve(tag)?)?;
        let reader = store.image_reader(manifest.image(image).context("no such image")?);
        let mut bytes = vec![0; len];
        let got = reader.read_at(&mut bytes, offset)?;
        ensure!(got == len, "{tag}/{image} is too short");
        Ok(bytes)
    }

    /// A whole image of a snapshot.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn stored_all(&self, tag: &str, image: &str) -> Result<Vec<u8>> {
        let store = Store::open(self.cli.store())?;
        let manifest = store.manifest(store.resolve(tag)?)?;
        let size = manifest.image(image).context("no such image")?.size_bytes;
        self.stored(tag, image, 0, usize::try_from(size)?)
    }

    /// The step that a `table` guest was at when it was committed: its line is
    /// the next to be printed whole, unless it just was, or was being, printed.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn committed_step(&self, tag: &str) -> Result<u32> {
        let bytes = self.stored(tag, "memory", STEP_ADDRESS, 4)?;
        Ok(u32::from_le_bytes(bytes.as_slice().try_into()?))
    }

    /// A machine restored from this tag goes on where it was committed.
    ///
    /// # Errors
    /// If it does not.
    pub fn assert_goes_on(&self, name: &str, tag: &str) -> Result<()> {
        let at = self.committed_step(tag)?;
        let steps = self.wait_for_steps(name, 3)?;
        ensure!(
            steps[0] == at || steps[0] == at + 1,
            "{tag} was committed in step {at}; {name} went on at {}",
            steps[0]
        );
        Ok(())
    }

    /// Live processes that belong to this lab: machines, frozen copies, servers.
    ///
    /// # Errors
    /// If processes cannot be listed.
    pub fn processes(&self) -> Result<Vec<(u32, String)>> {
        let mark = format!("SNAPSTORE_RUNTIME_DIR={}\0", self.runtime_text());
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc")? {
            let path = entry?.path();
            let pid = path
                .file_name()
                .and_then(|name| name.to_str()?.parse().ok());
            // Processes may end meanwhile, and those that have ended have none.
            let environment = fs::read(path.join("environ")).unwrap_or_default();
            let contains = environment
                .windows(mark.len())
                .any(|part| part == mark.as_bytes());
            if let (Some(pid), true) = (pid, contains) {
                let name = fs::read_to_string(path.join("comm")).unwrap_or_default();
                found.push((pid, name.trim().to_owned()));
            }
        }
        Ok(found)
    }

    /// The frozen copies that live.
    ///
    /// # Errors
    /// As [`Lab::processes`].
    pub fn frozen(&self) -> Result<Vec<u32>> {
        let processes = self.processes()?.into_iter();
        // The kernel keeps 15 bytes of a name. Before it has its own, a copy has
        // that of the thread it was made by.
        let frozen = processes.filter(|(_, name)| name == "snapstore-froze" || name == "client");
        Ok(frozen.map(|(pid, _)| pid).collect())
    }

    /// Waits until no frozen copy lives.
    ///
    /// # Errors
    /// If one does not end.
    pub fn wait_until_thawed(&self) -> Result<()> {
        eventually("no frozen copy", || {
            Ok(self.frozen()?.is_empty().then_some(()))
        })
    }

    /// What is mounted in this lab.
    ///
    /// # Errors
    /// If mounts cannot be listed.
    pub fn mounts(&self) -> Result<Vec<PathBuf>> {
        let table = fs::read_to_string("/proc/self/mounts")?;
        let dirs = table.lines().filter_map(|line| line.split(' ').nth(1));
        Ok(dirs
            .map(PathBuf::from)
            .filter(|dir| dir.starts_with(self.dir.path()))
            .collect())
    }

    /// The process that serves the only mount made for machines.
    ///
    /// # Errors
    /// If there is not just one.
    pub fn mount_server(&self) -> Result<u32> {
        let mut servers = Vec::new();
        for (pid, _) in self.processes()? {
            let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            if arguments
                .split(|byte| *byte == 0)
                .any(|it| it == b"--while-locked")
            {
                servers.push(pid);
            }
        }
        ensure!(servers.len() == 1, "{} servers", servers.len());
        Ok(servers[0])
    }

    /// Waits until nothing of any machine is left: no process, no mount, no file.
    ///
    /// # Errors
    /// What is left.
    pub fn assert_nothing_left(&self) -> Result<()> {
        let mut left = String::new();
        let gone = eventually("nothing is left", || {
            let files = ["vms", "mounts"].map(|dir| names(&self.runtime().join(dir)));
            let (processes, mounts) = (self.processes()?, self.mounts()?);
            let none = processes.is_empty() && mounts.is_empty();
            left = format!("{processes:?} {mounts:?} {files:?}");
            Ok((none && files.iter().all(BTreeSet::is_empty)).then_some(()))
        });
        gone.with_context(|| left)
    }

    /// Ends all machines and waits until nothing is left.
    ///
    /// # Errors
    /// What is left.
    pub fn finish(&self) -> Result<()> {
        self.cli.ok(&["stop", "--all"])?;
        self.assert_nothing_left()?;
        self.cli.ok(&["verify", "--read-data"])?;
        Ok(())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // As good as it can be done after a failure.
        if let Ok(mut command) = self.cli.command(&["stop", "--all"]) {
            let _ = Command::new("timeout")
                .arg("20")
                .arg(command.get_program())
                .args(command.get_args())
                .env("SNAPSTORE_RUNTIME_DIR", self.runtime())
                .output()
                .or_else(|_| command.output());
        }
        for (pid, _) in self.processes().unwrap_or_default() {
            let _ = signal(pid, Signal::KILL);
        }
        for dir in self.mounts().unwrap_or_default() {
            let _ = rustix::mount::unmount(&dir, rustix::mount::UnmountFlags::DETACH);
        }
        self.cli.assert_no_server_panicked();
    }
}
