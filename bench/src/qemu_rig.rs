//! QEMU to measure: a guest that does as it is told, under QEMU's own emulator, and the ways
//! that QEMU has of its own to save and load one.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde_json::json;
use snapstore_guests::{LOAD_ADDRESS, TOUCH, TouchCommand};
use snapstore_tests::qmp::{Qmp, connect};

use crate::tools::{find, timed};
use crate::vm_rig::Touch;

/// The guest's memory, in MiB.
pub const MEMORY_MIB: u32 = 256;
/// The length of its disk.
pub const DISK_BYTES: usize = 64 << 20;
/// How long anything may take before it counts as hanging.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often it is looked whether something has happened.
const RETRY: Duration = Duration::from_millis(1);
/// What lets QEMU send as fast as it can: without it, it keeps to 128 MiB a second.
const BANDWIDTH: u64 = 1 << 40;

/// The program, and its version.
pub struct Qemu {
    /// Where it is.
    pub program: PathBuf,
    /// Its version.
    pub version: (u32, u32),
}

impl Qemu {
    /// `$QEMU`, or what is in `$PATH`; `None` where there is none.
    ///
    /// # Errors
    /// If it does not say its version.
    pub fn find() -> anyhow::Result<Option<Self>> {
        let named = std::env::var_os("QEMU").map(PathBuf::from);
        let Some(program) = named.or_else(|| find("qemu-system-x86_64")) else {
            return Ok(None);
        };
        let said = Command::new(&program).arg("--version").output()?.stdout;
        let said = String::from_utf8_lossy(&said);
        let version = said.split("version ").nth(1).and_then(|rest| {
            let mut numbers = rest.split('.').map(str::parse);
            Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
        });
        let version = version.with_context(|| format!("{} says {said:?}", program.display()))?;
        Ok(Some(Self { program, version }))
    }

    /// Whether it maps a file that it cannot write to.
    #[must_use]
    pub fn maps_read_only(&self) -> bool {
        self.version >= (8, 2)
    }
}

/// Keeps a program from advising huge pages, as docs/monitors.md says.
const NO_HUGE_PAGES: &str = "
#include <stddef.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
int madvise(void *start, size_t length, int advice)
{
    return advice == MADV_HUGEPAGE ? 0 : syscall(SYS_madvise, start, length, advice);
}
";

/// A script in `dir` that starts QEMU without huge pages. `None` without a C compiler.
///
/// # Errors
/// If it cannot be made.
pub fn without_huge_pages(qemu: &Qemu, dir: &Path) -> anyhow::Result<Option<PathBuf>> {
    let Some(compiler) = find("cc") else {
        return Ok(None);
    };
    let [source, library, script] = ["nohuge.c", "nohuge.so", "qemu.sh"].map(|it| dir.join(it));
    fs::write(&source, NO_HUGE_PAGES)?;
    let mut compile = Command::new(compiler);
    compile.args(["-D_GNU_SOURCE", "-shared", "-fPIC", "-o"]);
    timed(compile.args([&library, &source]))?;
    let (library, program) = (library.display(), qemu.program.display());
    let run = format!("#!/bin/sh\nLD_PRELOAD={library} exec {program} \"$@\"\n");
    fs::write(&script, run)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    Ok(Some(script))
}

/// A `touch` guest as QEMU boots it: with a header and an entry of the Multiboot
/// specification behind it.
///
/// # Errors
/// If the header does not come to lie where a loader looks for it.
pub fn kernel() -> anyhow::Result<Vec<u8>> {
    const MAGIC: u32 = 0x1bad_b002;
    const HAS_ADDRESSES: u32 = 1 << 16;
    const HEADER_BYTES: u32 = 32;
    let mut image = TOUCH.to_vec();
    image.resize(image.len().next_multiple_of(4), 0);
    ensure!(image.len() + 32 <= 8192, "the guest is too long");
    let load = u32::try_from(LOAD_ADDRESS)?;
    let header = load + u32::try_from(image.len())?;
    let entry = header + HEADER_BYTES;
    let sum = 0_u32.wrapping_sub(MAGIC.wrapping_add(HAS_ADDRESSES));
    for word in [MAGIC, HAS_ADDRESSES, sum, header, load, 0, 0, entry] {
        image.extend(word.to_le_bytes());
    }
    // What the guest is promised: xor eax, eax; mov ebx, 1; mov ecx, MiB; jmp to its start.
    image.extend([0x31, 0xc0, 0xbb, 1, 0, 0, 0, 0xb9]);
    image.extend(MEMORY_MIB.to_le_bytes());
    let behind = entry + 17;
    image.push(0xe9);
    image.extend(load.wrapping_sub(behind).to_le_bytes());
    Ok(image)
}

/// A serial line.
pub struct Line(BufReader<UnixStream>);

impl Line {
    /// Waits until somebody listens there.
    ///
    /// # Errors
    /// If nobody does.
    pub fn connect(socket: &Path) -> anyhow::Result<Self> {
        Ok(Self(connect(socket)?))
    }

    /// Sends a byte that is no command; returns the seconds until the guest says so.
    ///
    /// # Errors
    /// If it does not.
    pub fn ping(&mut self) -> anyhow::Result<f64> {
        let start = Instant::now();
        self.0.get_mut().write_all(b"?")?;
        self.answer("got 3f")?;
        Ok(start.elapsed().as_secs_f64())
    }

    /// Waits until the guest has booted.
    fn ready(&mut self) -> anyhow::Result<()> {
        let mut line = String::new();
        while line.trim_end() != "ready" {
            line.clear();
            ensure!(self.0.read_line(&mut line)? > 0, "the line has ended");
        }
        Ok(())
    }

    fn answer(&mut self, wanted: &str) -> anyhow::Result<()> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        ensure!(line.trim_end() == wanted, "the guest answered {line:?}");
        Ok(())
    }
}

impl Touch for Line {
    fn obey(&mut self, command: TouchCommand, answer: &str) -> anyhow::Result<f64> {
        let start = Instant::now();
        self.0.get_mut().write_all(&command.encode())?;
        self.answer(answer)?;
        Ok(start.elapsed().as_secs_f64())
    }
}

/// Has QEMU send its state into a file, with the memory unless that is shared.
///
/// # Errors
/// If that fails.
pub fn save_state(qmp: &mut Qmp, into: &File, without_shared: bool) -> anyhow::Result<()> {
    shared_memory_stays(qmp, without_shared)?;
    let parameters = json!({"max-bandwidth": BANDWIDTH});
    qmp.run("migrate-set-parameters", &parameters)?;
    qmp.run_with("getfd", &json!({"fdname": "state"}), Some(into))?;
    qmp.run("migrate", &json!({"uri": "fd:state"}))?;
    wait_for_migration(qmp)
}

/// Has QEMU load such a state.
fn load_state(qmp: &mut Qmp, from: &File) -> anyhow::Result<()> {
    shared_memory_stays(qmp, true)?;
    qmp.run_with("getfd", &json!({"fdname": "state"}), Some(from))?;
    qmp.run("migrate-incoming", &json!({"uri": "fd:state"}))?;
    let deadline = Instant::now() + PATIENCE;
    while qmp.run("query-status", &json!({}))?["status"] == "inmigrate" {
        ensure!(Instant::now() < deadline, "QEMU does not load its state");
        std::thread::sleep(RETRY);
    }
    Ok(())
}

fn shared_memory_stays(qmp: &mut Qmp, stays: bool) -> anyhow::Result<()> {
    let capability = json!({"capability": "x-ignore-shared", "state": stays});
    let capabilities = json!({"capabilities": [capability]});
    qmp.run("migrate-set-capabilities", &capabilities)?;
    Ok(())
}

fn wait_for_migration(qmp: &mut Qmp) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = qmp.run("query-migrate", &json!({}))?;
        match status["status"].as_str() {
            Some("completed") => return Ok(()),
            Some("failed") => bail!("QEMU cannot save its state: {status}"),
            _ => ensure!(Instant::now() < deadline, "it does not come to an end"),
        }
        std::thread::sleep(RETRY);
    }
}

/// A machine that was started by its command line, and ends with this.
pub struct Machine {
    child: Child,
    dir: PathBuf,
}

/// The files of a machine of which copies are loaded, as QEMU does that by itself.
#[derive(Clone)]
pub struct Plain {
    /// Where they are.
    pub dir: PathBuf,
}

impl Plain {
    /// The guest's memory.
    #[must_use]
    pub fn memory(&self) -> PathBuf {
        self.dir.join("memory")
    }

    /// Its disk.
    #[must_use]
    pub fn disk(&self) -> PathBuf {
        self.dir.join("disk.img")
    }

    /// The state of its CPU and devices.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// Boots the machine: its memory is the file.
    ///
    /// # Errors
    /// If it does not come to obey.
    pub fn boot(&self, qemu: &Qemu) -> anyhow::Result<(Machine, Line)> {
        // What it prints before somebody is connected is lost.
        let machine = self.start(qemu, &self.dir, ("on", "off"), &["-S"])?;
        let mut line = Line::connect(&machine.console())?;
        Qmp::connect(&machine.qmp())?.run("cont", &json!({}))?;
        line.ready()?;
        Ok((machine, line))
    }

    /// Starts a machine in `dir` that maps the file privately, and lets it go on from the state.
    ///
    /// # Errors
    /// If it does not.
    pub fn load(&self, qemu: &Qemu, dir: &Path) -> anyhow::Result<(Machine, Line)> {
        fs::create_dir_all(dir)?;
        let own = ("off", "on");
        let machine = self.start(qemu, dir, own, &["-incoming", "defer"])?;
        let mut qmp = Qmp::connect(&machine.qmp())?;
        load_state(&mut qmp, &File::open(self.state())?)?;
        qmp.run("cont", &json!({}))?;
        let line = Line::connect(&machine.console())?;
        Ok((machine, line))
    }

    fn start(
        &self,
        qemu: &Qemu,
        dir: &Path,
        (share, has_overlay): (&str, &str),
        more: &[&str],
    ) -> anyhow::Result<Machine> {
        let memory = self.memory().display().to_string();
        let memory = format!("id=mem,mem-path={memory},share={share},size={MEMORY_MIB}M");
        let disk = self.disk().display().to_string();
        let child = Command::new(&qemu.program)
            .current_dir(dir)
            .args(["-nodefaults", "-display", "none", "-accel", "tcg", "-m"])
            .arg(format!("{MEMORY_MIB}M"))
            .args(["-machine", "pc,memory-backend=mem", "-object"])
            .arg(format!("memory-backend-file,{memory}"))
            .arg("-kernel")
            .arg(self.dir.join("kernel"))
            .args(["-serial", "chardev:con", "-chardev"])
            .arg("socket,id=con,path=con.sock,server=on,wait=off")
            .args(["-qmp", "unix:qmp.sock,server=on,wait=off", "-drive"])
            .arg(format!(
                "file={disk},format=raw,if=virtio,snapshot={has_overlay}"
            ))
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(dir.join("log"))?)
            .spawn()?;
        Ok(Machine {
            child,
            dir: dir.to_owned(),
        })
    }
}

impl Machine {
    /// Its monitor's socket.
    #[must_use]
    pub fn qmp(&self) -> PathBuf {
        self.dir.join("qmp.sock")
    }

    /// Its serial line.
    #[must_use]
    pub fn console(&self) -> PathBuf {
        self.dir.join("con.sock")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        for socket in [self.qmp(), self.console()] {
            let _ = fs::remove_file(socket);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_entry_behind_the_header_leads_to_the_guest() {
        let image = kernel().unwrap();
        let word = |at: usize| u32::from_le_bytes(image[at..at + 4].try_into().unwrap());
        let header = (0..image.len() - 4).find(|at| at % 4 == 0 && word(*at) == 0x1bad_b002);
        let header = header.unwrap();
        let sum = (0..3).map(|number| word(header + 4 * number));
        assert_eq!(sum.fold(0, u32::wrapping_add), 0);
        let load = word(header + 16);
        assert_eq!(word(header + 12), load + header as u32);
        let entry = (word(header + 28) - load) as usize;
        let jump = image.len() - 5;
        assert_eq!((image[entry], image[jump]), (0x31, 0xe9));
        let lands = (image.len() as u32).wrapping_add(word(jump + 1));
        assert_eq!(lands, 0, "at the guest's first byte");
    }
}
