//! Mounts.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;
use snapstore_host::mount_server::ServerRequest;

use super::values::snapshot;

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
#[command(after_help = "Example:\n  snapstore umount /mnt/base")]
pub struct UmountArgs {
    /// The mount point
    pub dir: PathBuf,
    /// Unmount now; processes that still use it keep it until they end
    #[arg(long)]
    pub lazy: bool,
}

#[derive(Args)]
pub struct WarmArgs {
    /// A tag, or the beginning of a snapshot id, that is mounted or of which machines run
    #[arg(value_parser = snapshot)]
    pub snapshot: String,
}
