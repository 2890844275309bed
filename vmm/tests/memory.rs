//! What a guest writes under KVM, as seen by KVM's dirty log, by the page tables
//! and by the tracker.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use snapstore_vmm::memory::{
    Frozen, GuestMemory, HostSlot, MemoryLayout, PAGE_BYTES, ScanMethod, Tracker, private_ranges,
};
use vm_memory::{Bytes as _, GuestAddress};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const CODE: u64 = 0x1000;
const BYTE: u8 = 0x5a;

/// Real-mode code that reads and writes the first bytes of pages below 1 MiB and
/// tells after each round, by a byte sent to a port, that it is done.
fn code(rounds: &[(&[u64], &[u64])]) -> Vec<u8> {
    let mut code = Vec::new();
    let select = |code: &mut Vec<u8>, page: u64| {
        let segment = u16::try_from(page * PAGE_BYTES / 16).unwrap();
        code.push(0xb8); // mov ax, segment
        code.extend(segment.to_le_bytes());
        code.extend([0x8e, 0xc0]); // mov es, ax
    };
    for (reads, writes) in rounds {
        for page in *reads {
            select(&mut code, *page);
            code.extend([0x26, 0xa0, 0, 0]); // mov al, es:[0]
        }
        for page in *writes {
            select(&mut code, *page);
            code.extend([0x26, 0xc6, 0x06, 0, 0, BYTE]); // mov byte es:[0], BYTE
        }
        code.extend([0xe6, 0x80]); // out 0x80, al
    }
    code.push(0xf4); // hlt
    code
}

/// An image with code at [`CODE`], data from there to 512 KiB, and holes.
fn image(size_bytes: u64, code: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size_bytes).unwrap();
    file.write_all_at(&vec![1; 508 << 10], CODE).unwrap();
    file.write_all_at(code, CODE).unwrap();
    file
}

/// Declared in the order in which it has to be dropped.
struct Machine {
    vcpu: VcpuFd,
    vm: VmFd,
    slots: Vec<HostSlot>,
}

impl Machine {
    /// `None`, with the reason printed, where there is no KVM.
    fn new(memory: &GuestMemory) -> Option<Self> {
        let kvm = match Kvm::new() {
            Ok(kvm) => kvm,
            Err(error) => {
                // A test's thread has its name.
                let test = std::thread::current();
                println!(
                    "SKIPPED {}: /dev/kvm: {error}",
                    test.name().unwrap_or("vmm")
                );
                return None;
            }
        };
        let vm = kvm.create_vm().unwrap();
        let slots = memory.host_slots();
        for (number, slot) in (0..).zip(&slots) {
            let region = kvm_userspace_memory_region {
                slot: number,
                flags: KVM_MEM_LOG_DIRTY_PAGES,
                guest_phys_addr: slot.guest_address,
                memory_size: slot.length,
                userspace_addr: slot.host_address,
            };
            // SAFETY: the memory is mapped there, and outlives the machine in
            // every test.
            unsafe { vm.set_user_memory_region(region) }.unwrap();
        }
        // Only Intel's processors need it, and only for real mode.
        let _unneeded = vm.set_tss_address(0xfffb_d000);
        let vcpu = vm.create_vcpu(0).unwrap();
        let mut sregs = vcpu.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        vcpu.set_sregs(&sregs).unwrap();
        let mut regs = vcpu.get_regs().unwrap();
        (regs.rip, regs.rflags) = (CODE, 2);
        vcpu.set_regs(&regs).unwrap();
        Some(Self { vcpu, vm, slots })
    }

    /// Runs to the end of a round.
    fn round(&mut self) {
        match self.vcpu.run().unwrap() {
            VcpuExit::IoOut(0x80, _) => {}
            other => panic!("unexpected exit: {other:?}"),
        }
    }

    /// The pages of the image that KVM logged since the last call.
    fn dirty_log(&self) -> BTreeSet<u64> {
        let mut pages = BTreeSet::new();
        for (number, slot) in (0..).zip(&self.slots) {
            let length = usize::try_from(slot.length).unwrap();
            let bitmap = self.vm.get_dirty_log(number, length).unwrap();
            for (word, bits) in (0_u64..).zip(bitmap) {
                let set = (0..64).filter(|bit| bits >> bit & 1 == 1);
                pages.extend(set.map(|bit| slot.image_offset / PAGE_BYTES + word * 64 + bit));
            }
        }
        pages
    }
}

fn pages(ranges: &[Range<u64>]) -> BTreeSet<u64> {
    ranges
        .iter()
        .flat_map(|range| range.start / PAGE_BYTES..range.end / PAGE_BYTES)
        .collect()
}

fn private(slots: &[HostSlot], method: ScanMethod) -> BTreeSet<u64> {
    let pagemap = File::open("/proc/self/pagemap").unwrap();
    pages(&private_ranges(&pagemap, slots, method).unwrap())
}

#[test]
fn every_write_is_found() {
    // Pages of data (up to 127) and of the hole behind it; those that are only
    // read lie in data, where they must not count as written.
    let first: &[u64] = &[2, 3, 40, 100, 130, 200, 255];
    let second: &[u64] = &[3, 41, 130, 131, 254];
    let reads: &[u64] = &[50, 51, 60];
    let image = image(5 * GIB, &code(&[(reads, first), (reads, second)]));
    let memory = GuestMemory::from_image(MemoryLayout::new(5 * GIB).unwrap(), &image).unwrap();
    let slots = memory.host_slots();
    let Some(mut machine) = Machine::new(&memory) else {
        return;
    };
    let mut tracker = Tracker::new(&slots).unwrap();
    if tracker.is_none() {
        println!("SKIPPED every_write_is_found: this kernel cannot track writes");
    }

    // What the monitor writes, KVM does not log.
    memory
        .ram()
        .write_obj(1_u64, GuestAddress(4 * GIB + 8192))
        .unwrap();
    let monitors = 3 * GIB / PAGE_BYTES + 2;

    let mut all = BTreeSet::from([monitors]);
    for (round, writes) in [first, second].into_iter().enumerate() {
        machine.round();
        let written: BTreeSet<u64> = writes.iter().copied().collect();
        let log = machine.dirty_log();
        assert!(written.is_subset(&log), "round {round}: {log:?}");
        assert!(!log.contains(&monitors));

        all.extend(&written);
        for method in [ScanMethod::Automatic, ScanMethod::Pagemap] {
            let private = private(&slots, method);
            assert!(log.is_subset(&private), "{method:?}: {log:?} {private:?}");
            assert_eq!(private, all, "{method:?}, round {round}");
        }
        if let Some(tracker) = &mut tracker {
            // What was only read may be listed, too.
            let listed = pages(&tracker.take().unwrap());
            let taken = &listed & &private(&slots, ScanMethod::Automatic);
            let mut expected = written;
            if round == 0 {
                expected.insert(monitors);
            }
            assert_eq!(taken, expected, "round {round}");
        }
    }
    for page in &all - &BTreeSet::from([monitors]) {
        let byte: u8 = memory
            .ram()
            .read_obj(GuestAddress(page * PAGE_BYTES))
            .unwrap();
        assert_eq!(byte, BYTE);
    }
}

#[test]
fn a_frozen_copy_stays_behind_its_guest() {
    let image = image(2 * MIB, &code(&[(&[], &[2, 200]), (&[], &[3, 200, 201])]));
    let memory = GuestMemory::from_image(MemoryLayout::new(2 * MIB).unwrap(), &image).unwrap();
    let slots = memory.host_slots();
    let Some(mut machine) = Machine::new(&memory) else {
        return;
    };
    machine.round();
    let frozen = Frozen::fork(slots.clone()).unwrap();
    memory
        .ram()
        .write_obj(7_u8, GuestAddress(2 * PAGE_BYTES + 1))
        .unwrap();
    machine.round();
    let files = frozen.open().unwrap();
    let found = private_ranges(&files.pagemap, &slots, ScanMethod::Automatic).unwrap();
    assert_eq!(pages(&found), BTreeSet::from([2, 200]));
    for (page, bytes) in [(2, [BYTE, 1]), (200, [BYTE, 0]), (3, [1, 1]), (201, [0, 0])] {
        let mut found = [0; 2];
        let position = slots[0].host_address + page * PAGE_BYTES;
        files.memory.read_exact_at(&mut found, position).unwrap();
        assert_eq!(found, bytes, "page {page}");
    }
    assert_eq!(
        private(&slots, ScanMethod::Automatic),
        BTreeSet::from([2, 3, 200, 201])
    );
}
