//! Measures snapstore: `cargo run --release -p snapstore-tests --bin bench`.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use clap::Parser;
use snapstore_tests::bench::guest::Images;
use snapstore_tests::bench::{ALL, Bench, serve_ram};

/// Compares snapstore with other programs and with itself, in turns. Takes the
/// guest images from the directory `$SNAPSTORE_IMAGES`.
#[derive(Parser)]
struct Args {
    /// Which benchmarks [default: all]
    names: Vec<String>,
    /// How many turns each side takes
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Also write the tables here, in Markdown
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Only print the benchmarks' names
    #[arg(long)]
    list: bool,
}

fn main() -> anyhow::Result<()> {
    let raw: Vec<_> = std::env::args_os().skip(1).collect();
    // This program is also the trivial server that mounts are compared with.
    if let [command, file, dir, read_ahead] = raw.as_slice()
        && command == "serve-ram"
    {
        let read_ahead = read_ahead.to_str().context("a number of bytes")?.parse()?;
        return serve_ram::serve(file.as_ref(), dir.as_ref(), read_ahead);
    }
    let args = Args::parse();
    if args.list {
        ALL.iter().for_each(|(name, _)| println!("{name}"));
        return Ok(());
    }
    if let Some(unknown) = args
        .names
        .iter()
        .find(|name| ALL.iter().all(|(known, _)| known != name))
    {
        bail!("there is no benchmark {unknown}; --list names them");
    }
    let mut bench = Bench::new(Images::from_env()?, args.rounds.into())?;
    for (name, run) in ALL {
        if !args.names.is_empty() && !args.names.iter().any(|wanted| wanted == name) {
            continue;
        }
        bench.report.begin(name);
        run(&mut bench).with_context(|| format!("benchmark {name}"))?;
        println!("{}", bench.report.last_as_text());
        if let Some(path) = &args.markdown {
            // After each, so that an interruption leaves what is known.
            fs::write(path, bench.report.as_markdown())?;
        }
    }
    Ok(())
}
