//! Pictures of what is stored.

use std::path::PathBuf;

use clap::Args;

use super::values::{columns, snapshot};

#[derive(Args)]
#[command(after_help = "\
A cell stands for some pages in a row, and shows the last of these that any of them is: . zero,
p shared with the parent, s shared with other snapshots, o own, which is in no other one. A
capital letter, or : for zero, says that some of them are in the working set. The numbers below
are exact. --json has every run of pages.

It looks at the references of every snapshot, and reads no page.

Examples:
  snapstore map base+3
  snapstore map base+3 --image root --width 140
  snapstore map base+3 --json")]
pub struct MapArgs {
    /// A tag, or the beginning of a snapshot id
    #[arg(value_parser = snapshot)]
    pub snapshot: String,
    /// The image to draw, by its name [default: memory, else the longest one]
    #[arg(long, value_name = "NAME")]
    pub image: Option<String>,
    /// Columns to draw in [default: those of the terminal, else 80]
    #[arg(long, value_name = "COLUMNS", value_parser = columns)]
    pub width: Option<usize>,
}

#[derive(Args)]
#[command(after_help = "\
The page needs no other file and loads nothing. It shows who descends from whom and what each
snapshot added, a map of memory (of TAG with its disks, else of the newest snapshots that none
descends from), growth, what chains share, and who has most for itself. It takes the time of a
`stats` or two.

Examples:
  snapstore report -o report.html
  snapstore report base+3 -o base+3.html")]
pub struct ReportArgs {
    /// The snapshot whose images to draw: a tag, or the beginning of an id
    #[arg(value_name = "TAG", value_parser = snapshot)]
    pub snapshot: Option<String>,
    /// The file to write, which appears once it is whole; - is standard output
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
}
