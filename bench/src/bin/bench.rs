//! Measures snapstore: `cargo run --release -p snapstore-bench`.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use clap::Parser;
use snapstore_bench::guest::Images;
use snapstore_bench::{ALL, Bench, serve_ram, vm_bare, vm_frozen, vm_rig};

/// Compares snapstore with other programs and with itself, in turns. Takes the
/// guest images from the directory `$SNAPSTORE_IMAGES`; the benchmarks of
/// machines (vm-...) do without.
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
    let raw: Vec<_> = std::env::args().skip(1).collect();
    let raw: Vec<&str> = raw.iter().map(String::as_str).collect();
    if serve_as_helper(&raw)? {
        return Ok(());
    }
    let args = Args::parse();
    if args.list {
        ALL.iter().for_each(|(name, ..)| println!("{name}"));
        return Ok(());
    }
    if let Some(unknown) = args
        .names
        .iter()
        .find(|name| ALL.iter().all(|(known, ..)| known != name))
    {
        bail!("there is no benchmark {unknown}; --list names them");
    }
    let chosen = ALL.iter().filter(|(name, ..)| {
        args.names.is_empty() || args.names.iter().any(|wanted| wanted == name)
    });
    let images = match chosen.clone().any(|(_, needs, _)| needs.images()) {
        true => Images::from_env()?,
        false => Images::none(),
    };
    let mut bench = Bench::new(images, args.rounds.into())?;
    for (name, needs, run) in chosen {
        bench.report.begin(name);
        let mut failed = Ok(());
        match vm_rig::missing().filter(|_| needs.machines()) {
            Some(reason) => bench.report.skip(name, &reason),
            None => failed = run(&mut bench).with_context(|| format!("benchmark {name}")),
        }
        // Of one that failed, what was measured before it did.
        println!("{}", bench.report.last_as_text());
        if let Some(path) = &args.markdown {
            // After each, so that an interruption leaves what is known.
            fs::write(path, bench.report.as_markdown())?;
        }
        failed?;
    }
    Ok(())
}

/// This program is also what the product is compared with: a trivial server for
/// mounts, machines of nothing but KVM, a process with private memory.
fn serve_as_helper(arguments: &[&str]) -> anyhow::Result<bool> {
    match *arguments {
        ["serve-ram", file, dir, read_ahead, access @ ("ro" | "rw")] => {
            let read_ahead = read_ahead.parse().context("a number of bytes")?;
            serve_ram::serve(file.as_ref(), dir.as_ref(), read_ahead, access == "rw")?;
        }
        ["bare-vm", count, bytes, cpus, kernel, ref image @ ..] => {
            vm_bare::run(&vm_bare::Options {
                count: count.parse()?,
                memory_bytes: bytes.parse()?,
                cpus: cpus.parse()?,
                kernel: kernel.as_ref(),
                image: image.first().map(AsRef::as_ref),
            })?
        }
        ["bare-memory", image] => vm_frozen::run(image.as_ref())?,
        _ => return Ok(false),
    }
    Ok(true)
}
