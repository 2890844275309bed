//! The main job on memory of real guests, by the program as its user would run it:
//! commits the given images, shows and compares them, commits and restores running
//! machines, and cleans up. `make demo` runs it.

mod compare;
#[path = "../../src/format.rs"]
#[expect(dead_code, reason = "the demonstration shows less than the program")]
mod format;
mod machines;
mod program;
mod report;
mod workspace;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Parser;
use snapstore_store::{ImageRole, SnapshotId, Store};

use compare::{Comparison, Stored};
use format::size;
use program::{Program, say};
use report::{ImageRow, Report, StoreRow, duration, rate};
use workspace::{Mount, Workspace};

/// Run the main job on real guest memory, and measure it.
#[derive(Parser)]
struct Args {
    /// A tag and a memory image to commit under it, in order; may be repeated
    #[arg(long = "image", value_name = "TAG=FILE", value_parser = tag_and_file, required = true)]
    images: Vec<(String, String)>,
    /// Where to put the demonstration's store, and keep it [default: a temporary directory]
    #[arg(long, value_name = "DIR")]
    work_dir: Option<PathBuf>,
    /// Keep the temporary directory
    #[arg(long)]
    keep: bool,
    /// Print what was measured as one JSON object; the rest goes to standard error
    #[arg(long)]
    json: bool,
}

fn tag_and_file(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((tag, file)) if !tag.is_empty() && !file.is_empty() => {
            Ok((tag.to_owned(), file.to_owned()))
        }
        _ => Err("it has the form TAG=FILE".to_owned()),
    }
}

fn main() -> ExitCode {
    let Err(error) = run(&Args::parse()) else {
        return ExitCode::SUCCESS;
    };
    // A reader that went away is no failure.
    if let Some(io::ErrorKind::BrokenPipe) = error.downcast_ref().map(io::Error::kind) {
        return ExitCode::SUCCESS;
    }
    eprintln!("error: {}", snapstore_host::message(&error));
    ExitCode::FAILURE
}

fn run(args: &Args) -> anyhow::Result<()> {
    if args.json {
        program::keep_stdout_free();
    }
    for (_, image) in &args.images {
        let metadata = std::fs::metadata(image).with_context(|| format!("cannot read {image}"))?;
        if !metadata.is_file() {
            bail!("{image} is not a file");
        }
    }
    // Declared first, so that it goes last: after any mount in it.
    let workspace = Workspace::create(args.work_dir.as_deref(), args.keep)?;
    let mut demo = Demo {
        images: &args.images,
        program: Program::new(workspace.store(), &workspace.runtime())?,
        no_fuse: File::open("/dev/fuse")
            .err()
            .map(|error| format!("cannot open /dev/fuse: {error}")),
        no_kvm: File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .err()
            .map(|error| format!("cannot open /dev/kvm: {error}")),
        workspace: &workspace,
        report: Report::default(),
    };
    demo.run()?;
    let steps = demo.program.steps();
    if args.json {
        program::answer(&demo.report.to_json(steps).to_string())?;
    } else {
        program::answer(&demo.report.describe(steps))?;
    }
    if workspace.is_kept() {
        say(&format!("The store is in {}.", workspace.store().display()))?;
    }
    Ok(())
}

struct Demo<'a> {
    images: &'a [(String, String)],
    workspace: &'a Workspace,
    program: Program,
    /// Why nothing can be mounted here.
    no_fuse: Option<String>,
    /// Why no machine can run here.
    no_kvm: Option<String>,
    report: Report,
}

impl Demo<'_> {
    fn run(&mut self) -> anyhow::Result<()> {
        let tags: Vec<&str> = self.images.iter().map(|(tag, _)| tag.as_str()).collect();
        self.program.announce()?;
        self.program.run(&["init"])?;
        for (tag, image) in self.images {
            self.commit(tag, image)?;
        }
        let chain = self.chain()?;
        let (base, head) = (chain[0].as_str(), chain[chain.len() - 1].as_str());

        self.check_head(head)?;
        self.check_all(&tags)?;
        self.program.run(&["log", "--graph"])?;
        if base != head {
            self.program.run(&["diff", base, head])?;
        }
        self.program.run(&["stats"])?;
        self.note_store("committed")?;

        // One from the middle of the chain, where others were made from it.
        let removed = match chain.as_slice() {
            [_, middle, _, ..] => Some(middle.as_str()),
            _ => tags.iter().copied().find(|tag| *tag != head),
        };
        if let Some(tag) = removed {
            self.program.run(&["rm", tag])?;
        }
        self.program.run(&["gc"])?;
        self.program.run(&["verify", "--read-data"])?;
        self.note_store(&match removed {
            Some(tag) => format!("without {tag}, after gc"),
            None => "after gc".to_owned(),
        })?;
        self.check_head(head)?;
        self.machines()
    }

    /// Commits and restores running machines, where that is possible.
    fn machines(&mut self) -> anyhow::Result<()> {
        if let Some(reason) = self.no_kvm.as_ref().or(self.no_fuse.as_ref()) {
            return say(&format!("\nSKIPPED machines: {reason}"));
        }
        let dir = self.workspace.dir().to_owned();
        machines::run(&mut self.program, &mut self.report, &dir)
    }

    fn commit(&mut self, tag: &str, image: &str) -> anyhow::Result<()> {
        let time = self.program.run(&["commit", tag, "--memory", image])?;
        let store = self.store()?;
        let manifest = store.manifest(store.resolve(tag)?)?;
        let memory = manifest.images.first().context("nothing was committed")?;
        self.report.images.push(ImageRow {
            tag: tag.to_owned(),
            image_bytes: memory.size_bytes,
            nonzero_pages: memory.nonzero_pages,
            changed_pages: memory.changed_pages,
            added_chunks: manifest.added_chunks,
            added_bytes: manifest.added_bytes,
            time,
        });
        Ok(())
    }

    /// The tags of the first image and of those made from it, one from the other.
    fn chain(&self) -> anyhow::Result<Vec<String>> {
        let store = self.store()?;
        let mut chain = Vec::new();
        let mut last: Option<SnapshotId> = None;
        for (tag, _) in self.images {
            let id = store.resolve(tag)?;
            if last.is_none() || store.manifest(id)?.parent == last {
                chain.push(tag.clone());
                last = Some(id);
            }
        }
        Ok(chain)
    }

    /// Mounts one snapshot and compares all of its memory with the image.
    fn check_head(&mut self, tag: &str) -> anyhow::Result<()> {
        if self.skips_mount()? {
            return self.compare(tag, None);
        }
        let mount = self.mount(Some(tag))?;
        let file = mount.dir().join("memory.bin");
        let (at, time) = compare::first_read(&file)?;
        say(&format!("  first read, at {at:#x}: {}", duration(time)))?;
        self.program.note("  first read", time, "");
        self.compare(tag, Some(&file))?;
        self.umount(mount)
    }

    /// Mounts all tags and compares each of them.
    fn check_all(&mut self, tags: &[&str]) -> anyhow::Result<()> {
        if self.skips_mount()? {
            return tags.iter().try_for_each(|tag| self.compare(tag, None));
        }
        let mount = self.mount(None)?;
        for tag in tags {
            self.compare(tag, Some(&mount.dir().join(tag).join("memory.bin")))?;
        }
        self.umount(mount)
    }

    fn skips_mount(&self) -> anyhow::Result<bool> {
        if let Some(reason) = &self.no_fuse {
            say(&format!(
                "\nSKIPPED mount: {reason}; comparing through the library instead"
            ))?;
        }
        Ok(self.no_fuse.is_some())
    }

    fn mount(&mut self, tag: Option<&str>) -> anyhow::Result<Mount> {
        // The guard is there first: it does no harm if nothing was mounted.
        let mount = Mount::at(self.workspace.mount_dir()?, self.program.path());
        let dir = mount.dir().to_str().context("the path is not UTF-8")?;
        let arguments: Vec<&str> = ["mount"].into_iter().chain(tag).chain([dir]).collect();
        self.program.run_whatever_signal(&arguments)?;
        Ok(mount)
    }

    fn umount(&mut self, mount: Mount) -> anyhow::Result<()> {
        let dir = mount.dir().to_str().context("the path is not UTF-8")?;
        self.program.run(&["umount", dir])?;
        Ok(())
    }

    /// Compares a snapshot's memory, as the file shows it or as the library
    /// reads it, with the image it was committed from.
    fn compare(&mut self, tag: &str, file: Option<&Path>) -> anyhow::Result<()> {
        let (_, image) = self
            .images
            .iter()
            .find(|(name, _)| name == tag)
            .context("there is no such image")?;
        let (name, stored) = match file {
            Some(file) => (format!("{tag} as mounted"), Stored::file(file)?),
            None => (format!("{tag} as stored"), self.stored(tag)?),
        };
        let started = Instant::now();
        let stop = || self.program.check_interrupted();
        match compare::compare(&stored, Path::new(image), stop)? {
            Comparison::Equal { bytes } => self.equal(&name, image, bytes, started.elapsed()),
            Comparison::Lengths { stored, image: len } => {
                bail!("{name} has {stored} bytes, but {image} has {len}")
            }
            Comparison::Differs { at } => {
                bail!("{name} differs from {image} at byte {at:#x}")
            }
        }
    }

    fn equal(&mut self, name: &str, image: &str, bytes: u64, time: Duration) -> anyhow::Result<()> {
        let image = Path::new(image).file_name().unwrap_or_default().display();
        let speed = rate(bytes, time);
        say(&format!(
            "  {name} = {image}, all {}: {}, {speed}",
            size(bytes),
            duration(time)
        ))?;
        self.program
            .note(&format!("  compare {name}"), time, &speed);
        self.report.compared += 1;
        Ok(())
    }

    fn stored(&self, tag: &str) -> anyhow::Result<Stored> {
        let store = self.store()?;
        let manifest = store.manifest(store.resolve(tag)?)?;
        let memory = manifest
            .images
            .iter()
            .find(|image| image.role == ImageRole::Memory)
            .context("the snapshot has no memory image")?;
        Ok(Stored::Library(store.image_reader(memory)))
    }

    fn note_store(&mut self, when: &str) -> anyhow::Result<()> {
        let stats = self.store()?.stats()?;
        self.report.stores.push(StoreRow {
            when: when.to_owned(),
            snapshots: stats.snapshots,
            logical_bytes: stats.logical_bytes,
            pack_bytes: stats.pack_bytes,
            total_bytes: stats.total_bytes,
        });
        Ok(())
    }

    fn store(&self) -> anyhow::Result<Store> {
        Ok(Store::open(self.workspace.store())?)
    }
}
