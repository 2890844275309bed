//! What a store costs however much it holds, and what it does with little.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use snapstore_store::{
    CommitRequest, ImageRole, Input, InputData, InputKind, PageSize, ReadAt, Silent, Store,
};
use snapstore_tests::harness::{self, Cli, noise, skipped};
use snapstore_tests::scale;
use tempfile::TempDir;

/// Packs of the store of many, where nothing else is said: more than descriptors.
const PACKS: u64 = 2000;

/// Runs the program under a limit of the shell's `ulimit`.
fn limited(cli: &Cli, limit: &str, arguments: &[&str]) -> anyhow::Result<Output> {
    let script = format!("ulimit -c 0 && ulimit {limit} && exec \"$0\" \"$@\"");
    Command::new("sh")
        .args(["-c", &script])
        .arg(harness::program()?)
        .arg("--store")
        .arg(cli.store())
        .args(arguments)
        .output()
        .context("sh")
}

fn text_of(output: &Output) -> String {
    let both = [&output.stdout[..], &output.stderr[..]].concat();
    String::from_utf8_lossy(&both).into_owned()
}

/// The flushes in what strace printed, by what was flushed.
fn flushes(trace: &str, store: &Path) -> BTreeMap<String, usize> {
    let mut found = BTreeMap::new();
    for line in trace.lines().filter(|line| line.contains("sync(")) {
        let path = line.split(['<', '>']).nth(1).unwrap_or(line);
        let path = path.strip_prefix(&*store.to_string_lossy()).unwrap_or(path);
        // Of a pack, which has a hexadecimal number, and of others.
        let name: String = match path.ends_with(".open") {
            true => "/packs/.open".to_owned(),
            false => path.chars().filter(|it| !it.is_ascii_digit()).collect(),
        };
        *found.entry(name).or_default() += 1;
    }
    found
}

#[test]
fn a_tiny_commit_flushes_three_times_more_than_it_must() -> anyhow::Result<()> {
    const TEST: &str = "a_tiny_commit_flushes_three_times_more_than_it_must";
    let dir = TempDir::new()?;
    let cli = Cli::new(&dir.path().join("store"));
    cli.ok(&["init"])?;
    let page = dir.path().join("page");
    let page_name = page.to_str().context("a path")?;
    let trace = dir.path().join("trace");
    for number in 0..20 {
        std::fs::write(&page, noise(number, 4096))?;
        let tag = format!("t-{number}");
        let commit = ["commit", &tag, "--no-parent", "--memory", page_name];
        let traced = Command::new("strace")
            .args(["-f", "-y", "-e", "trace=fsync,fdatasync,syncfs,sync", "-o"])
            .arg(&trace)
            .arg(harness::program()?)
            .arg("--store")
            .arg(cli.store())
            .args(commit)
            .output();
        match traced {
            Ok(output) if output.status.success() => {}
            Ok(output) if !text_of(&output).contains("ptrace") => {
                anyhow::bail!("{}", text_of(&output));
            }
            _ => {
                skipped(TEST, "there is no strace(1) that may trace");
                return Ok(());
            }
        }
        let found = flushes(&std::fs::read_to_string(&trace)?, cli.store());
        let sum = if number == 16 { "all" } else { "run" };
        let run = format!("/index/runs/..{sum}.new");
        let mut must = BTreeMap::from([
            // What no commit can do without: its bytes and its tag, and their names.
            ("/packs/.open", 1),
            ("/packs", 1),
            ("/tags/.t-.new", 1),
            ("/tags", 1),
            // The index, so that the snapshot is found without a hint.
            (&*run, 1),
            ("/index/runs", 1),
            // The store's own name: who made the store may have been killed.
            ("", 1),
        ]);
        if number == 0 {
            // Once in ten thousand entries.
            must.insert("/index", 1);
        }
        let must: BTreeMap<String, usize> = must
            .into_iter()
            .map(|(name, count)| (name.to_owned(), count))
            .collect();
        ensure!(found == must, "commit {number} flushes {found:#?}");
    }
    Ok(())
}

#[test]
fn address_space_that_is_short_is_told() -> anyhow::Result<()> {
    let dir = TempDir::new()?;
    let cli = Cli::new(&dir.path().join("store"));
    cli.ok(&["init"])?;
    let memory = dir.path().join("memory");
    std::fs::write(&memory, noise(5, 1 << 20))?;
    let memory = memory.to_str().context("a path")?;
    cli.ok(&["commit", "one", "--memory", memory])?;
    let (mut refused, mut done) = (0, 0);
    let kib = [
        60_000, 80_000, 120_000, 200_000, 300_000, 400_000, 800_000, 64_000_000,
    ];
    for limit in kib.map(|kib: u64| format!("-v {kib}")) {
        for command in [
            &["tags"][..],
            &["log"],
            &["show", "one"],
            &["stats"],
            &["verify", "--read-data"],
            &["commit", "new", "--replace", "--memory", memory],
            &["gc"],
            &["repair"],
        ] {
            let output = limited(&cli, &limit, command)?;
            let text = text_of(&output);
            match output.status.code() {
                Some(0) => done += 1,
                Some(1) => {
                    refused += 1;
                    let says = "address space (ulimit -v)";
                    ensure!(text.contains(says), "{limit} {command:?}: {text}");
                }
                _ => anyhow::bail!("{limit} {command:?}: {}: {text}", output.status),
            }
        }
    }
    ensure!(refused > 20 && done >= 8, "{refused} refused, {done} done");
    let report = cli.ok(&["verify", "--read-data"])?;
    ensure!(report.contains("Nothing is damaged"), "{report}");
    Ok(())
}

#[test]
fn many_packs_need_few_descriptors() -> anyhow::Result<()> {
    // A limit that is far below the number of packs in each of the sizes.
    let (packs, limit) = match std::env::var("SCALE_PACKS") {
        Ok(count) => (count.parse()?, "-n 1024"),
        Err(_) => (PACKS, "-n 128"),
    };
    // Flushes cost nothing there.
    let memory_disk = Path::new("/dev/shm");
    let dir = match memory_disk.is_dir() {
        true => TempDir::new_in(memory_disk)?,
        false => TempDir::new()?,
    };
    let cli = Cli::new(&dir.path().join("store"));
    Store::create(cli.store(), PageSize::KIB_4)?;
    scale::add_packs(cli.store(), packs, 0)?;
    let count = || -> anyhow::Result<u64> {
        Ok(std::fs::read_dir(cli.store().join("packs"))?.count() as u64)
    };
    ensure!(count()? >= packs, "{} packs", count()?);
    let page = dir.path().join("page");
    std::fs::write(&page, noise(1, 4096))?;
    let page = page.to_str().context("a path")?;
    let does = |arguments: &[&str]| -> anyhow::Result<String> {
        let output = limited(&cli, limit, arguments)?;
        let text = text_of(&output);
        ensure!(
            output.status.success(),
            "{arguments:?}: {}: {text}",
            output.status
        );
        Ok(text)
    };
    does(&["commit", "page", "--memory", page])?;
    does(&["stats"])?;
    let healthy = |text: &str| text.contains("Nothing is damaged");
    ensure!(healthy(&does(&["verify", "--read-data"])?), "before");
    std::fs::remove_dir_all(cli.store().join("index"))?;
    does(&["repair"])?;
    ensure!(healthy(&does(&["verify", "--read-data"])?), "repaired");
    does(&["gc"])?;
    ensure!(count()? < packs / 10, "{} packs are left", count()?);
    ensure!(healthy(&does(&["verify", "--read-data"])?), "collected");
    Ok(())
}

/// An image of so many pages, each with its number in it.
#[derive(Debug)]
struct Numbered(u64);

impl ReadAt for Numbered {
    fn size_bytes(&self) -> u64 {
        self.0 * scale::PAGE as u64
    }

    fn read_exact_at(&self, out: &mut [u8], offset_bytes: u64) -> std::io::Result<()> {
        let page = scale::PAGE as u64;
        let (first, skipped) = (offset_bytes / page, offset_bytes % page);
        let count = (skipped + out.len() as u64).div_ceil(page);
        let bytes = scale::pages(first, count);
        let skipped = usize::try_from(skipped).expect("less than a page");
        out.copy_from_slice(&bytes[skipped..][..out.len()]);
        Ok(())
    }
}

/// Both fill a pack, which is what a push holds of the pages themselves. What else grows is what
/// the store keeps of what was read, up to a limit. With a hash table of ids it was 417 bytes a
/// page, not 218.
#[test]
fn a_push_remembers_little_of_each_page() -> anyhow::Result<()> {
    const FEW: u64 = 110_000;
    const MANY: u64 = 240_000;
    const MOST_BYTES_A_PAGE: u64 = 300;
    let dir = TempDir::new()?;
    let cli = Cli::new(&dir.path().join("store"));
    let store = Store::create(cli.store(), PageSize::KIB_4)?;
    let mut peaks = Vec::new();
    for (tag, pages) in [("few", FEW), ("many", MANY)] {
        let request = CommitRequest {
            tag: tag.to_owned(),
            inputs: vec![Input {
                name: "memory".to_owned(),
                role: ImageRole::Memory,
                data: InputData::Reader(Arc::new(Numbered(pages))),
                kind: InputKind::Full,
            }],
            ..CommitRequest::default()
        };
        store.commit(&request, &Silent)?;
        let url = format!(
            "file://{}",
            dir.path().join(format!("bucket-{tag}")).display()
        );
        cli.ok(&["remote", "add", tag, &url])?;
        cli.ok(&["remote", "init", tag])?;
        peaks.push(scale::usage(&cli.command(&["push", tag, tag])?)?.peak_bytes);
    }
    let grown = peaks[1].saturating_sub(peaks[0]);
    println!("{FEW} and {MANY} pages: {peaks:?} bytes");
    ensure!(
        grown < (MANY - FEW) * MOST_BYTES_A_PAGE,
        "{} bytes a page: {peaks:?}",
        grown / (MANY - FEW)
    );
    Ok(())
}
