//! Boots a guest with the agent in its initrd, has it do what the agent can do,
//! saves the machine, restores it with another context id, and does it again.
//!
//! ```text
//! agent [--mem MIB] KERNEL INITRD [CMDLINE]
//! ```

use std::error::Error;
use std::io::{Seek as _, Write as _};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use snapstore_vmm::agent::{AGENT_PORT, AgentClient, Exec, Stream};
use snapstore_vmm::memory::{GuestMemory, MemoryLayout};
use snapstore_vmm::virtio::{GuestCid, VirtioDevice, Vsock};
use snapstore_vmm::{Console, Kernel, Machine};
use vm_memory::{Bytes as _, GuestAddress};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const PATIENCE: Duration = Duration::from_secs(120);

fn main() -> Result<()> {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut mem_mib: u64 = 256;
    if arguments.first().is_some_and(|first| first == "--mem") {
        mem_mib = arguments.get(1).ok_or("--mem of what?")?.parse()?;
        arguments.drain(..2);
    }
    let mut arguments = arguments.into_iter();
    let kernel = Kernel::Linux {
        kernel: arguments.next().ok_or("which kernel?")?.into(),
        initrd: Some(arguments.next().ok_or("which initrd?")?.into()),
        cmdline: arguments
            .next()
            .unwrap_or_else(|| "console=ttyS0 panic=1".to_owned()),
    };
    let (first, second) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let path = first.path().join("vsock.sock");
    let layout = MemoryLayout::new(mem_mib << 20)?;
    let memory = GuestMemory::anonymous(layout.clone())?;
    let console = Arc::new(Console::new());
    let machine = Machine::boot(memory, 1, &kernel, &console, vec![device(&path, None)?])?;
    let began = Instant::now();
    show(&console);
    machine.resume()?;
    drop(AgentClient::connect(&path, AGENT_PORT, PATIENCE)?);
    say(began, "the agent answers");
    try_agent(&path)?;
    say(began, "tried before the snapshot");

    let waiting = AgentClient::connect(&path, AGENT_PORT, PATIENCE)?;
    let waiting = std::thread::spawn(move || {
        waiting
            .exec(&shell("sleep 1000"), None, &mut |_, _| Ok(()))
            .is_err()
    });
    run(&path, "sleep 0.2; echo waits", b"")?;
    machine.pause()?;
    let state = machine.save()?;
    let mut image = tempfile::tempfile()?;
    image.set_len(layout.size_bytes())?;
    for slot in machine.memory().host_slots() {
        image.seek(std::io::SeekFrom::Start(slot.image_offset))?;
        let length = usize::try_from(slot.length)?;
        let ram = machine.memory().ram();
        ram.write_all_volatile_to(GuestAddress(slot.guest_address), &mut image, length)?;
    }
    machine.resume()?;
    try_agent(&path)?;
    say(
        began,
        "tried the machine that was saved, whose connections go on",
    );
    assert!(!waiting.is_finished());
    machine.stop();
    drop(machine);
    assert!(waiting.join().map_err(|_| "the waiting client panicked")?);

    let path = second.path().join("vsock.sock");
    let memory = GuestMemory::from_image(layout, &image)?;
    let console = Arc::new(Console::new());
    let devices = vec![device(&path, GuestCid::new(77))?];
    let machine = Machine::restore(&state, memory, &console, devices)?;
    show(&console);
    let began = Instant::now();
    machine.resume()?;
    let mut client = AgentClient::connect(&path, AGENT_PORT, PATIENCE)?;
    say(began, "the agent of the restored machine answers");
    client.after_restore(&[])?;
    say(began, "reseeded, and the clock set");
    try_agent(&path)?;
    let left = run(&path, "ps | grep -c '[s]leep 1000'", b"")?;
    assert_eq!(left, b"0\n", "the command of the old connection is gone");
    say(began, "tried after the restore");
    machine.stop();
    Ok(())
}

fn device(path: &Path, cid: Option<GuestCid>) -> Result<Box<dyn VirtioDevice>> {
    Ok(Box::new(Vsock::new(path, cid)?))
}

fn say(began: Instant, what: &str) {
    println!("\n== {:.2} s: {what}", began.elapsed().as_secs_f64());
}

fn show(console: &Arc<Console>) {
    let console = console.clone();
    std::thread::spawn(move || {
        let mut position = 0;
        while let Some(output) = console.read(position, Duration::from_secs(1)) {
            position = output.next;
            let _ = std::io::stdout().write_all(&output.bytes);
        }
    });
}

fn shell(script: &str) -> Exec {
    Exec {
        command: ["/bin/sh", "-c", script].map(str::to_owned).into(),
        timeout_seconds: Some(100),
        ..Exec::default()
    }
}

fn run(path: &Path, script: &str, input: &[u8]) -> Result<Vec<u8>> {
    let mut stdin = tempfile::tempfile()?;
    stdin.write_all(input)?;
    stdin.rewind()?;
    let mut all = Vec::new();
    let client = AgentClient::connect(path, AGENT_PORT, PATIENCE)?;
    let exit = client.exec(&shell(script), Some(stdin.as_fd()), &mut |stream, bytes| {
        match stream {
            Stream::Stdout => all.extend_from_slice(bytes),
            Stream::Stderr => std::io::stderr().write_all(bytes)?,
        }
        Ok(())
    })?;
    println!("{script}: {exit:?}, {} bytes", all.len());
    Ok(all)
}

fn try_agent(path: &Path) -> Result<()> {
    let mut client = AgentClient::connect(path, AGENT_PORT, PATIENCE)?;
    client.ping()?;
    client.reseed(&[7; 64])?;
    client.set_time(SystemTime::UNIX_EPOCH + Duration::from_secs(2_000_000_000))?;
    client.identify(Some("renamed"), None)?;
    let told = run(path, "hostname; date -u +%Y", b"")?;
    assert_eq!(told, b"renamed\n2033\n");
    let sent: Vec<u8> = (0..4_000_000_u32)
        .map(|at| u8::try_from(at % 251).unwrap_or(0))
        .collect();
    let began = Instant::now();
    assert!(run(path, "cat", &sent)? == sent);
    let seconds = began.elapsed().as_secs_f64();
    println!("{:.1} MB/s there and back", 4.0 / seconds);
    let threads: Vec<_> = (0..20)
        .map(|number| {
            let path = path.to_owned();
            std::thread::spawn(move || {
                let told = run(&path, &format!("sleep 0.3; echo {number}"), b"");
                told.is_ok_and(|told| told == format!("{number}\n").as_bytes())
            })
        })
        .collect();
    for thread in threads {
        assert!(thread.join().is_ok_and(|told| told), "all at a time");
    }
    Ok(())
}
