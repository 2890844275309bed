//! The least that a virtual machine can be: KVM, memory and a serial port, in a
//! process of its own. What it takes is what KVM takes; the rest of the product's
//! time is its own.
//!
//! `bench bare-vm COUNT BYTES CPUS KERNEL [IMAGE]` forks COUNT such processes.
//! Each says `entered PID SECONDS` (since its fork) when its first vCPU enters
//! the guest, and then each line that the guest prints. It ends with its standard
//! input, where it takes commands.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead as _, Write as _};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context as _, bail, ensure};
use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_RUNNABLE, KVM_PIT_SPEAKER_DUMMY, kvm_mp_state,
    kvm_pit_config, kvm_regs, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use snapstore_guests::LOAD_ADDRESS;
use snapstore_vmm::memory::{GuestMemory, HostSlot, MemoryLayout};

use crate::vm_frozen::Children;

/// What a bare machine is made of.
#[derive(Clone, Copy, Debug)]
pub struct Options<'a> {
    /// How many machines.
    pub count: usize,
    /// The memory of each, in bytes.
    pub memory_bytes: u64,
    /// The vCPUs of each.
    pub cpus: u32,
    /// The guest, a flat program.
    pub kernel: &'a Path,
    /// What the memory holds at first; without it, zeros.
    pub image: Option<&'a Path>,
}

/// Runs the bare machines until standard input ends.
///
/// # Errors
/// If they cannot be made.
pub fn run(options: &Options<'_>) -> anyhow::Result<()> {
    if options.count == 1 {
        return machine(options, Instant::now());
    }
    for _ in 0..options.count {
        let began = Instant::now();
        // SAFETY: this process has a single thread, so that the child finds every
        // lock free.
        match unsafe { libc::fork() } {
            -1 => return Err(io::Error::last_os_error()).context("cannot fork"),
            0 => {
                let code = machine(options, began).map_or(1, |()| 0);
                std::process::exit(code);
            }
            _ => {}
        }
    }
    // Its end of the pipes is not to keep anybody waiting.
    Ok(())
}

fn machine(options: &Options<'_>, began: Instant) -> anyhow::Result<()> {
    let layout = MemoryLayout::new(options.memory_bytes)?;
    let memory = match options.image {
        Some(image) => GuestMemory::from_image(layout, &File::open(image)?)?,
        None => GuestMemory::anonymous(layout)?,
    };
    let slots = memory.host_slots();
    load(&slots[0], &std::fs::read(options.kernel)?)?;
    let kvm = Kvm::new()?;
    let vm = create(&kvm, &slots)?;
    let serial = Arc::new(Mutex::new(VecDeque::new()));
    for cpu in 0..options.cpus {
        let mut vcpu = vm.create_vcpu(cpu.into())?;
        power_on(&kvm, &vcpu, cpu, options)?;
        let serial = serial.clone();
        std::thread::Builder::new()
            .stack_size(256 << 10)
            .spawn(move || {
                if cpu == 0 {
                    let seconds = began.elapsed().as_secs_f64();
                    say(&format!("entered {} {seconds}", std::process::id()));
                }
                let ended = run_vcpu(&mut vcpu, &serial);
                say(&format!("ended {ended:?}"));
            })?;
    }
    commands(&serial)
}

/// `type HEX` gives the guest bytes, `fork` and `thaw` are as [`Children`] says.
fn commands(serial: &Mutex<VecDeque<u8>>) -> anyhow::Result<()> {
    let mut children = Children::default();
    for line in io::stdin().lock().lines() {
        let line = line?;
        match line.split_once(' ').unwrap_or((&line, "")) {
            ("type", hex) => {
                let mut input = serial.lock().unwrap_or_else(PoisonError::into_inner);
                for pair in hex.as_bytes().chunks(2) {
                    let pair = std::str::from_utf8(pair)?;
                    input.push_back(u8::from_str_radix(pair, 16)?);
                }
            }
            ("fork", _) => say(&format!("forked {}", children.fork()?)),
            ("thaw", _) => {
                children.end();
                say("thawed");
            }
            (other, _) => bail!("there is no command {other:?}"),
        }
    }
    std::process::exit(0);
}

fn say(line: &str) {
    let mut out = io::stdout().lock();
    // One write: a pipe takes lines of several processes whole. Without a reader
    // there is nobody to tell.
    let _ = out.write_all(format!("{line}\n").as_bytes());
}

fn load(slot: &HostSlot, kernel: &[u8]) -> anyhow::Result<()> {
    let end = LOAD_ADDRESS + kernel.len() as u64;
    ensure!(end <= slot.length, "the guest is larger than its memory");
    let target = slot.host_address + LOAD_ADDRESS;
    // SAFETY: the first slot is mapped from guest address 0 on and large enough;
    // nothing else refers to it yet.
    unsafe {
        std::ptr::copy_nonoverlapping(kernel.as_ptr(), target as *mut u8, kernel.len());
    }
    Ok(())
}

fn create(kvm: &Kvm, slots: &[HostSlot]) -> anyhow::Result<VmFd> {
    let vm = kvm.create_vm()?;
    vm.set_identity_map_address(0xfffb_c000)?;
    vm.set_tss_address(0xfffb_d000)?;
    // As in the product, and for its reason: slots are set before there are devices to forget.
    for (number, slot) in (0..).zip(slots) {
        let region = kvm_userspace_memory_region {
            slot: number,
            flags: 0,
            guest_phys_addr: slot.guest_address,
            memory_size: slot.length,
            userspace_addr: slot.host_address,
        };
        // SAFETY: the memory stays mapped until the process ends (`commands`).
        unsafe { vm.set_user_memory_region(region) }?;
    }
    vm.create_irq_chip()?;
    vm.create_pit2(kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    })?;
    Ok(vm)
}

fn power_on(kvm: &Kvm, vcpu: &VcpuFd, cpu: u32, options: &Options<'_>) -> anyhow::Result<()> {
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    let mut sregs = vcpu.get_sregs()?;
    let flat = |selector, type_| kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = flat(0x08, 0xb);
    sregs.ds = flat(0x10, 0x3);
    (sregs.es, sregs.fs, sregs.gs, sregs.ss) = (sregs.ds, sregs.ds, sregs.ds, sregs.ds);
    sregs.cr0 |= 1;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs {
        rip: LOAD_ADDRESS,
        rax: cpu.into(),
        rbx: options.cpus.into(),
        rcx: options.memory_bytes.min(3 << 30) >> 20,
        rflags: 2,
        ..Default::default()
    })?;
    vcpu.set_mp_state(kvm_mp_state {
        mp_state: KVM_MP_STATE_RUNNABLE,
    })?;
    Ok(())
}

/// The serial port as far as the guests here use it: data, and the status that
/// says whether there is input and that there is room for output.
fn run_vcpu(vcpu: &mut VcpuFd, serial: &Mutex<VecDeque<u8>>) -> anyhow::Result<()> {
    const DATA: u16 = 0x3f8;
    const STATUS: u16 = 0x3fd;
    let input = || serial.lock().unwrap_or_else(PoisonError::into_inner);
    let mut line = Vec::new();
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(DATA, data)) => {
                line.extend_from_slice(data);
                if line.ends_with(b"\n") {
                    say(String::from_utf8_lossy(&line).trim_end());
                    line.clear();
                }
            }
            Ok(VcpuExit::IoIn(STATUS, data)) => {
                data.fill(0x60 | u8::from(!input().is_empty()));
            }
            Ok(VcpuExit::IoIn(DATA, data)) => data.fill(input().pop_front().unwrap_or(0)),
            Ok(VcpuExit::IoIn(_, data) | VcpuExit::MmioRead(_, data)) => data.fill(0xff),
            Ok(VcpuExit::IoOut(..) | VcpuExit::MmioWrite(..)) => {}
            Ok(other) => bail!("{other:?}"),
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(error.into()),
        }
    }
}
