//! Mounts.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;
use snapstore_host::monitors::Kind;
use snapstore_host::mount_server::{ServerRequest, Writing};

use super::values::{mode, owner, snapshot};

#[derive(Clone, Args)]
#[command(after_help = "\
Examples:
  snapstore mount base /mnt/base      memory.bin, disks, manifest.json of one snapshot
  snapstore mount /mnt/all            a directory per tag; new tags appear
  snapstore mount --rw base /mnt/vm && snapstore commit base+1 --mount /mnt/vm
  snapstore mount --rw -n 10 base /mnt/vms     ten clones, /mnt/vms/0 to /mnt/vms/9
  snapstore mount --rw --resume /mnt/vm        after a crash, or `umount --keep`
  snapstore mount --layout firecracker base /mnt/base      snapshot_file, mem_file, disks
  snapstore mount site/base /mnt/base          of a remote: what is read comes from there

A writable mount keeps what is written beside the store until it is committed. Images keep
their length; files can be made, and are part of the snapshot (docs/SEMANTICS.md).")]
pub struct MountArgs {
    /// The snapshot to show (without it: every tag), or REMOTE/TAG to read one where it is,
    /// as it is asked for; and where
    #[arg(required = true, num_args = 1..=2, value_names = ["TAG", "DIR"])]
    pub what: Vec<OsString>,
    /// Stay in the foreground and serve until unmounted; it says so once it is mounted
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
    /// Give no page to the kernel before it is asked for; of REMOTE/TAG: do not read first
    /// what those who restored it before touched first
    #[arg(long)]
    pub no_prefetch: bool,
    /// Give the files the names that a monitor looks for: qemu, firecracker or
    /// cloud-hypervisor (docs/monitors.md)
    #[arg(long, value_name = "NAME", conflicts_with = "resume")]
    pub layout: Option<Kind>,
    /// Let the images be written, and files be made; `commit --mount` commits that
    #[arg(long)]
    pub rw: bool,
    /// So many clones, each a directory with its own changes, named 0, 1, 2 ...
    #[arg(short = 'n', long, value_name = "N", requires = "rw", conflicts_with = "resume", value_parser = clap::value_parser!(u32).range(1..=i64::from(snapstore_fuse::MOST_CLONES)))]
    pub count: Option<u32>,
    /// Who has the files of a writable mount [default: this user]; others than this user
    /// can then use it
    #[arg(long, value_name = "UID:GID", requires = "rw", value_parser = owner)]
    pub owner: Option<(u32, u32)>,
    /// The mode of its files [default: 644]
    #[arg(long, value_name = "MODE", requires = "rw", value_parser = mode)]
    pub mode: Option<u32>,
    /// Where what is written is kept until it is committed
    #[arg(long, value_name = "DIR", requires = "rw", default_value = Writing::OVERLAY_DIR)]
    pub overlay_dir: PathBuf,
    /// The most of it for each clone; who writes more is told that no space is left
    #[arg(long, value_name = "SIZE", requires = "rw", value_parser = crate::format::parse_limit)]
    pub overlay_limit: Option<u64>,
    /// Go on with what was written to a view at DIR whose server has ended, or which was
    /// unmounted with --keep. Its owner, mode and limit stay, unless others are given
    #[arg(long, requires = "rw")]
    pub resume: bool,
    /// Of the memory only what standard input lists is read of it, a range of bytes a line
    #[arg(long, hide = true, requires = "foreground")]
    pub part: bool,
    /// What is in no commit goes with the mount
    #[arg(long, hide = true, requires = "foreground")]
    pub discard: bool,
    #[command(flatten)]
    pub reading: ReadingArgs,
    /// Of REMOTE/TAG: read all of it in the end, when there is nothing else to do, as far as
    /// --cache-limit allows
    #[arg(long)]
    pub fill: bool,
    /// Mount REMOTE/TAG only if it names this snapshot
    #[arg(long, hide = true, value_name = "ID")]
    pub of_snapshot: Option<String>,
    /// Write "ready" to standard output once mounted, then detach
    #[arg(long, hide = true, requires = "foreground")]
    pub announce: bool,
    /// Unmount once nobody holds a shared lock on this file
    #[arg(long, hide = true, value_name = "FILE")]
    pub while_locked: Option<PathBuf>,
}

/// How a snapshot is read that stays in a remote.
#[derive(Clone, Args)]
pub struct ReadingArgs {
    /// Of REMOTE/TAG: how long a read waits for a remote that does not answer, until it fails
    #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub remote_timeout: u64,
    /// Of REMOTE/TAG: the most that is kept on this host of what is read of remotes; 0 keeps
    /// nothing
    #[arg(long, value_name = "SIZE", default_value = "16G", value_parser = crate::format::parse_size)]
    pub cache_limit: u64,
}

#[derive(Args)]
#[command(after_help = "Example:\n  snapstore umount /mnt/base")]
pub struct UmountArgs {
    /// The mount point
    pub dir: PathBuf,
    /// Unmount now; processes that still use it keep it until they end
    #[arg(long)]
    pub lazy: bool,
    /// Of a writable mount: keep what is in no commit, for `mount --rw --resume`. Without
    /// this it is given up
    #[arg(long)]
    pub keep: bool,
}

#[derive(Args)]
pub struct WarmArgs {
    /// A tag, or the beginning of a snapshot id, that is mounted or of which machines run
    #[arg(value_parser = snapshot)]
    pub snapshot: String,
}
