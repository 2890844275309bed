//! The store as a whole, and its host.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::values::{FormArgs, interval};

#[derive(Args)]
#[command(after_help = "Example:\n  snapstore --store /srv/snaps init --page-size 16K")]
pub struct InitArgs {
    /// The size of a page: 4K, 16K or 64K
    #[arg(long, default_value = "4K", value_name = "SIZE", value_parser = crate::format::parse_size)]
    pub page_size: u64,
}

#[derive(Args)]
#[command(after_help = "\
With --max-store or --reserve it ends with 1 if too much is left, and says which tags would
have to go, the oldest first. It removes none: that is what `forget` and `rm` are for.

With --optimize it also rewrites what was committed since it last did: smaller, small packs
as one, and pages in the order in which an image has them. It does so at the lowest priority,
beside everything else, and can be stopped at any time; the next one goes on.

Examples:
  snapstore gc --dry-run
  snapstore gc --optimize --max-seconds 600
  snapstore gc --max-store 500G --reserve 10G")]
pub struct GcArgs {
    /// Only print the plan
    #[arg(long)]
    pub dry_run: bool,
    /// The most that the store may take on disk
    #[arg(long, value_name = "SIZE", value_parser = crate::format::parse_size)]
    pub max_store: Option<u64>,
    /// The least that is to be free on the store's filesystem
    #[arg(long, value_name = "SIZE", value_parser = crate::format::parse_size)]
    pub reserve: Option<u64>,
    /// Rewrite packs with less than this share of needed bytes
    #[arg(long, default_value_t = 50, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=100))]
    pub keep_percent: u8,
    /// Make what is kept smaller and quicker to read
    #[arg(long)]
    pub optimize: bool,
    /// With --optimize: begin nothing new after so many seconds
    #[arg(long, value_name = "SECONDS", requires = "optimize")]
    pub max_seconds: Option<u64>,
}

#[derive(Args)]
#[command(after_help = "Example:\n  snapstore verify --read-data")]
pub struct VerifyArgs {
    /// Read and check every stored byte, not only footers and references
    #[arg(long)]
    pub read_data: bool,
    #[command(flatten)]
    pub form: FormArgs,
}

#[derive(Args)]
#[command(after_help = "\
Examples:
  snapstore stats --json
  snapstore stats -o '{total_bytes}'
  snapstore stats -o '{exclusive_stored_bytes} {tag}' | sort -n")]
pub struct StatsArgs {
    #[command(flatten)]
    pub form: FormArgs,
}

#[derive(Args)]
#[command(after_help = "\
Older versions of snapstore cannot use the store any more. Undo its mounts, stop its
machines and wait for commits first. An upgrade that is interrupted goes on when it is
run again; meanwhile the store can be used.

Example:
  snapstore upgrade --dry-run")]
pub struct UpgradeArgs {
    /// Only say what there is to do
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Args)]
#[command(after_help = "\
Each line is ok, warning (slower, weaker or left over) or error (does not work). It ends with 1
if there is an error. To check what is stored, use `verify`.

Examples:
  snapstore doctor --json
  snapstore doctor -o '{level} {name}' | grep -v ^ok")]
pub struct DoctorArgs {
    /// First clear away machines that ended badly, and mounts whose servers are gone
    #[arg(long)]
    pub fix: bool,
    #[command(flatten)]
    pub form: FormArgs,
}

#[derive(Args)]
#[command(after_help = "\
It tells of the mounts and machines of the user who calls it. A server or machine that does not
answer within seconds is told as `..._up 0`. docs/METRICS.md lists every name, and how to have
them collected.

Examples:
  snapstore metrics
  snapstore metrics --output /var/lib/prometheus/node-exporter/snapstore.prom")]
pub struct MetricsArgs {
    /// Also count what no tag needs, which takes time in proportion to what is stored
    #[arg(long)]
    pub full: bool,
    /// Replace this file with the numbers, at once, instead of printing them
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

#[derive(Args)]
#[command(after_help = "\
Faults are read requests of the kernel; HITS is the share of a working set that is asked for.
PRIVATE is memory that a machine shares with nobody: what its guest has written, above all.
The numbers are those of `metrics`.

Examples:
  snapstore top                  Ctrl-C ends it
  snapstore top --once --json")]
pub struct TopArgs {
    /// Look twice, print what happened between, and end; as without a terminal
    #[arg(long)]
    pub once: bool,
    /// Seconds between two looks
    #[arg(short, long, default_value = "1", value_name = "SECONDS", value_parser = interval)]
    pub interval: Duration,
}
