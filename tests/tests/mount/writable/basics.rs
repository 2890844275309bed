//! One view: written, committed, written again.

use std::fs::{self, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::process::{Pid, Signal, kill_process};
use snapstore_tests::harness::noise;
use snapstore_tests::shared_map::SharedMap;

use super::{DISK, PAGES, base_memory, contents, named, open_both, with_machine};
use crate::PAGE;

#[test]
fn what_is_written_is_committed_and_nothing_else() -> anyhow::Result<()> {
    let Some(mut fixture) = with_machine("what_is_written_is_committed_and_nothing_else")? else {
        return Ok(());
    };
    let (dir, _) = fixture.mount_rw("view", &[])?;
    assert_eq!(contents(&dir)?, fixture.shown("base")?);
    let (mut memory, mut disk) = (base_memory(), noise(2, DISK));

    let file = open_both(&dir.join("memory.bin"))?;
    for (at, len) in [(5, 10), (3 * PAGE - 7, 2 * PAGE), (20 * PAGE, PAGE)] {
        file.write_all_at(&noise(9, len), at as u64)?;
        memory[at..at + len].copy_from_slice(&noise(9, len));
    }
    let root = open_both(&dir.join("root.img"))?;
    root.write_all_at(&[7; 700], (DISK - 700) as u64)?;
    disk[DISK - 700..].fill(7);
    fs::write(dir.join("vmstate"), b"as it is")?;
    fs::write(dir.join("config.json"), b"{}")?;
    assert_eq!(contents(&dir)?, fixture.view_of(&memory, &disk));

    let committed = fixture.commit_view("next", &dir)?;
    let changed = |name: &str| {
        let images = committed["images"].as_array().into_iter().flatten();
        let mut images = images.filter(|image| image["name"] == name);
        images.next().map(|image| image["changed_pages"].clone())
    };
    assert_eq!(changed("memory"), Some(5.into()));
    assert_eq!(changed("root"), Some(2.into()));
    assert_eq!(committed["parent_tag"], "base");
    assert_eq!(fixture.shown("next")?, fixture.view_of(&memory, &disk));

    // It goes on as the child.
    file.write_all_at(b"later", 40 * PAGE as u64)?;
    memory[40 * PAGE..40 * PAGE + 5].copy_from_slice(b"later");
    let committed = fixture.commit_view("third", &dir)?;
    assert_eq!(committed["parent_tag"], "next");
    assert_eq!(fixture.shown("third")?, fixture.view_of(&memory, &disk));
    assert_eq!(contents(&dir)?, fixture.view_of(&memory, &disk));
    drop((file, root));
    fixture.umount(&dir)?;
    let base = fixture.shown("base")?;
    assert_eq!(named(&base, "memory.bin"), Some(&base_memory()[..]));
    Ok(())
}

impl crate::Fixture {
    fn view_of(&self, memory: &[u8], disk: &[u8]) -> Vec<(String, Vec<u8>)> {
        let files: [(&str, &[u8]); 4] = [
            ("config.json", b"{}"),
            ("memory.bin", memory),
            ("root.img", disk),
            ("vmstate", b"as it is"),
        ];
        let owned = files.map(|(name, bytes)| (name.to_owned(), bytes.to_vec()));
        owned.to_vec()
    }
}

#[test]
fn images_keep_their_length_and_their_names() -> anyhow::Result<()> {
    let Some(mut fixture) = with_machine("images_keep_their_length_and_their_names")? else {
        return Ok(());
    };
    let (dir, _) = fixture.mount_rw("view", &[])?;
    let path = dir.join("memory.bin");
    let length = (PAGES * PAGE) as u64;
    // Before anybody has opened it for writing, and after.
    for _ in 0..2 {
        let is_refused = |done: std::io::Result<()>| {
            let kind = done.map_err(|error| error.kind());
            assert_eq!(kind, Err(ErrorKind::PermissionDenied));
        };
        is_refused(fs::remove_file(&path));
        is_refused(fs::rename(&path, dir.join("else")));
        fs::write(dir.join("file"), b"x")?;
        is_refused(fs::rename(dir.join("file"), &path));
        is_refused(fs::write(&path, b"x"));
        let file = OpenOptions::new().write(true).open(&path)?;
        is_refused(file.set_len(length - 1));
        is_refused(file.set_len(length + 4096));
        file.set_len(length)?;
        let beyond = file.write_all_at(b"xy", length - 1);
        let beyond = beyond.map_err(|error| error.kind());
        assert_eq!(beyond, Err(ErrorKind::FileTooLarge));
        assert_eq!(fs::metadata(&path)?.len(), length);
        fs::remove_file(dir.join("file"))?;
    }
    let made = fs::write(dir.join("manifest.json"), b"{}");
    assert_eq!(
        made.map_err(|error| error.kind()),
        Err(ErrorKind::PermissionDenied)
    );
    fixture.umount(&dir)
}

#[test]
fn holes_can_be_made_and_are_told() -> anyhow::Result<()> {
    let Some(mut fixture) = with_machine("holes_can_be_made_and_are_told")? else {
        return Ok(());
    };
    let (dir, _) = fixture.mount_rw("view", &[])?;
    let file = open_both(&dir.join("memory.bin"))?;
    let mut memory = base_memory();
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    for (flags, at, len) in [
        (punch, 2 * PAGE, 3 * PAGE),
        (punch, 10 * PAGE + 100, PAGE),
        (FallocateFlags::ZERO_RANGE, 50 * PAGE - 1, 2 * PAGE + 2),
    ] {
        fallocate(&file, flags, at as u64, len as u64)?;
        memory[at..at + len].fill(0);
    }
    file.write_all_at(&[5; 10], 25 * PAGE as u64)?;
    memory[25 * PAGE..25 * PAGE + 10].fill(5);
    let reserve = fallocate(&file, FallocateFlags::KEEP_SIZE, 0, 4096);
    assert_eq!(reserve, Err(rustix::io::Errno::OPNOTSUPP));
    // Pages of zeros are holes, and no others.
    let mut data = vec![false; PAGES];
    let mut from = 0;
    while let Ok(start) = seek(&file, SeekFrom::Data(from)) {
        let end = seek(&file, SeekFrom::Hole(start))?;
        let pages = usize::try_from(start)? / PAGE..usize::try_from(end)?.div_ceil(PAGE);
        data[pages].fill(true);
        from = end;
    }
    let pages = memory.chunks(PAGE);
    let expected: Vec<_> = pages.map(|page| page.iter().any(|it| *it != 0)).collect();
    assert_eq!(data, expected);
    fixture.commit_view("holes", &dir)?;
    let shown = fixture.shown("holes")?;
    assert!(named(&shown, "memory.bin") == Some(&memory[..]));
    drop(file);
    fixture.umount(&dir)
}

#[test]
fn what_is_uncommitted_is_told_and_given_up_or_kept() -> anyhow::Result<()> {
    let test = "what_is_uncommitted_is_told_and_given_up_or_kept";
    let Some(mut fixture) = with_machine(test)? else {
        return Ok(());
    };
    let (dir, _) = fixture.mount_rw("view", &[])?;
    let shown = dir.display().to_string();
    let write = |byte: u8| -> anyhow::Result<()> {
        let file = OpenOptions::new().write(true).open(dir.join("root.img"))?;
        Ok(file.write_all_at(&[byte; 100], 4000)?)
    };
    write(1)?;
    let kept = fixture.cli.json(&["umount", "--keep", &shown])?;
    assert_eq!(kept["uncommitted_bytes"], 2 * PAGE);
    assert!(kept["kept"].is_string(), "{kept}");
    assert_eq!(fixture.views()?, 1);
    fixture.resume(&dir)?;
    let mut disk = noise(2, DISK);
    disk[4000..4100].fill(1);
    assert!(fs::read(dir.join("root.img"))? == disk);
    // Nothing is left of one that is committed,
    fixture.commit_view("kept", &dir)?;
    let clean = fixture.cli.ok(&["umount", &shown])?;
    assert!(!clean.contains("given up"), "{clean}");
    // nor of one that is given up.
    fixture.writable_on(&["kept", &shown])?;
    write(2)?;
    let told = fixture.cli.ok(&["umount", &shown])?;
    assert!(told.contains("given up: 8.0 KiB"), "{told}");
    let error = fixture
        .cli
        .fails(3, &["mount", "--rw", "--resume", &shown])?;
    assert!(error.contains("no view"), "{error}");
    let shown = fixture.shown("kept")?;
    assert!(named(&shown, "root.img") == Some(&disk[..]));
    Ok(())
}

#[test]
fn names_that_changed_and_files_that_no_commit_takes_are_kept() -> anyhow::Result<()> {
    let test = "names_that_changed_and_files_that_no_commit_takes_are_kept";
    let Some(mut fixture) = with_machine(test)? else {
        return Ok(());
    };
    let (dir, _) = fixture.mount_rw("view", &[])?;
    let shown = dir.display().to_string();
    let keep = |fixture: &crate::Fixture, what: &str| -> anyhow::Result<()> {
        let kept = fixture.cli.json(&["umount", "--keep", &shown])?;
        assert!(kept["kept"].is_string(), "{what}: {kept}");
        fixture.resume(&dir)?;
        Ok(())
    };
    fs::remove_file(dir.join("vmstate"))?;
    keep(&fixture, "a removal")?;
    assert!(!dir.join("vmstate").exists());
    fs::write(dir.join("one"), "1")?;
    fs::write(dir.join("two"), "2")?;
    fixture.commit_view("named", &dir)?;
    for (from, to) in [("one", "three"), ("two", "one"), ("three", "two")] {
        fs::rename(dir.join(from), dir.join(to))?;
    }
    keep(&fixture, "names that were exchanged")?;
    assert_eq!(fs::read(dir.join("one"))?, b"2");
    fixture.commit_view("exchanged", &dir)?;
    let clean = fixture.cli.ok(&["umount", &shown])?;
    assert!(!clean.contains("given up"), "{clean}");
    // No snapshot has a file of such a name.
    fixture.writable_on(&["exchanged", &shown])?;
    fs::write(dir.join("my notes.txt"), "noted")?;
    fixture.commit_view("without-notes", &dir)?;
    keep(&fixture, "a file that is in no commit")?;
    assert_eq!(fs::read(dir.join("my notes.txt"))?, b"noted");
    let told = fixture.cli.ok(&["umount", &shown])?;
    assert!(told.contains("given up"), "{told}");
    Ok(())
}

#[test]
fn clones_share_what_they_do_not_write() -> anyhow::Result<()> {
    let Some(mut fixture) = with_machine("clones_share_what_they_do_not_write")? else {
        return Ok(());
    };
    let (dir, _) = fixture.mount_rw("view", &["-n", "3"])?;
    assert_eq!(crate::names(&dir)?, ["0", "1", "2"]);
    let path = |clone: usize| dir.join(clone.to_string()).join("memory.bin");
    let inode = |clone| Ok::<_, anyhow::Error>(fs::metadata(path(clone))?.ino());
    assert_eq!([inode(0)?, inode(1)?], [inode(2)?; 2]);
    let reader = fs::File::open(path(1))?;
    let file = OpenOptions::new().write(true).open(path(1))?;
    file.write_all_at(b"one", 0)?;
    assert_eq!(inode(0)?, inode(2)?);
    assert_ne!(inode(0)?, inode(1)?);
    let mut old = [0; 3];
    reader.read_exact_at(&mut old, 0)?;
    assert_eq!(old, base_memory()[..3], "who had it open sees it as it was");
    assert_eq!(&fs::read(path(1))?[..3], b"one");
    assert_eq!(&fs::read(path(2))?[..3], &base_memory()[..3]);
    fixture.commit_view("one", &dir.join("1"))?;
    fixture.commit_view("two", &dir.join("2"))?;
    let [one, two] = [fixture.shown("one")?, fixture.shown("two")?];
    let first = |files| named(files, "memory.bin").map(|it| it[..3].to_vec());
    assert_eq!(first(&one), Some(b"one".to_vec()));
    assert_eq!(named(&two, "memory.bin"), Some(&base_memory()[..]));
    let whole = dir.display().to_string();
    let error = fixture
        .cli
        .fails(1, &["commit", "all", "--mount", &whole])?;
    assert!(error.contains("name one of them"), "{error}");
    drop((file, reader));
    fixture.umount(&dir)
}

#[test]
fn who_writes_too_much_is_told_and_nothing_is_hurt() -> anyhow::Result<()> {
    let test = "who_writes_too_much_is_told_and_nothing_is_hurt";
    let Some(mut fixture) = with_machine(test)? else {
        return Ok(());
    };
    let (dir, _) = fixture.mount_rw("view", &["--overlay-limit", "64K"])?;
    let file = OpenOptions::new()
        .write(true)
        .open(dir.join("memory.bin"))?;
    let mut memory = base_memory();
    file.write_all_at(&[1; 16 * PAGE], 0)?;
    memory[..16 * PAGE].fill(1);
    let full = file.write_all_at(&[2; PAGE], 50 * PAGE as u64);
    let full = full.map_err(|error| error.kind());
    assert_eq!(full, Err(ErrorKind::StorageFull));
    let full = fs::write(dir.join("vmstate"), b"more").map_err(|error| error.kind());
    assert_eq!(full, Err(ErrorKind::StorageFull));
    // What is there can be written again, and committed; then there is room.
    file.write_all_at(&[3; PAGE], 0)?;
    memory[..PAGE].fill(3);
    fixture.commit_view("full", &dir)?;
    file.write_all_at(&[2; PAGE], 50 * PAGE as u64)?;
    let shown = fixture.shown("full")?;
    assert!(named(&shown, "memory.bin") == Some(&memory[..]));
    drop(file);
    fixture.umount(&dir)
}

/// Else whoever stores to a mapping waits for the server again and again.
#[test]
fn stores_through_mappings_may_wait_as_those_of_a_disk() -> anyhow::Result<()> {
    let test = "stores_through_mappings_may_wait_as_those_of_a_disk";
    let Some(mut fixture) = with_machine(test)? else {
        return Ok(());
    };
    let (dir, _) = fixture.mount_rw("view", &[])?;
    let device = fs::metadata(&dir)?.dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let limit = format!("/sys/class/bdi/{major}:{minor}/strict_limit");
    match fs::read_to_string(&limit) {
        Ok(strict) if rustix::process::geteuid().is_root() => assert_eq!(strict.trim(), "0"),
        Ok(_) => snapstore_tests::harness::skipped(test, "it takes root"),
        Err(error) => snapstore_tests::harness::skipped(test, &format!("{limit}: {error}")),
    }
    fixture.umount(&dir)
}

/// What the kernel had to give up is in no commit, which says so.
#[test]
fn stores_that_cannot_be_kept_keep_a_commit_away() -> anyhow::Result<()> {
    let test = "stores_that_cannot_be_kept_keep_a_commit_away";
    let Some(mut fixture) = with_machine(test)? else {
        return Ok(());
    };
    let (dir, _) = fixture.mount_rw("view", &["--overlay-limit", "64K"])?;
    let file = open_both(&dir.join("memory.bin"))?;
    let map = SharedMap::new(&file, PAGES * PAGE)?;
    map.store(0, &vec![9; 40 * PAGE]);
    assert!(map.sync().is_err(), "there is no room for all of it");
    let shown = dir.display().to_string();
    let commit = ["commit", "next", "--mount", &shown];
    let error = fixture.cli.fails(1, &commit)?;
    assert!(error.contains("could not be kept"), "{error}");
    // Once all of it is something else, that is committed.
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&file, punch, 0, 40 * PAGE as u64)?;
    fixture.commit_view("next", &dir)?;
    let mut memory = base_memory();
    memory[..40 * PAGE].fill(0);
    let committed = fixture.shown("next")?;
    assert!(named(&committed, "memory.bin") == Some(&memory[..]));
    drop((map, file));
    fixture.umount(&dir)
}

#[test]
fn a_file_takes_no_name_of_an_image() -> anyhow::Result<()> {
    let Some(mut fixture) = with_machine("a_file_takes_no_name_of_an_image")? else {
        return Ok(());
    };
    let (dir, _) = fixture.mount_rw("view", &[])?;
    fs::write(dir.join("other"), b"of its own")?;
    // Images are called so; they are shown as memory.bin and root.img.
    for name in ["memory", "root"] {
        let made = fs::write(dir.join(name), b"x").map_err(|error| error.kind());
        assert_eq!(made, Err(ErrorKind::PermissionDenied), "{name}");
        let renamed = fs::rename(dir.join("other"), dir.join(name));
        let renamed = renamed.map_err(|error| error.kind());
        assert_eq!(renamed, Err(ErrorKind::PermissionDenied), "{name}");
    }
    fixture.commit_view("next", &dir)?;
    let shown = fixture.shown("next")?;
    let names: Vec<&str> = shown.iter().map(|(name, _)| &name[..]).collect();
    assert_eq!(names, ["memory.bin", "other", "root.img", "vmstate"]);
    fixture.umount(&dir)
}

#[test]
fn a_commit_says_that_the_server_does_not_answer() -> anyhow::Result<()> {
    let Some(mut fixture) = with_machine("a_commit_says_that_the_server_does_not_answer")? else {
        return Ok(());
    };
    let (dir, pid) = fixture.mount_rw("view", &[])?;
    fs::write(dir.join("note"), b"written")?;
    let server = Pid::from_raw(pid.cast_signed()).expect("it has a number");
    kill_process(server, Signal::STOP)?;
    let shown = dir.display().to_string();
    let output = fixture.cli.run(&["commit", "next", "--mount", &shown])?;
    kill_process(server, Signal::CONT)?;
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(5), "{said}");
    assert!(said.contains("does not answer"), "{said}");
    fixture.commit_view("next", &dir)?;
    fixture.umount(&dir)
}

#[test]
fn a_view_whose_server_does_not_answer_is_unmounted_and_kept() -> anyhow::Result<()> {
    let test = "a_view_whose_server_does_not_answer_is_unmounted_and_kept";
    let Some(mut fixture) = with_machine(test)? else {
        return Ok(());
    };
    let (dir, pid) = fixture.mount_rw("view", &[])?;
    fs::write(dir.join("note"), b"written")?;
    let server = Pid::from_raw(pid.cast_signed()).expect("it has a number");
    kill_process(server, Signal::STOP)?;
    let shown = dir.display().to_string();
    let output = fixture.cli.run(&["umount", &shown])?;
    kill_process(server, Signal::CONT)?;
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(said.contains("did not answer"), "{said}");
    assert!(said.contains("--resume"), "{said}");
    crate::lifecycle::wait_for_end(pid)?;
    fixture.resume(&dir)?;
    assert_eq!(fs::read(dir.join("note"))?, b"written");
    fixture.umount(&dir)
}

#[test]
fn a_mount_does_not_hide_its_own_overlay() -> anyhow::Result<()> {
    let Some(mut fixture) = with_machine("a_mount_does_not_hide_its_own_overlay")? else {
        return Ok(());
    };
    let dir = fixture.mountpoint("view")?;
    let within = dir.join("overlays");
    fs::create_dir(&within)?;
    for overlays in [&dir, &within] {
        let (overlays, shown) = (overlays.display().to_string(), dir.display().to_string());
        let mount = ["mount", "--rw", "--overlay-dir", &overlays, "base", &shown];
        let output = fixture.cli.run(&mount)?;
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("hide"), "{said}");
    }
    assert_eq!(crate::names(&dir)?, ["overlays"]);
    Ok(())
}
