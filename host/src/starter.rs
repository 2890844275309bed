//! The process that will start machines, while it is not known yet which.
//!
//! It is started first, and gets ready while the command opens the store. Until it is told
//! what to start, it looks at mounts: the command then need not start a process for that.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use snapstore_vmm::control::Connection;

use crate::background;
use crate::runtime::{RUNTIME_DIR, Runtime};
use crate::spec::{Order, SUPERVISOR, Spec};

/// How long a process without anything to do may take to end, and how often that is asked.
const END: (Duration, Duration) = (Duration::from_secs(1), Duration::from_millis(1));

/// The waiting process. It ends with this, unless machines were started.
pub struct Starter {
    process: Option<(Child, Connection)>,
}

impl Starter {
    /// Starts the process; machines will be in this runtime directory.
    ///
    /// # Errors
    /// There is no such program, or no room for a process.
    pub fn launch(runtime: &Runtime) -> anyhow::Result<Self> {
        let (ours, theirs) = UnixStream::pair().context("cannot make a socket")?;
        let child = background::machine_command()?
            .arg(SUPERVISOR)
            // Of a machine's process: one heap for all of its threads, and what its
            // start freed goes back to the system (mallopt(3)).
            .env("MALLOC_ARENA_MAX", "1")
            .env("MALLOC_TRIM_THRESHOLD_", "0")
            .env("MALLOC_TOP_PAD_", "0")
            .env(RUNTIME_DIR, runtime.path())
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start the machines' processes")?;
        Ok(Self {
            process: Some((child, Connection::new(ours))),
        })
    }

    /// What it sees, if it tells so in time. One that does not will not do so later: it waits
    /// for a mount's server, and is given up.
    pub(crate) fn look(&mut self, arguments: &[&str], patience: Duration) -> Option<String> {
        let (_, connection) = self.process.as_mut()?;
        let arguments = arguments.iter().copied().map(str::to_owned).collect();
        connection.send(&Order::Look(arguments), &[]).ok()?;
        if connection.is_readable_within(patience) {
            return connection.receive().ok()?;
        }
        if let Some((mut child, _)) = self.process.take() {
            // While it is there, its mount is in use. One that cannot be killed is left to itself.
            let _ = child.kill();
            wait_for_end(&mut child);
        }
        None
    }

    /// Whether it still does what it is asked.
    pub(crate) fn is_there(&self) -> bool {
        self.process.is_some()
    }

    /// Tells it what to start, and hands it what the machines keep open.
    pub(crate) fn order(
        mut self,
        spec: &Spec,
        kept: &[BorrowedFd<'_>],
        runtime: &Runtime,
    ) -> anyhow::Result<(Child, UnixStream)> {
        let process = match self.process.take() {
            None => Self::launch(runtime)?.process.take(),
            process => process,
        };
        let (child, mut connection) = process.context("no process that starts machines")?;
        let sent = connection.send(&Order::Start(spec), kept);
        // Of one that has ended there is more to be read than this.
        if let Err(error) = sent {
            tracing::debug!(%error, "the process that starts machines takes no order");
        }
        Ok((child, connection.into_stream().0))
    }
}

impl Drop for Starter {
    fn drop(&mut self) {
        if let Some((mut child, connection)) = self.process.take() {
            drop(connection);
            wait_for_end(&mut child);
        }
    }
}

fn wait_for_end(child: &mut Child) {
    let began = Instant::now();
    while matches!(child.try_wait(), Ok(None)) && began.elapsed() < END.0 {
        std::thread::sleep(END.1);
    }
}
