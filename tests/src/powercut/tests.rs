#![allow(clippy::unwrap_used)]

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::process::Command;

use rustix::fs::FallocateFlags;
use tempfile::TempDir;

use super::*;

/// A disk mounted at a directory of its own. Fields are dropped in order.
struct Rig {
    mount: MountedDisk,
    disk: Disk,
    _dir: TempDir,
}

impl Rig {
    fn mount(disk: Disk) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self {
            mount: disk.mount(dir.path()).unwrap(),
            disk,
            _dir: dir,
        }
    }

    /// An empty disk, or nothing if there is no FUSE here.
    fn new() -> Option<Self> {
        match unavailable() {
            None => Some(Self::mount(Disk::new())),
            Some(reason) => {
                // A test's thread has its name.
                let test = std::thread::current();
                println!("SKIPPED {}: {reason}", test.name().unwrap_or("powercut"));
                None
            }
        }
    }

    fn cut(&self, lost: Lost) -> Self {
        Self::mount(self.disk.after_power_cut(lost))
    }

    fn at(&self, name: &str) -> PathBuf {
        self.mount.path().join(name)
    }

    fn write(&self, name: &str, data: &str) {
        fs::write(self.at(name), data).unwrap();
    }

    fn sync(&self, name: &str) {
        File::open(self.at(name)).unwrap().sync_all().unwrap();
    }

    fn durable(&self, name: &str, data: &str) {
        self.write(name, data);
        self.sync(name);
        self.sync("");
    }

    fn read(&self, name: &str) -> Option<String> {
        match fs::read_to_string(self.at(name)) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => panic!("{name}: {error}"),
        }
    }

    #[track_caller]
    fn expect(&self, name: &str, text: Option<&str>) {
        assert_eq!(self.read(name).as_deref(), text, "{name}");
    }

    fn names(&self, dir: &str) -> Vec<String> {
        let entries = fs::read_dir(self.at(dir)).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        names
    }
}

const KINDS: [Lost; 3] = [Lost::All, Lost::DataOnly, Lost::Nothing];

#[test]
fn unsynced_data_is_lost() {
    let Some(rig) = Rig::new() else { return };
    rig.durable("a", "old");
    rig.write("b", "never synced");
    rig.sync("");
    let mut a = OpenOptions::new().append(true).open(rig.at("a")).unwrap();
    a.write_all(b" and new").unwrap();
    drop(a);
    rig.expect("a", Some("old and new"));
    for lost in [Lost::All, Lost::DataOnly] {
        let left = rig.cut(lost);
        left.expect("a", Some("old"));
        left.expect("b", Some(""));
    }
    let left = rig.cut(Lost::Nothing);
    left.expect("a", Some("old and new"));
    left.expect("b", Some("never synced"));
    // A kill syncs nothing: the power may still fail later.
    left.cut(Lost::All).expect("a", Some("old"));
}

#[test]
fn overwritten_and_truncated_data_comes_back() {
    let Some(rig) = Rig::new() else { return };
    rig.durable("a", "0123456789");
    let a = OpenOptions::new().write(true).open(rig.at("a")).unwrap();
    a.write_all_at(b"xx", 2).unwrap();
    a.set_len(4).unwrap();
    a.set_len(6).unwrap();
    rig.expect("a", Some("01xx\0\0"));
    rig.cut(Lost::All).expect("a", Some("0123456789"));
    a.sync_data().unwrap();
    a.write_all_at(b"unsynced", 20).unwrap();
    rig.cut(Lost::All).expect("a", Some("01xx\0\0"));
    rig.cut(Lost::DataOnly).expect("a", Some("01xx\0\0"));
}

#[test]
fn o_dsync_writes_are_durable() {
    let Some(rig) = Rig::new() else { return };
    let dsync = OFlags::DSYNC.bits().cast_signed();
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).custom_flags(dsync);
    let mut a = options.open(rig.at("a")).unwrap();
    a.write_all(b"text").unwrap();
    rig.sync("");
    rig.cut(Lost::All).expect("a", Some("text"));
}

#[test]
fn file_sync_leaves_the_name_unsynced() {
    let Some(rig) = Rig::new() else { return };
    rig.write("a", "text");
    rig.sync("a");
    rig.cut(Lost::All).expect("a", None);
    rig.cut(Lost::DataOnly).expect("a", Some("text"));
    rig.cut(Lost::Nothing).expect("a", Some("text"));
    rig.sync("");
    rig.cut(Lost::All).expect("a", Some("text"));
}

#[test]
fn rename_without_directory_sync_returns_to_the_old_file() {
    let Some(rig) = Rig::new() else { return };
    rig.durable("a", "old");
    rig.write("tmp", "new");
    rig.sync("tmp");
    fs::rename(rig.at("tmp"), rig.at("a")).unwrap();
    rig.expect("a", Some("new"));
    assert_eq!(rig.names(""), ["a"]);
    let left = rig.cut(Lost::All);
    left.expect("a", Some("old"));
    assert_eq!(left.names(""), ["a"]);
    rig.cut(Lost::DataOnly).expect("a", Some("new"));
}

#[test]
fn rename_without_file_sync_loses_the_contents() {
    let Some(rig) = Rig::new() else { return };
    rig.durable("a", "old");
    rig.write("tmp", "new");
    fs::rename(rig.at("tmp"), rig.at("a")).unwrap();
    rig.cut(Lost::DataOnly).expect("a", Some(""));
    rig.cut(Lost::All).expect("a", Some("old"));
    rig.sync("");
    rig.cut(Lost::All).expect("a", Some(""));
}

#[test]
fn replacing_with_all_syncs_survives() {
    let Some(rig) = Rig::new() else { return };
    rig.durable("a", "old");
    rig.write("tmp", "new");
    rig.sync("tmp");
    fs::rename(rig.at("tmp"), rig.at("a")).unwrap();
    rig.sync("");
    for lost in KINDS {
        let left = rig.cut(lost);
        left.expect("a", Some("new"));
        assert_eq!(left.names(""), ["a"]);
        assert_eq!(fs::metadata(left.at("a")).unwrap().nlink(), 1);
    }
}

#[test]
fn unlink_without_directory_sync_comes_back() {
    let Some(rig) = Rig::new() else { return };
    rig.durable("a", "text");
    let ino = fs::metadata(rig.at("a")).unwrap().ino();
    fs::remove_file(rig.at("a")).unwrap();
    rig.expect("a", None);
    let left = rig.cut(Lost::All);
    left.expect("a", Some("text"));
    assert_eq!(fs::metadata(left.at("a")).unwrap().ino(), ino);
    rig.cut(Lost::DataOnly).expect("a", None);
    // The old entry is still there for a cut after a kill.
    rig.cut(Lost::Nothing)
        .cut(Lost::All)
        .expect("a", Some("text"));
    rig.sync("");
    rig.cut(Lost::All).expect("a", None);
}

#[test]
fn unlinked_file_stays_readable_while_open() {
    let Some(rig) = Rig::new() else { return };
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true);
    let mut a = options.open(rig.at("a")).unwrap();
    let again = options.open(rig.at("a")).unwrap_err();
    assert_eq!(again.kind(), ErrorKind::AlreadyExists);
    a.write_all(b"text").unwrap();
    fs::remove_file(rig.at("a")).unwrap();
    a.write_all(b" more").unwrap();
    a.sync_all().unwrap();
    let mut text = String::new();
    a.seek(SeekFrom::Start(0)).unwrap();
    a.read_to_string(&mut text).unwrap();
    assert_eq!(text, "text more");
    assert_eq!(a.metadata().unwrap().nlink(), 0);
    assert_eq!(a.metadata().unwrap().len(), 9);
    for lost in KINDS {
        rig.cut(lost).expect("a", None);
    }
}

#[test]
fn rename_over_a_file_keeps_its_open_handles() {
    let Some(rig) = Rig::new() else { return };
    rig.write("a", "old");
    rig.write("b", "new");
    fs::create_dir(rig.at("dir")).unwrap();
    let old = File::open(rig.at("a")).unwrap();
    fs::rename(rig.at("b"), rig.at("a")).unwrap();
    rig.expect("a", Some("new"));
    rig.expect("b", None);
    let mut buffer = [0; 3];
    old.read_exact_at(&mut buffer, 0).unwrap();
    assert_eq!(&buffer, b"old");
    let error = fs::rename(rig.at("a"), rig.at("dir")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::IsADirectory);
    let error = fs::rename(rig.at("dir"), rig.at("a")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotADirectory);
}

#[test]
fn rename_between_directories_needs_both_synced() {
    let Some(rig) = Rig::new() else { return };
    for dir in ["from", "to"] {
        fs::create_dir(rig.at(dir)).unwrap();
    }
    for name in ["from/a", "from/b"] {
        rig.write(name, "text");
        rig.sync(name);
    }
    rig.sync("from");
    rig.sync("");
    fs::rename(rig.at("from/a"), rig.at("to/a")).unwrap();
    let left = rig.cut(Lost::All);
    left.expect("from/a", Some("text"));
    left.expect("to/a", None);
    rig.sync("to");
    let left = rig.cut(Lost::All);
    left.expect("from/a", Some("text"));
    left.expect("to/a", Some("text"));
    assert_eq!(fs::metadata(left.at("to/a")).unwrap().nlink(), 2);
    rig.sync("from");
    rig.cut(Lost::All).expect("from/a", None);

    fs::rename(rig.at("from/b"), rig.at("to/b")).unwrap();
    rig.sync("from");
    let left = rig.cut(Lost::All);
    left.expect("from/b", None);
    left.expect("to/b", None);
}

#[test]
fn new_directories_need_their_parent_synced() {
    let Some(rig) = Rig::new() else { return };
    fs::create_dir_all(rig.at("x/y")).unwrap();
    rig.write("x/y/a", "text");
    rig.sync("x/y/a");
    rig.sync("x/y");
    rig.sync("x");
    assert!(rig.cut(Lost::All).names("").is_empty());
    rig.cut(Lost::DataOnly).expect("x/y/a", Some("text"));
    rig.sync("");
    let left = rig.cut(Lost::All);
    left.expect("x/y/a", Some("text"));
    assert_eq!(fs::metadata(left.at("x")).unwrap().nlink(), 3);
    left.expect("x/y/../y/a", Some("text"));

    let error = fs::remove_dir(rig.at("x")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DirectoryNotEmpty);
    fs::remove_dir_all(rig.at("x")).unwrap();
    rig.cut(Lost::All).expect("x/y/a", Some("text"));
    rig.sync("");
    assert!(rig.cut(Lost::All).names("").is_empty());
    // Nothing but the root is kept when nothing is needed any more.
    assert_eq!(rig.disk.state().free_blocks(), State::new().free_blocks());
}

#[test]
fn half_synced_moves_of_directories_end() {
    let Some(rig) = Rig::new() else { return };
    for dir in ["a", "b"] {
        fs::create_dir(rig.at(dir)).unwrap();
    }
    rig.sync("");
    fs::rename(rig.at("b"), rig.at("a/b")).unwrap();
    rig.sync("a");
    fs::rename(rig.at("a/b"), rig.at("b")).unwrap();
    fs::rename(rig.at("a"), rig.at("b/a")).unwrap();
    rig.sync("b");
    assert_eq!(rig.cut(Lost::All).names(""), ["a", "b"]);
    assert_eq!(rig.cut(Lost::DataOnly).names("b"), ["a"]);
}

#[test]
fn sizes_links_and_allocation_are_reported() {
    let Some(rig) = Rig::new() else { return };
    let a = File::create(rig.at("a")).unwrap();
    let allocate = |mode, offset, len| rustix::fs::fallocate(&a, mode, offset, len);
    a.write_all_at(&[7; 5000], 0).unwrap();
    allocate(FallocateFlags::KEEP_SIZE, 0, 100_000).unwrap();
    fs::hard_link(rig.at("a"), rig.at("b")).unwrap();
    let stat = a.metadata().unwrap();
    assert_eq!((stat.len(), stat.blocks(), stat.nlink()), (5000, 16, 2));
    allocate(FallocateFlags::empty(), 0, 6000).unwrap();
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    allocate(punch, 1, 4998).unwrap();
    let data = fs::read(rig.at("b")).unwrap();
    let ones: Vec<_> = (0..6000).filter(|&at| data[at] == 7).collect();
    assert_eq!((data.len(), ones), (6000, vec![0, 4999]));
    let space = rustix::fs::statvfs(rig.at("")).unwrap();
    assert!(space.f_bavail > 0 && space.f_bavail < space.f_blocks);
    let error = a.set_len(1 << 40).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FileTooLarge);
}

#[test]
fn long_directories_are_listed_while_they_shrink() {
    let Some(rig) = Rig::new() else { return };
    for index in 0..2000 {
        rig.write(&format!("a-rather-long-name-{index}"), "");
    }
    assert_eq!(rig.names("").len(), 2000);
    for entry in fs::read_dir(rig.at("")).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    assert!(rig.names("").is_empty());
}

#[test]
fn mappings_and_locks_work() {
    use rustix::fs::{FlockOperation, flock};
    let Some(rig) = Rig::new() else { return };
    rig.write("a", "text");
    let (one, two) = (File::open(rig.at("a")), File::open(rig.at("a")));
    let (one, two) = (one.unwrap(), two.unwrap());
    flock(&one, FlockOperation::NonBlockingLockExclusive).unwrap();
    assert!(flock(&two, FlockOperation::NonBlockingLockExclusive).is_err());
    drop(one);
    flock(&two, FlockOperation::NonBlockingLockExclusive).unwrap();
    // The loader maps a program privately, which needs no unsafe code here.
    fs::copy("/bin/true", rig.at("true")).unwrap();
    assert!(Command::new(rig.at("true")).status().unwrap().success());
}

#[test]
fn busy_mounts_are_detached() {
    let Some(rig) = Rig::new() else { return };
    rig.write("a", "text");
    let mut a = File::open(rig.at("a")).unwrap();
    let Rig { mount, disk, _dir } = rig;
    let dir = mount.path().to_owned();
    drop(mount);
    assert!(fs::read_dir(&dir).unwrap().next().is_none());
    let mut text = String::new();
    a.read_to_string(&mut text).unwrap();
    assert_eq!(text, "text");
    // The directory can be used again at once, also for what is left.
    let next = disk.after_power_cut(Lost::Nothing).mount(&dir).unwrap();
    assert_eq!(fs::read(dir.join("a")).unwrap(), b"text");
    drop(a);
    assert_eq!(fs::read(dir.join("a")).unwrap(), b"text");
    // Somebody else unmounts it.
    unmount(&dir, UnmountFlags::empty()).unwrap();
    drop(next);
}
