//! A monitor that this command has paused goes on, however the command ends.
//!
//! The guard resumes it when it is dropped. A second process waits for the command's end,
//! and resumes the monitor if the command was killed before it could, or was not answered: the
//! two share a pipe, which the kernel closes.

use std::io::{self, Read as _, Write as _};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::io::{FdFlags, fcntl_setfd};

use super::adapter::{Kind, Monitor};
use super::known;
use super::step::KILL_AT;
use super::turn::Turn;
use crate::background;

/// The hidden command of the process that waits.
pub const COMMAND: &str = "monitor-resumer";

/// How often it tries, and how long it waits in between.
const TRIES: u32 = 10;
const BETWEEN_TRIES: Duration = Duration::from_secs(1);

/// A monitor may tell that its guest runs, and pause it then: a client that is gone by now had
/// asked for that. So the guest is looked at for so long, and so often.
const SETTLES: Duration = Duration::from_millis(300);
const LOOKS: Duration = Duration::from_millis(20);

/// What is written to it when there is nothing left to resume.
const DONE: u8 = b'd';
/// What it writes when it waits.
const WAITS: u8 = b'w';

/// A monitor whose guest stands still.
pub struct Paused<'a> {
    monitor: &'a mut dyn Monitor,
    /// Whether it ran before.
    is_ours: bool,
    resumer: Option<Child>,
    /// Ends after the guest goes on.
    turn: Option<Turn>,
    since: Instant,
}

/// What is known of a pause.
pub struct Pause {
    /// How long the guest stood still for this command; none if it stood still before.
    pub length: Option<Duration>,
}

impl<'a> Paused<'a> {
    /// Pauses the guest, unless it is. Others who would wait for their turn.
    pub fn new(monitor: &'a mut dyn Monitor, turn: Option<Turn>) -> anyhow::Result<Self> {
        let is_ours = monitor.is_running()?;
        let resumer = match is_ours {
            true => Some(start_resumer(
                monitor.kind(),
                monitor.socket(),
                turn.as_ref(),
            )?),
            false => None,
        };
        let paused = Self {
            monitor,
            is_ours,
            resumer,
            turn,
            since: Instant::now(),
        };
        if is_ours {
            // From here on it may be paused, whatever is answered.
            paused.monitor.pause()?;
        }
        Ok(paused)
    }

    /// The monitor.
    pub fn monitor(&mut self) -> &mut dyn Monitor {
        self.monitor
    }

    /// What is known of the pause so far.
    pub fn so_far(&self) -> Pause {
        Pause {
            length: self.is_ours.then(|| self.since.elapsed()),
        }
    }

    /// Lets the guest go on, if it ran before.
    pub fn resume(mut self) -> anyhow::Result<Pause> {
        let pause = self.so_far();
        self.end()?;
        Ok(pause)
    }

    fn end(&mut self) -> anyhow::Result<()> {
        if std::mem::take(&mut self.is_ours)
            && let Err(error) = self.monitor.resume()
        {
            // Its pipe closes, and it tries what was in vain here. It is not waited for: a
            // monitor may serve one connection at a time, and this one is open still.
            drop(self.resumer.take());
            self.turn.iter_mut().for_each(Turn::leave);
            return Err(error.context(format!(
                "the guest may stand still: {} at {} was paused for the commit and could not be \
                 told to go on; that is tried again for a while; should it be in vain, tell it \
                 to, or end it",
                self.monitor.kind(),
                self.monitor.socket().display()
            )));
        }
        if let Some(mut resumer) = self.resumer.take() {
            if let Some(mut pipe) = resumer.stdin.take() {
                pipe.write_all(&[DONE]).ok();
            }
            resumer.wait().ok();
        }
        Ok(())
    }
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::error!("{}", crate::error::message(&error));
        }
    }
}

fn start_resumer(kind: Kind, socket: &Path, turn: Option<&Turn>) -> anyhow::Result<Child> {
    let socket = std::path::absolute(socket)?;
    // It may let the guest go on as long as it lives.
    let lock = turn.map(Turn::lock);
    lock.map_or(Ok(()), background::hand_on)?;
    let resumer = background::command()?
        .arg(COMMAND)
        .env_remove(KILL_AT)
        .arg(kind.name())
        .arg(socket)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start the process that resumes the monitor should this one be killed");
    lock.map_or(Ok(()), |lock| fcntl_setfd(lock, FdFlags::CLOEXEC))?;
    let mut resumer = resumer?;
    let mut byte = [0];
    let mut out = resumer
        .stdout
        .take()
        .context("no pipe to the new process")?;
    out.read_exact(&mut byte)
        .context("the process ended that resumes the monitor should this one be killed")?;
    Ok(resumer)
}

/// The hidden command.
pub fn wait_and_resume(arguments: &[String]) -> anyhow::Result<u8> {
    background::detach()?;
    let [kind, socket] = arguments else {
        anyhow::bail!("a monitor and its socket are expected");
    };
    let kind: Kind = kind.parse().map_err(anyhow::Error::msg)?;
    io::stdout().write_all(&[WAITS])?;
    io::stdout().flush()?;
    let mut said = Vec::new();
    io::stdin().read_to_end(&mut said)?;
    if said.contains(&DONE) {
        return Ok(0);
    }
    let mut tries = TRIES;
    loop {
        tries -= 1;
        match resume(kind, Path::new(socket)) {
            Err(_) if tries > 0 => std::thread::sleep(BETWEEN_TRIES),
            other => return other.map(|()| 0),
        }
    }
}

fn resume(kind: Kind, socket: &Path) -> anyhow::Result<()> {
    let mut monitor = known::connect(kind, socket)?;
    let began = Instant::now();
    loop {
        if !monitor.is_running()? {
            monitor.resume()?;
        }
        if began.elapsed() > SETTLES {
            return Ok(());
        }
        std::thread::sleep(LOOKS);
    }
}
