//! A commit reads what changed since the one before, and no more.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use snapstore_guests::{TABLE, TOUCH, TouchCommand, page_sum};
use snapstore_tests::vm::Lab;

const PAGE: u64 = 4096;
const FIRST: u32 = 512;
/// Pages that a guest writes besides those it was told to: stack and state.
const FEW: u64 = 4;

fn pages_read(commit: &Value) -> Result<u64> {
    Ok(commit["read_bytes"].as_u64().context("no read_bytes")? / PAGE)
}

/// Whether a commit's pages were copied in the pause; else the machine was forked.
fn was_copied(commit: &Value) -> Result<bool> {
    let stage = |name: &str| commit["timings"][name].as_f64();
    let (copy, fork) = stage("copy").zip(stage("fork")).context("no stages")?;
    ensure!(copy >= 0.0 && fork >= 0.0, "{commit}");
    Ok(copy > fork)
}

/// Whether pages were read while the guest ran.
fn was_read_before(commit: &Value) -> bool {
    commit["timings"]["precopy"].is_number()
}

/// Whether the kernel has asynchronous write protection, Linux 6.7.
pub fn tracks_writes() -> Result<bool> {
    let release = rustix::system::uname();
    let release = release.release().to_str()?;
    let mut numbers = release.split(['.', '-']).map(str::parse::<u32>);
    let (major, minor) = (numbers.next(), numbers.next());
    let version = major.zip(minor).context("no version")?;
    Ok((version.0?, version.1?) >= (6, 7))
}

/// Has a `touch` guest write pages, once for each call.
struct Writer<'a> {
    lab: &'a Lab,
    name: &'a str,
    said: usize,
}

impl Writer<'_> {
    fn write(&mut self, first: u32, count: u32, value: u32) -> Result<()> {
        let write = TouchCommand::Write {
            count,
            first,
            value,
        };
        self.lab.type_in(self.name, &write.encode())?;
        self.said += 1;
        snapstore_tests::vm::eventually("pages are written", || {
            let said = self.lab.console(self.name)?;
            let answers = said.lines().filter(|line| line.starts_with('w')).count();
            Ok((answers >= self.said && said.ends_with('\n')).then_some(()))
        })
    }

    fn sum(&self, first: u32, count: u32, value: u32) -> Result<()> {
        let read = TouchCommand::Read { count, first };
        self.lab.type_in(self.name, &read.encode())?;
        let answer = format!("r{:08x}\n", page_sum(count, first, value));
        self.lab.wait_for_text(self.name, &answer)?;
        Ok(())
    }
}

#[test]
fn only_what_changed_since_the_last_commit_is_read() -> Result<()> {
    let test = "only_what_changed_since_the_last_commit_is_read";
    let Some(lab) = Lab::with_mounts(test)? else {
        return Ok(());
    };
    lab.run("vm", TOUCH, &["--mem", "64M"])?;
    let mut writer = Writer {
        lab: &lab,
        name: "vm",
        said: 0,
    };
    writer.write(FIRST, 5000, 1)?;
    let read = pages_read(&lab.commit("all", "vm")?)?;
    ensure!((5000..=5000 + FEW).contains(&read), "{read} pages");

    writer.write(FIRST + 2000, 1000, 7)?;
    let thousand = lab.commit("thousand", "vm")?;
    let read = pages_read(&thousand)?;
    ensure!((1000..=1000 + FEW).contains(&read), "{read} pages");
    // Most of it before the pause, which then only has to copy the rest.
    ensure!(was_copied(&thousand)? == tracks_writes()?, "{thousand}");
    ensure!(was_read_before(&thousand) == tracks_writes()?, "{thousand}");

    // The same content once more: read, and found to be the same.
    writer.write(FIRST + 2000, 300, 7)?;
    let same = lab.commit("same", "vm")?;
    let read = pages_read(&same)?;
    ensure!((300..=300 + FEW).contains(&read), "{same}");
    ensure!(
        same["images"][0]["changed_pages"].as_u64() <= Some(FEW),
        "{same}"
    );

    // Away and back.
    writer.write(FIRST, 50, 99)?;
    writer.write(FIRST, 50, 1)?;
    let back = lab.commit("back", "vm")?;
    ensure!(
        back["images"][0]["changed_pages"].as_u64() <= Some(FEW),
        "{back}"
    );
    // So few are copied, where the kernel tells which.
    let read = pages_read(&back)?;
    ensure!((50..=50 + FEW).contains(&read), "{read} pages");
    ensure!(was_copied(&back)? == tracks_writes()?, "{back}");

    // A fork after a copy, and the other way round: a guest that stands still anyhow is
    // not read before.
    writer.write(FIRST + 3000, 2000, 5)?;
    lab.cli.ok(&["pause", "vm"])?;
    let many = lab.commit("many", "vm")?;
    lab.cli.ok(&["resume", "vm"])?;
    ensure!(!was_copied(&many)? && !was_read_before(&many), "{many}");
    writer.write(FIRST + 4000, 10, 6)?;
    let last = lab.commit("last", "vm")?;
    ensure!(was_copied(&last)? == tracks_writes()?, "{last}");

    lab.stop("vm")?;
    for (tag, value, later, last) in [
        ("all", 1, 1, 1),
        ("thousand", 7, 1, 1),
        ("same", 7, 1, 1),
        ("back", 7, 1, 1),
        ("many", 7, 5, 5),
        ("last", 7, 5, 6),
    ] {
        lab.restore(tag, &[])?;
        let check = Writer {
            lab: &lab,
            name: tag,
            said: 0,
        };
        check.sum(FIRST, 2000, 1)?;
        check.sum(FIRST + 2000, 1000, value)?;
        check.sum(FIRST + 3000, 1000, later)?;
        check.sum(FIRST + 4000, 10, last)?;
        check.sum(FIRST + 4010, 990, later)?;
        lab.stop(tag)?;
    }
    lab.finish()
}

#[test]
fn a_paused_machine_has_nothing_new() -> Result<()> {
    let Some(lab) = Lab::with_mounts("a_paused_machine_has_nothing_new")? else {
        return Ok(());
    };
    lab.run("vm", TABLE, &[])?;
    lab.wait_for_steps("vm", 2)?;
    lab.cli.ok(&["pause", "vm"])?;
    lab.commit("first", "vm")?;
    for tag in ["second", "third"] {
        let again = lab.commit(tag, "vm")?;
        ensure!(pages_read(&again)? == 0, "{again}");
        ensure!(again["images"][0]["changed_pages"] == 0, "{again}");
        ensure!(lab.stored_all(tag, "memory")? == lab.stored_all("first", "memory")?);
    }
    lab.stop("vm")?;
    lab.restore("third", &[])?;
    lab.assert_goes_on("third", "third")?;
    lab.finish()
}

#[test]
fn a_restored_machine_reads_only_what_it_wrote() -> Result<()> {
    let test = "a_restored_machine_reads_only_what_it_wrote";
    let Some(lab) = Lab::with_mounts(test)? else {
        return Ok(());
    };
    lab.run("vm", TOUCH, &[])?;
    let mut writer = Writer {
        lab: &lab,
        name: "vm",
        said: 0,
    };
    writer.write(FIRST, 2000, 3)?;
    lab.commit("base", "vm")?;
    lab.stop("vm")?;
    lab.restore("base", &[])?;
    let mut restored = Writer {
        lab: &lab,
        name: "base",
        said: 0,
    };
    // Reading makes no page the machine's own.
    restored.sum(FIRST, 2000, 3)?;
    let idle = lab.commit("idle", "base")?;
    ensure!(pages_read(&idle)? <= FEW, "{idle}");
    restored.write(FIRST + 100, 10, 4)?;
    // A page that was never written before, and one of zeros.
    restored.write(FIRST + 2500, 1, 5)?;
    restored.write(FIRST, 1, 0_u32.wrapping_sub(FIRST))?;
    let few = lab.commit("few", "base")?;
    ensure!((12..=12 + FEW).contains(&pages_read(&few)?), "{few}");
    lab.stop("base")?;

    lab.restore("few", &[])?;
    let check = Writer {
        lab: &lab,
        name: "few",
        said: 0,
    };
    check.sum(FIRST, 1, 0_u32.wrapping_sub(FIRST))?;
    check.sum(FIRST + 100, 10, 4)?;
    check.sum(FIRST + 110, 1890, 3)?;
    check.sum(FIRST + 2500, 1, 5)?;
    lab.finish()
}
