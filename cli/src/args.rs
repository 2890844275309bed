//! What can be typed.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

/// Snapshots of virtual machines: each distinct page stored once, any snapshot
/// readable at once as a flat file.
#[derive(Parser)]
#[command(version, about, long_about = None, after_help = EXIT_CODES)]
pub struct Cli {
    /// The store's directory [default: $XDG_DATA_HOME/snapstore or ~/.local/share/snapstore]
    #[arg(
        long,
        global = true,
        help_heading = "Global options",
        env = "SNAPSTORE_DIR",
        value_name = "DIR"
    )]
    pub store: Option<PathBuf>,
    /// Print one JSON object instead of text
    #[arg(long, global = true, help_heading = "Global options")]
    pub json: bool,
    /// Say more about what happens; twice for details
    #[arg(short, long, global = true, help_heading = "Global options", action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// How long to wait for another process that changes the store, in seconds
    #[arg(long, global = true, help_heading = "Global options", value_name = "SECONDS", value_parser = seconds)]
    pub lock_timeout: Option<Duration>,
    #[command(subcommand)]
    pub command: Command,
}

const EXIT_CODES: &str = "\
Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not found, 4 damaged data found, 5 busy";

#[derive(Subcommand)]
pub enum Command {
    /// Create a store
    Init(InitArgs),
    /// Store memory and disk images as a snapshot under a tag
    Commit(CommitArgs),
    /// Show a snapshot, or every tag, as flat files
    Mount(MountArgs),
    /// Undo a mount
    Umount(UmountArgs),
    /// Give a snapshot another name
    Tag(TagArgs),
    /// List tags
    #[command(after_help = "Example:\n  snapstore tags --json")]
    Tags,
    /// Remove tags; `gc` then frees what only they needed
    Rm(RmArgs),
    /// Show how snapshots descend from each other
    Log(LogArgs),
    /// Show what a snapshot holds
    Show(ShowArgs),
    /// Show what differs between two snapshots
    Diff(DiffArgs),
    /// Free what no tag and no mount needs
    Gc(GcArgs),
    /// Check the store, and name what is damaged
    Verify(VerifyArgs),
    /// Rebuild the index and whatever else can be rebuilt
    #[command(after_help = "Example:\n  snapstore repair")]
    Repair,
    /// Count what is stored, and what each snapshot adds
    #[command(after_help = "Example:\n  snapstore stats --json")]
    Stats,
    /// Run the main job on real guest memory, and measure it
    Demo(DemoArgs),
}

#[derive(Args)]
#[command(after_help = "Example:\n  snapstore --store /srv/snaps init --page-size 16K")]
pub struct InitArgs {
    /// The size of a page: 4K, 16K or 64K
    #[arg(long, default_value = "4K", value_name = "SIZE", value_parser = crate::format::parse_size)]
    pub page_size: u64,
}

#[derive(Args)]
#[command(after_help = "\
Examples:
  snapstore commit base --memory guest.ram --vmstate guest.state
  snapstore commit base+1 --memory guest.ram           what changed is found by itself
  snapstore commit base+2 --memory changes.sparse --diff --parent base+1
  snapstore commit base+3 --memory guest.ram --disk root=disk.img --label os=debian12")]
pub struct CommitArgs {
    /// The tag to create
    pub tag: String,
    /// The guest's memory, a file of raw pages; holes are zeros
    #[arg(long, value_name = "FILE")]
    pub memory: Option<PathBuf>,
    /// --memory and --disk files hold changes only: holes inherit from --parent
    #[arg(long, requires = "parent")]
    pub diff: bool,
    /// The state of the virtual machine's CPUs and devices, a file of any kind
    #[arg(long, value_name = "FILE")]
    pub vmstate: Option<PathBuf>,
    /// A disk image and its name; may be repeated
    #[arg(long = "disk", value_name = "NAME=FILE", value_parser = key_value)]
    pub disks: Vec<(String, String)>,
    /// The snapshot this one was made from [default: the recent one it is most like]
    #[arg(long, value_name = "TAG", conflicts_with = "no_parent")]
    pub parent: Option<String>,
    /// Begin a new chain, whatever the image is like
    #[arg(long)]
    pub no_parent: bool,
    /// A label; may be repeated
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = key_value)]
    pub labels: Vec<(String, String)>,
    /// Move the tag if it exists
    #[arg(long)]
    pub replace: bool,
}

#[derive(Args)]
#[command(after_help = "\
Examples:
  snapstore mount base /mnt/base      memory.bin, disks, manifest.json of one snapshot
  snapstore mount /mnt/all            a directory per tag; new tags appear")]
pub struct MountArgs {
    /// The snapshot to show (without it: every tag), and where
    #[arg(required = true, num_args = 1..=2, value_names = ["TAG", "DIR"])]
    pub what: Vec<String>,
    /// Stay in the foreground and serve until unmounted
    #[arg(long)]
    pub foreground: bool,
    /// Let other users read the mount
    #[arg(long)]
    pub allow_other: bool,
    /// How much the kernel reads around a fault, at most 128K
    #[arg(long, default_value = "16K", value_name = "SIZE", value_parser = crate::format::parse_size)]
    pub read_ahead: u64,
    /// Threads that answer the kernel
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    pub threads: u8,
    /// Write "ready" to standard output once mounted, then detach
    #[arg(long, hide = true, requires = "foreground")]
    pub announce: bool,
}

#[derive(Args)]
#[command(after_help = "Example:\n  snapstore umount /mnt/base")]
pub struct UmountArgs {
    /// The mount point
    pub dir: PathBuf,
    /// Unmount now; processes that still use it keep it until they end
    #[arg(long)]
    pub lazy: bool,
}

#[derive(Args)]
#[command(after_help = "Example:\n  snapstore tag base+3 release-7")]
pub struct TagArgs {
    /// A tag, or the beginning of a snapshot id
    pub source: String,
    /// The tag to create
    pub tag: String,
    /// Move the tag if it exists
    #[arg(long)]
    pub replace: bool,
}

#[derive(Args)]
#[command(after_help = "Example:\n  snapstore rm base+1 && snapstore gc")]
pub struct RmArgs {
    /// The tags to remove
    #[arg(required = true)]
    pub tags: Vec<String>,
    /// Only say what `gc` would then free
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Args)]
#[command(after_help = "Examples:\n  snapstore log --graph\n  snapstore log base+3")]
pub struct LogArgs {
    /// Only this snapshot and those it descends from
    pub tag: Option<String>,
    /// Draw who descends from whom
    #[arg(long)]
    pub graph: bool,
}

#[derive(Args)]
#[command(after_help = "Example:\n  snapstore show base+3 --json")]
pub struct ShowArgs {
    /// A tag, or the beginning of a snapshot id
    pub snapshot: String,
}

#[derive(Args)]
#[command(after_help = "Example:\n  snapstore diff base base+3 --ranges")]
pub struct DiffArgs {
    /// The first snapshot
    pub old: String,
    /// The second snapshot
    pub new: String,
    /// List the changed ranges (always with --json)
    #[arg(long)]
    pub ranges: bool,
}

#[derive(Args)]
#[command(after_help = "Example:\n  snapstore gc --dry-run")]
pub struct GcArgs {
    /// Only print the plan
    #[arg(long)]
    pub dry_run: bool,
    /// Rewrite packs with less than this share of needed bytes
    #[arg(long, default_value_t = 50, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=100))]
    pub keep_percent: u8,
}

#[derive(Args)]
#[command(after_help = "Example:\n  snapstore verify --read-data")]
pub struct VerifyArgs {
    /// Read and check every stored byte, not only footers and references
    #[arg(long)]
    pub read_data: bool,
}

#[derive(Args)]
#[command(after_help = "Example:\n  snapstore demo --image base=a.ram --image base+1=b.ram")]
pub struct DemoArgs {
    /// A tag and a memory image to commit under it, in order; may be repeated
    #[arg(long = "image", value_name = "TAG=FILE", value_parser = key_value, required = true)]
    pub images: Vec<(String, String)>,
    /// Where to put the demonstration's store, and keep it [default: a temporary directory]
    #[arg(long, value_name = "DIR")]
    pub work_dir: Option<PathBuf>,
    /// Keep the temporary directory
    #[arg(long)]
    pub keep: bool,
}

fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() && !value.is_empty() => {
            Ok((key.to_owned(), value.to_owned()))
        }
        _ => Err("it has the form NAME=VALUE".to_owned()),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}
