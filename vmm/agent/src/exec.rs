//! Runs a command: one loop waits for the command, its output, and the other end.
//!
//! The command is the leader of a process group of its own, which is killed when
//! the time is over or the other end leaves. It is over when the leader ends: what
//! it left running in the background goes on, with its output unread.
//!
//! Neither side makes the agent keep more than a frame: it does not read output
//! before it was sent on, nor input before the command took it.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use crate::reply::{self, invalid, refusal, reply_frame};
use snapstore_agent_protocol::{
    Exec, Exit, FRAME_HEADER_BYTES, FrameKind, MAX_FRAME_BYTES, Reply, put_frame, take_frame,
};

/// How much output is read at once, in bytes.
const PIECE_BYTES: usize = 32 << 10;
/// How much output is read after the command's end: a pipe can hold this much.
const LAST_BYTES: usize = 1 << 20;

/// Runs a command for whoever is at the other end of the stream.
pub fn run<S: Read + Write + AsFd>(stream: &mut S, exec: &Exec) -> io::Result<()> {
    match Running::start(exec) {
        Ok(mut running) => {
            let served = running.serve(stream.as_fd());
            if running.status.is_none() {
                running.kill();
                // Reaps it; the connection's error is the one to tell.
                let _ = running.child.wait();
            }
            served
        }
        Err(error) => reply::send(stream, &refusal(&error)),
    }
}

/// A pipe from the command.
struct Output {
    kind: FrameKind,
    pipe: Option<OwnedFd>,
    /// How much more is read once the command has ended.
    left: usize,
}

/// A command that was started.
struct Running {
    child: Child,
    pidfd: OwnedFd,
    outputs: [Output; 2],
    stdin: Option<ChildStdin>,
    /// Frames of input may come.
    takes_input: bool,
    deadline: Option<Instant>,
    timed_out: bool,
    status: Option<ExitStatus>,
    /// From the other end, not yet a whole frame.
    received: Vec<u8>,
    /// For the command.
    input: Vec<u8>,
    /// For the other end.
    unsent: Vec<u8>,
}

impl Running {
    fn start(exec: &Exec) -> io::Result<Self> {
        let Some((program, arguments)) = exec.command.split_first() else {
            return Err(invalid("there is no command to run"));
        };
        let mut command = Command::new(program);
        command
            .args(arguments)
            .envs(&exec.env)
            .stdin(if exec.stdin {
                Stdio::piped()
            } else {
                Stdio::null()
            })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        if let Some(directory) = &exec.directory {
            command.current_dir(directory);
        }
        let mut child = command.spawn()?;
        let pipes = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        match Self::attach(&child, pipes) {
            Ok((pidfd, stdin, outputs)) => Ok(Self {
                child,
                pidfd,
                outputs,
                stdin,
                takes_input: exec.stdin,
                deadline: exec
                    .timeout_seconds
                    .and_then(|seconds| Instant::now().checked_add(Duration::from_secs(seconds))),
                timed_out: false,
                status: None,
                received: Vec::new(),
                input: Vec::new(),
                unsent: Vec::new(),
            }),
            Err(error) => {
                // It was only just started, and nobody will hear of it.
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    fn attach(
        child: &Child,
        (stdin, stdout, stderr): (
            Option<ChildStdin>,
            Option<std::process::ChildStdout>,
            Option<std::process::ChildStderr>,
        ),
    ) -> io::Result<(OwnedFd, Option<ChildStdin>, [Output; 2])> {
        let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
        if let Some(stdin) = &stdin {
            do_not_block(stdin.as_fd())?;
        }
        let output = |kind, pipe: Option<OwnedFd>| -> io::Result<Output> {
            if let Some(pipe) = &pipe {
                do_not_block(pipe.as_fd())?;
            }
            Ok(Output {
                kind,
                pipe,
                left: LAST_BYTES,
            })
        };
        let outputs = [
            output(FrameKind::Stdout, stdout.map(OwnedFd::from))?,
            output(FrameKind::Stderr, stderr.map(OwnedFd::from))?,
        ];
        Ok((pidfd, stdin, outputs))
    }

    fn serve(&mut self, stream: BorrowedFd<'_>) -> io::Result<()> {
        loop {
            self.wait(stream)?;
            self.hear(stream)?;
            self.feed();
            self.take_input()?;
            self.watch()?;
            if self.unsent.is_empty() {
                self.collect()?;
                if self.unsent.is_empty() && self.status.is_some() {
                    break;
                }
            }
            self.send(stream)?;
        }
        self.unsent = reply_frame(&Reply::Exit(self.exit()))?;
        while !self.unsent.is_empty() {
            wait_for(&mut [PollFd::new(&stream, PollFlags::OUT)], None)?;
            self.send(stream)?;
        }
        Ok(())
    }

    fn exit(&self) -> Exit {
        Exit {
            code: self.status.and_then(|status| status.code()),
            signal: self.status.and_then(|status| status.signal()),
            timed_out: self.timed_out,
        }
    }

    /// Waits until there is something to do.
    fn wait(&self, stream: BorrowedFd<'_>) -> io::Result<()> {
        let mut events = PollFlags::RDHUP;
        if self.hears() {
            events |= PollFlags::IN;
        }
        if !self.unsent.is_empty() {
            events |= PollFlags::OUT;
        }
        let mut fds = vec![PollFd::from_borrowed_fd(stream, events)];
        if self.status.is_none() {
            fds.push(PollFd::new(&self.pidfd, PollFlags::IN));
        } else if self.unsent.is_empty() {
            // Only what is there already is still of interest.
            return Ok(());
        }
        if self.unsent.is_empty() {
            let pipes = self
                .outputs
                .iter()
                .filter_map(|output| output.pipe.as_ref());
            fds.extend(pipes.map(|pipe| PollFd::new(pipe, PollFlags::IN)));
        }
        if let (Some(stdin), false) = (&self.stdin, self.input.is_empty()) {
            fds.push(PollFd::new(stdin, PollFlags::OUT));
        }
        wait_for(&mut fds, self.deadline)
    }

    /// Whether the other end is listened to: not before its input was taken.
    fn hears(&self) -> bool {
        self.input.is_empty() || self.stdin.is_none()
    }

    /// Hears the other end: input, or that it left.
    fn hear(&mut self, stream: BorrowedFd<'_>) -> io::Result<()> {
        let mut bytes = [0; 4096];
        // One frame and what came with it: more is left where it is.
        while self.hears() && self.received.len() < FRAME_HEADER_BYTES + MAX_FRAME_BYTES {
            let length = match recv(stream, &mut bytes, RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok((_, length)) => length,
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            self.received.extend(&bytes[..length]);
            self.take_input()?;
        }
        let mut state = [PollFd::new(&stream, PollFlags::RDHUP)];
        poll(&mut state, Some(&Timespec::default()))?;
        let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        if !self.hears() && state[0].revents().intersects(gone) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }

    fn take_input(&mut self) -> io::Result<()> {
        while self.hears() {
            let Some((kind, content)) = take_frame(&mut self.received)? else {
                return Ok(());
            };
            if kind != FrameKind::Stdin || !self.takes_input {
                return Err(invalid("a frame that was not announced"));
            }
            if content.is_empty() {
                self.takes_input = false;
                self.stdin = None;
            } else if self.stdin.is_some() {
                self.input = content;
                self.feed();
            }
        }
        Ok(())
    }

    /// Gives the command its input.
    fn feed(&mut self) {
        while let (Some(stdin), false) = (&mut self.stdin, self.input.is_empty()) {
            match stdin.write(&self.input) {
                Ok(written) => {
                    self.input.drain(..written);
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock => return,
                    // It reads no more: the rest is for nobody.
                    _ => {
                        self.stdin = None;
                        self.input.clear();
                    }
                },
            }
        }
    }

    /// Looks whether the command has ended, or its time is over.
    fn watch(&mut self) -> io::Result<()> {
        if self.status.is_none() {
            self.status = self.child.try_wait()?;
        }
        if self.status.is_none() && self.deadline.is_some_and(|at| at <= Instant::now()) {
            self.deadline = None;
            self.timed_out = true;
            self.kill();
        }
        Ok(())
    }

    fn kill(&self) {
        // Fails when all have ended, which is what is wanted.
        let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
    }

    /// Makes frames of what there is of output.
    fn collect(&mut self) -> io::Result<()> {
        let mut piece = [0; PIECE_BYTES];
        for output in &mut self.outputs {
            let Some(pipe) = &output.pipe else { continue };
            match rustix::io::read(pipe, &mut piece) {
                Ok(0) => output.pipe = None,
                Ok(length) => put_frame(&mut self.unsent, output.kind, &piece[..length]),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            if self.status.is_some() {
                output.left = output.left.saturating_sub(PIECE_BYTES);
                if output.left == 0 {
                    output.pipe = None;
                }
            }
        }
        Ok(())
    }

    /// Sends what the other end takes.
    fn send(&mut self, stream: BorrowedFd<'_>) -> io::Result<()> {
        while !self.unsent.is_empty() {
            match send(
                stream,
                &self.unsent,
                SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
            ) {
                Ok(sent) => {
                    self.unsent.drain(..sent);
                }
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

fn wait_for(fds: &mut [PollFd<'_>], deadline: Option<Instant>) -> io::Result<()> {
    let timeout = deadline.map(|at| {
        let left = at.saturating_duration_since(Instant::now());
        // Rounded up: the deadline has passed when the wait for it ends.
        Timespec::try_from(left + Duration::from_millis(1))
    });
    let timeout = timeout.and_then(Result::ok);
    match poll(fds, timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn do_not_block(fd: BorrowedFd<'_>) -> io::Result<()> {
    fcntl_setfl(fd, fcntl_getfl(fd)? | OFlags::NONBLOCK)?;
    Ok(())
}
