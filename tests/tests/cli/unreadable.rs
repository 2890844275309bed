//! One file of a store that cannot be opened or read costs what is in it, and nothing
//! else: every command goes on with all the rest, and names the file.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use anyhow::{Context as _, ensure};
use rustix::io::Errno;
use snapstore_store::Store;
use snapstore_tests::harness::{Cli, noise, skipped};
use snapstore_tests::powercut::{self, Disk, Lost, Refused};
use tempfile::TempDir;

use crate::PAGE;

const PAGES: usize = 16;

/// What each command does, with its exit code and whether it names the file, `N`.
/// The commands are those of [`COMMANDS`], in their order.
struct Row {
    /// Part of the path of the file in the store.
    file: &'static str,
    /// On a disk that cannot read it.
    unreadable: [&'static str; COMMANDS.len()],
    /// Where this process may not.
    denied: [&'static str; COMMANDS.len()],
}

const COMMANDS: [&[&str]; 16] = [
    &["verify"],
    &["verify", "--read-data"],
    &["tags"],
    &["log"],
    &["stats"],
    &["map", "one"],
    &["report", "-o", "-"],
    &["show", "one"],
    &["show", "two"],
    &["diff", "one", "three"],
    &["tag", "one", "another"],
    &["rm", "three"],
    &["commit", "new", "--memory", "IMAGE"],
    &["gc", "--dry-run"],
    &["gc"],
    &["repair"],
];

/// `two` is the snapshot that needs the file, where one does; the pack of `gone` is needed
/// by none.
#[rustfmt::skip]
const TABLE: [Row; 9] = [
    //                verify data  tags  log   stats map   rep.  one   two   diff  tag   rm    commit dry  gc    repair
    Row { file: "tags/two",
        unreadable: ["4N", "4N", "4N", "4N", "4N", "4N", "4N", "0",   "4N", "0",   "0",   "0",   "0",   "4N", "4N", "0N"],
        denied:     ["1N", "1N", "1N", "1N", "1N", "1N", "1N", "0",   "1N", "0",   "0",   "0",   "0",   "1N", "1N", "1N"] },
    Row { file: "packs/00000003.pack",
        unreadable: ["4N", "4N", "4N", "4N", "4N", "4N", "4N", "0",   "4N", "0",   "0",   "0",   "0",   "4N", "4N", "4N"],
        denied:     ["1N", "1N", "1N", "1N", "1N", "1N", "1N", "0",   "1N", "0",   "0",   "0",   "0",   "1N", "1N", "1N"] },
    Row { file: "packs/00000005.pack",
        unreadable: ["4N", "4N", "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0N", "0N", "0N"],
        denied:     ["1N", "1N", "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0N", "0N", "1N"] },
    Row { file: "collector",
        unreadable: ["4N", "4N", "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "4N", "4N", "4N", "0N"],
        denied:     ["1N", "1N", "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "1N", "1N", "1N", "1N"] },
    // Its holder may live, and need anything.
    Row { file: "leases/77-0",
        unreadable: ["0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0N", "5N"],
        denied:     ["0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0N", "5N"] },
    Row { file: "config",
        unreadable: ["4N", "4N", "4N", "4N", "4N", "4N", "4N", "4N", "4N", "4N", "4N", "4N", "4N", "4N", "4N", "0N"],
        denied:     ["1N", "1N", "1N", "1N", "1N", "1N", "1N", "1N", "1N", "1N", "1N", "1N", "1N", "1N", "1N", "1N"] },
    Row { file: "config-copy",
        unreadable: ["4N", "4N", "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0N"],
        denied:     ["1N", "1N", "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "1N"] },
    Row { file: "recent-tags",
        unreadable: ["0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0"],
        denied:     ["0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0",   "0"] },
    Row { file: "index",
        unreadable: ["4N", "4N", "4N", "4N", "4N", "4N", "4N", "4N", "4N", "4N", "0",   "0",   "4N", "4N", "4N", "0"],
        denied:     ["1N", "1N", "1N", "1N", "1N", "1N", "1N", "1N", "1N", "1N", "0",   "0",   "1N", "1N", "1N", "0"] },
];

/// A disk with a store, and what its snapshots hold.
struct Prepared {
    disk: Disk,
    _dir: TempDir,
    at: PathBuf,
    image: String,
}

fn content(tag: &str) -> Vec<u8> {
    let seed = tag.bytes().map(u64::from).sum();
    noise(seed, PAGES * PAGE)
}

fn prepare() -> anyhow::Result<Prepared> {
    let dir = tempfile::tempdir()?;
    let cli = Cli::new(&dir.path().join("store"));
    cli.ok(&["init"])?;
    let image = dir.path().join("image");
    let name = image.display().to_string();
    // Collected, so that there is a state of the collector.
    for tag in ["old", "one", "two", "three", "gone"] {
        fs::write(&image, content(tag))?;
        cli.ok(&["commit", tag, "--memory", &name, "--no-parent"])?;
        if tag == "old" {
            cli.ok(&["rm", tag])?;
            cli.ok(&["gc"])?;
        }
    }
    cli.ok(&["rm", "gone"])?;
    fs::write(cli.store().join("leases/77-0"), "somebody's")?;
    fs::write(&image, content("new"))?;
    let (disk, at) = (Disk::new(), dir.path().join("disk"));
    fs::create_dir(&at)?;
    let mounted = disk.mount(&at)?;
    let copied = std::process::Command::new("cp")
        .arg("-a")
        .arg(cli.store())
        .arg(mounted.path())
        .status()?;
    ensure!(copied.success(), "the store is not copied");
    drop(mounted);
    Ok(Prepared {
        disk,
        _dir: dir,
        at,
        image: name,
    })
}

/// The path of a file from the root of the disk.
fn path_of(at: &Path, file: &str) -> anyhow::Result<PathBuf> {
    if file != "index" {
        return Ok(Path::new("store").join(file));
    }
    let runs = at.join("store/index/runs");
    let first = fs::read_dir(&runs)?.next().context("no runs")??;
    Ok(Path::new("store/index/runs").join(first.file_name()))
}

fn holds(store: &Path, tag: &str) -> anyhow::Result<()> {
    let store = Store::open(store)?;
    let manifest = store.manifest(store.resolve(tag)?)?;
    let image = manifest.image("memory").context("no memory")?;
    let bytes = store.read_file_image(image, 1 << 30)?;
    ensure!(bytes == content(tag), "{tag} has other bytes");
    Ok(())
}

fn text(output: &Output) -> String {
    let said = [&output.stdout[..], b"\n", &output.stderr].concat();
    String::from_utf8_lossy(&said).into_owned()
}

/// One cell of the table: `None`, or what is wrong.
fn cell(
    prepared: &Prepared,
    (file, refused): (&str, Refused),
    command: &[&str],
    expected: &str,
) -> anyhow::Result<()> {
    let disk = prepared.disk.after_power_cut(Lost::Nothing);
    let mounted = disk.mount(&prepared.at)?;
    let cli = Cli::new(&mounted.path().join("store"));
    let packs = fs::read_dir(cli.store().join("packs"))?.count();
    let path = path_of(mounted.path(), file)?;
    disk.refuse(&path, refused)?;
    let image = |argument: &&'_ str| match *argument {
        "IMAGE" => prepared.image.clone(),
        other => other.to_owned(),
    };
    let arguments: Vec<String> = command.iter().map(image).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let output = cli.run(&arguments)?;
    let said = text(&output);
    let (code, names) = expected.split_at(1);
    ensure!(
        output.status.code() == Some(code.parse()?),
        "{} instead of {code}: {said}",
        output.status
    );
    let name = Path::new(file).file_name().context("a name")?;
    let name = name.to_str().context("a name")?;
    ensure!(
        said.contains(name) || names.is_empty(),
        "{name} is not named: {said}"
    );
    // With the lists come the others.
    if command.len() == 1 && ["tags", "log", "stats"].contains(&command[0]) {
        let lists_others = !["config", "index"].contains(&file);
        ensure!(
            !lists_others || said.contains("one") && said.contains("three"),
            "{said}"
        );
    }
    if command == ["gc"] {
        let left = fs::read_dir(cli.store().join("packs"))?.count();
        // Only what is proved to be unneeded is gone.
        let may_free = ["config-copy", "recent-tags"].contains(&file);
        ensure!(
            left == packs - usize::from(may_free),
            "{left} packs are left"
        );
    }
    if code == "0" && command[0] == "commit" {
        holds(cli.store(), "new")?;
    }
    if command == ["repair"] && code != "5" && code != "1" {
        let is_lost = file == "packs/00000003.pack";
        for tag in ["one", "two", "three"] {
            if tag != "two" || !is_lost {
                holds(cli.store(), tag).context("after repair")?;
            }
        }
        let verified = cli.run(&["verify", "--read-data"])?;
        let expected = if is_lost { 4 } else { 0 };
        ensure!(
            verified.status.code() == Some(expected),
            "after repair: {}",
            text(&verified)
        );
    }
    Ok(())
}

#[test]
fn a_file_that_cannot_be_read_costs_what_is_in_it() -> anyhow::Result<()> {
    if let Some(reason) = powercut::unavailable() {
        skipped("a_file_that_cannot_be_read_costs_what_is_in_it", &reason);
        return Ok(());
    }
    let prepared = prepare()?;
    let mut wrong = Vec::new();
    for row in TABLE {
        for (refused, expected) in [
            (Refused::Open(Errno::IO), row.unreadable),
            (Refused::Read(Errno::IO), row.unreadable),
            (Refused::Open(Errno::ACCESS), row.denied),
        ] {
            // A lease that can be locked is nobody's.
            if row.file.starts_with("leases") && matches!(refused, Refused::Read(_)) {
                continue;
            }
            for (command, expected) in COMMANDS.into_iter().zip(expected) {
                if let Err(error) = cell(&prepared, (row.file, refused), command, expected) {
                    wrong.push(format!("{} {refused:?} {command:?}: {error:#}", row.file));
                }
            }
        }
    }
    ensure!(
        wrong.is_empty(),
        "{}\n{} cells",
        wrong.join("\n"),
        wrong.len()
    );
    Ok(())
}

/// What a mount shows of the snapshots whose files can be read is not touched.
#[test]
fn a_mount_serves_all_but_what_cannot_be_read() -> anyhow::Result<()> {
    if let Some(reason) = powercut::unavailable() {
        skipped("a_mount_serves_all_but_what_cannot_be_read", &reason);
        return Ok(());
    }
    let prepared = prepare()?;
    let shown = prepared.at.with_file_name("shown");
    fs::create_dir(&shown)?;
    let dir = shown.display().to_string();
    for file in ["tags/two", "packs/00000003.pack"] {
        for refused in [
            Refused::Open(Errno::IO),
            Refused::Read(Errno::IO),
            Refused::Open(Errno::ACCESS),
        ] {
            let disk = prepared.disk.after_power_cut(Lost::Nothing);
            let mounted = disk.mount(&prepared.at)?;
            let cli = Cli::new(&mounted.path().join("store"));
            disk.refuse(&path_of(mounted.path(), file)?, refused)?;
            cli.ok(&["mount", &dir])?;
            let read = |tag: &str| fs::read(shown.join(tag).join("memory.bin"));
            let (one, two, three) = (read("one"), read("two"), read("three"));
            cli.ok(&["umount", &dir])?;
            ensure!(
                one? == content("one") && three? == content("three"),
                "{file}"
            );
            let error = two.err().context("two was read")?;
            let expected = match refused {
                Refused::Open(Errno::ACCESS) => Errno::ACCESS,
                _ => Errno::IO,
            };
            let errno = Errno::from_io_error(&error);
            ensure!(errno == Some(expected), "{file} {refused:?}: {error}");
        }
    }
    Ok(())
}
