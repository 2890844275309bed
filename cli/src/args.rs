//! What can be typed: a file for each group of commands.

mod machines;
mod mounts;
mod pictures;
mod remote;
mod shell;
mod snapshots;
mod transfer;
mod upkeep;
mod values;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand};

pub use machines::{
    ConsoleArgs, CpArgs, ExecArgs, PsArgs, RestoreArgs, RunArgs, StartArgs, StopArgs, VmArgs,
};
pub use mounts::{MountArgs, ReadingArgs, UmountArgs, WarmArgs};
pub use pictures::{MapArgs, ReportArgs};
pub use remote::{AddArgs, PullArgs, PushArgs, RemoteArgs, RemoteCommand, RemoteGcArgs};
pub use shell::{CompletionsArgs, GenerateArgs, Shell};
pub use snapshots::{
    CommitArgs, DiffArgs, ForgetArgs, LogArgs, RmArgs, ShowArgs, TagArgs, TagsArgs,
};
pub use transfer::{CopyArgs, ExportArgs, ImportArgs};
pub use upkeep::{
    DoctorArgs, GcArgs, InitArgs, MetricsArgs, StatsArgs, TopArgs, UpgradeArgs, VerifyArgs,
};
use values::seconds;
pub use values::{FormArgs, GroupBy, of_remote};

use crate::log_format::LogFormat;

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
    /// Print long tables at once, also on a terminal, instead of through a pager
    /// [$SNAPSTORE_PAGER, else $PAGER, else less]
    #[arg(long, global = true, help_heading = "Global options")]
    pub no_pager: bool,
    /// Say more about what happens; twice for details
    #[arg(short, long, global = true, help_heading = "Global options", action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// What is said on standard error, and logged by what is started in the background: text
    /// for people, or one JSON object a line [default: $SNAPSTORE_LOG_FORMAT, else text]
    #[arg(
        long,
        global = true,
        help_heading = "Global options",
        value_name = "FORMAT"
    )]
    pub log_format: Option<LogFormat>,
    /// How long to wait for another process that changes the store, in seconds
    #[arg(long, global = true, help_heading = "Global options", value_name = "SECONDS", value_parser = seconds)]
    pub lock_timeout: Option<Duration>,
    #[command(subcommand)]
    pub command: Command,
}

const EXIT_CODES: &str = "\
Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not found, 4 damaged data found, 5 busy,
6 a remote did not answer: what was asked for may have happened";

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
    #[command(
        after_help = "Examples:\n  snapstore ps\n  snapstore ps base.1 --json\n  snapstore ps -o '{name} {pid}'"
    )]
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
    #[command(visible_alias = "attach")]
    Console(ConsoleArgs),
    /// Run a command in a guest, through its agent
    Exec(ExecArgs),
    /// Copy a file to or from a guest, through its agent
    Cp(CpArgs),
    /// Give a snapshot another name
    Tag(TagArgs),
    /// List tags
    #[command(
        visible_alias = "ls",
        after_help = "Examples:\n  snapstore ls\n  snapstore tags --quiet | xargs -n 1 snapstore show\n  snapstore tags -o '{tag} {id} {logical_bytes}'"
    )]
    Tags(TagsArgs),
    /// Remove tags; `gc` then frees what only they needed
    Rm(RmArgs),
    /// Remove tags by rules of age, name and label; `gc` then frees what only they needed
    Forget(ForgetArgs),
    /// Show how snapshots descend from each other
    Log(LogArgs),
    /// Show what a snapshot holds
    #[command(visible_alias = "inspect")]
    Show(ShowArgs),
    /// Show what differs between two snapshots
    Diff(DiffArgs),
    /// Draw who has which page of a snapshot's memory or disk
    Map(MapArgs),
    /// Write a page for a browser that shows the store: snapshots, memory, growth
    Report(ReportArgs),
    /// Write snapshots as one file, which any store can import
    Export(ExportArgs),
    /// Store the snapshots of such a file, under their tags
    Import(ImportArgs),
    /// Take snapshots over from another store
    Copy(CopyArgs),
    /// Keep snapshots of many hosts in one bucket
    Remote(RemoteArgs),
    /// Store a snapshot in a remote, under its tag
    Push(PushArgs),
    /// Take a snapshot over from a remote
    Pull(PullArgs),
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
    Stats(StatsArgs),
    /// Print numbers of the store, its mounts and the machines, as Prometheus reads them
    Metrics(MetricsArgs),
    /// Watch what mounts and machines do
    Top(TopArgs),
    /// Check this host, the store and what ended processes left
    Doctor(DoctorArgs),
    /// Print the script with which a shell completes commands, tags and machines
    Completions(CompletionsArgs),
    /// Write the manual pages
    #[command(hide = true)]
    Generate(GenerateArgs),
}
