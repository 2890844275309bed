//! Running the built `snapstore` program on a store of a test's own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

/// The built program, beside the running test. `make test` builds it first.
///
/// # Errors
/// If it has not been built.
pub fn program() -> anyhow::Result<PathBuf> {
    let test = std::env::current_exe()?;
    // target/PROFILE/deps/TEST or target/PROFILE/TEST
    let found = test
        .ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join("snapstore"))
        .find(|path| path.is_file());
    found.context("the program is not built; run `cargo build` (in the same profile) first")
}

/// Copies a program, by another process. Were it copied by this one, a child that another test
/// starts meanwhile would hold what it is written through, and it could not be executed for as
/// long (`ETXTBSY`).
///
/// # Errors
/// cp(1)'s.
pub fn copy_program(from: &Path, to: &Path) -> anyhow::Result<()> {
    let output = Command::new("cp").args([from, to]).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{said}");
    Ok(())
}

/// A store in a directory, used through the program.
#[derive(Clone, Debug)]
pub struct Cli {
    store: PathBuf,
    program: Option<PathBuf>,
    environment: Vec<(String, String)>,
}

impl Cli {
    /// The store at `path`, which may not exist yet.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self {
            store: path.to_owned(),
            program: None,
            environment: Vec::new(),
        }
    }

    /// The store's directory.
    #[must_use]
    pub fn store(&self) -> &Path {
        &self.store
    }

    /// The same store with one more environment variable.
    #[must_use]
    pub fn with_env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The same store through another program than the built one.
    #[must_use]
    pub fn with_program(mut self, program: &Path) -> Self {
        self.program = Some(program.to_owned());
        self
    }

    /// The program with these arguments, not started yet.
    ///
    /// # Errors
    /// If the program has not been built.
    pub fn command(&self, arguments: &[&str]) -> anyhow::Result<Command> {
        let program = self.program.clone().map_or_else(program, Ok)?;
        let mut command = Command::new(program);
        command
            .arg("--store")
            .arg(&self.store)
            .args(arguments)
            .envs(self.environment.iter().cloned())
            .stdin(Stdio::null());
        Ok(command)
    }

    /// Runs the program to its end, however it ends.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn run(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        Ok(self.command(arguments)?.output()?)
    }

    /// Runs the program, which must succeed; returns what it printed.
    ///
    /// # Errors
    /// If it fails; the message holds its standard error.
    pub fn ok(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = self.run(arguments)?;
        if !output.status.success() {
            bail!(
                "snapstore {} ended with {}: {}",
                arguments.join(" "),
                output.status,
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Runs the program with `--json`, which must succeed; returns its object.
    ///
    /// # Errors
    /// If it fails or prints anything else than one JSON value.
    pub fn json(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let all = [arguments, &["--json"]].concat();
        Ok(serde_json::from_str(&self.ok(&all)?)?)
    }

    /// Runs the program, which must end with this exit code; returns its
    /// standard error.
    ///
    /// # Errors
    /// If it ends with another code.
    pub fn fails(&self, code: i32, arguments: &[&str]) -> anyhow::Result<String> {
        let output = self.run(arguments)?;
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.code() != Some(code) {
            bail!(
                "snapstore {} ended with {} instead of {code}: {stderr}",
                arguments.join(" "),
                output.status
            );
        }
        Ok(stderr)
    }

    /// Fails a test in which a thread of a mount's server has panicked: the server may have gone
    /// on without it, and only its log tells. To be called once the test is over.
    ///
    /// # Panics
    /// If one has, unless the test fails already.
    pub fn assert_no_server_panicked(&self) {
        for name in ["mounts.log", "mounts.log.1"] {
            let log = self.store.join(name);
            // Whatever a test has put there.
            if std::thread::panicking() || !log.is_file() {
                continue;
            }
            let told = fs::read(&log).unwrap_or_default();
            let told = String::from_utf8_lossy(&told);
            assert!(!told.contains("panicked at"), "{}:\n{told}", log.display());
        }
    }
}

/// Says on standard output that a test was skipped, in the form that the
/// summary of `make test` counts.
pub fn skipped(test: &str, reason: &str) {
    println!("SKIPPED {test}: {reason}");
}

/// Pseudo-random bytes that depend on the seed only.
#[must_use]
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(&mut bytes);
    bytes
}
