//! Snapshots and their tags.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::values::{
    FormArgs, GroupBy, existing_tag, group_by, how_many, label, named_path, pattern, snapshot,
    span, tag,
};

#[derive(Args)]
#[command(after_help = "\
Examples:
  snapstore commit base --memory guest.ram --vmstate guest.state
  snapstore commit base+1 --memory guest.ram           what changed is found by itself
  snapstore commit base+2 --memory-diff changes.sparse --parent base+1
  snapstore commit base+3 --memory guest.ram --disk root=disk.img --label os=debian12
  snapstore commit base+4 --memory-diff changes.sparse --disk root=disk.img --parent base+3
  snapstore commit warm --vm web                       a running machine, which goes on
  snapstore commit vm+1 --mount /mnt/vm                a writable mount, which goes on
  snapstore commit warm --qmp qmp.sock                 a machine of QEMU, which goes on
  snapstore commit fc+1 --pid 4711 --vmstate fc.state --disk root=root.img

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
    /// A process of another monitor that was restored from a mount of this store, and whose
    /// guest is paused: what it changed in memory. Its state and its disks are to be named
    /// beside it
    #[arg(long, value_name = "PID", conflicts_with_all = ["memory", "memory_diff", "diff", "parent", "no_parent", "vm"])]
    pub pid: Option<u32>,
    /// What was written to a writable mount, or to one of its clones, with all files in it.
    /// It goes on as the child of the snapshot
    #[arg(long, value_name = "DIR", conflicts_with_all = ["memory", "memory_diff", "diff", "dense_diff", "inherit", "disks", "disk_diffs", "parent", "no_parent", "vm", "pid", "qmp", "firecracker"])]
    pub mount: Option<PathBuf>,
    /// A machine of QEMU that listens at this QMP socket (-qmp unix:SOCKET,server=on,wait=off):
    /// its memory, state and disks at one instant. It goes on (docs/monitors.md)
    #[arg(long, value_name = "SOCKET", conflicts_with_all = ["vm", "pid", "memory", "memory_diff", "diff", "dense_diff", "inherit", "vmstate", "files", "disks", "disk_diffs", "parent", "no_parent"])]
    pub qmp: Option<PathBuf>,
    /// The same of a machine of Firecracker, which listens at this API socket
    #[arg(long, value_name = "SOCKET", conflicts_with_all = ["qmp", "vm", "pid", "memory", "memory_diff", "diff", "dense_diff", "inherit", "vmstate", "files", "disks", "disk_diffs", "parent", "no_parent"])]
    pub firecracker: Option<PathBuf>,
    /// The same of a machine of Cloud Hypervisor, which listens at this API socket
    #[arg(long, value_name = "SOCKET", conflicts_with_all = ["firecracker", "qmp", "mount", "vm", "pid", "memory", "memory_diff", "diff", "dense_diff", "inherit", "vmstate", "files", "disks", "disk_diffs", "parent", "no_parent"])]
    pub cloud_hypervisor: Option<PathBuf>,
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
pub struct TagsArgs {
    /// Print the tags only, one a line
    #[arg(short, long, conflicts_with = "form")]
    pub quiet: bool,
    #[command(flatten)]
    pub form: FormArgs,
}

#[derive(Args)]
#[command(after_help = "Example:\n  snapstore rm base+1 && snapstore gc")]
pub struct RmArgs {
    /// The tags to remove
    #[arg(required = true, value_parser = existing_tag)]
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
  snapstore forget --expired --keep-tag 'release-*'")]
pub struct ForgetArgs {
    /// Keep the newest N tags of each group
    #[arg(long, value_name = "N", value_parser = how_many)]
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
    /// Remove only what has expired, and of that nothing that a --keep option keeps
    #[arg(long)]
    pub expired: bool,
    /// What --keep-last and --keep-within count together: none (all tags), chain, or label:KEY
    #[arg(long, value_name = "GROUP", default_value = "none", value_parser = group_by)]
    pub group_by: GroupBy,
    /// Only say what would go, and why the others stay
    #[arg(long)]
    pub dry_run: bool,
    #[command(flatten)]
    pub form: FormArgs,
}

#[derive(Args)]
#[command(
    after_help = "Examples:\n  snapstore log --graph\n  snapstore log base+3\n  snapstore log -o '{id} {parent} {tags}'"
)]
pub struct LogArgs {
    /// Only this snapshot and those it descends from
    #[arg(value_parser = snapshot)]
    pub tag: Option<String>,
    /// Draw who descends from whom
    #[arg(long, conflicts_with = "form")]
    pub graph: bool,
    #[command(flatten)]
    pub form: FormArgs,
}

#[derive(Args)]
#[command(
    after_help = "Examples:\n  snapstore show base+3 --json\n  snapstore show base+3 -o '{id} {manifest.labels.os}'\n  snapstore show --mount /mnt/base          what was read of it, and in what pieces"
)]
pub struct ShowArgs {
    /// A tag, or the beginning of a snapshot id
    #[arg(value_parser = snapshot, required_unless_present = "mount")]
    pub snapshot: Option<String>,
    /// A mount, or a clone's directory in one: what was read of it, what of it is in memory, and
    /// whether it is read lazily
    #[arg(long, value_name = "DIR", conflicts_with = "snapshot")]
    pub mount: Option<PathBuf>,
    #[command(flatten)]
    pub form: FormArgs,
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
    #[command(flatten)]
    pub form: FormArgs,
}
