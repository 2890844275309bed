//! Disks of machines in commits: of any number of sectors, and of files that stay
//! as they are.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;

use anyhow::{Result, ensure};
use snapstore_guests::HALT;
use snapstore_store::{PageSize, Store};
use snapstore_tests::harness::{Cli, noise};
use snapstore_tests::vm::Lab;

/// A flat program as what only Linux gets disks for: an ELF file of one segment at
/// 1 MiB, entered in 32-bit mode as the note for PVH in its second one says.
fn as_kernel(program: &[u8]) -> Vec<u8> {
    const ADDRESS: u64 = 1 << 20;
    const HEADERS: u64 = 4096;
    let mut content = program.to_vec();
    content.resize(content.len().next_multiple_of(4), 0);
    let note_at = content.len() as u64;
    for number in [4_u32, 8, 18] {
        content.extend_from_slice(&number.to_le_bytes());
    }
    content.extend_from_slice(b"Xen\0");
    content.extend_from_slice(&ADDRESS.to_le_bytes());
    let segment = |kind: u32, flags: u32, at: u64, length: u64, alignment: u64| {
        let mut bytes = [kind.to_le_bytes(), flags.to_le_bytes()].concat();
        for number in [
            HEADERS + at,
            ADDRESS + at,
            ADDRESS + at,
            length,
            length,
            alignment,
        ] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes
    };
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend_from_slice(&[2, 0, 62, 0, 1, 0, 0, 0]);
    for number in [ADDRESS, 64, 0] {
        file.extend_from_slice(&number.to_le_bytes());
    }
    file.extend_from_slice(&[0; 4]);
    for number in [64_u16, 56, 2, 64, 0, 0] {
        file.extend_from_slice(&number.to_le_bytes());
    }
    let length = content.len() as u64;
    file.extend(segment(1, 7, 0, length, 4096));
    file.extend(segment(4, 4, note_at, length - note_at, 4));
    file.resize(4096, 0);
    file.extend(content);
    file
}

/// A machine `vm` with a disk of this file, and the file's path.
fn with_disk(lab: &Lab, bytes: &[u8]) -> Result<String> {
    let kernel = lab.file("kernel", &as_kernel(HALT))?;
    let disk = lab.file("disk", bytes)?;
    let run = [
        "run", "vm", "--kernel", &kernel, "--mem", "32M", "--disk", &disk, "--detach",
    ];
    lab.cli.ok(&run)?;
    Ok(disk)
}

#[test]
fn a_disk_of_any_number_of_sectors_is_committed_and_restored() -> Result<()> {
    let Some(lab) = Lab::with_mounts("a_disk_of_any_number_of_sectors_is_committed_and_restored")?
    else {
        return Ok(());
    };
    let bytes = noise(3, (1 << 20) + 1536);
    with_disk(&lab, &bytes)?;
    lab.commit("base", "vm")?;
    lab.commit("next", "vm")?;
    lab.stop("vm")?;
    lab.restore("next", &["--name", "copy"])?;
    lab.commit("later", "copy")?;
    for tag in ["base", "next", "later"] {
        ensure!(lab.stored_all(tag, "disk0")? == bytes, "{tag}");
    }
    lab.stop("copy")?;
    lab.cli.ok(&["verify", "--read-data"])?;
    lab.finish()
}

#[test]
fn all_layers_of_an_overlay_may_be_written() -> Result<()> {
    let Some(lab) = Lab::new("all_layers_of_an_overlay_may_be_written")? else {
        return Ok(());
    };
    with_disk(&lab, &noise(3, 8 << 20))?;
    let limits = &lab.ps("vm")?["confinement"]["limits"];
    ensure!(limits["file_bytes"] == 10 * (8 << 20), "{limits}");
    lab.stop("vm")?;
    lab.finish()
}

#[test]
fn a_disk_whose_file_has_changed_is_not_committed() -> Result<()> {
    let Some(lab) = Lab::new("a_disk_whose_file_has_changed_is_not_committed")? else {
        return Ok(());
    };
    let path = with_disk(&lab, &noise(3, 1 << 20))?;
    lab.commit("base", "vm")?;
    let file = File::options().write(true).open(&path)?;
    // A clock may tell whole ticks only.
    let before = fs::metadata(&path)?.modified()?;
    file.set_len(4096)?;
    let error = lab.cli.fails(1, &["commit", "short", "--vm", "vm"])?;
    ensure!(error.contains("4096 bytes long and was 1048576"), "{error}");
    file.write_all_at(&noise(3, 1 << 20), 0)?;
    file.set_modified(before + std::time::Duration::from_secs(1))?;
    let error = lab.cli.fails(1, &["commit", "written", "--vm", "vm"])?;
    ensure!(error.contains("somebody wrote to it"), "{error}");
    // The file is what it was again, and so is the machine.
    file.set_modified(before)?;
    lab.commit("again", "vm")?;
    lab.stop("vm")?;
    lab.finish()
}

#[test]
fn another_store_is_named_and_not_called_damaged() -> Result<()> {
    let Some(lab) = Lab::new("another_store_is_named_and_not_called_damaged")? else {
        return Ok(());
    };
    // What is read of a disk depends on the snapshot that the machine was made from.
    with_disk(&lab, &[7; 8192])?;
    lab.commit("base", "vm")?;
    let other = lab.path("other");
    Store::create(&other, PageSize::KIB_4)?;
    let runtime = lab.runtime().display().to_string();
    let other = Cli::new(&other).with_env("SNAPSTORE_RUNTIME_DIR", &runtime);
    let error = other.fails(3, &["commit", "x", "--vm", "vm"])?;
    ensure!(error.contains("--store"), "{error}");
    ensure!(!error.contains("repair"), "{error}");
    lab.commit("next", "vm")?;
    lab.stop("vm")?;
    lab.finish()
}
