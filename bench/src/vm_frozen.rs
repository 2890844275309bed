//! A process with private memory and nothing else: what a machine's pause, its
//! commit and its faults are compared with.
//!
//! `bench bare-memory IMAGE` maps the image privately and obeys commands, a line
//! each; pages are 4096 bytes, and every answer ends with the seconds it took:
//!
//! - `write FIRST COUNT VALUE` stores VALUE plus the page's number in each page;
//! - `read FIRST COUNT STRIDE` reads a byte of each page, in order, or STRIDE
//!   pages apart, around until each was read once (an odd STRIDE);
//! - `copy FIRST COUNT FILE` writes the pages to a file;
//! - `fork` makes a child that stands still, `thaw` ends all of them.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, bail, ensure};
use memmap2::{Advice, MmapMut, MmapOptions};

use crate::guest::PAGE;

/// Children that hold copies of this process's memory and run nothing.
#[derive(Debug, Default)]
pub struct Children(Vec<libc::pid_t>);

impl Children {
    /// Forks one; returns the seconds that took. Nothing but fork(2) is counted.
    ///
    /// # Errors
    /// The kernel's.
    pub fn fork(&mut self) -> io::Result<f64> {
        let start = Instant::now();
        // SAFETY: the child has a copy of this memory and makes system calls
        // only, without locks, until it is killed.
        let pid = unsafe {
            let pid = libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0);
            if pid == 0 {
                loop {
                    libc::syscall(libc::SYS_pause);
                }
            }
            pid
        };
        let seconds = start.elapsed().as_secs_f64();
        match libc::pid_t::try_from(pid) {
            Ok(pid) if pid > 0 => self.0.push(pid),
            _ => return Err(io::Error::last_os_error()),
        }
        Ok(seconds)
    }

    /// Ends them all.
    pub fn end(&mut self) {
        for pid in self.0.drain(..) {
            // SAFETY: a signal to, and a wait for, a child of this process.
            unsafe {
                libc::kill(pid, libc::SIGKILL);
                libc::waitpid(pid, std::ptr::null_mut(), 0);
            }
        }
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        self.end();
    }
}

/// The process: serves commands until standard input ends.
///
/// # Errors
/// If the image cannot be mapped, or a command is none.
pub fn run(image: &Path) -> anyhow::Result<()> {
    let file = File::open(image)?;
    // SAFETY: the image does not change while it is mapped: it is a file of a
    // mounted snapshot.
    let mut map = unsafe { MmapOptions::new().no_reserve_swap().map_copy(&file) }?;
    map.advise(Advice::NoHugePage)?;
    let mut children = Children::default();
    println!("ready");
    for line in io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split(' ').collect();
        let start = Instant::now();
        let seconds = match *words.as_slice() {
            ["write", first, count, value] => {
                write(&mut map, first.parse()?, count.parse()?, value.parse()?);
                start.elapsed().as_secs_f64()
            }
            ["read", first, count, stride] => {
                read(&map, first.parse()?, count.parse()?, stride.parse()?);
                start.elapsed().as_secs_f64()
            }
            ["copy", first, count, file] => {
                let (first, count): (usize, usize) = (first.parse()?, count.parse()?);
                let pages = &map[first * PAGE..(first + count) * PAGE];
                let mut file = File::create(file)?;
                let start = Instant::now();
                file.write_all(pages)?;
                start.elapsed().as_secs_f64()
            }
            ["fork"] => children.fork()?,
            ["thaw"] => {
                children.end();
                start.elapsed().as_secs_f64()
            }
            _ => bail!("there is no command {line:?}"),
        };
        println!("{} {seconds}", words[0]);
    }
    Ok(())
}

fn write(map: &mut MmapMut, first: usize, count: usize, value: u32) {
    for page in first..first + count {
        let word = u32::try_from(page).unwrap_or(0).wrapping_add(value);
        map[page * PAGE..page * PAGE + 4].copy_from_slice(&word.to_le_bytes());
    }
}

fn read(map: &MmapMut, first: usize, count: usize, stride: usize) {
    let mut at = 0;
    for _ in 0..count {
        std::hint::black_box(map[(first + at) * PAGE]);
        at = (at + stride) % count;
    }
}

/// The parent's end of a helper process of this program that talks in lines.
#[derive(Debug)]
pub struct Helper {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Helper {
    /// Starts this program with these arguments.
    ///
    /// # Errors
    /// If that fails.
    pub fn start(arguments: &[&str]) -> anyhow::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        Ok(Self {
            input: child.stdin.take(),
            output: BufReader::new(child.stdout.take().context("its output is a pipe")?),
            child,
        })
    }

    /// A process with this image mapped privately.
    ///
    /// # Errors
    /// If that fails.
    pub fn memory(image: &Path) -> anyhow::Result<Self> {
        let image = image.to_str().context("a path in UTF-8")?;
        let mut helper = Self::start(&["bare-memory", image])?;
        ensure!(helper.line()? == "ready", "the helper did not start");
        Ok(helper)
    }

    /// The next line that it says.
    ///
    /// # Errors
    /// If it has ended.
    pub fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        ensure!(
            self.output.read_line(&mut line)? > 0,
            "a helper process has ended; its message stands above"
        );
        Ok(line.trim_end().to_owned())
    }

    /// Gives it a command.
    ///
    /// # Errors
    /// If it has ended.
    pub fn send(&mut self, command: &str) -> anyhow::Result<()> {
        let input = self.input.as_mut().context("its input is open")?;
        Ok(input.write_all(format!("{command}\n").as_bytes())?)
    }

    /// Gives it a command; returns the seconds it answers.
    ///
    /// # Errors
    /// If it has ended.
    pub fn ask(&mut self, command: &str) -> anyhow::Result<f64> {
        self.send(command)?;
        let answer = self.line()?;
        let seconds = answer.rsplit(' ').next().unwrap_or_default();
        seconds
            .parse()
            .with_context(|| format!("it answered {answer:?}"))
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.input = None;
        // It ends with its input; one that hangs is not waited for.
        for _ in 0..500 {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
