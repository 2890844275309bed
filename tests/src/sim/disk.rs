//! What of a directory would be there after a power cut.
//!
//! The files are real, on a filesystem in memory; beside them stands what has
//! been flushed. A flush of a file makes its bytes durable, and not its name; a
//! flush of a directory makes the names in it durable, and not the bytes of its
//! files. After a cut each name that was changed since its directory was
//! flushed is as it was then, or as any change since has left it, one name
//! independently of the other; each file that was not flushed since it was
//! written is as it was flushed, as it is now, or as long as now with zeros
//! at its end.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use fastrand::Rng;

/// A file or directory, whatever its name. Numbers of inodes are used again on
/// some filesystems.
type Inode = (u64, Option<SystemTime>);
type Names = BTreeMap<OsString, Inode>;
type Bytes = Arc<Vec<u8>>;

/// A directory, and what of it is durable.
pub struct Disk {
    root: PathBuf,
    files: HashMap<Inode, Bytes>,
    directories: HashMap<Inode, Names>,
    /// What names have been since their directory was flushed.
    changes: HashMap<Inode, Vec<(OsString, Option<Inode>)>>,
}

/// What a power cut does to what was not flushed.
#[derive(Clone, Copy, Debug)]
enum Cut {
    Everything,
    Names,
    Bytes,
    Any,
}

/// What a directory holds after a cut.
enum Tree {
    File(Bytes),
    Directory(BTreeMap<OsString, Tree>),
}

/// The directory as it is now.
#[derive(Default)]
struct Current {
    files: HashMap<Inode, Bytes>,
    directories: HashMap<Inode, Names>,
}

impl Disk {
    /// The directory `root`, of which all is durable.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn new(root: &Path) -> anyhow::Result<Self> {
        let mut disk = Self {
            root: root.to_owned(),
            files: HashMap::new(),
            directories: HashMap::new(),
            changes: HashMap::new(),
        };
        disk.all_is_durable()?;
        Ok(disk)
    }

    /// The name `path` was made, replaced or removed.
    pub fn changed(&mut self, path: &Path) {
        let (Some(parent), Some(name)) = (path.parent().and_then(inode), path.file_name()) else {
            return;
        };
        let now = inode(path);
        let changes = self.changes.entry(parent).or_default();
        changes.push((name.to_owned(), now));
    }

    /// The file at `path` was flushed.
    pub fn synced_file(&mut self, path: &Path) {
        if let (Some(inode), Ok(bytes)) = (inode(path), fs::read(path)) {
            self.files.insert(inode, Arc::new(bytes));
        }
    }

    /// The directory at `path` was flushed.
    pub fn synced_dir(&mut self, path: &Path) {
        if let (Some(inode), Ok(names)) = (inode(path), names(path)) {
            self.changes.remove(&inode);
            self.directories.insert(inode, names);
        }
    }

    /// The file at `path` is what it is now, durably.
    pub fn forgets(&mut self, path: &Path) {
        if let Some(parent) = path.parent() {
            self.synced_file(path);
            self.synced_dir(parent);
        }
    }

    /// Leaves in the directory what is left when the power fails now.
    ///
    /// # Errors
    /// If the directory cannot be read or written.
    pub fn cut(&mut self, rng: &mut Rng) -> anyhow::Result<()> {
        let mut current = Current::default();
        current.read(&self.root)?;
        let root = inode(&self.root).context("the store is gone")?;
        let cut = [Cut::Everything, Cut::Names, Cut::Bytes, Cut::Any, Cut::Any][rng.usize(..5)];
        let tree = self.left(root, &current, cut, rng);
        for name in names(&self.root)?.keys() {
            let path = self.root.join(name);
            if path.is_dir() {
                fs::remove_dir_all(&path)?;
            } else {
                fs::remove_file(&path)?;
            }
        }
        if let Tree::Directory(below) = tree {
            write(&self.root, &below, &mut 0)?;
        }
        self.all_is_durable()
    }

    fn left(&self, inode: Inode, current: &Current, cut: Cut, rng: &mut Rng) -> Tree {
        let is_dir =
            current.directories.contains_key(&inode) || self.directories.contains_key(&inode);
        if !is_dir {
            return Tree::File(self.left_of_file(inode, current, cut, rng));
        }
        let nothing = Names::new();
        let durable = self.directories.get(&inode).unwrap_or(&nothing);
        // A directory that has been removed holds what it held when it was flushed.
        let now = current.directories.get(&inode).unwrap_or(durable);
        let mut may_be: BTreeMap<&OsString, Vec<Option<Inode>>> = BTreeMap::new();
        for name in durable.keys().chain(now.keys()) {
            may_be.entry(name).or_default();
        }
        for (name, _) in self.changes.get(&inode).into_iter().flatten() {
            may_be.entry(name).or_default();
        }
        for (name, values) in &mut may_be {
            values.push(durable.get(*name).copied());
            for (changed, value) in self.changes.get(&inode).into_iter().flatten() {
                if changed == *name {
                    values.push(*value);
                }
            }
            values.push(now.get(*name).copied());
            values.dedup();
        }
        let mut below = BTreeMap::new();
        for (name, values) in may_be {
            let chosen = match cut {
                Cut::Everything | Cut::Names => values[0],
                Cut::Bytes => values[values.len() - 1],
                Cut::Any => values[rng.usize(..values.len())],
            };
            if let Some(chosen) = chosen {
                below.insert(name.clone(), self.left(chosen, current, cut, rng));
            }
        }
        Tree::Directory(below)
    }

    fn left_of_file(&self, inode: Inode, current: &Current, cut: Cut, rng: &mut Rng) -> Bytes {
        let durable = self.files.get(&inode).cloned().unwrap_or_default();
        let Some(now) = current.files.get(&inode) else {
            return durable;
        };
        match cut {
            _ if *now == durable => durable,
            Cut::Everything | Cut::Bytes => durable,
            Cut::Names => now.clone(),
            Cut::Any => match rng.u8(..3) {
                0 => durable,
                1 => now.clone(),
                _ => {
                    let mut torn = now.to_vec();
                    let from = rng.usize(..=torn.len());
                    torn[from..].fill(0);
                    Arc::new(torn)
                }
            },
        }
    }

    fn all_is_durable(&mut self) -> anyhow::Result<()> {
        let mut current = Current::default();
        current.read(&self.root)?;
        self.files = current.files;
        self.directories = current.directories;
        self.changes.clear();
        Ok(())
    }
}

impl Current {
    fn read(&mut self, dir: &Path) -> anyhow::Result<()> {
        let names = names(dir)?;
        for (name, inode) in &names {
            let path = dir.join(name);
            if path.is_dir() {
                self.read(&path)?;
            } else {
                self.files.insert(*inode, Arc::new(fs::read(&path)?));
            }
        }
        let inode = inode(dir).context("a directory is gone")?;
        self.directories.insert(inode, names);
        Ok(())
    }
}

/// Everything gets an age of its own, which is the same whenever this happens.
fn write(dir: &Path, below: &BTreeMap<OsString, Tree>, clock: &mut u64) -> anyhow::Result<()> {
    for (name, tree) in below {
        let path = dir.join(name);
        match tree {
            Tree::File(bytes) => fs::write(&path, bytes.as_slice())?,
            Tree::Directory(below) => {
                fs::create_dir(&path)?;
                write(&path, below, clock)?;
            }
        }
        *clock += 1;
        let age = SystemTime::UNIX_EPOCH + Duration::from_secs(*clock);
        fs::File::open(&path)?.set_modified(age)?;
    }
    Ok(())
}

fn names(dir: &Path) -> anyhow::Result<Names> {
    let mut names = Names::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if let Some(inode) = inode(&entry.path()) {
            names.insert(entry.file_name(), inode);
        }
    }
    Ok(names)
}

fn inode(path: &Path) -> Option<Inode> {
    use std::os::unix::fs::MetadataExt as _;
    let metadata = fs::symlink_metadata(path).ok()?;
    Some((metadata.ino(), metadata.created().ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All that a cut can leave of what `work` does.
    fn outcomes(work: impl Fn(&Path, &mut Disk)) -> Vec<String> {
        let mut seen = Vec::new();
        for seed in 0..200 {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join("old"), "old").unwrap();
            let mut disk = Disk::new(dir.path()).unwrap();
            work(dir.path(), &mut disk);
            disk.cut(&mut Rng::with_seed(seed)).unwrap();
            let mut left = String::new();
            for name in names(dir.path()).unwrap().keys() {
                let bytes = fs::read(dir.path().join(name)).unwrap();
                let text = String::from_utf8_lossy(&bytes).replace('\0', "0");
                left += &format!("{}:{text} ", name.to_string_lossy());
            }
            seen.push(left.trim_end().to_owned());
        }
        seen.sort();
        seen.dedup();
        seen
    }

    #[test]
    fn what_is_flushed_stays_and_all_else_may_go() {
        let flushed = outcomes(|dir, disk| {
            let new = dir.join("new");
            fs::write(&new, "ab").unwrap();
            disk.changed(&new);
            disk.synced_file(&new);
            disk.synced_dir(dir);
        });
        assert_eq!(flushed, ["new:ab old:old"]);
        let name_lost = outcomes(|dir, disk| {
            let new = dir.join("new");
            fs::write(&new, "ab").unwrap();
            disk.changed(&new);
            disk.synced_file(&new);
        });
        assert_eq!(name_lost, ["new:ab old:old", "old:old"]);
        let bytes_lost = outcomes(|dir, disk| {
            let new = dir.join("new");
            fs::write(&new, "ab").unwrap();
            disk.changed(&new);
            disk.synced_dir(dir);
        });
        assert_eq!(
            bytes_lost,
            [
                "new: old:old",
                "new:00 old:old",
                "new:a0 old:old",
                "new:ab old:old"
            ]
        );
    }

    #[test]
    fn a_replaced_name_is_the_old_file_or_the_new_one() {
        let outcomes = outcomes(|dir, disk| {
            let (old, new) = (dir.join("old"), dir.join("new"));
            fs::write(&new, "ab").unwrap();
            disk.changed(&new);
            disk.synced_file(&new);
            fs::rename(&new, &old).unwrap();
            disk.changed(&new);
            disk.changed(&old);
        });
        assert!(outcomes.contains(&"old:old".to_owned()));
        assert!(outcomes.contains(&"old:ab".to_owned()));
        assert!(!outcomes.iter().any(|left| !left.contains("old:")));
        let removed = outcomes_of_removal();
        assert_eq!(removed, ["", "old:old"]);
    }

    fn outcomes_of_removal() -> Vec<String> {
        outcomes(|dir, disk| {
            fs::remove_file(dir.join("old")).unwrap();
            disk.changed(&dir.join("old"));
        })
    }
}
