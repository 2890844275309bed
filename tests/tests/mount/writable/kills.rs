//! The server is killed before each of its steps, and what was acknowledged is found again.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::{Context as _, ensure};
use rustix::fs::{FallocateFlags, fallocate};

use super::{DISK, base_memory, contents, named, with_machine};
use crate::lifecycle::wait_for_end;
use crate::{Fixture, PAGE};
use snapstore_tests::harness::noise;

/// Steps that a run makes at least: fewer, and it ends nowhere.
const LEAST_STEPS: u64 = 30;

/// What may be there: each name with the contents that it may have.
type May = BTreeMap<String, Vec<Bytes>>;
/// `None` if there is no such file.
type Bytes = Option<Vec<u8>>;

/// A run of operations, of which each is done or not when the server is killed.
struct Run<'a> {
    dir: &'a Path,
    may: May,
}

#[derive(Clone, Copy)]
enum Op {
    Write(&'static str, usize, usize, u8),
    Zero(&'static str, usize, usize),
    File(&'static str, u8),
    Remove(&'static str),
    Rename(&'static str, &'static str),
    Sync(&'static str),
    Commit(&'static str),
}

const OPS: [Op; 18] = [
    Op::Write("memory.bin", 0, PAGE, 1),
    Op::Write("memory.bin", 5 * PAGE + 9, 40, 2),
    Op::Write("root.img", 39 * PAGE, PAGE + 512, 3),
    Op::File("vmstate", 4),
    Op::File("new", 5),
    Op::Commit("first"),
    Op::Write("memory.bin", 0, 10, 6),
    Op::Zero("memory.bin", 4 * PAGE, 2 * PAGE),
    Op::Sync("memory.bin"),
    Op::Write("memory.bin", 7 * PAGE, PAGE, 7),
    Op::Rename("new", "other"),
    Op::Remove("vmstate"),
    Op::Commit("second"),
    Op::Write("root.img", 0, PAGE, 8),
    Op::File("vmstate", 9),
    Op::Rename("vmstate", "other"),
    Op::Write("memory.bin", 0, PAGE, 10),
    Op::Sync("root.img"),
];

impl Run<'_> {
    /// Does one; false if the server is gone. Then it may be done or not.
    fn act(&mut self, fixture: &Fixture, op: Op) -> anyhow::Result<bool> {
        let path = |name: &str| self.dir.join(name);
        let done: io::Result<()> =
            match op {
                Op::Write(name, at, len, byte) => OpenOptions::new()
                    .write(true)
                    .open(path(name))
                    .and_then(|file| file.write_all_at(&vec![byte; len], at as u64)),
                Op::Zero(name, at, len) => OpenOptions::new()
                    .write(true)
                    .open(path(name))
                    .and_then(|file| {
                        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                        Ok(fallocate(&file, punch, at as u64, len as u64)?)
                    }),
                Op::File(name, byte) => fs::write(path(name), vec![byte; 6000]),
                Op::Remove(name) => fs::remove_file(path(name)),
                Op::Rename(from, to) => fs::rename(path(from), path(to)),
                Op::Sync(name) => fs::File::open(path(name)).and_then(|file| file.sync_all()),
                Op::Commit(tag) => {
                    let dir = self.dir.display().to_string();
                    let output = fixture.cli.run(&["commit", tag, "--mount", &dir])?;
                    let said = String::from_utf8_lossy(&output.stderr);
                    match output.status.success() && !said.contains("has not taken note") {
                        true => Ok(()),
                        false => Err(io::Error::other(said.into_owned())),
                    }
                }
            };
        self.tell(op, done.is_ok());
        Ok(done.is_ok())
    }

    /// What may be there after it.
    fn tell(&mut self, op: Op, done: bool) {
        let mut change = |name: &str, change: &dyn Fn(&Bytes) -> Bytes| {
            let may = self
                .may
                .entry(name.to_owned())
                .or_insert_with(|| vec![None]);
            let after: Vec<_> = may.iter().map(change).collect();
            match done {
                true => *may = after,
                false => may.extend(after),
            }
        };
        let set = |bytes: &Bytes, at: usize, len: usize, byte: u8| {
            let mut bytes = bytes.clone()?;
            bytes[at..at + len].fill(byte);
            Some(bytes)
        };
        match op {
            Op::Write(name, at, len, byte) => change(name, &|it| set(it, at, len, byte)),
            Op::Zero(name, at, len) => change(name, &|it| set(it, at, len, 0)),
            Op::File(name, byte) => {
                if !done {
                    // It may have been cut off, and not written yet, or not all of it.
                    change(name, &|_| Some(Vec::new()));
                    change(name, &|_| Some(vec![byte; 4096]));
                }
                change(name, &|_| Some(vec![byte; 6000]));
            }
            Op::Remove(name) => change(name, &|_| None),
            Op::Rename(from, to) => {
                let moved = self.may.get(from).and_then(|may| may.last().cloned());
                let moved = moved.flatten();
                let mut change = |name: &str, after: Bytes| {
                    let may = self
                        .may
                        .entry(name.to_owned())
                        .or_insert_with(|| vec![None]);
                    match done {
                        true => *may = vec![after],
                        false => may.push(after),
                    }
                };
                change(to, moved);
                change(from, None);
            }
            Op::Sync(_) | Op::Commit(_) => {}
        }
    }

    fn check(&self) -> anyhow::Result<()> {
        let found = contents(self.dir)?;
        for (name, _) in &found {
            ensure!(self.may.contains_key(name), "{name} was never made");
        }
        for (name, may) in &self.may {
            let is = named(&found, name);
            // Blocks of one write may be there each by itself.
            let blocks = |bytes: &[u8]| bytes.chunks(PAGE).map(<[u8]>::to_vec).collect::<Vec<_>>();
            let fits = may.iter().any(|it| it.as_deref() == is)
                || is.is_some_and(|is| {
                    blocks(is).iter().enumerate().all(|(number, block)| {
                        let mut all = may.iter().flatten().map(|it| blocks(it));
                        all.any(|it| it.len() * PAGE >= is.len() && it.get(number) == Some(block))
                    })
                });
            let len = is.map(<[u8]>::len);
            ensure!(
                fits,
                "{name} ({len:?} bytes) is none of the {} that it may be",
                may.len()
            );
        }
        Ok(())
    }
}

fn begin(dir: &Path) -> Run<'_> {
    let may = [
        ("memory.bin", Some(base_memory())),
        ("root.img", Some(noise(2, DISK))),
        ("vmstate", Some(b"as it was".to_vec())),
    ];
    let may = may.map(|(name, bytes)| (name.to_owned(), vec![bytes]));
    Run {
        dir,
        may: may.into(),
    }
}

/// Returns whether the server was killed.
fn killed_at(step: u64) -> anyhow::Result<Option<bool>> {
    let test = "what_was_acknowledged_is_found_after_any_step";
    let Some(mut fixture) = with_machine(test)? else {
        return Ok(None);
    };
    let plain = fixture.cli.clone();
    let dir = fixture.mountpoint("view")?;
    let shown = dir.display().to_string();
    fixture.cli = plain
        .clone()
        .with_env("SNAPSTORE_KILL_AT_OVERLAY_STEP", &step.to_string());
    let begun = fixture.writable_on(&["base", &shown]);
    fixture.cli = plain;
    let Ok(server) = begun else {
        // Nothing was acknowledged, and nothing keeps the next one away.
        fixture.writable_on(&["base", &shown])?;
        let mut run = begin(&dir);
        ensure!(run.act(&fixture, OPS[0])?);
        run.check()?;
        return Ok(Some(true));
    };
    let mut run = begin(&dir);
    let mut ended = false;
    for op in OPS {
        if !run.act(&fixture, op)? {
            ended = true;
            break;
        }
    }
    if !ended {
        run.check()?;
        fixture.umount(&dir)?;
        return Ok(Some(false));
    }
    wait_for_end(server)?;
    // Twice: what was found again is found again.
    let again = fixture.resume(&dir)?;
    run.check().context("found again")?;
    crate::lifecycle::kill(again)?;
    fixture.resume(&dir)?;
    run.check().context("found again twice")?;
    let now = contents(&dir)?;
    fixture.commit_view("last", &dir)?;
    ensure!(
        fixture.shown("last")? == now,
        "a commit of what was found differs"
    );
    snapstore_tests::crashing::assert_clean(fixture.cli.store())?;
    fixture.umount(&dir)?;
    ensure!(
        fixture.views()? == 0,
        "something is left in the overlays' directory"
    );
    Ok(Some(true))
}

#[test]
fn what_was_acknowledged_is_found_after_any_step() -> anyhow::Result<()> {
    let mut step = 1;
    loop {
        match killed_at(step).with_context(|| format!("killed before step {step}"))? {
            None => return Ok(()),
            Some(true) => step += 1,
            Some(false) => break,
        }
    }
    ensure!(step > LEAST_STEPS, "there are only {step} steps");
    Ok(())
}

/// What was written is not left out where a file that holds it is gone.
#[test]
fn an_overlay_that_lacks_a_file_is_told() -> anyhow::Result<()> {
    let Some(mut fixture) = with_machine("an_overlay_that_lacks_a_file_is_told")? else {
        return Ok(());
    };
    let (dir, _) = fixture.mount_rw("view", &[])?;
    super::open_both(&dir.join("memory.bin"))?.write_all_at(b"written", 0)?;
    let shown = dir.display().to_string();
    fixture.cli.ok(&["umount", "--keep", &shown])?;
    let entries: Vec<_> = fs::read_dir(fixture.path("overlays"))?.collect::<Result<_, _>>()?;
    let clone = entries.first().expect("it is kept").path().join("0");
    let away = fixture.path("away");
    for (file, says) in [
        (
            "memory.bin.0000000000000000.journal",
            "the journal of memory.bin is gone",
        ),
        ("memory.bin.data", "memory.bin.data is gone"),
    ] {
        fs::rename(clone.join(file), &away)?;
        let resumed = fixture.resume(&dir).map_err(|error| error.to_string());
        let said = resumed.expect_err("it is served");
        assert!(said.contains(says), "{said}");
        fs::rename(&away, clone.join(file))?;
    }
    fixture.resume(&dir)?;
    assert!(fs::read(dir.join("memory.bin"))?.starts_with(b"written"));
    fixture.umount(&dir)
}

/// What was written is not left out where a part of it is gone, and what is advised then helps.
#[test]
fn data_that_is_cut_off_and_files_that_are_gone_are_told() -> anyhow::Result<()> {
    let test = "data_that_is_cut_off_and_files_that_are_gone_are_told";
    let Some(mut fixture) = with_machine(test)? else {
        return Ok(());
    };
    let (dir, pid) = fixture.mount_rw("view", &[])?;
    let write = |dir: &std::path::Path| -> anyhow::Result<()> {
        super::open_both(&dir.join("memory.bin"))?.write_all_at(&[7; 3 * PAGE], 0)?;
        super::open_both(&dir.join("vmstate"))?.write_all_at(b"changed", 0)?;
        Ok(fs::write(dir.join("note"), "noted")?)
    };
    write(&dir)?;
    let refused = |fixture: &Fixture, file: &std::path::Path, says: &str| -> anyhow::Result<()> {
        let resumed = fixture.resume(&dir).map_err(|error| error.to_string());
        let said = resumed.expect_err("it is served");
        let named = said.contains(&file.display().to_string()) && said.contains("remove");
        ensure!(named && said.contains(says), "{said}");
        Ok(())
    };
    // Also of a server that was killed.
    crate::lifecycle::kill(pid)?;
    let entries: Vec<_> = fs::read_dir(fixture.path("overlays"))?.collect::<Result<_, _>>()?;
    let place = entries.first().expect("it is there").path();
    let clone = place.join("0");
    let data = clone.join("memory.bin.data");
    let good = fs::read(&data)?;
    for bytes in [0, PAGE, good.len() - 1] {
        fs::write(&data, &good[..bytes])?;
        refused(&fixture, &data, "is cut off")?;
    }
    fs::write(&data, &good)?;
    fixture.resume(&dir)?;
    let shown = dir.display().to_string();
    fixture.cli.ok(&["umount", "--keep", &shown])?;
    fs::write(&data, &good[..PAGE])?;
    refused(&fixture, &data, "is cut off")?;
    fs::write(&data, &good)?;
    for name in ["note", "vmstate"] {
        let file = clone.join("files").join(name);
        let good = fs::read(&file)?;
        fs::remove_file(&file)?;
        refused(&fixture, &file, "is gone")?;
        fs::write(&file, &good[1..])?;
        refused(&fixture, &file, "bytes, and had")?;
        fs::write(&file, good)?;
    }
    fs::remove_file(clone.join("files/note"))?;
    fs::remove_file(place.join("ended.json"))?;
    fixture.resume(&dir)?;
    ensure!(!dir.join("note").exists());
    ensure!(fs::read(dir.join("vmstate"))?.starts_with(b"changed"));
    // A file that is gone as it should be.
    fs::write(dir.join("note"), "noted")?;
    fixture.cli.ok(&["umount", "--keep", &shown])?;
    fixture.resume(&dir)?;
    fs::remove_file(dir.join("note"))?;
    fixture.cli.ok(&["umount", "--keep", &shown])?;
    fixture.resume(&dir)?;
    fixture.cli.ok(&["umount", "--keep", &shown])?;
    fs::remove_dir_all(&clone)?;
    fixture.resume(&dir)?;
    ensure!(
        fs::read(dir.join("memory.bin"))?[..PAGE] != [7; PAGE],
        "it was given up"
    );
    fixture.umount(&dir)
}

/// Of a view that was kept each part is found again, or named.
#[test]
fn what_is_damaged_after_an_end_in_order_is_told() -> anyhow::Result<()> {
    let Some(mut fixture) = with_machine("what_is_damaged_after_an_end_in_order_is_told")? else {
        return Ok(());
    };
    let (dir, _) = fixture.mount_rw("view", &[])?;
    let memory = super::open_both(&dir.join("memory.bin"))?;
    for page in [1, 3, 5] {
        memory.write_all_at(&[7; PAGE], page * PAGE as u64)?;
        memory.sync_all()?;
    }
    drop(memory);
    let content = fs::read(dir.join("memory.bin"))?;
    let shown = dir.display().to_string();
    fixture.cli.ok(&["umount", "--keep", &shown])?;
    let entries: Vec<_> = fs::read_dir(fixture.path("overlays"))?.collect::<Result<_, _>>()?;
    let place = entries.first().expect("it is kept").path();
    let journal = place.join("0/memory.bin.0000000000000000.journal");
    let view = place.join("view.json");
    let last = fs::metadata(&journal)?.len() as usize - 1;
    type Damage<'a> = &'a dyn Fn(&mut Vec<u8>);
    let cases: [(&std::path::Path, &str, Damage); 4] = [
        (&journal, "journal is damaged", &|bytes| {
            bytes.truncate(last / 2)
        }),
        (&journal, "journal is damaged", &|bytes| {
            bytes.truncate(last)
        }),
        (&journal, "journal is damaged", &|bytes| {
            bytes[last - 9] ^= 4
        }),
        (&view, "view.json is damaged", &|bytes| bytes[4] ^= 4),
    ];
    for (file, says, damage) in cases {
        let good = fs::read(file)?;
        let mut bytes = good.clone();
        damage(&mut bytes);
        fs::write(file, bytes)?;
        let resumed = fixture.resume(&dir).map_err(|error| error.to_string());
        let said = resumed.expect_err("it is served");
        assert!(said.contains(says), "{said}");
        let anew = fixture.mount_rw("view", &[]).map(drop);
        assert!(anew.is_err(), "what was written is in the way");
        fs::write(file, good)?;
    }
    for file in [&view, &place.join("0/state.json")] {
        let good = fs::read(file)?;
        fs::remove_file(file)?;
        let resumed = fixture.resume(&dir).map_err(|error| error.to_string());
        let said = resumed.expect_err("it is served");
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        assert!(said.contains(&format!("{name} is damaged")), "{said}");
        assert!(said.contains("missing") || said.contains("gone"), "{said}");
        fs::write(file, good)?;
    }
    fixture.resume(&dir)?;
    assert!(fs::read(dir.join("memory.bin"))? == content);
    fixture.umount(&dir)
}

/// A number of clones that cannot be is not believed, nor one that leaves some of them out.
#[test]
fn a_wrong_number_of_clones_is_told() -> anyhow::Result<()> {
    let Some(mut fixture) = with_machine("a_wrong_number_of_clones_is_told")? else {
        return Ok(());
    };
    let (dir, _) = fixture.mount_rw("view", &["-n", "2"])?;
    fs::write(dir.join("1/notes"), "kept")?;
    let shown = dir.display().to_string();
    fixture.cli.ok(&["umount", "--keep", &shown])?;
    let entries: Vec<_> = fs::read_dir(fixture.path("overlays"))?.collect::<Result<_, _>>()?;
    let place = entries.first().expect("it is kept").path();
    let view = place.join("view.json");
    let good = fs::read_to_string(&view)?;
    assert!(good.contains("\"count\":2"), "{good}");
    for count in ["4000000000", "10001", "0", "1"] {
        let wrong = good.replace("\"count\":2", &format!("\"count\":{count}"));
        fs::write(&view, wrong)?;
        let resumed = fixture.resume(&dir).map_err(|error| error.to_string());
        let said = resumed.expect_err("it is served");
        assert!(said.contains("view.json is damaged"), "{said}");
        assert!(fs::read_dir(&place)?.count() < 8, "directories were made");
    }
    fs::write(&view, good)?;
    fixture.resume(&dir)?;
    assert_eq!(fs::read_to_string(dir.join("1/notes"))?, "kept");
    fixture.umount(&dir)
}
