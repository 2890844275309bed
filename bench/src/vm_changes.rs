//! Three ways to find what a machine changed since its last commit: ask the
//! kernel which pages were written (what the product does); hash all private
//! pages again; or give the machine its own new snapshot as memory, so that
//! there are no private pages any more.

use std::fs::File;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, bail};
use snapstore_store::{
    CommitRequest, Extent, ImageRole, Input, InputData, InputKind, ParentChoice, Silent,
    SnapshotId, Store,
};
use snapstore_vmm::control::{Client, CommitReport, Seconds};
use snapstore_vmm::memory::{HostSlot, ScanMethod, private_ranges};

use crate::Bench;
use crate::mounts::Mount;
use crate::stats::Samples;
use crate::vm_frozen::Helper;
use crate::vm_rig::{FIRST, MIB_PAGES, Talk, Touch, lab, mount, snapshot};
use snapstore_tests::vm::Lab;

const PRIVATE_MIB: [u32; 2] = [64, 256];
const CHANGED_MIB: u32 = 1;
const MEMORY_BYTES: u64 = 1 << 30;

/// A commit of one changed MiB by either list, and what remapping would cost.
///
/// # Errors
/// If something fails.
pub fn changes(bench: &mut Bench) -> anyhow::Result<()> {
    let lab = lab("vm-changes")?;
    snapshot(&lab, "full", "1G", 512 * MIB_PAGES, false)?;
    let image = mount(&lab, "full")?;
    for mib in PRIVATE_MIB {
        lab.restore("full", &["--name", "guest"])?;
        let mut guest = Talk::to(&lab, "guest")?;
        guest.write(FIRST, mib * MIB_PAGES, 1)?;
        lab.commit(&format!("all-{mib}"), "guest")?;
        let mut turn = 0;
        let mut next = |guest: &mut Talk, list| {
            turn += 1;
            guest.write(FIRST, CHANGED_MIB * MIB_PAGES, turn << 20)?;
            commit(&lab, list)
        };
        let mut figures = Vec::new();
        for _ in 0..bench.rounds {
            let tracked = next(&mut guest, List::Written)?;
            let all = next(&mut guest, List::Private)?;
            let refault = refault(&lab, mib)?;
            figures.push([vec![tracked, all], refault].concat());
        }
        lab.stop("guest")?;
        let column = |number: usize| Samples::new(figures.iter().map(|f| f[number]).collect());
        let what = format!("commit of {CHANGED_MIB} of {mib} MiB private");
        let tracked = column(0);
        bench.compare(
            &what,
            &tracked,
            "hashing all private pages",
            &column(1),
            None,
        );
        let what = format!("reading {mib} MiB again from a new snapshot, in order");
        bench.compare(&what, &column(2), "the commit by list", &tracked, None);
        let what = format!("reading {mib} MiB again from a new snapshot, scattered");
        bench.compare(&what, &column(3), "the commit by list", &tracked, None);
    }
    image.unmount()?;
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum List {
    Written,
    Private,
}

/// Commits the machine by the libraries; returns the seconds.
fn commit(lab: &Lab, list: List) -> anyhow::Result<f64> {
    let store = Store::open(lab.cli.store())?;
    let socket = lab.vm_dir("guest").join("control.sock");
    let begin = Instant::now();
    let client = Client::connect(&socket)?;
    match list {
        List::Written => {
            let frozen = client.freeze()?;
            let slots = frozen.slots();
            let extents = extents(slots, frozen.written())?;
            let parent = frozen.origin().snapshot.clone();
            let request = request(
                &parent,
                frozen.memory().try_clone()?,
                extents,
                frozen.state(),
            )?;
            let committed = store.commit(&request, &Silent)?;
            frozen.committed(report(committed.id), None)?;
        }
        List::Private => {
            // Of the machine itself, whose guest waits: a freeze may hold less.
            let pid = lab.pid("guest")?;
            let slots = [whole_image(pid)?];
            let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
            let memory = File::open(format!("/proc/{pid}/mem"))?;
            let frozen = client.freeze()?;
            let private = private_ranges(&pagemap, &slots, ScanMethod::Automatic)?;
            let extents = extents(&slots, &private)?;
            let parent = frozen.origin().snapshot.clone();
            let request = request(&parent, memory, extents, frozen.state())?;
            let committed = store.commit(&request, &Silent)?;
            frozen.committed(report(committed.id), None)?;
        }
    }
    Ok(begin.elapsed().as_secs_f64())
}

/// The slot of a process that has mapped an image as one.
fn whole_image(pid: u32) -> anyhow::Result<HostSlot> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    // "START-END PERMISSIONS OFFSET DEVICE INODE PATH", in hexadecimal; holes in the image are
    // mappings of their own.
    let line = maps.lines().find(|line| line.ends_with("/memory.bin"));
    let mut fields = line.context("no image is mapped")?.split(' ');
    let mut number = |field: usize| -> anyhow::Result<u64> {
        let field = fields.nth(field).context("a short line")?;
        let text = field.split_once('-').map_or(field, |(start, _)| start);
        Ok(u64::from_str_radix(text, 16)?)
    };
    let (start, offset) = (number(0)?, number(1)?);
    Ok(HostSlot {
        guest_address: 0,
        image_offset: 0,
        length: MEMORY_BYTES,
        host_address: start - offset,
    })
}

fn report(id: SnapshotId) -> CommitReport {
    CommitReport {
        snapshot: id.to_string(),
        tag: "next".to_owned(),
        timings: Seconds::new(),
    }
}

/// The image ranges in the frozen process. The guests here have one slot.
fn extents(slots: &[HostSlot], ranges: &[std::ops::Range<u64>]) -> anyhow::Result<Vec<Extent>> {
    let [slot] = slots else {
        bail!("{} memory slots", slots.len());
    };
    let extent = |range: &std::ops::Range<u64>| Extent {
        image_offset: range.start,
        file: 0,
        file_offset: slot.host_address + range.start,
        length: range.end - range.start,
    };
    Ok(ranges.iter().map(extent).collect())
}

fn request(
    parent: &Option<String>,
    memory: File,
    extents: Vec<Extent>,
    state: &[u8],
) -> anyhow::Result<CommitRequest> {
    let parent = parent.as_deref().context("the machine has an origin")?;
    let memory = Input {
        name: "memory".to_owned(),
        role: ImageRole::Memory,
        data: InputData::Extents {
            files: vec![Arc::new(memory)],
            label: "frozen memory".to_owned(),
            size_bytes: MEMORY_BYTES,
            extents,
        },
        kind: InputKind::Diff,
    };
    let state = Input {
        name: "vmstate".to_owned(),
        role: ImageRole::File,
        data: InputData::Bytes(state.into()),
        kind: InputKind::Full,
    };
    Ok(CommitRequest {
        tag: "next".to_owned(),
        replace: true,
        parent: ParentChoice::Pinned(SnapshotId::from_hex(parent).context("no snapshot id")?),
        inputs: vec![memory, state],
        ..CommitRequest::default()
    })
}

/// Reads the pages that were private from a new mount of what was committed:
/// in order, and scattered.
fn refault(lab: &Lab, mib: u32) -> anyhow::Result<Vec<f64>> {
    let count = mib * MIB_PAGES;
    let mut figures = Vec::new();
    for stride in [1, 4097] {
        let dir = lab.path("mnt-refault");
        let mount = Mount::product(&lab.cli, &format!("all-{mib}"), &dir, &[])?;
        let mut process = Helper::memory(&mount.memory())?;
        figures.push(process.ask(&format!("read {FIRST} {count} {stride}"))?);
        drop(process);
        mount.unmount()?;
    }
    Ok(figures)
}
