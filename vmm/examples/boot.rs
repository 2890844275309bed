//! Boots a kernel, with its console on the terminal, until the machine ends.
//!
//! ```text
//! boot [--cpus N] [--mem MIB] [--input LINE]... KERNEL [INITRD [CMDLINE]]
//! ```
//!
//! Each input line is typed into the console when the guest shows a prompt: `# ` and
//! nothing behind it.

use std::collections::VecDeque;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use snapstore_vmm::memory::{GuestMemory, MemoryLayout};
use snapstore_vmm::{Console, Kernel, Machine};

struct Options {
    cpus: u32,
    mem_mib: u64,
    input: VecDeque<String>,
    files: Vec<String>,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut options = options()?;
    let mut files = options.files.drain(..);
    let kernel = Kernel::Linux {
        kernel: files.next().ok_or("which kernel?")?.into(),
        initrd: files.next().map(PathBuf::from),
        cmdline: files
            .next()
            .unwrap_or_else(|| "console=ttyS0 panic=1".to_owned()),
    };
    drop(files);
    let memory = GuestMemory::anonymous(MemoryLayout::new(options.mem_mib << 20)?)?;
    let console = Arc::new(Console::new());
    let machine = Machine::boot(memory, options.cpus, &kernel, &console, Vec::new())?;
    let began = Instant::now();
    machine.resume()?;
    show(&machine, &console, options.input)?;
    let ending = machine.wait();
    eprintln!(
        "ended after {:.1} s: {ending} ({ending:?})",
        began.elapsed().as_secs_f64()
    );
    Ok(())
}

fn options() -> Result<Options, Box<dyn std::error::Error>> {
    let mut options = Options {
        cpus: 1,
        mem_mib: 256,
        input: VecDeque::new(),
        files: Vec::new(),
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} of what?"));
        match argument.as_str() {
            "--cpus" => options.cpus = value()?.parse()?,
            "--mem" => options.mem_mib = value()?.parse()?,
            "--input" => options.input.push_back(value()?),
            _ => options.files.push(argument),
        }
    }
    Ok(options)
}

/// Copies the console to the terminal until the machine has ended.
fn show(
    machine: &Machine,
    console: &Console,
    mut input: VecDeque<String>,
) -> Result<(), Box<dyn std::error::Error>> {
    let mut position = 0;
    // Output comes in pieces of any length.
    let mut tail = Vec::new();
    loop {
        let ended = machine.ending().is_some();
        let Some(output) = console.read(position, Duration::from_millis(100)) else {
            return Ok(());
        };
        position = output.next;
        std::io::stdout().write_all(&output.bytes)?;
        std::io::stdout().flush()?;
        if !output.bytes.is_empty() {
            tail.extend(output.bytes);
            tail.drain(..tail.len().saturating_sub(2));
        } else if ended {
            return Ok(());
        } else if tail == b"# "
            && let Some(line) = input.pop_front()
        {
            machine.serial_input(format!("{line}\n").as_bytes());
            tail.clear();
        }
    }
}
