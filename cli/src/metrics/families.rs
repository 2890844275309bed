//! The names of all metrics. docs/METRICS.md lists them, which a test compares.

use super::page::Family;
use super::page::Kind::{self, Counter, Gauge, Histogram, Summary};

const MOUNT: &[&str] = &["mount"];
const MACHINE: &[&str] = &["machine"];

const fn plain(name: &'static str, kind: Kind, help: &'static str) -> Family {
    Family::new(name, kind, &[], help)
}

const fn mount(name: &'static str, kind: Kind, help: &'static str) -> Family {
    Family::new(name, kind, MOUNT, help)
}

const fn machine(name: &'static str, kind: Kind, help: &'static str) -> Family {
    Family::new(name, kind, MACHINE, help)
}

/// Declares families, and the list of them in this order.
macro_rules! families {
    ($($constant:ident = $family:expr;)*) => {
        $(pub static $constant: Family = $family;)*
        /// All families.
        pub static ALL: &[&Family] = &[$(&$constant),*];
    };
}

families! {
    BUILD_INFO = Family::new("snapstore_build_info", Gauge, &["version"],
        "1, with the version of the program that tells this.");
    STORE_INFO = Family::new("snapstore_store_info", Gauge, &["store", "format"],
        "1, with the store's directory and the version of its format.");
    STORE_TAGS = plain("snapstore_store_tags", Gauge, "Tags.");
    STORE_PACKS = plain("snapstore_store_packs", Gauge, "Sealed pack files.");
    STORE_PACK_BYTES = plain("snapstore_store_pack_bytes", Gauge, "Length of the sealed packs.");
    STORE_OPEN_PACKS = plain("snapstore_store_open_packs", Gauge,
        "Packs that are being written, or were left by a commit that was killed.");
    STORE_DAMAGED_PACKS = plain("snapstore_store_damaged_packs", Gauge,
        "Packs that a repair has set aside.");
    STORE_CONDEMNED_PACKS = plain("snapstore_store_condemned_packs", Gauge,
        "Packs that a collection has condemned and not deleted yet.");
    STORE_INDEX_BYTES = plain("snapstore_store_index_bytes", Gauge, "Length of the index's files.");
    STORE_BYTES = plain("snapstore_store_bytes", Gauge, "Length of every file of the store.");
    STORE_COMMITTED_BYTES = plain("snapstore_store_committed_bytes_total", Counter,
        "Bytes of packs that commits have written, as far as collections have seen them.");
    STORE_REWRITTEN_BYTES = plain("snapstore_store_rewritten_bytes_total", Counter,
        "Bytes of packs that collections have written.");
    STORE_LEASES = Family::new("snapstore_store_leases", Gauge, &["kind"],
        "Live users of the store: writer (commits) and viewer (mounts, machines, pins).");
    STORE_LAST_TAGGED = plain("snapstore_store_last_tag_change_timestamp_seconds", Gauge,
        "When a tag was last set or removed, since 1970.");
    STORE_LAST_FREED = plain("snapstore_store_last_collection_timestamp_seconds", Gauge,
        "When a collection last found something to free, since 1970.");
    STORE_UNREFERENCED_BYTES = plain("snapstore_store_unreferenced_bytes", Gauge,
        "Bytes in packs that no tag needs. Only with --full.");
    STORE_LOGICAL_BYTES = plain("snapstore_store_logical_bytes", Gauge,
        "Length of all images of all tagged snapshots. Only with --full.");
    STORE_DISTINCT_BYTES = plain("snapstore_store_distinct_bytes", Gauge,
        "Distinct pages that tags need, uncompressed. Only with --full.");
    STORE_UNREADABLE_TAGS = plain("snapstore_store_unreadable_tags", Gauge,
        "Tags whose snapshots cannot be read whole. Only with --full.");

    MOUNT_UP = Family::new("snapstore_mount_up", Gauge, &["mount", "mode"],
        "1 if the mount's server answers in time, else 0. Its mode is ro or rw.");
    MOUNT_UPTIME = mount("snapstore_mount_uptime_seconds", Gauge,
        "How long the mount's server has served.");
    MOUNT_READ_DURATION = mount("snapstore_mount_read_duration_seconds", Histogram,
        "Read requests of the kernel, page faults above all, and how long they took to answer.");
    MOUNT_READ_BYTES = mount("snapstore_mount_read_bytes_total", Counter,
        "Bytes that the kernel was given as answers to read requests.");
    MOUNT_READ_ERRORS = mount("snapstore_mount_read_errors_total", Counter,
        "Read requests that were answered with an error.");
    MOUNT_DAMAGED_READS = mount("snapstore_mount_damaged_reads_total", Counter,
        "Read requests that met damaged or missing data; also among the errors.");
    MOUNT_WRITES = mount("snapstore_mount_writes_total", Counter,
        "Write requests of the kernel.");
    MOUNT_WRITTEN_BYTES = mount("snapstore_mount_written_bytes_total", Counter,
        "Bytes that were written to the mount.");
    MOUNT_WRITE_ERRORS = mount("snapstore_mount_write_errors_total", Counter,
        "Write requests that were answered with an error.");
    MOUNT_OVERLAY_BYTES = mount("snapstore_mount_overlay_bytes", Gauge,
        "Room that what was written to the mount takes, of all its clones together.");
    MOUNT_OVERLAY_LIMIT = mount("snapstore_mount_overlay_limit_bytes", Gauge,
        "Room that what is written to each clone may take. Only with --overlay-limit.");
    MOUNT_OVERLAY_FILL = mount("snapstore_mount_overlay_fill_ratio", Gauge,
        "How much of that room is taken, 0 to 1, of the clone that has taken most. Only with --overlay-limit.");
    MOUNT_PUSHED_PAGES = mount("snapstore_mount_prefetch_pushed_pages_total", Counter,
        "Pages of working sets that the kernel was given before anybody asked.");
    MOUNT_SAMPLED_PAGES = mount("snapstore_mount_prefetch_sampled_pages_total", Counter,
        "Pages of working sets that were left out, to see whether they are asked for.");
    MOUNT_SAMPLED_HITS = mount("snapstore_mount_prefetch_sampled_hits_total", Counter,
        "Of the pages left out, those that were asked for.");
    MOUNT_MISSED_PAGES = mount("snapstore_mount_prefetch_missed_pages_total", Counter,
        "Pages touched in the first seconds of an image's use that are in no working set.");
    MOUNT_REMOTE_REQUESTS = Family::new("snapstore_mount_remote_requests_total", Counter,
        &["mount", "cause"],
        "Requests to the remote whose snapshot the mount shows. Causes are demand, working_set, ahead and fill.");
    MOUNT_REMOTE_FAILED = Family::new("snapstore_mount_remote_failed_requests_total", Counter,
        &["mount", "cause"], "Of those, requests that failed.");
    MOUNT_REMOTE_BYTES = Family::new("snapstore_mount_remote_bytes_total", Counter,
        &["mount", "cause"], "Bytes that came from that remote.");
    MOUNT_REMOTE_HEDGES = Family::new("snapstore_mount_remote_hedges_total", Counter,
        &["mount", "cause"],
        "Second requests, beside these, for what was late. Only for the cause demand.");
    MOUNT_REMOTE_HEDGES_WON = Family::new("snapstore_mount_remote_hedges_won_total", Counter,
        &["mount", "cause"], "Of those, requests that were answered first.");

    MACHINE_UP = machine("snapstore_machine_up", Gauge,
        "1 if the machine answers in time, 0 if it does not or has ended badly.");
    MACHINE_STATE = Family::new("snapstore_machine_state", Gauge, &["machine", "state"],
        "1 for the state that the machine is in, 0 for the others.");
    MACHINE_UPTIME = machine("snapstore_machine_uptime_seconds", Gauge,
        "How long the machine's process has had it.");
    MACHINE_VCPUS = machine("snapstore_machine_vcpus", Gauge, "Its vCPUs.");
    MACHINE_MEMORY_BYTES = machine("snapstore_machine_memory_bytes", Gauge, "Its guest's memory.");
    MACHINE_PRIVATE_BYTES = machine("snapstore_machine_private_bytes", Gauge,
        "Memory that its process shares with nobody: what its guest has written, above all.");
    MACHINE_CONSOLE_BYTES = machine("snapstore_machine_console_bytes_total", Counter,
        "Bytes that its guest has printed.");
    MACHINE_PAUSES = machine("snapstore_machine_pauses_total", Counter,
        "Pauses that were asked for.");
    MACHINE_COMMITS = machine("snapstore_machine_commits_total", Counter,
        "Commits of it that are durable.");
    MACHINE_FREEZE_PAUSE = machine("snapstore_machine_freeze_pause_seconds", Summary,
        "How long its guest stood still for commits, whether they succeeded or not.");
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What <https://prometheus.io/docs/practices/naming/> asks for.
    #[test]
    fn names_follow_the_conventions() {
        let mut names: Vec<_> = ALL.iter().map(|family| family.name).collect();
        for family in ALL {
            let name = family.name;
            assert!(name.starts_with("snapstore_"), "{name}");
            let plain = |c: char| c.is_ascii_lowercase() || c == '_';
            assert!(name.chars().all(plain), "{name}");
            let is_counter = family.kind == Counter;
            assert_eq!(name.ends_with("_total"), is_counter, "{name}");
            if matches!(family.kind, Histogram | Summary) {
                assert!(name.ends_with("_seconds"), "{name}");
            }
            for odd in [
                "_ms", "_millis", "_kib", "_mb", "_percent", "_count", "_sum",
            ] {
                assert!(!name.ends_with(odd), "{name}");
            }
            assert!(family.help.ends_with('.'), "{name}");
            assert!(!family.help.contains(['\n', '\\']), "{name}");
        }
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), ALL.len(), "a name is there twice");
    }
}
