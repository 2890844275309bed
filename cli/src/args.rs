//! What can be typed.

mod shell;
mod transfer;

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand};

use snapstore_host::mount_server::ServerRequest;
use snapstore_host::networks::NetSpec;
use snapstore_vmm::state::Baseline;

pub use shell::{CompletionsArgs, GenerateArgs, Shell};
pub use transfer::{CopyArgs, ExportArgs, ImportArgs};

/// Snapshots of virtual machines: each distinct page stored once, any snapshot
/// readable at once as a flat file.
#[derive(Parser)]
#[command(version, about, long_about = None, after_help = EXIT_CODES)]
pub struct Cli {
    /// The store's directory [default: $SNAPSTORE_DIR, else $XDG_DATA_HOME/snapstore or
    /// ~/.local/share/snapstore]
    // Not by clap's `env`: a variable that is empty counts as unset.
    #[arg(
        long,
        global = true,
        help_heading = "Global options",
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
    /// Read what is touched first of a mounted snapshot, so that it is in memory
    #[command(after_help = "Example:\n  snapstore warm base")]
    Warm(WarmArgs),
    /// Undo a mount
    Umount(UmountArgs),
    /// Start a virtual machine
    Run(RunArgs),
    /// Start virtual machines from a snapshot, each as it was then
    Restore(RestoreArgs),
    /// List running virtual machines
    #[command(after_help = "Examples:\n  snapstore ps\n  snapstore ps base.1 --json")]
    Ps(PsArgs),
    /// Stop a virtual machine's vCPUs; it stays in memory
    #[command(after_help = "Example:\n  snapstore pause web")]
    Pause(VmArgs),
    /// Let a paused virtual machine run
    #[command(after_help = "Example:\n  snapstore resume web")]
    Resume(VmArgs),
    /// End virtual machines
    Stop(StopArgs),
    /// Attach to a virtual machine's serial line
    Console(ConsoleArgs),
    /// Run a command in a guest, through its agent
    Exec(ExecArgs),
    /// Give a snapshot another name
    Tag(TagArgs),
    /// List tags
    #[command(after_help = "Example:\n  snapstore tags --json")]
    Tags,
    /// Remove tags; `gc` then frees what only they needed
    Rm(RmArgs),
    /// Remove tags by rules of age, name and label; `gc` then frees what only they needed
    Forget(ForgetArgs),
    /// Show how snapshots descend from each other
    Log(LogArgs),
    /// Show what a snapshot holds
    Show(ShowArgs),
    /// Show what differs between two snapshots
    Diff(DiffArgs),
    /// Write snapshots as one file, which any store can import
    Export(ExportArgs),
    /// Store the snapshots of such a file, under their tags
    Import(ImportArgs),
    /// Take snapshots over from another store
    Copy(CopyArgs),
    /// Free what no tag and no mount needs
    Gc(GcArgs),
    /// Check the store, and name what is damaged
    Verify(VerifyArgs),
    /// Rebuild the index and whatever else can be rebuilt
    #[command(after_help = "Example:\n  snapstore repair")]
    Repair,
    /// Bring a store that an older version made to the newest format
    Upgrade(UpgradeArgs),
    /// Count what is stored, and what each snapshot adds
    #[command(after_help = "Example:\n  snapstore stats --json")]
    Stats,
    /// Check this host, the store and what ended processes left
    Doctor(DoctorArgs),
    /// Print the script with which a shell completes commands, tags and machines
    Completions(CompletionsArgs),
    /// Write the manual pages
    #[command(hide = true)]
    Generate(GenerateArgs),
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
  snapstore commit base+2 --memory-diff changes.sparse --parent base+1
  snapstore commit base+3 --memory guest.ram --disk root=disk.img --label os=debian12
  snapstore commit base+4 --memory-diff changes.sparse --disk root=disk.img --parent base+3
  snapstore commit warm --vm web                       a running machine, which goes on

A diff is a sparse file as long as the image. Its holes are the parent's bytes, all its data
counts, zeros too. A copy that lost its holes is refused.")]
pub struct CommitArgs {
    /// The tag to create
    #[arg(value_parser = tag)]
    pub tag: String,
    /// The guest's memory, a file of raw pages; holes are zeros
    #[arg(long, value_name = "FILE")]
    pub memory: Option<PathBuf>,
    /// Changes to the memory of --parent: holes are the parent's bytes
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with = "memory",
        requires = "parent"
    )]
    pub memory_diff: Option<PathBuf>,
    /// --memory holds changes only, as --memory-diff; what is not given is the parent's
    #[arg(long, requires = "parent")]
    pub diff: bool,
    /// All data of the diffs is meant, also if they have no holes, or on a filesystem that
    /// keeps holes by more than 4096 bytes: else such diffs are refused
    #[arg(long, requires = "parent")]
    pub dense_diff: bool,
    /// A running virtual machine: what it changed since its last commit or restore
    #[arg(long, value_name = "NAME", conflicts_with_all = ["memory", "memory_diff", "diff", "dense_diff", "inherit", "vmstate", "files", "disks", "disk_diffs", "parent", "no_parent"])]
    pub vm: Option<String>,
    /// The state of the virtual machine's CPUs and devices, a file of any kind
    #[arg(long, value_name = "FILE")]
    pub vmstate: Option<PathBuf>,
    /// A disk image and its name; holes are zeros. Its length is a multiple of 512 bytes.
    /// May be repeated
    #[arg(long = "disk", value_name = "NAME=FILE", value_parser = named_path())]
    pub disks: Vec<(String, PathBuf)>,
    /// Changes to the disk of --parent that has this name; may be repeated
    #[arg(long = "disk-diff", value_name = "NAME=FILE", value_parser = named_path(), requires = "parent")]
    pub disk_diffs: Vec<(String, PathBuf)>,
    /// A file to keep beside them, of any kind and length up to 1G, and its name; may be
    /// repeated
    #[arg(long = "file", value_name = "NAME=FILE", value_parser = named_path())]
    pub files: Vec<(String, PathBuf)>,
    /// Keep the memory and the disks of --parent that are not given, as they are there;
    /// a commit with a diff does
    #[arg(long, requires = "parent")]
    pub inherit: bool,
    /// The snapshot this one was made from [default: the recent one it is most like]
    #[arg(long, value_name = "TAG", conflicts_with = "no_parent", value_parser = snapshot)]
    pub parent: Option<String>,
    /// Begin a new chain, whatever the image is like
    #[arg(long)]
    pub no_parent: bool,
    /// A label; may be repeated
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label)]
    pub labels: Vec<(String, String)>,
    /// Let `forget` remove it after this time: 12h, 7d, 4w (sets the label expires)
    #[arg(long, value_name = "TIME", value_parser = span)]
    pub expires: Option<Duration>,
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
    pub what: Vec<OsString>,
    /// Stay in the foreground and serve until unmounted
    #[arg(long)]
    pub foreground: bool,
    /// Let other users read the mount
    #[arg(long)]
    pub allow_other: bool,
    /// How much the kernel reads around a fault, at most 128K
    #[arg(long, default_value = "16K", value_name = "SIZE", value_parser = crate::format::parse_read_ahead)]
    pub read_ahead: u64,
    /// Threads that answer the kernel
    #[arg(long, default_value_t = ServerRequest::THREADS, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    pub threads: u8,
    /// Give no page to the kernel before it is asked for
    #[arg(long)]
    pub no_prefetch: bool,
    /// Write "ready" to standard output once mounted, then detach
    #[arg(long, hide = true, requires = "foreground")]
    pub announce: bool,
    /// Unmount once nobody holds a shared lock on this file
    #[arg(long, hide = true, value_name = "FILE")]
    pub while_locked: Option<PathBuf>,
}

#[derive(Args)]
pub struct WarmArgs {
    /// A tag, or the beginning of a snapshot id, that is mounted or of which machines run
    #[arg(value_parser = snapshot)]
    pub snapshot: String,
}

/// How machines are started.
#[derive(Args, Clone)]
pub struct StartArgs {
    /// Do not attach to the serial line; print what was started
    #[arg(short, long)]
    pub detach: bool,
    /// Do not let it run yet (see `resume`)
    #[arg(long)]
    pub paused: bool,
    /// Leave its process all rights of this user: its files, network and processes.
    /// Then a guest that breaks out of its machine has them, too (docs/SECURITY-MODEL.md)
    #[arg(long)]
    pub no_confine: bool,
    /// Where what the guest writes to its disks is kept until it is committed [default:
    /// /var/tmp]. The last GiB of that filesystem, or 5 % of a small one, is left free
    #[arg(long, value_name = "DIR")]
    pub overlay_dir: Option<PathBuf>,
    /// The most of it for each disk. A guest that writes more stands still (`ps` says so)
    #[arg(long, value_name = "SIZE", value_parser = crate::format::parse_size)]
    pub overlay_limit: Option<u64>,
}

#[derive(Args)]
#[command(after_help = "\
Examples:
  snapstore run table --kernel table.bin --mem 64M
  snapstore run debian --kernel vmlinuz --initrd initrd.gz --disk root.img --cpus 2 --detach
  snapstore commit base --vm debian
  snapstore run web --kernel vmlinuz --initrd web.gz --commit-when ready --tag web --or-restore web
  ip tuntap add tap0 mode tap; ip link set tap0 up
  snapstore run debian --kernel vmlinuz --initrd initrd.gz --disk root.img --net tap0
  snapstore run any --kernel vmlinuz --initrd initrd.gz --cpu x86-64-v3,+aes,+mitigations

Attached, Ctrl-] leaves the machine running. A kernel is a Linux bzImage or vmlinux;
any other file is a flat program, loaded at 1 MiB and begun there in 32-bit mode.")]
pub struct RunArgs {
    /// What to call the machine
    pub name: String,
    /// The kernel to boot
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// Linux's first root filesystem
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Linux's command line
    #[arg(
        long,
        value_name = "STRING",
        default_value = "console=ttyS0 panic=1",
        allow_hyphen_values = true
    )]
    pub cmdline: String,
    /// Commit the machine when its guest says that it is ready (a byte to port
    /// 0x620), at that instant, and let it go on
    #[arg(long, value_name = "WHEN", requires = "tag")]
    pub commit_when: Option<CommitWhen>,
    /// The tag of that commit
    #[arg(long, value_name = "TAG", requires = "commit_when", value_parser = tag)]
    pub tag: Option<String>,
    /// Move that tag if it exists
    #[arg(long, requires = "tag")]
    pub replace: bool,
    /// Start from this snapshot instead, if it is there and was committed with
    /// --commit-when from the same kernel, initrd, command line, sizes, CPU and disks,
    /// with as many network interfaces
    #[arg(long, value_name = "TAG", value_parser = snapshot)]
    pub or_restore: Option<String>,
    /// With --or-restore: as with `restore`
    #[arg(long, requires = "or_restore")]
    pub require_reseed: bool,
    /// A raw disk image; what the guest writes is kept apart from it. With :ro the
    /// guest cannot write, with :direct it writes to the file, and the machine
    /// cannot be committed. May be repeated
    #[arg(long = "disk", value_name = "FILE[:ro|:direct]")]
    pub disks: Vec<String>,
    /// Connect a network interface of the guest to this tap of the host, which must
    /// be there. {} stands for the number that the machine's name ends in after a dot,
    /// else 1. Without mac= its address is random. May be repeated
    #[arg(long = "net", value_name = "TAP[,mac=MAC]")]
    pub nets: Vec<NetSpec>,
    /// The guest's memory
    #[arg(long, default_value = "512M", value_name = "SIZE", value_parser = crate::format::parse_size)]
    pub mem: u64,
    /// How many vCPUs
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub cpus: u32,
    /// What the guest is told of its CPU at most: host, or a level (x86-64, x86-64-v2, -v3,
    /// -v4), so that snapshots can be restored on every host of the same vendor that has
    /// that level; then +FEATURE to have more, -FEATURE to have less. +mitigations is all that
    /// protects from speculation. `show` tells what a snapshot needs
    #[arg(long, default_value_t, value_name = "CPU[,+FEATURE][,-FEATURE]")]
    pub cpu: Baseline,
    #[command(flatten)]
    pub start: StartArgs,
}

/// The moment of a commit.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum CommitWhen {
    /// The guest has said that it is ready.
    Ready,
}

#[derive(Args)]
#[command(after_help = "\
Examples:
  snapstore restore base                    attached; Ctrl-] leaves it running
  snapstore restore base -n 100 --detach    base.1 to base.100
  snapstore restore base -n 8 --detach --net tap{}    base.1 on tap1 and so on")]
pub struct RestoreArgs {
    /// A tag, or the beginning of a snapshot id
    #[arg(value_parser = snapshot)]
    pub snapshot: String,
    /// What to call the machine; several get .1, .2 and so on [default: the tag]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// How many machines
    #[arg(short = 'n', long, default_value_t = 1, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..))]
    pub count: u16,
    /// Fork the machines' processes instead of executing each: they start faster and take
    /// less memory, and have one layout of their addresses, so that what a guest learns of
    /// its own machine's it knows of all of them
    #[arg(long)]
    pub share_layout: bool,
    /// End a machine whose guest's agent has not taken fresh entropy ten seconds after the
    /// guest began to run; until then it draws the same random numbers as others of the
    /// snapshot. With --detach, wait until all have
    #[arg(long)]
    pub require_reseed: bool,
    /// If the snapshot is mounted for them: give no page to the kernel before a machine
    /// asks for it. Otherwise those come first that machines restored before touched first
    #[arg(long)]
    pub no_prefetch: bool,
    /// Connect a network interface of the snapshot, in their order, to this tap, with
    /// an address of its own. {} stands for the number that the machine's name ends in
    /// after a dot, else 1. An interface without a tap has its link down, and what the
    /// guest sends is dropped. May be repeated
    #[arg(long = "net", value_name = "TAP[,mac=MAC]")]
    pub nets: Vec<NetSpec>,
    #[command(flatten)]
    pub start: StartArgs,
}

#[derive(Args)]
pub struct PsArgs {
    /// Only this machine, with all that is known of it
    pub name: Option<String>,
}

#[derive(Args)]
pub struct VmArgs {
    /// The machine
    pub name: String,
}

#[derive(Args)]
#[command(after_help = "Examples:\n  snapstore stop base.1 base.2\n  snapstore stop --all")]
pub struct StopArgs {
    /// The machines
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    pub names: Vec<String>,
    /// Every machine of this user
    #[arg(long)]
    pub all: bool,
}

#[derive(Args)]
#[command(after_help = "\
Examples:
  snapstore exec base.1 -- uname -a
  snapstore exec base.1 -i -- sh -c 'cat > /tmp/file' < file

The guest has to run snapstore-agent (docs/AGENT.md). The exit code is that of the
command, 128 and the signal's number if a signal ended it, 127 if there is no such command.")]
pub struct ExecArgs {
    /// The machine
    pub name: String,
    /// Give the command this command's standard input
    #[arg(short, long)]
    pub interactive: bool,
    /// Kill the command after so many seconds
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(..=u64::from(LONGEST_SECONDS)))]
    pub timeout: Option<u64>,
    /// How long the agent may take to answer, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    pub wait: Duration,
    /// The command and its arguments
    #[arg(required = true, last = true)]
    pub command: Vec<String>,
}

#[derive(Args)]
#[command(after_help = "\
Examples:
  snapstore console base.1            Ctrl-] leaves it
  snapstore console base.1 --print    what it printed last")]
pub struct ConsoleArgs {
    /// The machine
    pub name: String,
    /// Print the output that is kept (64 KiB) and leave
    #[arg(long)]
    pub print: bool,
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
#[command(after_help = "\
Examples:
  snapstore tag base+3 release-7
  snapstore tag --protect release-7       neither `rm`, `forget` nor --replace touch it")]
pub struct TagArgs {
    /// A tag, or the beginning of a snapshot id
    #[arg(value_parser = snapshot)]
    pub source: String,
    /// The tag to create
    #[arg(value_parser = tag, required_unless_present_any = ["protect", "unprotect"])]
    pub tag: Option<String>,
    /// Protect the tag from being removed or moved (without TAG: SOURCE)
    #[arg(long)]
    pub protect: bool,
    /// End the protection of the tag SOURCE
    #[arg(long, conflicts_with_all = ["protect", "tag", "replace"])]
    pub unprotect: bool,
    /// Move the tag if it exists
    #[arg(long)]
    pub replace: bool,
}

#[derive(Args)]
#[command(after_help = "Example:\n  snapstore rm base+1 && snapstore gc")]
pub struct RmArgs {
    /// The tags to remove
    #[arg(required = true, value_parser = tag)]
    pub tags: Vec<String>,
    /// Only say what `gc` would then free
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Args)]
#[command(after_help = "\
A tag stays if any rule keeps it. What has expired (label expires, see `commit --expires`) goes
whatever --keep-last and --keep-within say, and what has not expired yet stays. What is
protected (see `tag --protect`) stays always.

Examples:
  snapstore forget --keep-last 7 --keep-within 30d --dry-run
  snapstore forget --keep-last 3 --group-by chain && snapstore gc
  snapstore forget --keep-tag 'release-*' --keep-label env=prod --keep-last 10
  snapstore forget --expired")]
pub struct ForgetArgs {
    /// Keep the newest N tags of each group
    #[arg(long, value_name = "N")]
    pub keep_last: Option<usize>,
    /// Keep what was committed within this time before the newest tag of its group: 12h,
    /// 7d, 4w
    #[arg(long, value_name = "TIME", value_parser = span)]
    pub keep_within: Option<Duration>,
    /// Keep tags whose names match: * is any text, ? any letter. May be repeated
    #[arg(long = "keep-tag", value_name = "PATTERN", value_parser = pattern)]
    pub keep_tags: Vec<glob::Pattern>,
    /// Keep tags of snapshots with this label. May be repeated
    #[arg(long = "keep-label", value_name = "KEY=VALUE", value_parser = label)]
    pub keep_labels: Vec<(String, String)>,
    /// Without a --keep option: remove only what has expired
    #[arg(long)]
    pub expired: bool,
    /// What --keep-last and --keep-within count together: none (all tags), chain, or label:KEY
    #[arg(long, value_name = "GROUP", default_value = "none", value_parser = group_by)]
    pub group_by: GroupBy,
    /// Only say what would go, and why the others stay
    #[arg(long)]
    pub dry_run: bool,
}

/// What `forget` counts together.
#[derive(Clone)]
pub enum GroupBy {
    /// All tags.
    None,
    /// Snapshots that descend from each other.
    Chain,
    /// Snapshots with the same value of this label.
    Label(String),
}

#[derive(Args)]
#[command(after_help = "Examples:\n  snapstore log --graph\n  snapstore log base+3")]
pub struct LogArgs {
    /// Only this snapshot and those it descends from
    #[arg(value_parser = snapshot)]
    pub tag: Option<String>,
    /// Draw who descends from whom
    #[arg(long)]
    pub graph: bool,
}

#[derive(Args)]
#[command(after_help = "Example:\n  snapstore show base+3 --json")]
pub struct ShowArgs {
    /// A tag, or the beginning of a snapshot id
    #[arg(value_parser = snapshot)]
    pub snapshot: String,
}

#[derive(Args)]
#[command(after_help = "Example:\n  snapstore diff base base+3 --ranges")]
pub struct DiffArgs {
    /// The first snapshot
    #[arg(value_parser = snapshot)]
    pub old: String,
    /// The second snapshot
    #[arg(value_parser = snapshot)]
    pub new: String,
    /// List the changed ranges (always with --json)
    #[arg(long)]
    pub ranges: bool,
}

#[derive(Args)]
#[command(after_help = "\
With --max-store or --reserve it ends with 1 if too much is left, and says which tags would
have to go, the oldest first. It removes none: that is what `forget` and `rm` are for.

Examples:
  snapstore gc --dry-run
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

Example:
  snapstore doctor --json")]
pub struct DoctorArgs {
    /// First clear away machines that ended badly, and mounts whose servers are gone
    #[arg(long)]
    pub fix: bool,
}

#[derive(Args)]
#[command(after_help = "Example:\n  snapstore verify --read-data")]
pub struct VerifyArgs {
    /// Read and check every stored byte, not only footers and references
    #[arg(long)]
    pub read_data: bool,
}

fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() && !value.is_empty() => {
            Ok((key.to_owned(), value.to_owned()))
        }
        _ => Err("a label has the form KEY=VALUE, and neither is empty".to_owned()),
    }
}

/// A tag that can be set.
fn tag(text: &str) -> Result<String, snapstore_store::Error> {
    snapstore_store::check_tag(text).map(|()| text.to_owned())
}

/// A tag, or the beginning of an id.
fn snapshot(text: &str) -> Result<String, snapstore_store::Error> {
    snapstore_store::check_snapshot(text).map(|()| text.to_owned())
}

/// A time such as `12h` or `7d`.
fn span(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text)
        .map_err(|_| "a time is a number with m, h, d or w, such as 12h or 7d".to_owned())?;
    match time <= Duration::from_secs(LONGEST_SECONDS.into()) {
        true => Ok(time),
        false => Err("a time is at most 31 years".to_owned()),
    }
}

fn pattern(text: &str) -> Result<glob::Pattern, String> {
    glob::Pattern::new(text).map_err(|error| error.to_string())
}

fn group_by(text: &str) -> Result<GroupBy, String> {
    match (text, text.strip_prefix("label:")) {
        ("none", _) => Ok(GroupBy::None),
        ("chain", _) => Ok(GroupBy::Chain),
        (_, Some(key)) if !key.is_empty() => Ok(GroupBy::Label(key.to_owned())),
        _ => Err("it is none, chain or label:KEY".to_owned()),
    }
}

fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = key_value(text)?;
    snapstore_store::check_label(&key, &value).map_err(|error| error.to_string())?;
    Ok((key, value))
}

/// `NAME=FILE`, where the file may have any name that a file can have.
fn named_path() -> impl TypedValueParser<Value = (String, PathBuf)> {
    OsStringValueParser::new().try_map(|text: OsString| {
        let bytes = text.as_bytes();
        let at = bytes.iter().position(|byte| *byte == b'=');
        let (name, path) = match at {
            Some(at) if at > 0 && at + 1 < bytes.len() => (&bytes[..at], &bytes[at + 1..]),
            _ => return Err("it has the form NAME=FILE".to_owned()),
        };
        let name = std::str::from_utf8(name).map_err(|_| "the name is no text".to_owned())?;
        snapstore_store::check_image(name).map_err(|error| error.to_string())?;
        let path = OsString::from_vec(path.to_vec());
        Ok((name.to_owned(), PathBuf::from(path)))
    })
}

/// The longest time that can be asked for in seconds, 31 years: clocks of the
/// system have room for it.
const LONGEST_SECONDS: u32 = 1_000_000_000;

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if (0.0..=f64::from(LONGEST_SECONDS)).contains(&seconds) {
        Ok(Duration::from_secs_f64(seconds))
    } else {
        Err(format!(
            "a time is a number of seconds from 0 to {LONGEST_SECONDS}"
        ))
    }
}
