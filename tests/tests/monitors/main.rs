//! Machines of other monitors: real ones where there are some, and sockets that are none.

mod cloud_hypervisor;
mod cloud_hypervisor_devices;
mod described;
mod firecracker;
mod firecracker_jailed;
mod firecracker_memory;
mod firecracker_versions;
mod kills;
mod layouts;
mod qemu;
mod qemu_alone;
mod sockets;

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use snapstore_tests::harness::{Cli, skipped};
use tempfile::TempDir;

/// How long an emulated guest may take to do something, on a host that is busy.
const PATIENCE: Duration = Duration::from_secs(180);
const PAGE: usize = 4096;

/// A store, and a runtime directory whose machines are ended in the end.
struct Fixture {
    dir: TempDir,
    cli: Cli,
}

impl Fixture {
    /// `None`, and a line that says so, where mounts are impossible.
    fn new(test: &str) -> anyhow::Result<Option<Self>> {
        if let Err(error) = fs::File::open("/dev/fuse") {
            skipped(test, &format!("/dev/fuse: {error}"));
            return Ok(None);
        }
        // Paths of sockets are short.
        let dir = tempfile::Builder::new().prefix("mon").tempdir_in("/tmp")?;
        let run = dir.path().join("run").display().to_string();
        let cli = Cli::new(&dir.path().join("store")).with_env("SNAPSTORE_RUNTIME_DIR", &run);
        cli.ok(&["init"])?;
        Ok(Some(Self { dir, cli }))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// What a restored machine has made, such as its socket.
    fn of_machine(&self, machine: &str, file: &str) -> String {
        self.text(&format!("run/vms/{machine}/monitor/{file}"))
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for log in fs::read_dir(self.path("run/vms"))
                .into_iter()
                .flatten()
                .flatten()
            {
                let said = fs::read_to_string(log.path().join("log")).unwrap_or_default();
                println!("{}: {said}", log.path().display());
            }
        }
        if let Err(error) = self.cli.ok(&["stop", "--all"]) {
            println!("machines are left: {error}");
        }
    }
}

impl Fixture {
    /// A file of a snapshot, through a mount.
    fn shown(&self, tag: &str, file: &str) -> anyhow::Result<Vec<u8>> {
        let dir = self.path(&format!("{tag}.{file}"));
        fs::create_dir(&dir)?;
        let text = dir.display().to_string();
        self.cli.ok(&["mount", tag, &text])?;
        let bytes = fs::read(dir.join(file));
        self.cli.ok(&["umount", &text])?;
        Ok(bytes?)
    }
}

/// Fills a page of an image.
fn set(image: &mut [u8], page: usize, fill: u8) {
    image[page * PAGE..(page + 1) * PAGE].fill(fill);
}

/// The double of a monitor, as a program. `None`, and a line that says so, without Python.
fn double(
    fixture: &Fixture,
    test: &str,
    name: &str,
    environment: &[(&str, &str)],
) -> anyhow::Result<Option<PathBuf>> {
    if Command::new("python3").arg("--version").output().is_err() {
        skipped(test, "there is no python3 to be the monitor");
        return Ok(None);
    }
    let doubles = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/monitors/doubles");
    let path = fixture.path(name);
    let set: String = environment
        .iter()
        .map(|(key, value)| format!("export {key}={value}\n"))
        .collect();
    // The process has to be the interpreter itself, whose memory is looked at.
    let run = format!("exec python3 -B {}/{name}.py \"$@\"\n", doubles.display());
    fs::write(&path, format!("#!/bin/sh\n{set}{run}"))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(Some(path))
}

/// A process that ends with this.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Process {
    fn start(command: &mut Command) -> anyhow::Result<Self> {
        Ok(Self(command.spawn()?))
    }

    /// Waits until somebody listens there.
    fn wait_for_socket(&mut self, socket: &Path) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while UnixStream::connect(socket).is_err() {
            ensure!(self.0.try_wait()?.is_none(), "the monitor has ended");
            ensure!(Instant::now() < deadline, "it does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Waits until the file is there and has this text in it.
    fn wait_for(&mut self, file: &Path, text: &str) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let said = fs::read(file).unwrap_or_default();
            if String::from_utf8_lossy(&said).contains(text) {
                return Ok(());
            }
            if let Some(status) = self.0.try_wait()? {
                bail!("the monitor has ended ({status})");
            }
            ensure!(
                Instant::now() < deadline,
                "it does not come to {text:?}: {}",
                String::from_utf8_lossy(&said)
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Asks a monitor's REST interface; returns the body of its answer, which must be a good one.
fn http(
    socket: &str,
    method: &str,
    path: &str,
    body: &serde_json::Value,
) -> anyhow::Result<String> {
    let body = match body {
        serde_json::Value::Null => String::new(),
        body => body.to_string(),
    };
    let mut stream = UnixStream::connect(socket)?;
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    ensure!(said.starts_with("HTTP/1.1 20"), "{method} {path}: {said}");
    Ok(said)
}

/// Has the shell of a guest at a serial line run something; returns what it printed.
fn ask(console: &str, line: &str) -> anyhow::Result<String> {
    let deadline = Instant::now() + PATIENCE;
    let mut stream = UnixStream::connect(console).with_context(|| console.to_owned())?;
    stream.set_read_timeout(Some(Duration::from_millis(200)))?;
    // The words are not in what the terminal echoes.
    writeln!(stream, "echo be''gin; {line}; echo en''d=$?")?;
    let mut said = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => bail!("the console of {console} has ended"),
            Ok(count) => said.extend_from_slice(&buffer[..count]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
        let text = String::from_utf8_lossy(&said).replace('\r', "");
        if let Some((_, rest)) = text.split_once("begin\n")
            && let Some((answer, code)) = rest.split_once("end=")
            && code.contains('\n')
        {
            ensure!(code.starts_with("0\n"), "{line:?} failed: {answer}");
            return Ok(answer.to_owned());
        }
        ensure!(
            Instant::now() < deadline,
            "{line:?} is not answered: {text}"
        );
    }
}
