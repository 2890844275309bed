//! Snapshots in a bucket that hosts share.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::values::{FormArgs, remote, snapshot, tag};

#[derive(Args)]
#[command(after_help = "\
Examples:
  snapstore remote add site file:///mnt/shared/snaps
  snapstore remote init site
  snapstore push base site
  snapstore remote gc site")]
pub struct RemoteArgs {
    #[command(subcommand)]
    pub command: RemoteCommand,
}

#[derive(Subcommand)]
pub enum RemoteCommand {
    /// Give a bucket a name in this store
    Add(AddArgs),
    /// List the remotes of this store
    List {
        #[command(flatten)]
        form: FormArgs,
    },
    /// Forget a bucket: this store does not know its name any more, and the bucket stays as it is
    Forget {
        /// A remote of this store
        #[arg(value_parser = remote)]
        name: String,
    },
    /// Make a key for encrypted remotes, in a new file that only its owner may read
    Key {
        /// The file
        file: PathBuf,
    },
    /// Make a bucket a remote, with pages as this store has them, or mend its configuration; it
    /// is encrypted if `remote add` was given a key
    Init {
        /// A remote of this store
        #[arg(value_parser = remote)]
        name: String,
    },
    /// Probe whether a bucket keeps what a remote has to rely on
    Check {
        /// A remote of this store
        #[arg(value_parser = remote)]
        name: String,
    },
    /// List the tags of a remote
    Tags {
        /// A remote of this store
        #[arg(value_parser = remote)]
        name: String,
        #[command(flatten)]
        form: FormArgs,
    },
    /// Remove tags of a remote; `remote gc` then frees what only they needed
    Rm {
        /// A remote of this store
        #[arg(value_parser = remote)]
        name: String,
        /// Tags there
        #[arg(required = true, value_name = "TAG", value_parser = snapshot)]
        tags: Vec<String>,
    },
    /// Take an older record of a tag for right than this store has seen in a remote
    Accept {
        /// A remote of this store
        #[arg(value_parser = remote)]
        name: String,
        /// The tag there
        #[arg(value_parser = snapshot)]
        tag: String,
    },
    /// Free what no tag and no reader of a remote needs
    Gc(RemoteGcArgs),
    /// Check that a remote has all that its tags need, and name what is damaged
    Verify {
        /// A remote of this store
        #[arg(value_parser = remote)]
        name: String,
        /// Read all bytes of the packs, too
        #[arg(long)]
        read_data: bool,
    },
    /// List who works on a remote
    Leases {
        /// A remote of this store
        #[arg(value_parser = remote)]
        name: String,
        #[command(flatten)]
        form: FormArgs,
    },
}

#[derive(Args)]
#[command(after_help = "\
Examples:
  snapstore remote gc site
  snapstore remote gc site --dry-run
  snapstore remote gc site --max-bytes 2G
  snapstore remote gc site --repack 0

Packs of which only a part is needed are repacked: what is needed of them is read, compared
with its ids and written anew, and the old ones are deleted. At most --repack percent of what
goes is written.")]
pub struct RemoteGcArgs {
    /// A remote of this store
    #[arg(value_parser = remote)]
    pub name: String,
    /// Only say what there is to free
    #[arg(long)]
    pub dry_run: bool,
    /// Do not wait for pushes that are under way: delete nothing then
    #[arg(long)]
    pub no_wait: bool,
    /// Repack packs of which less than this share is needed; 0 repacks none
    #[arg(
        long,
        value_name = "PERCENT",
        default_value_t = snapstore_remote::RepackOptions::PERCENT,
        value_parser = clap::value_parser!(u8).range(0..=100)
    )]
    pub repack: u8,
    /// The most that is written for that; the rest is for later collections
    #[arg(long, value_name = "SIZE", value_parser = crate::format::parse_size)]
    pub max_bytes: Option<u64>,
}

#[derive(Args)]
#[command(after_help = "\
Examples:
  snapstore remote add site file:///mnt/shared/snaps
  snapstore remote add site s3://snaps/site --region eu-central-1
  snapstore remote add own s3://snaps --endpoint https://garage.example:3900 --region garage \\
      --credentials /etc/snapstore/own.env
  snapstore remote key /etc/snapstore/site.key
  snapstore remote add site s3://snaps/site --key /etc/snapstore/site.key

Credentials come from the usual variables of the environment (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN; GOOGLE_APPLICATION_CREDENTIALS;
AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY), or with --machine-role from the
provider's own service on its machines, each time they are needed. The store keeps none.")]
pub struct AddArgs {
    /// The name
    #[arg(value_parser = remote)]
    pub name: String,
    /// Where the bucket is: file:///DIRECTORY, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or
    /// az://CONTAINER/PREFIX
    pub url: String,
    /// The server, if it is not the provider's own
    #[arg(long, value_name = "URL")]
    pub endpoint: Option<String>,
    /// The region of an S3 bucket
    #[arg(long)]
    pub region: Option<String>,
    /// Let an endpoint be http://, which hides nothing on the way and is for tests
    #[arg(long)]
    pub allow_http: bool,
    /// A file of lines NAME=VALUE with these variables, which count before the environment's;
    /// only its owner may read it
    #[arg(long, value_name = "FILE")]
    pub credentials: Option<PathBuf>,
    /// Where there are no credentials, ask the provider's own service on its machines
    #[arg(long)]
    pub machine_role: bool,
    /// A file that `remote key` has made: everything in the bucket is encrypted with it, and
    /// nothing can be read without it; only its owner may read it
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// How long a request that fails is tried again [default: 60]
    #[arg(long, value_name = "SECONDS")]
    pub retry_seconds: Option<u64>,
}

#[derive(Args)]
#[command(after_help = "\
Examples:
  snapstore push base site
  snapstore push base+3 site --replace --json

Only what the remote has not is uploaded. A push that was interrupted is run again. Exit code
6 says that the remote did not answer: the push may have happened, which pushing again tells.")]
pub struct PushArgs {
    /// The tag, which it has there, too; or the beginning of an id, for the snapshot's own tag
    #[arg(value_name = "TAG", value_parser = snapshot)]
    pub tag: String,
    /// A remote of this store
    #[arg(value_name = "REMOTE", value_parser = remote)]
    pub remote: String,
    /// Move the tag there if it names another snapshot; if it names this one, read all that it
    /// has there, and upload what is gone or damaged
    #[arg(long)]
    pub replace: bool,
}

#[derive(Args)]
#[command(after_help = "\
Examples:
  snapstore pull site/base
  snapstore pull site/base --as base-of-site

Only what the store has not is read, and each page is compared with its id.")]
pub struct PullArgs {
    /// The remote, and the tag there
    #[arg(value_name = "REMOTE/TAG")]
    pub from: String,
    /// The tag here [default: as there]
    #[arg(long = "as", value_name = "TAG", value_parser = tag)]
    pub as_tag: Option<String>,
    /// Move the tag here if it names another snapshot
    #[arg(long)]
    pub replace: bool,
}
