//! `snapstore run`

use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use snapstore_host::commit::CommitTarget;
use snapstore_host::runtime::Runtime;
use snapstore_host::start::free_names;
use snapstore_host::starter::Starter;
use snapstore_host::{
    DiskAccess, DiskSpec, MachineSource, Overlays, Spec, Usage, check_kind, networks,
};
use snapstore_store::Error;
use snapstore_vmm::control::Origin;

use crate::args::{ReadingArgs, RestoreArgs, RunArgs};
use crate::commands::restore;
use crate::commands::start::start;
use crate::context::Context;
use crate::logging::say;

/// The label that tells what a ready-made snapshot was booted from.
const CONFIGURATION_LABEL: &str = "snapstore.configuration";

pub fn run(context: &Context, args: &RunArgs) -> anyhow::Result<ExitCode> {
    let runtime = Runtime::open()?;
    let disks = args.disks.iter().map(|text| disk(text));
    let disks: Vec<DiskSpec> = disks.collect::<anyhow::Result<_>>()?;
    // First, since the default store may have to be created.
    runtime.vm(&args.name)?;
    if args.commit_when.is_some()
        && let Some(disk) = disks.iter().find(|disk| disk.access == DiskAccess::InPlace)
    {
        bail!(Usage(format!(
            "{} is written in place (:direct), and a machine with such a disk cannot be committed; \
             leave out :direct or --commit-when",
            disk.path.display()
        )));
    }
    let needs_configuration = args.commit_when.is_some() || args.or_restore.is_some();
    let configuration = needs_configuration
        .then(|| configuration(args, &disks))
        .transpose()?;
    if let (Some(tag), Some(configuration)) = (&args.or_restore, &configuration)
        && is_ready_made(context, tag, configuration)?
    {
        let restore = RestoreArgs {
            with: None,
            exec: None,
            snapshot: tag.clone(),
            name: Some(args.name.clone()),
            count: 1,
            share_layout: false,
            no_prefetch: false,
            no_common_memory: false,
            require_reseed: args.require_reseed,
            nets: args.nets.clone(),
            // It is a tag of this store: no remote is read.
            reading: ReadingArgs {
                remote_timeout: 0,
                cache_limit: 0,
            },
            no_fill: true,
            start: args.start.clone(),
        };
        return restore::run(context, &restore);
    }
    if let Some(tag) = &args.tag {
        // Now rather than when the guest has booted.
        let store = context.open_or_create_default()?;
        store.check_tag_free(tag, args.replace)?;
    }
    let when_ready = args
        .tag
        .as_ref()
        .zip(configuration)
        .map(|(tag, configuration)| CommitTarget {
            tag: tag.clone(),
            replace: args.replace,
            labels: [(CONFIGURATION_LABEL.to_owned(), configuration)].into(),
        });
    let starter = Starter::launch(&runtime)?;
    let (names, reserved) = free_names(&runtime, &args.name, true, 1)?;
    let nets = networks::of_machines(&args.nets, &names)?;
    let overlays = Overlays::new(args.start.overlay_dir.as_deref(), args.start.overlay_limit)?;
    let spec = Spec {
        overlays,
        names,
        nets,
        what: MachineSource::Boot {
            kernel: absolute(&args.kernel)?,
            initrd: args.initrd.as_deref().map(absolute).transpose()?,
            cmdline: args.cmdline.clone(),
            memory_bytes: args.mem,
            cpus: args.cpus,
            cpu: args.cpu.clone(),
            disks,
        },
        origin: Origin::default(),
        run: !args.start.paused,
        run_on_word: false,
        kept: Vec::new(),
        confine: true,
        require_reseed: false,
        share_layout: false,
        stop_at_ready: when_ready.is_some(),
    };
    start(
        context,
        (&runtime, starter),
        &args.start,
        spec,
        &[],
        reserved,
        when_ready,
    )
}

/// Whether a snapshot is there and was made from this configuration.
fn is_ready_made(context: &Context, tag: &str, configuration: &str) -> anyhow::Result<bool> {
    let store = context.open_or_create_default()?;
    let id = match store.resolve(tag) {
        Err(Error::NotFound { .. }) => return Ok(false),
        other => other?,
    };
    let same = store
        .manifest(id)?
        .labels
        .get(CONFIGURATION_LABEL)
        .map(String::as_str)
        == Some(configuration);
    if !same {
        say!("{tag} was not made from this configuration; booting.");
    }
    Ok(same)
}

/// A name for all that the guest can see of how it was booted: the content of
/// kernel and initrd, the command line, the sizes, the CPU, how many network interfaces, and
/// for disks, which may be large, their path, length and time of change.
fn configuration(args: &RunArgs, disks: &[DiskSpec]) -> anyhow::Result<String> {
    let mut hasher = blake3::Hasher::new();
    for file in std::iter::once(&args.kernel).chain(&args.initrd) {
        check_kind(file)?;
        let mut one = blake3::Hasher::new();
        one.update_reader(
            File::open(file).with_context(|| format!("cannot open {}", file.display()))?,
        )
        .with_context(|| format!("cannot read {}", file.display()))?;
        hasher.update(one.finalize().as_bytes());
    }
    let mut seen = format!("{}\n{}\n{}\n", args.cmdline, args.mem, args.cpus);
    if !args.nets.is_empty() {
        seen += &format!("{} network interfaces\n", args.nets.len());
    }
    if !args.cpu.is_host() {
        seen += &format!("{}\n", args.cpu);
    }
    for disk in disks {
        let file = std::fs::metadata(&disk.path)
            .with_context(|| format!("cannot examine {}", disk.path.display()))?;
        seen += &format!(
            "{}\n{:?} {} {}.{}\n",
            disk.path.display(),
            disk.access,
            file.len(),
            file.mtime(),
            file.mtime_nsec()
        );
    }
    hasher.update(seen.as_bytes());
    Ok(hasher.finalize().to_hex()[..32].to_owned())
}

/// `FILE`, `FILE:ro` or `FILE:direct`.
fn disk(text: &str) -> anyhow::Result<DiskSpec> {
    let (path, access) = match text.rsplit_once(':') {
        Some((path, "ro")) => (path, DiskAccess::ReadOnly),
        Some((path, "direct")) => (path, DiskAccess::InPlace),
        _ => (text, DiskAccess::Overlay),
    };
    Ok(DiskSpec {
        path: absolute(path.as_ref())?,
        access,
    })
}

/// The machine's process may be in another directory.
fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("cannot find {}", path.display()))
}
