//! Snapshots between stores.

use std::path::PathBuf;

use clap::Args;

use super::values::snapshot;

#[derive(Args)]
#[command(after_help = "\
Examples:
  snapstore export base+3 --chain -o base.snapstream
  snapstore export base -o - | ssh other.example snapstore import -

The file holds each page once, also if several of the snapshots have it. It is of no store:
any store with pages of the same size can import it, and the snapshots keep their ids.")]
pub struct ExportArgs {
    /// Tags, or beginnings of snapshot ids
    #[arg(required = true, value_name = "TAG", value_parser = snapshot)]
    pub snapshots: Vec<String>,
    /// With all that they descend from, as far as it has tags
    #[arg(long)]
    pub chain: bool,
    /// The file to write, which appears once it is whole; - is standard output
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
}

#[derive(Args)]
#[command(after_help = "\
Examples:
  snapstore import base.snapstream
  ssh other.example snapstore export base -o - | snapstore import -

What the store has already is not written again: an import that was interrupted goes on when
it is run again. No tag is set before all of the file was read and found whole.")]
pub struct ImportArgs {
    /// What `export` wrote; - is standard input
    #[arg(value_name = "FILE")]
    pub input: PathBuf,
    /// Move tags that name other snapshots here
    #[arg(long)]
    pub replace: bool,
}

#[derive(Args)]
#[command(
    after_help = "Example:\n  snapstore --store /srv/snaps copy --from ~/snaps base+3 --chain"
)]
pub struct CopyArgs {
    /// The store to take them from
    #[arg(long, value_name = "STORE")]
    pub from: PathBuf,
    /// Tags there, or beginnings of snapshot ids
    #[arg(required = true, value_name = "TAG", value_parser = snapshot)]
    pub snapshots: Vec<String>,
    /// With all that they descend from, as far as it has tags
    #[arg(long)]
    pub chain: bool,
    /// Move tags that name other snapshots here
    #[arg(long)]
    pub replace: bool,
}
