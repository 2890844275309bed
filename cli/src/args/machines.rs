//! Machines.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use snapstore_host::monitors::Kind;
use snapstore_host::networks::NetSpec;
use snapstore_vmm::state::Baseline;

use super::mounts::ReadingArgs;
use super::values::{FormArgs, LONGEST_SECONDS, seconds, snapshot, snapshot_anywhere, tag};

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
    #[arg(long, value_name = "SIZE", value_parser = crate::format::parse_limit)]
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
  snapstore restore base -n 8 --detach --net tap{}    base.1 on tap1 and so on
  snapstore restore warm -n 10 --with qemu            machines of another monitor, detached
  snapstore restore site/base --detach                of a remote: what it touches comes from there")]
pub struct RestoreArgs {
    /// A tag, the beginning of a snapshot id, or REMOTE/TAG to read the snapshot where it is,
    /// as the machine needs it
    #[arg(value_parser = snapshot_anywhere)]
    pub snapshot: String,
    /// Start machines of this monitor, from which the snapshot was committed, detached:
    /// qemu, firecracker, cloud-hypervisor (docs/monitors.md)
    #[arg(long, value_name = "MONITOR", conflicts_with_all = ["share_layout", "require_reseed", "no_confine", "overlay_limit"])]
    pub with: Option<Kind>,
    /// The program of that monitor [default: the one of its usual name in PATH]
    #[arg(long, value_name = "PATH", requires = "with")]
    pub exec: Option<PathBuf>,
    /// What to call the machine; several get .1, .2 and so on [default: the tag]
    #[arg(long, value_name = "NAME", visible_alias = "id")]
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
    /// Map all memory from this snapshot's own mount. Otherwise what it has in common with a
    /// snapshot of which machines run already is mapped from that one's, and held once
    #[arg(long, conflicts_with = "with")]
    pub no_common_memory: bool,
    /// Connect a network interface of the snapshot, in their order, to this tap, with
    /// an address of its own. {} stands for the number that the machine's name ends in
    /// after a dot, else 1. An interface without a tap has its link down, and what the
    /// guest sends is dropped. May be repeated
    #[arg(long = "net", value_name = "TAP[,mac=MAC]")]
    pub nets: Vec<NetSpec>,
    #[command(flatten)]
    pub reading: ReadingArgs,
    /// Of REMOTE/TAG: read no more of it than the machine needs. Otherwise all of it is read
    /// in the end, when there is nothing else to do, as far as --cache-limit allows: then the
    /// machine needs the remote no more
    #[arg(long)]
    pub no_fill: bool,
    #[command(flatten)]
    pub start: StartArgs,
}

#[derive(Args)]
pub struct PsArgs {
    /// Only this machine, with all that is known of it
    pub name: Option<String>,
    /// Print the names only, one a line
    #[arg(short, long, conflicts_with_all = ["name", "form"])]
    pub quiet: bool,
    #[command(flatten)]
    pub form: FormArgs,
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
  snapstore cp app.conf web:/etc/app.conf
  snapstore cp web:/var/log/app.log .
  snapstore exec web -- tar -c -C /etc . | tar -x -C etc       a directory

The guest has to run snapstore-agent (docs/AGENT.md) and have sh, cat, chmod and mv. What a name
leads to is replaced once the copy is whole, or stays. Into a guest a file keeps its permissions.")]
pub struct CpArgs {
    /// A file of this host, - for standard input, or MACHINE:PATH for one of a guest
    #[arg(value_name = "FROM")]
    pub from: OsString,
    /// The other: a file or a directory, or - for standard output
    #[arg(value_name = "TO")]
    pub to: OsString,
    /// How long the agent may take to answer, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    pub wait: Duration,
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
