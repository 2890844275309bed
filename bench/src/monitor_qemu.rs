//! Machines of QEMU: loaded from a snapshot and committed to one, against what QEMU does by
//! itself with plain files.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::Context as _;
use serde_json::{Value, json};
use snapstore_guests::TouchCommand;
use snapstore_tests::harness::{Cli, noise};
use snapstore_tests::qmp::Qmp;
use snapstore_tests::vm::eventually;

use crate::qemu_rig::{
    DISK_BYTES, Line, Machine, Plain, Qemu, kernel, save_state, without_huge_pages,
};
use crate::stats::{Run, Samples, alternate};
use crate::tools::{bytes_under, figure, find, read_all, settle, timed};
use crate::vm_rig::{FIRST, MIB_PAGES, MemoryFile, Touch as _};
use crate::{Bench, utf8};

/// What the guest has written before the first commit.
const DATA_MIB: u32 = 128;
/// What it writes between two.
const CHANGED_MIB: [u32; 3] = [1, 8, 64];
/// The pages that it reads for its first answer: some here and there of what it has written.
const FIRST_ANSWER: (u32, u32, u32) = (64, 509, 0x7fff);
/// The name of the machine that is restored.
const NAME: &str = "guest";

/// A store with a snapshot of the machine, and the same as files of QEMU's own.
struct Rig {
    qemu: Qemu,
    cli: Cli,
    plain: Plain,
    run: PathBuf,
    mount: PathBuf,
}

/// All that is measured of QEMU.
///
/// # Errors
/// If something fails.
pub fn qemu(bench: &mut Bench) -> anyhow::Result<()> {
    if let Err(error) = File::open("/dev/fuse") {
        let reason = format!("/dev/fuse: {error}");
        bench.report.skip("monitor-qemu", &reason);
        return Ok(());
    }
    let Some(qemu) = Qemu::find()? else {
        let reason = "there is no qemu-system-x86_64 ($QEMU, or in $PATH)";
        bench.report.skip("monitor-qemu", reason);
        return Ok(());
    };
    let rig = Rig::new(bench, qemu)?;
    load(bench, &rig)?;
    commit(bench, &rig)?;
    clones(bench, &rig)
}

impl Rig {
    fn new(bench: &Bench, qemu: Qemu) -> anyhow::Result<Self> {
        let run = bench.path("qemu-run");
        let cli = bench.new_store("qemu-store")?;
        let cli = cli.with_env("SNAPSTORE_RUNTIME_DIR", utf8(&run)?);
        let plain = Plain {
            dir: bench.path("qemu"),
        };
        fs::create_dir_all(&plain.dir)?;
        fs::write(plain.dir.join("kernel"), kernel()?)?;
        fs::write(plain.disk(), noise(1, DISK_BYTES))?;
        let (machine, mut line) = plain.boot(&qemu)?;
        line.write(FIRST, DATA_MIB * MIB_PAGES, 0)?;
        let socket = machine.qmp();
        cli.ok(&["commit", "base", "--qmp", utf8(&socket)?])?;
        let mut qmp = Qmp::connect(&socket)?;
        qmp.run("stop", &json!({}))?;
        save_state(&mut qmp, &File::create(plain.state())?, true)?;
        Ok(Self {
            qemu,
            cli,
            plain,
            run,
            mount: bench.path("qemu-mount"),
        })
    }

    fn restore(&self) -> anyhow::Result<Line> {
        self.restore_with(&self.qemu.program)
    }

    fn restore_with(&self, program: &Path) -> anyhow::Result<Line> {
        let program = utf8(program)?;
        let with = ["--with", "qemu", "--exec", program, "--name", NAME];
        self.cli.ok(&[&["restore", "base"][..], &with].concat())?;
        Line::connect(&self.of_clone("con.sock"))
    }

    fn of_clone(&self, file: &str) -> PathBuf {
        self.run.join("vms").join(NAME).join("monitor").join(file)
    }

    /// Ends the machine, and waits for the mount to go that was there for it alone.
    fn stop(&self) -> anyhow::Result<()> {
        self.cli.ok(&["stop", NAME])?;
        eventually("the mount goes", || {
            let left = fs::read_dir(self.run.join("mounts"))?.count();
            Ok((left == 0).then_some(()))
        })
    }

    /// Shows the snapshot, and has all of its memory read.
    fn show(&self) -> anyhow::Result<()> {
        fs::create_dir_all(&self.mount)?;
        self.cli.ok(&["mount", "base", utf8(&self.mount)?])?;
        read_all(&self.mount.join("memory.bin"), 1 << 20)?;
        Ok(())
    }

    fn hide(&self) -> anyhow::Result<()> {
        self.cli.ok(&["umount", utf8(&self.mount)?]).map(drop)
    }

    fn settle(&self) -> anyhow::Result<()> {
        Ok(settle(&[self.cli.store(), &self.plain.dir])?)
    }

    /// How much of the snapshot's memory is in the kernel's cache.
    fn cached_memory(&self, mount: &Path) -> anyhow::Result<f64> {
        let shown = self.cli.json(&["show", "--mount", utf8(mount)?])?;
        let files = shown["files"].as_array().map(Vec::as_slice);
        let mut files = files.unwrap_or_default().iter();
        let memory = files.find(|file| file["name"] == "memory.bin");
        let cached = memory.and_then(|file| file["cached_bytes"].as_f64());
        cached.with_context(|| format!("nothing of memory.bin in {shown}"))
    }

    /// The mount that a restore has started.
    fn own_mount(&self) -> anyhow::Result<PathBuf> {
        let entries = fs::read_dir(self.run.join("mounts"))?;
        let mut paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
        let found = paths.find(|path| path.is_dir());
        found.context("the restore has started no mount")
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = self.cli.run(&["stop", "--all"]);
    }
}

/// The guest's first answer, for which it reads a few pages of what it had written.
fn first_answer(line: &mut Line) -> anyhow::Result<()> {
    let (count, stride, mask) = FIRST_ANSWER;
    let command = TouchCommand::ReadScattered {
        count,
        first: FIRST,
        stride,
        mask,
    };
    let pages = (0..count).map(|number| FIRST + (number.wrapping_mul(stride) & mask));
    let sum = pages.fold(0, u32::wrapping_add);
    line.obey(command, &format!("s{sum:08x}")).map(drop)
}

/// What was there of a snapshot's memory before a restore.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Before {
    Nothing,
    AllIsRead,
}

/// From the command to the clone's socket, to its first answer, and how much of its memory was
/// read by then.
fn load_once(rig: &Rig, program: &Path, before: Before) -> anyhow::Result<Vec<f64>> {
    rig.settle()?;
    let working_sets = rig.cli.store().join("working-sets");
    if working_sets.exists() {
        fs::remove_dir_all(working_sets)?;
    }
    if before == Before::AllIsRead {
        rig.show()?;
    }
    let start = Instant::now();
    let mut line = rig.restore_with(program)?;
    let loaded = start.elapsed().as_secs_f64();
    first_answer(&mut line)?;
    let answered = start.elapsed().as_secs_f64();
    let cached = match before {
        Before::Nothing => rig.cached_memory(&rig.own_mount()?)?,
        Before::AllIsRead => 0.0,
    };
    rig.stop()?;
    if before == Before::AllIsRead {
        rig.hide()?;
    }
    Ok(vec![loaded, answered, cached])
}

/// Restoring the machine until it answers.
fn load(bench: &mut Bench, rig: &Rig) -> anyhow::Result<()> {
    let program = rig.qemu.program.as_path();
    let script = match rig.qemu.maps_read_only() {
        true => without_huge_pages(&rig.qemu, &rig.plain.dir)?,
        false => None,
    };
    let mut subjects: Vec<Run<'_>> = vec![
        Box::new(|_| {
            rig.settle()?;
            let start = Instant::now();
            let (machine, mut line) = rig.plain.load(&rig.qemu, &bench.path("qemu-clone"))?;
            let loaded = start.elapsed().as_secs_f64();
            first_answer(&mut line)?;
            let answered = start.elapsed().as_secs_f64();
            drop(machine);
            Ok(vec![loaded, answered])
        }),
        Box::new(|_| load_once(rig, program, Before::Nothing)),
        Box::new(|_| load_once(rig, program, Before::AllIsRead)),
    ];
    if let Some(script) = &script {
        subjects.push(Box::new(|_| load_once(rig, script, Before::Nothing)));
    }
    let done = alternate(bench.rounds, subjects)?;
    let (major, minor) = rig.qemu.version;
    let against = format!("QEMU {major}.{minor} on a plain file, warm");
    let ways = [
        "no mount yet",
        "a mount that was read",
        "no mount yet, no huge pages",
    ];
    for (subject, which) in done[1..].iter().zip(ways) {
        for (number, what) in ["restore", "restore, first answer"].into_iter().enumerate() {
            let what = format!("{what}, {which}");
            let plain = &done[0][number];
            bench.compare(&what, &subject[number], &against, plain, None);
        }
    }
    if !rig.qemu.maps_read_only() {
        let reason = format!("QEMU {major}.{minor} maps no file that it cannot write to");
        bench.report.skip("what is read of a mount", &reason);
        return Ok(());
    }
    let all = Samples::constant(figure(u64::from(DATA_MIB) << 20), bench.rounds);
    let what = "read of the memory until the first answer";
    let against = "what the guest has written";
    bench.compare_bytes((what, &done[1][2]), (against, &all), None);
    if let Some(unadvised) = done.get(3) {
        let (count, ..) = FIRST_ANSWER;
        let asked = Samples::constant(figure(u64::from(count) * 4096), bench.rounds);
        let what = format!("{what}, no huge pages");
        bench.compare_bytes((&what, &unadvised[2]), (against, &all), None);
        let against = "the pages that it reads for it";
        bench.compare_bytes((&what, &unadvised[2]), (against, &asked), None);
    } else {
        let reason = "there is no C compiler (cc in $PATH)";
        bench.report.skip("a restore without huge pages", reason);
    }
    Ok(())
}

/// What happens while the guest is asked without a break: how long that takes, and the
/// longest time until an answer.
fn while_asked(
    line: &mut Line,
    what: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<(f64, f64)> {
    let is_done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| -> anyhow::Result<f64> {
            let mut longest = line.ping()?;
            while !is_done.load(Ordering::Relaxed) {
                longest = longest.max(line.ping()?);
            }
            Ok(longest)
        });
        let start = Instant::now();
        let done = what();
        let seconds = start.elapsed().as_secs_f64();
        is_done.store(true, Ordering::Relaxed);
        let longest = asking.join().ok().context("the asking thread panicked")?;
        done?;
        Ok((seconds, longest?))
    })
}

/// A commit, and the pause for it, against QEMU writing all of its state into a file in memory.
fn commit(bench: &mut Bench, rig: &Rig) -> anyhow::Result<()> {
    rig.show()?;
    for mib in CHANGED_MIB {
        let dir = bench.path("qemu-clone");
        let own = |is_live: bool, round: usize| -> anyhow::Result<Vec<f64>> {
            let (machine, mut line) = rig.plain.load(&rig.qemu, &dir)?;
            line.write(FIRST, mib * MIB_PAGES, value(round)?)?;
            rig.settle()?;
            save(&machine, &mut line, is_live)
        };
        let subjects: Vec<Run<'_>> = vec![
            Box::new(|round| {
                let mut line = rig.restore()?;
                line.write(FIRST, mib * MIB_PAGES, value(round)?)?;
                rig.settle()?;
                let before = bytes_under(rig.cli.store())?;
                let socket = rig.of_clone("qmp.sock");
                let socket = utf8(&socket)?;
                let mut answer = Value::Null;
                let (seconds, longest) = while_asked(&mut line, || {
                    let tag = format!("changed-{mib}-{round}");
                    answer = rig.cli.json(&["commit", &tag, "--qmp", socket])?;
                    Ok(())
                })?;
                let added = bytes_under(rig.cli.store())? - before;
                rig.cli.ok(&["stop", NAME])?;
                let pause = answer["pause_seconds"].as_f64();
                let pause = pause.with_context(|| format!("no pause in {answer}"))?;
                Ok(vec![seconds, longest, figure(added), pause])
            }),
            Box::new(|round| own(false, round)),
            Box::new(|round| own(true, round)),
        ];
        let done = alternate(bench.rounds, subjects)?;
        commit_rows(bench, mib, &done);
    }
    rig.hide()
}

/// What is written to the pages in a round: nothing that was there before.
fn value(round: usize) -> anyhow::Result<u32> {
    Ok(0x1000_0000 * (1 + u32::try_from(round)?))
}

/// QEMU saves its state with all of its memory, at once or while the guest runs.
fn save(machine: &Machine, line: &mut Line, is_live: bool) -> anyhow::Result<Vec<f64>> {
    let memory = MemoryFile::new();
    let file = File::create(memory.path())?;
    let mut qmp = Qmp::connect(&machine.qmp())?;
    let (seconds, longest) = while_asked(line, || {
        if !is_live {
            qmp.run("stop", &json!({}))?;
        }
        save_state(&mut qmp, &file, false)?;
        qmp.run("cont", &json!({})).map(drop)
    })?;
    Ok(vec![seconds, longest, figure(file.metadata()?.len())])
}

fn commit_rows(bench: &mut Bench, mib: u32, done: &[Vec<Samples>]) {
    let [product, stopped, live] = done else {
        unreachable!("one for each subject");
    };
    let stop = "QEMU's stop, migrate to tmpfs, cont";
    let migrate = "QEMU's migrate to tmpfs, live";
    let what = format!("commit, {mib} MiB changed");
    bench.compare(&what, &product[0], stop, &stopped[0], None);
    bench.compare(&what, &product[0], migrate, &live[0], None);
    let what = format!("longest time to an answer, {mib} MiB changed");
    bench.compare(&what, &product[1], stop, &stopped[1], None);
    bench.compare(&what, &product[1], migrate, &live[1], None);
    let what = format!("pause that the commit tells, {mib} MiB changed");
    let against = "the longest time to an answer";
    bench.compare(&what, &product[3], against, &product[1], None);
    let what = format!("bytes stored, {mib} MiB changed");
    let against = "the file that QEMU writes";
    bench.compare_bytes((&what, &product[2]), (against, &stopped[2]), None);
    let pages = Samples::constant(figure(u64::from(mib) << 20), bench.rounds);
    bench.compare_bytes((&what, &product[2]), ("these pages", &pages), None);
}

/// What a clone takes on the disk, against a copy of the machine's disk and QEMU's overlays.
fn clones(bench: &mut Bench, rig: &Rig) -> anyhow::Result<()> {
    let line = rig.restore()?;
    let machine = rig.cli.json(&["ps", NAME])?;
    let pid = machine["pid"].as_u64().context("it has a process")?;
    let untouched = overlay_bytes(pid)?;
    let write = json!({"command-line": "qemu-io virtio0 \"write -P 7 0 1M\""});
    let mut qmp = Qmp::connect(&rig.of_clone("qmp.sock"))?;
    qmp.run("human-monitor-command", &write)?;
    let written = overlay_bytes(pid)?;
    drop(line);
    rig.stop()?;
    let [untouched, written] = [untouched, written].map(|bytes| Samples::one(figure(bytes)));
    let copied = Samples::one(figure(DISK_BYTES as u64));
    let copy = ("a copy of its disk", &copied);
    let what = "on the disk, a clone that wrote nothing";
    bench.compare_bytes((what, &untouched), copy, None);
    if let Some(program) = find("qemu-img") {
        let overlay = bench.path("qemu-overlay");
        let mut command = Command::new(program);
        let command = command.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]);
        timed(command.arg(rig.plain.disk()).arg(&overlay))?;
        let own = Samples::one(figure(fs::metadata(&overlay)?.blocks() * 512));
        bench.compare_bytes((what, &untouched), ("qemu-img's overlay", &own), None);
    } else {
        let reason = "there is no qemu-img in $PATH";
        bench.report.skip("overlays of qemu-img", reason);
    }
    let what = "on the disk, a clone that wrote 1 MiB";
    bench.compare_bytes((what, &written), copy, None);
    let least = Samples::one(figure(1 << 20));
    bench.compare_bytes((what, &written), ("this 1 MiB alone", &least), None);
    Ok(())
}

/// What files without a name, which a process has open, take on the disk.
fn overlay_bytes(pid: u64) -> anyhow::Result<u64> {
    rustix::fs::sync();
    let mut seen = std::collections::BTreeSet::new();
    let mut bytes = 0;
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let path = entry?.path();
        let target = fs::read_link(&path)?.display().to_string();
        // Not what is in memory.
        if !target.ends_with(" (deleted)") || target.starts_with("/memfd:") {
            continue;
        }
        let found = fs::metadata(&path)?;
        if seen.insert((found.dev(), found.ino())) {
            bytes += found.blocks() * 512;
        }
    }
    Ok(bytes)
}
