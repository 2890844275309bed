//! Running the program's commands in the open: each is shown, then its output.

use std::io::{self, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

/// Something that took time.
pub struct Step {
    pub what: String,
    pub time: Duration,
    pub note: String,
}

/// The program, on one store.
pub struct Program {
    path: PathBuf,
    store: PathBuf,
    runtime: PathBuf,
    steps: Vec<Step>,
    interrupted: Arc<AtomicBool>,
}

impl Program {
    /// From here on a signal does not end this process, but the step it is at.
    pub fn new(store: &Path, runtime: &Path) -> anyhow::Result<Self> {
        use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
        let interrupted = Arc::new(AtomicBool::new(false));
        for signal in [SIGHUP, SIGINT, SIGTERM] {
            signal_hook::flag::register(signal, interrupted.clone())
                .context("cannot watch for signals")?;
        }
        Ok(Self {
            path: program()?,
            store: store.to_owned(),
            runtime: runtime.to_owned(),
            steps: Vec::new(),
            interrupted,
        })
    }

    /// Its file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn check_interrupted(&self) -> anyhow::Result<()> {
        if self.interrupted.load(Ordering::Relaxed) {
            bail!("interrupted");
        }
        Ok(())
    }

    /// Shows how a user would name the store.
    pub fn announce(&self) -> anyhow::Result<()> {
        let store = self.store.to_string_lossy();
        say(&format!("$ export SNAPSTORE_DIR={}", quoted(&store)))
    }

    /// Runs a command, which must succeed. A Ctrl-C on the terminal ends it.
    pub fn run(&mut self, arguments: &[&str]) -> anyhow::Result<Duration> {
        self.execute(arguments, |command| command)
    }

    /// The same, but a Ctrl-C does not reach the command.
    pub fn run_whatever_signal(&mut self, arguments: &[&str]) -> anyhow::Result<Duration> {
        self.execute(arguments, |command| command.process_group(0))
    }

    /// Runs a command without showing it; returns what it printed.
    pub fn capture(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = self
            .command(arguments)
            .process_group(0)
            .output()
            .context("cannot start the program")?;
        if !output.status.success() {
            bail!(
                "`snapstore {}` ended with {}",
                arguments.join(" "),
                output.status
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.path);
        command
            .args(arguments)
            .env("SNAPSTORE_DIR", &self.store)
            .env("SNAPSTORE_RUNTIME_DIR", &self.runtime)
            .stdin(Stdio::null())
            .stderr(Stdio::inherit());
        command
    }

    fn execute(
        &mut self,
        arguments: &[&str],
        configure: impl FnOnce(&mut Command) -> &mut Command,
    ) -> anyhow::Result<Duration> {
        self.check_interrupted()?;
        let words: Vec<String> = arguments.iter().map(|word| quoted(word)).collect();
        let line = format!("snapstore {}", words.join(" "));
        say(&format!("\n$ {line}"))?;
        let mut command = self.command(arguments);
        let started = Instant::now();
        let output = configure(&mut command)
            .output()
            .context("cannot start the program")?;
        let time = started.elapsed();
        let text = String::from_utf8_lossy(&output.stdout);
        for text_line in text.lines() {
            say(format!("  {text_line}").trim_end())?;
        }
        self.check_interrupted()?;
        if !output.status.success() {
            bail!("`{line}` ended with {}", output.status);
        }
        // Paths say nothing in a list of times.
        let what: Vec<&str> = arguments
            .iter()
            .copied()
            .filter(|word| !word.contains('/') && *word != "--memory")
            .collect();
        let what = match what.as_slice() {
            ["mount"] => "mount all tags".to_owned(),
            words => words.join(" "),
        };
        self.note(&what, time, "");
        Ok(time)
    }

    /// Adds to the list of what took how long.
    pub fn note(&mut self, what: &str, time: Duration, note: &str) {
        self.steps.push(Step {
            what: what.to_owned(),
            time,
            note: note.to_owned(),
        });
    }

    pub fn steps(&self) -> &[Step] {
        &self.steps
    }
}

/// The built program: this one is `examples/demo` beside it.
fn program() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("cannot find this program's own file")?;
    let program = own.ancestors().nth(2).map(|dir| dir.join("snapstore"));
    let program = program.filter(|program| program.is_file());
    program.context("snapstore is not built in the same profile; run `cargo build` first")
}

/// Whether standard output is kept for one JSON object.
static STORY_ON_STDERR: AtomicBool = AtomicBool::new(false);

/// From here on the story goes to standard error.
pub fn keep_stdout_free() {
    STORY_ON_STDERR.store(true, Ordering::Relaxed);
}

/// Tells a line of the story; unlike `println!` it survives a reader that went
/// away.
pub fn say(line: &str) -> anyhow::Result<()> {
    if STORY_ON_STDERR.load(Ordering::Relaxed) {
        let _ = writeln!(io::stderr(), "{line}");
        return Ok(());
    }
    answer(line)
}

/// Writes a line to standard output.
pub fn answer(line: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{}", line.trim_end())?;
    Ok(out.flush()?)
}

/// As one would type it in a shell.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-+=:,./@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_where_a_shell_needs_it() {
        assert_eq!(quoted("base+1"), "base+1");
        assert_eq!(quoted("/a dir/it's"), r"'/a dir/it'\''s'");
        assert_eq!(quoted(""), "''");
    }
}
