//! What a store, its mounts and this user's machines tell of themselves, as numbers with
//! names.

mod families;
mod page;

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::time::{SystemTime, UNIX_EPOCH};

use snapstore_host::metrics::{Machine, Mount};
use snapstore_store::{Store, StoreFormat, StoreStats, StoreUsage};
use snapstore_vmm::control::RunState;

use families as of;
pub use page::Page;

/// No number yet.
pub fn page() -> Page {
    let mut page = Page::new(of::ALL.iter().copied());
    page.add(&of::BUILD_INFO, &[env!("CARGO_PKG_VERSION")], 1.0);
    page
}

pub fn add_store(page: &mut Page, store: &Store, usage: &StoreUsage) {
    let format = match store.format() {
        StoreFormat::One => "1",
        StoreFormat::Two => "2",
    };
    let path = store.path().to_string_lossy();
    page.add(&of::STORE_INFO, &[&path, format], 1.0);
    let counts = [
        (&of::STORE_TAGS, usage.tags),
        (&of::STORE_PACKS, usage.packs),
        (&of::STORE_PACK_BYTES, usage.pack_bytes),
        (&of::STORE_OPEN_PACKS, usage.open_packs),
        (&of::STORE_DAMAGED_PACKS, usage.damaged_packs),
        (&of::STORE_INDEX_BYTES, usage.index_bytes),
        (&of::STORE_BYTES, usage.total_bytes),
    ];
    for (family, count) in counts {
        page.add(family, &[], count as f64);
    }
    for (family, count) in [
        (&of::STORE_CONDEMNED_PACKS, usage.condemned_packs),
        (&of::STORE_COMMITTED_BYTES, usage.committed_bytes),
        (&of::STORE_REWRITTEN_BYTES, usage.rewritten_bytes),
    ] {
        page.add_known(family, &[], count.map(|count| count as f64));
    }
    if let Some((writers, viewers)) = usage.leases {
        page.add(&of::STORE_LEASES, &["writer"], writers as f64);
        page.add(&of::STORE_LEASES, &["viewer"], viewers as f64);
    }
    let since = |time: Option<SystemTime>| {
        let since = time?.duration_since(UNIX_EPOCH).ok()?;
        Some(since.as_secs_f64())
    };
    page.add_known(&of::STORE_LAST_TAGGED, &[], since(usage.last_tagged));
    page.add_known(&of::STORE_LAST_FREED, &[], since(usage.last_freed));
}

/// What takes time in proportion to what is stored.
pub fn add_stats(page: &mut Page, stats: &StoreStats) {
    let numbers = [
        (&of::STORE_UNREFERENCED_BYTES, stats.unreferenced_bytes),
        (&of::STORE_LOGICAL_BYTES, stats.logical_bytes),
        (&of::STORE_DISTINCT_BYTES, stats.distinct_bytes),
        (&of::STORE_UNREADABLE_TAGS, stats.unreadable.len() as u64),
    ];
    for (family, number) in numbers {
        page.add(family, &[], number as f64);
    }
}

/// A path as text. A byte that is no UTF-8 is written as `\xNN`: two mounts whose paths differ
/// in such bytes only have series of their own.
fn told_bytes(path: &OsStr) -> String {
    let mut text = String::new();
    for part in path.as_bytes().utf8_chunks() {
        text += part.valid();
        for byte in part.invalid() {
            text += &format!("\\x{byte:02x}");
        }
    }
    text
}

pub fn add_mounts(page: &mut Page, mounts: &[Mount]) {
    for mount in mounts {
        let dir = told_bytes(mount.dir.as_os_str());
        let dir: &[&str] = &[&dir];
        let mode = if mount.is_writable { "rw" } else { "ro" };
        let up = f64::from(u8::from(mount.counters.is_some()));
        page.add(&of::MOUNT_UP, &[dir[0], mode], up);
        let Some(counters) = &mount.counters else {
            continue;
        };
        page.add(&of::MOUNT_UPTIME, dir, counters.uptime_seconds);
        page.add_histogram(
            &of::MOUNT_READ_DURATION,
            dir,
            &counters.reads_within,
            counters.read_seconds,
            counters.reads,
        );
        let numbers = [
            (&of::MOUNT_READ_BYTES, counters.read_bytes),
            (&of::MOUNT_READ_ERRORS, counters.read_errors),
            (&of::MOUNT_DAMAGED_READS, counters.damaged_reads),
            (&of::MOUNT_PUSHED_PAGES, counters.pushed_pages),
            (&of::MOUNT_SAMPLED_PAGES, counters.sampled_pages),
            (&of::MOUNT_SAMPLED_HITS, counters.sampled_hit_pages),
            (&of::MOUNT_MISSED_PAGES, counters.missed_pages),
        ];
        let written = [
            (&of::MOUNT_WRITES, counters.writes),
            (&of::MOUNT_WRITTEN_BYTES, counters.written_bytes),
            (&of::MOUNT_WRITE_ERRORS, counters.write_errors),
        ];
        let written = written.into_iter().filter(|_| mount.is_writable);
        for (family, number) in numbers.into_iter().chain(written) {
            page.add(family, dir, number as f64);
        }
        if let Some(overlays) = &counters.overlays {
            let limit = overlays.limit_bytes.map(|bytes| bytes as f64);
            page.add(&of::MOUNT_OVERLAY_BYTES, dir, overlays.used_bytes as f64);
            page.add_known(&of::MOUNT_OVERLAY_LIMIT, dir, limit);
            page.add_known(&of::MOUNT_OVERLAY_FILL, dir, overlays.fill());
        }
        for one in &counters.elsewhere {
            let labels = &[dir[0], one.cause.as_str()];
            page.add(&of::MOUNT_REMOTE_REQUESTS, labels, one.requests as f64);
            page.add(&of::MOUNT_REMOTE_FAILED, labels, one.failed_requests as f64);
            page.add(&of::MOUNT_REMOTE_BYTES, labels, one.bytes as f64);
            page.add(&of::MOUNT_REMOTE_HEDGES, labels, one.hedges as f64);
            page.add(&of::MOUNT_REMOTE_HEDGES_WON, labels, one.hedges_won as f64);
        }
    }
}

const STATES: [(RunState, &str); 7] = [
    (RunState::Starting, "starting"),
    (RunState::Running, "running"),
    (RunState::Paused, "paused"),
    (RunState::Halted, "halted"),
    (RunState::IoError, "io_error"),
    (RunState::Stopping, "stopping"),
    (RunState::Ended, "ended"),
];

pub fn state_name(state: RunState) -> &'static str {
    let named = STATES.iter().find(|(one, _)| *one == state);
    named.map_or("unknown", |(_, name)| name)
}

pub fn add_machines(page: &mut Page, machines: &[Machine]) {
    for machine in machines {
        let name: &[&str] = &[&machine.name];
        let is_up = machine.status.is_some() || machine.record.is_some();
        page.add(&of::MACHINE_UP, name, f64::from(u8::from(is_up)));
        let private = machine.private_bytes.map(|bytes| bytes as f64);
        page.add_known(&of::MACHINE_PRIVATE_BYTES, name, private);
        if let Some(record) = &machine.record {
            page.add(&of::MACHINE_UPTIME, name, record.uptime_seconds());
            page.add(&of::MACHINE_MEMORY_BYTES, name, record.memory_bytes as f64);
            page.add_known(&of::MACHINE_VCPUS, name, record.cpus.map(f64::from));
        }
        let Some(status) = &machine.status else {
            continue;
        };
        for (state, text) in STATES {
            let is_it = f64::from(u8::from(state == status.state));
            page.add(&of::MACHINE_STATE, &[name[0], text], is_it);
        }
        let totals = &status.totals;
        let numbers = [
            (&of::MACHINE_VCPUS, status.cpus as f64),
            (&of::MACHINE_MEMORY_BYTES, status.memory_bytes as f64),
            (&of::MACHINE_UPTIME, status.uptime_seconds),
            (&of::MACHINE_CONSOLE_BYTES, status.console_bytes as f64),
            (&of::MACHINE_PAUSES, totals.pauses as f64),
            (&of::MACHINE_COMMITS, totals.commits as f64),
        ];
        for (family, number) in numbers {
            page.add(family, name, number);
        }
        page.add_summary(
            &of::MACHINE_FREEZE_PAUSE,
            name,
            totals.freeze_pause_seconds,
            totals.freezes as f64,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_differ_in_bytes_that_are_no_text_stay_apart() {
        let told = |bytes: &[u8]| told_bytes(OsStr::from_bytes(bytes));
        assert_eq!(told("/mnt/näher".as_bytes()), "/mnt/näher");
        assert_eq!(told(b"/mnt/\xff.1"), "/mnt/\\xff.1");
        assert_ne!(told(b"/mnt/\xff"), told(b"/mnt/\xfe"));
    }
}
