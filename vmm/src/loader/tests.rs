//! Kernels of every form and deformity, loaded.

use linux_loader::bootparam::{boot_params, setup_header};
use proptest::prelude::*;
use vm_memory::{ByteValued as _, Bytes as _, GuestAddress};

use super::testing::{self, CODE_BYTES, ELF_ADDRESS, MIB, SETUP_BYTES, bzimage, elf, file, header};
use super::*;
use crate::Error;
use crate::addresses::{COMMAND_LINE, RESET_VECTOR, VM_GENERATION, ZERO_PAGE};

const SIZE: u64 = 64 * MIB;

fn devices() -> AcpiDevices {
    AcpiDevices {
        cpus: 2,
        vm_generation: Some(VM_GENERATION),
        ..Default::default()
    }
}

fn load_with(
    kernel: &[u8],
    initrd: Option<&[u8]>,
    cmdline: &str,
    memory: &GuestMemory,
) -> Result<Entry> {
    let kernel = file(kernel);
    let initrd = initrd.map(file);
    let linux = Kernel::Linux {
        kernel: kernel.path().to_owned(),
        initrd: initrd.as_ref().map(|file| file.path().to_owned()),
        cmdline: cmdline.to_owned(),
    };
    linux.load(memory, &devices())
}

fn load(kernel: &[u8]) -> Result<Entry> {
    load_with(kernel, None, "", &testing::memory(SIZE))
}

fn zero_page(memory: &GuestMemory) -> boot_params {
    memory.ram().read_obj(GuestAddress(ZERO_PAGE)).unwrap()
}

fn with(change: impl FnOnce(&mut setup_header)) -> Vec<u8> {
    let mut header = header();
    change(&mut header);
    bzimage(header)
}

#[test]
fn a_bzimage_is_loaded_at_1_mib_with_all_that_it_needs() {
    let memory = testing::memory(SIZE);
    let initrd = vec![7; 5000];
    let entry = load_with(&bzimage(header()), Some(&initrd), "console=ttyS0", &memory).unwrap();
    assert_eq!(entry, Entry::linux64(MIB + 0x200));
    let at = |address| -> u8 { memory.ram().read_obj(GuestAddress(address)).unwrap() };
    let end = MIB + CODE_BYTES as u64;
    assert_eq!(
        (at(MIB - 1), at(MIB), at(end - 1), at(end)),
        (0, 0xff, 0xff, 0)
    );

    let page = zero_page(&memory);
    let header = page.hdr;
    assert_eq!({ header.init_size }, 4 << 20);
    assert_eq!({ header.code32_start }, 1 << 20);
    let initrd = u64::from(header.ramdisk_image);
    assert_eq!((initrd, { header.ramdisk_size }), (SIZE - 8192, 5000));
    assert_eq!(
        (
            at(initrd - 1),
            at(initrd),
            at(initrd + 4999),
            at(initrd + 5000)
        ),
        (0, 7, 7, 0)
    );
    let mut cmdline = [0xff; 14];
    memory
        .ram()
        .read_slice(&mut cmdline, GuestAddress(COMMAND_LINE))
        .unwrap();
    assert_eq!(&cmdline, b"console=ttyS0\0");
    let root: [u8; 8] = memory
        .ram()
        .read_obj(GuestAddress(page.acpi_rsdp_addr))
        .unwrap();
    assert_eq!(&root, b"RSD PTR ");
}

#[test]
fn a_machine_has_its_own_generation_and_a_reset_vector() {
    let generation = || -> u128 {
        let memory = testing::memory(SIZE);
        load_with(&elf(true), None, "", &memory).unwrap();
        assert_eq!(
            memory
                .ram()
                .read_obj::<u8>(GuestAddress(RESET_VECTOR))
                .unwrap(),
            0xb0
        );
        memory.ram().read_obj(GuestAddress(VM_GENERATION)).unwrap()
    };
    assert_ne!(generation(), generation());
}

#[test]
fn what_is_behind_a_short_header_is_not_taken_for_header() {
    let memory = testing::memory(SIZE);
    // A header that ends before `kernel_info_offset`.
    let short = with(|header| {
        header.jump = u16::from_le_bytes([0xeb, 0x66]);
        header.kernel_info_offset = 0x5555_5555;
        header.handover_offset = 0x66;
    });
    load_with(&short, None, "", &memory).unwrap();
    let header = zero_page(&memory).hdr;
    assert_eq!({ header.kernel_info_offset }, 0);
    assert_eq!({ header.handover_offset }, 0x66);
}

#[test]
fn an_initrd_stays_below_the_address_that_the_kernel_names() {
    let memory = testing::memory(SIZE);
    let low = with(|header| header.initrd_addr_max = 0x01ff_ffff);
    load_with(&low, Some(&[1; 4096]), "", &memory).unwrap();
    assert_eq!({ zero_page(&memory).hdr.ramdisk_image }, 0x01ff_f000);
}

#[test]
fn an_elf_kernel_is_entered_by_pvh_if_it_can() {
    assert_eq!(load(&elf(true)).unwrap(), Entry::pvh(ELF_ADDRESS + 16));
    let memory = testing::memory(SIZE);
    let entry = load_with(&elf(false), None, "a", &memory).unwrap();
    assert_eq!(entry, Entry::linux64(ELF_ADDRESS));
    let header = zero_page(&memory).hdr;
    assert_eq!({ header.header }, super::zero_page::HEADER_MAGIC);
}

#[test]
fn what_is_no_kernel_is_refused() {
    for bytes in [&b""[..], b"#!/bin/sh\n", &[0; 100_000], b"\x7fELF"] {
        assert!(matches!(
            load(bytes),
            Err(Error::NotAKernel { .. } | Error::KernelTruncated { .. })
        ));
    }
    let mut elf32 = elf(true);
    elf32[4] = 1;
    let old = with(|header| header.version = 0x020b);
    let low = with(|header| header.loadflags = 0);
    let bits32 = with(|header| header.xloadflags = 0);
    let fixed_low = with(|header| {
        header.relocatable_kernel = 0;
        header.pref_address = 0x1000;
    });
    let mut entry_outside = elf(false);
    entry_outside[24..32].copy_from_slice(&(40 * MIB).to_le_bytes());
    let mut below = elf(false);
    below[64 + 24..64 + 32].copy_from_slice(&0x7000_u64.to_le_bytes());
    for bytes in [elf32, old, low, bits32, fixed_low, entry_outside, below] {
        let refused = load(&bytes);
        assert!(
            matches!(refused, Err(Error::KernelUnsupported { .. })),
            "{refused:?}"
        );
    }
}

#[test]
fn truncated_kernels_are_refused() {
    for whole in [bzimage(header()), elf(true)] {
        for length in [0x210, 0x26c, SETUP_BYTES, 0x800, whole.len() - 1] {
            let refused = load(&whole[..length]);
            assert!(
                matches!(refused, Err(Error::KernelTruncated { found_bytes, .. })
                    if found_bytes == length as u64),
                "{length}: {refused:?}"
            );
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let small = testing::memory(16 * MIB);
    for kernel in [bzimage(header()), elf(true)] {
        assert!(matches!(
            load_with(&kernel, None, "", &small),
            Err(Error::KernelRoom { .. })
        ));
    }
    let far = with(|header| header.pref_address = u64::MAX);
    assert!(matches!(load(&far), Err(Error::KernelRoom { .. })));

    // 44 MiB are left behind the unpacked kernel.
    let memory = testing::memory(SIZE);
    let refused = load_with(
        &bzimage(header()),
        Some(&vec![0; 44 << 20 | 1]),
        "",
        &memory,
    );
    assert!(matches!(refused, Err(Error::KernelSize { room_bytes, .. }) if room_bytes == 44 * MIB));
    assert!(load_with(&bzimage(header()), Some(&vec![0; 44 << 20]), "", &memory).is_ok());
    let empty = load_with(&bzimage(header()), Some(&[]), "", &memory);
    assert!(matches!(empty, Err(Error::KernelSize { .. })));
}

#[test]
fn command_lines_are_as_long_as_the_kernel_takes() {
    let memory = testing::memory(SIZE);
    let long = "a".repeat(2048);
    for kernel in [bzimage(header()), elf(true)] {
        assert!(load_with(&kernel, None, &long[1..], &memory).is_ok());
        assert!(matches!(
            load_with(&kernel, None, &long, &memory),
            Err(Error::CommandLine {
                bytes: 2048,
                limit: 2047
            })
        ));
    }
    let refused = load_with(&elf(true), None, "a\0b", &memory);
    assert!(matches!(refused, Err(Error::CommandLineNul)));
    let boundless = with(|header| header.cmdline_size = u32::MAX);
    let longer = "a".repeat(0x1_0000);
    assert!(load_with(&boundless, None, &longer[1..], &memory).is_ok());
    assert!(load_with(&boundless, None, &longer, &memory).is_err());
}

/// `SNAPSTORE_KERNELS` names real kernels, separated by colons.
#[test]
fn real_kernels_are_loaded() {
    let Some(paths) = std::env::var_os("SNAPSTORE_KERNELS") else {
        println!("SKIPPED real_kernels_are_loaded: SNAPSTORE_KERNELS names none");
        return;
    };
    for path in std::env::split_paths(&paths) {
        let memory = testing::memory(256 * MIB);
        let linux = Kernel::Linux {
            kernel: path.clone(),
            initrd: Some("/bin/sh".into()),
            cmdline: "console=ttyS0".to_owned(),
        };
        let entry = linux.load(&memory, &devices()).unwrap();
        println!("{}: {entry:x?}", path.display());
    }
}

fn mutated(seed: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..24);
    (changes, 0..seed.len()).prop_map(move |(changes, cut)| {
        let mut bytes = seed.clone();
        for (index, value) in changes {
            // Mostly the headers, which are at the begin of both forms.
            let at = index.index(0x400);
            bytes[at] = value;
        }
        if cut % 4 == 0 {
            bytes.truncate(cut);
        }
        bytes
    })
}

fn mutated_header() -> impl Strategy<Value = Vec<u8>> {
    let length = setup_header::default().as_slice().len();
    let changes = prop::collection::vec((0..length, any::<u8>()), 1..16);
    changes.prop_map(|changes| {
        let mut header = header();
        for (at, value) in changes {
            header.as_mut_slice()[at] = value;
        }
        header.header = super::zero_page::HEADER_MAGIC;
        bzimage(header)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn no_bytes_make_it_panic(
        bytes in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..2048),
            mutated(bzimage(header())),
            mutated(elf(true)),
            mutated(elf(false)),
            mutated_header(),
        ],
        initrd in prop::option::of(prop::collection::vec(any::<u8>(), 0..8192)),
    ) {
        let memory = testing::memory(32 * MIB);
        // What is loaded is in memory, and so is its entry.
        if let Ok(entry) = load_with(&bytes, initrd.as_deref(), "quiet", &memory) {
            prop_assert!((MIB..32 * MIB).contains(&entry.address()));
        }
    }
}
