//! A machine with memory above the devices below 4 GiB: what is frozen and what is
//! restored is at the image's offsets, which there are not the guest's addresses.

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use snapstore_guests::{TABLE, TableModel, TableStep};
use snapstore_vmm::memory::{GuestMemory, MemoryLayout};
use snapstore_vmm::state::MachineState;
use snapstore_vmm::{Console, Ending, Freeze, FrozenMemory, Kernel, Machine};
use vm_memory::{Bytes as _, GuestAddress};

const GIB: u64 = 1 << 30;
const PAGE: u64 = 4096;
const SIZE: u64 = 5 * GIB;
/// Guest addresses and what is written there; the second slot begins at 4 GiB.
const WRITTEN: [(u64, u64); 5] = [
    (3 * GIB - PAGE, 1),
    (4 * GIB, 2),
    (4 * GIB + 8 * PAGE, 3),
    (5 * GIB + 123 * PAGE, 4),
    (6 * GIB - PAGE, 5),
];

/// The image's offset of a guest address: there is no memory from 3 to 4 GiB.
fn offset(address: u64) -> u64 {
    if address < 3 * GIB {
        address
    } else {
        address - GIB
    }
}

fn has_kvm(test: &str) -> bool {
    let opened = File::options().read(true).write(true).open("/dev/kvm");
    if let Err(error) = &opened {
        println!("SKIPPED {test}: /dev/kvm: {error}");
    }
    opened.is_ok()
}

/// A running machine of the `table` guest in 5 GiB.
fn boot(console: &Arc<Console>) -> Machine {
    let kernel = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(kernel.path(), TABLE).unwrap();
    let memory = GuestMemory::anonymous(MemoryLayout::new(SIZE).unwrap()).unwrap();
    let machine = Machine::boot(
        memory,
        1,
        &Kernel::Flat(kernel.path().into()),
        console,
        Vec::new(),
    )
    .unwrap();
    machine.resume().unwrap();
    machine
}

/// The whole lines printed so far that are steps; there must be `count`.
fn steps(console: &Console, count: usize) -> Vec<TableStep> {
    let begin = Instant::now();
    loop {
        let output = console.read(0, Duration::ZERO).unwrap();
        let text = String::from_utf8(output.bytes).unwrap();
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        assert!(!whole.contains("BAD"), "{whole}");
        let steps: Vec<_> = whole.lines().filter_map(TableStep::parse).collect();
        if steps.len() >= count {
            return steps;
        }
        assert!(begin.elapsed() < Duration::from_secs(60), "{text}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Copies these ranges of frozen memory to a sparse image.
fn copy(freeze: &Freeze, ranges: &[Range<u64>], image: &File) {
    let mut page = vec![0; usize::try_from(PAGE).unwrap()];
    for at in ranges.iter().flat_map(|range| range.clone().step_by(4096)) {
        let slots = freeze.memory.slots();
        let slot = slots
            .iter()
            .find(|slot| (slot.image_offset..slot.image_offset + slot.length).contains(&at));
        let slot = slot.unwrap();
        let position = slot.host_address + (at - slot.image_offset);
        freeze
            .memory
            .file()
            .read_exact_at(&mut page, position)
            .unwrap();
        image.write_all_at(&page, at).unwrap();
    }
}

fn word(image: &File, at: u64) -> u64 {
    let mut bytes = [0; 8];
    image.read_exact_at(&mut bytes, at).unwrap();
    u64::from_le_bytes(bytes)
}

fn contains(ranges: &[Range<u64>], at: u64) -> bool {
    ranges.iter().any(|range| range.contains(&at))
}

#[test]
fn memory_above_the_devices_is_frozen_and_restored() {
    if !has_kvm("memory_above_the_devices_is_frozen_and_restored") {
        return;
    }
    let console = Arc::new(Console::new());
    let machine = boot(&console);
    steps(&console, 2);
    for (address, value) in WRITTEN {
        let ram = machine.memory().ram();
        ram.write_obj(value, GuestAddress(address)).unwrap();
    }
    let image = tempfile::tempfile().unwrap();
    image.set_len(SIZE).unwrap();
    let first = machine.freeze().unwrap();
    let all = first.written().unwrap();
    assert!(all.iter().all(|range| range.end <= SIZE), "{all:?}");
    let bytes: u64 = all.iter().map(|range| range.end - range.start).sum();
    assert!(bytes < 1 << 20, "{bytes} bytes of {SIZE}");
    copy(&first, &all, &image);
    for (address, value) in WRITTEN {
        assert!(contains(&all, offset(address)), "{address:#x}: {all:?}");
        assert_eq!(word(&image, offset(address)), value, "{address:#x}");
    }
    machine.committed(first);

    // Only what is written from here on is listed; the rest stays what it was.
    let again = 5 * GIB + 7 * PAGE;
    let ram = machine.memory().ram();
    ram.write_obj(6_u64, GuestAddress(again)).unwrap();
    machine.pause().unwrap();
    let second = machine.freeze().unwrap();
    // Of so little a copy is made, where the kernel tells what it is.
    let is_copy = matches!(second.memory, FrozenMemory::Copied(_));
    assert_eq!(is_copy, second.changed.is_some());
    let some = second.written().unwrap();
    if second.changed.is_some() {
        for (address, _) in WRITTEN {
            assert!(!contains(&some, offset(address)), "{address:#x}: {some:?}");
        }
    }
    assert!(contains(&some, offset(again)));
    copy(&second, &some, &image);
    let state = MachineState::decode(&second.state.encode()).unwrap();
    let before = steps(&console, 1);
    machine.stop();
    assert_eq!(machine.wait(), Ending::Stopped);
    drop((second, machine));

    let layout = MemoryLayout::new(SIZE).unwrap();
    let memory = GuestMemory::from_image(layout, &image).unwrap();
    let console = Arc::new(Console::new());
    let machine = Machine::restore(&state, memory, &console, Vec::new()).unwrap();
    for (address, value) in WRITTEN.into_iter().chain([(again, 6)]) {
        let found: u64 = machine
            .memory()
            .ram()
            .read_obj(GuestAddress(address))
            .unwrap();
        assert_eq!(found, value, "{address:#x}");
    }
    machine.resume().unwrap();
    let after = steps(&console, 3);
    let last = before.last().unwrap().number;
    assert!(
        (last + 1..=last + 2).contains(&after[0].number),
        "{last}: {after:?}"
    );
    let model: Vec<_> = TableModel::new()
        .skip_while(|step| step.number < after[0].number)
        .take(after.len())
        .collect();
    assert_eq!(after, model);
}

#[test]
fn a_state_is_refused_over_memory_of_another_size() {
    if !has_kvm("a_state_is_refused_over_memory_of_another_size") {
        return;
    }
    let console = Arc::new(Console::new());
    let machine = boot(&console);
    machine.pause().unwrap();
    let state = machine.save().unwrap();
    for size in [SIZE - PAGE, SIZE + PAGE, GIB, SIZE - GIB] {
        let memory = GuestMemory::anonymous(MemoryLayout::new(size).unwrap()).unwrap();
        assert!(
            Machine::restore(&state, memory, &console, Vec::new()).is_err(),
            "{size}"
        );
    }
    machine.resume().unwrap();
    assert!(machine.save().is_err(), "a running machine was saved");
}
