//! A control group of a machine's own, where they are delegated: what bounds its memory
//! and tasks, and what ends with all that is in it (cgroup v2, cgroups(7)).
//!
//! It is made below the group that this process is in, or, if that can give none of what is
//! asked for, beside it where that is delegated: a group with processes cannot divide
//! memory, so those who delegate put them into one of several (systemd, `DelegateSubgroup=`).
//! What cannot be had is told, and no error: who starts machines often has no group to divide.
//!
//! Deliberately absent: cgroup v1, and groups that were not delegated to whoever starts
//! machines (the rule of one writer).

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::limits::Limits;
use super::report::Confinement;

/// What the names of machines' groups begin with.
const PREFIX: &str = "snapstore-";
const CONTROLLERS: [&str; 2] = ["memory", "pids"];

/// What a machine takes beside its guest's memory, a frozen copy of that, and the maps of
/// its disks, in bytes. Files that it has read or written count, too, but give way.
const ALLOWANCE_BYTES: u64 = 256 << 20;

/// How long processes of an ended machine may take to be gone, by themselves at first: one
/// that ends has something to say of it.
const PATIENCE: Duration = Duration::from_secs(2);
const BY_THEMSELVES: Duration = Duration::from_millis(500);
const RETRY: Duration = Duration::from_millis(2);

/// Where this process is in the hierarchy.
struct Place {
    /// Where the hierarchy is mounted.
    mount: PathBuf,
    /// This process's group, there.
    own: PathBuf,
}

/// Where this process makes groups for machines that it starts.
pub struct Groups(PathBuf);

impl Groups {
    /// `None` where there can be none: each machine then finds out why.
    #[must_use]
    pub fn find() -> Option<Self> {
        let (parent, _) = Place::of_this_process().ok()?.parent();
        Some(Self(parent))
    }

    /// A group for the machine `name`, if it can be had. `record` as of [`Group::enter`],
    /// which the process that begins there calls all the same.
    pub fn make(&self, name: &str, record: impl FnOnce(&Path) -> io::Result<()>) -> Option<Made> {
        let dir = make_dir(&self.0, name, record).ok()?;
        let fd = fs::File::open(&dir).map(OwnedFd::from);
        fd.inspect_err(|_| drop(fs::remove_dir(&dir)))
            .map(|fd| Made { dir, fd })
            .ok()
    }
}

/// A group that was made for a process that is about to be started in it. To begin there
/// costs nothing; to enter it later takes the kernel 10 ms and more, since it waits for all
/// that look at the process's group (`cgroup_threadgroup_rwsem`).
pub struct Made {
    dir: PathBuf,
    fd: OwnedFd,
}

impl Made {
    /// The group's directory, for `CLONE_INTO_CGROUP` (clone(2)).
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Removes it: nothing could be started in it.
    pub(crate) fn discard(self) {
        let _ = fs::remove_dir(self.dir);
    }
}

/// Makes the directory of a group for the machine `name`. It is recorded first: of a process
/// that is killed between the two a record stays that leads nowhere, and no group that
/// nobody knows.
fn make_dir(
    parent: &Path,
    name: &str,
    record: impl FnOnce(&Path) -> io::Result<()>,
) -> io::Result<PathBuf> {
    let dir = parent.join(format!("{PREFIX}{name}-{}", std::process::id()));
    record(&dir)?;
    fs::create_dir(&dir)?;
    Ok(dir)
}

/// Whether this is the directory of a group that was made for the machine `name`.
fn is_for(dir: &Path, name: &str) -> bool {
    let maker = || {
        let dir = dir.file_name()?.to_str()?;
        dir.strip_prefix(PREFIX)?
            .strip_prefix(name)?
            .strip_prefix('-')
    };
    maker().is_some_and(|maker| maker.parse::<u32>().is_ok())
}

/// The group that this process has entered, if there is one.
pub struct Group {
    entered: Option<Entered>,
    /// Why it bounds less than it should.
    lacks: Option<String>,
}

struct Entered {
    dir: PathBuf,
    /// Where the process was before; `None` if it was started in the group.
    from: Option<PathBuf>,
    controllers: Vec<&'static str>,
}

impl Group {
    /// Makes a group for the machine `name` and enters it with this process, unless it was
    /// started in one that was [`Made`] for that. `record` is told its directory before it
    /// is there: whoever clears away after the machine calls [`remove_group`] with it.
    pub fn enter(name: &str, record: impl FnOnce(&Path) -> io::Result<()>) -> Self {
        let place = match Place::of_this_process() {
            Ok(place) => place,
            Err(lacks) => return Self::none(lacks),
        };
        let (parent, controllers, dir, from);
        if is_for(&place.own, name) {
            parent = place.own.parent().unwrap_or(&place.mount).to_owned();
            controllers = enable(&parent);
            (dir, from) = (place.own, None);
        } else {
            (parent, controllers) = place.parent();
            let entered = make_dir(&parent, name, record).and_then(|dir| {
                fs::write(dir.join("cgroup.procs"), "0")
                    .inspect_err(|_| drop(fs::remove_dir(&dir)))
                    .map(|()| dir)
            });
            dir = match entered {
                Ok(dir) => dir,
                Err(error) => {
                    let parent = parent.display();
                    return Self::none(format!("{parent} is not delegated: {error}"));
                }
            };
            from = Some(place.own);
        }
        let missing: Vec<_> = CONTROLLERS
            .into_iter()
            .filter(|controller| !controllers.contains(controller))
            .collect();
        let lacks = (!missing.is_empty())
            .then(|| format!("{} gives no {}", parent.display(), missing.join(", no ")));
        Self {
            entered: Some(Entered {
                dir,
                from,
                controllers,
            }),
            lacks,
        }
    }

    fn none(lacks: String) -> Self {
        Self {
            entered: None,
            lacks: Some(lacks),
        }
    }

    /// Bounds the group, and says what it bounds.
    pub(super) fn limit(&mut self, limits: &Limits, report: &mut Confinement) {
        if let Some(entered) = &self.entered {
            report.cgroup = Some(entered.dir.display().to_string());
            let bounds = [
                ("memory", "memory.max", "memory_bytes", memory_bytes(limits)),
                ("pids", "pids.max", "group_tasks", limits.tasks()),
            ];
            for (controller, file, name, bound) in bounds {
                if !entered.controllers.contains(&controller) {
                    continue;
                }
                match fs::write(entered.dir.join(file), bound.to_string()) {
                    Ok(()) => drop(report.limits.insert(name.to_owned(), bound)),
                    Err(error) => self.lacks = Some(format!("{file} cannot be set: {error}")),
                }
            }
        }
        report.cgroup_lacks.clone_from(&self.lacks);
    }

    /// The process stays in the group until it ends.
    pub fn keep(mut self) {
        self.entered = None;
    }
}

impl Drop for Group {
    /// What is not kept is left and removed: the machine was not built.
    fn drop(&mut self) {
        if let Some(entered) = &self.entered
            && let Some(from) = entered.from.clone().or_else(Place::of_starter)
        {
            // Otherwise its supervisor does.
            let _ = fs::write(from.join("cgroup.procs"), "0")
                .and_then(|()| fs::remove_dir(&entered.dir));
        }
    }
}

/// Twice the guest's memory, since a frozen copy comes to as much if the guest writes all
/// of it meanwhile; the maps of overlays (1/1024 of what they name) and the host's page
/// tables; and an allowance.
fn memory_bytes(limits: &Limits) -> u64 {
    let twice = limits.memory_bytes.saturating_mul(2);
    let maps = (limits.memory_bytes / 128).saturating_add(limits.disk_bytes / 1000);
    twice.saturating_add(maps).saturating_add(ALLOWANCE_BYTES)
}

/// Ends what is left of a machine in the group that was recorded for it, and removes the
/// group. One that is not there is no error.
///
/// # Errors
/// It is not a group of a machine's, this process is in it, or its processes do not end.
pub fn remove_group(dir: &Path) -> io::Result<()> {
    let name = dir.file_name().map(|name| name.to_string_lossy());
    if !name.is_some_and(|name| name.starts_with(PREFIX)) {
        return Err(ErrorKind::InvalidInput.into());
    }
    let began = Instant::now();
    loop {
        let error = match fs::remove_dir(dir) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => error,
            Ok(()) => return Ok(()),
        };
        let inside = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
        let own = std::process::id().to_string();
        if inside.lines().any(|pid| pid == own) || began.elapsed() > PATIENCE {
            return Err(error);
        }
        // Frozen copies that their machine could not end any more. Before Linux 5.14 they
        // end by themselves.
        if began.elapsed() > BY_THEMSELVES {
            let _ = fs::write(dir.join("cgroup.kill"), "1");
        }
        std::thread::sleep(RETRY);
    }
}

impl Place {
    fn of_this_process() -> Result<Self, String> {
        Self::of("/proc/self/cgroup")
    }

    /// Of the process whose groups this file of `/proc` tells.
    fn of(groups: &str) -> Result<Self, String> {
        let read = |path| fs::read_to_string(path).map_err(|error| format!("{path}: {error}"));
        Self::parse(&read("/proc/self/mountinfo")?, &read(groups)?)
    }

    /// The group of the process that started this one.
    fn of_starter() -> Option<PathBuf> {
        let starter = rustix::process::getppid()?.as_raw_nonzero();
        Self::of(&format!("/proc/{starter}/cgroup"))
            .ok()
            .map(|it| it.own)
    }

    fn parse(mounts: &str, groups: &str) -> Result<Self, String> {
        let none = || "cgroup v2 is not mounted".to_owned();
        let (root, mount) = mounts.lines().find_map(cgroup2_mount).ok_or_else(none)?;
        let own = groups.lines().find_map(|line| line.strip_prefix("0::"));
        let own = Path::new(own.ok_or_else(none)?);
        let below = own
            .strip_prefix(root)
            .ok()
            .filter(|below| !below.starts_with(".."))
            .ok_or_else(|| format!("this process's group {} is not mounted", own.display()))?;
        Ok(Self {
            // Without a slash at its end if it is the root.
            own: mount.join(below).components().collect(),
            mount: mount.to_owned(),
        })
    }

    /// The group to make one below, and what that bounds.
    fn parent(&self) -> (PathBuf, Vec<&'static str>) {
        let own = (self.own.clone(), enable(&self.own));
        if own.1.is_empty()
            && self.own != self.mount
            && let Some(beside) = self.own.parent()
            && is_delegated(beside)
        {
            let beside = (beside.to_owned(), enable(beside));
            if !beside.1.is_empty() {
                return beside;
            }
        }
        own
    }
}

/// The root and the place of a mount of cgroup v2, from its line in `mountinfo` (proc(5)).
fn cgroup2_mount(line: &str) -> Option<(&str, &Path)> {
    let (mount, kind) = line.split_once(" - ")?;
    if kind.split(' ').next() != Some("cgroup2") {
        return None;
    }
    let mut fields = mount.split(' ').skip(3);
    Some((fields.next()?, Path::new(fields.next()?)))
}

/// Of the controllers that are wanted those that groups below `parent` have; those that
/// are not enabled there yet are, where that can be.
fn enable(parent: &Path) -> Vec<&'static str> {
    let has = |file: &str, controller: &str| {
        let list = fs::read_to_string(parent.join(file)).unwrap_or_default();
        list.split_whitespace().any(|it| it == controller)
    };
    CONTROLLERS
        .into_iter()
        .filter(|controller| {
            let file = "cgroup.subtree_control";
            has(file, controller)
                || has("cgroup.controllers", controller)
                    && fs::write(parent.join(file), format!("+{controller}")).is_ok()
                    && has(file, controller)
        })
        .collect()
}

/// Whether somebody said that groups are made there by others (systemd.resource-control(5)).
fn is_delegated(group: &Path) -> bool {
    ["trusted.delegate", "user.delegate"]
        .into_iter()
        .any(|name| {
            let mut value = [0; 8];
            let length = rustix::fs::getxattr(group, name, &mut value);
            length.is_ok_and(|length| &value[..length] == b"1")
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
        24 1 0:22 / /proc rw - proc proc rw\n\
        30 24 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
        31 24 0:27 /pod /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n";

    fn limits() -> Limits {
        Limits {
            cpus: 2,
            memory_bytes: 1 << 30,
            disk_bytes: 8 << 30,
        }
    }

    /// A directory with the files of a group that can give these.
    fn group(dir: &Path, controllers: &str, enabled: &str) {
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join("cgroup.controllers"), controllers).unwrap();
        fs::write(dir.join("cgroup.subtree_control"), enabled).unwrap();
    }

    #[test]
    fn a_group_is_found_by_what_is_mounted() {
        let place = |own| Place::parse(MOUNTS, &format!("4:memory:/x\n0::{own}\n"));
        let own = place("/pod/app/main").unwrap().own;
        assert_eq!(own, Path::new("/sys/fs/cgroup/app/main"));
        let own = place("/pod").unwrap().own;
        assert_eq!(own.as_os_str(), "/sys/fs/cgroup");
        for elsewhere in ["/other", "/../x", "/podded"] {
            assert!(place(elsewhere).is_err(), "{elsewhere}");
        }
        assert!(Place::parse(MOUNTS, "4:memory:/x\n").is_err());
        let v1: String = MOUNTS
            .lines()
            .take(2)
            .map(|line| line.to_owned() + "\n")
            .collect();
        assert!(Place::parse(&v1, "0::/pod\n").is_err());
    }

    #[test]
    fn a_group_is_made_where_there_is_something_to_give() {
        let dir = tempfile::tempdir().unwrap();
        let mount = dir.path().to_owned();
        let own = mount.join("main");
        let place = Place {
            mount: mount.clone(),
            own: own.clone(),
        };
        group(&mount, "cpu memory pids", "memory pids");
        group(&own, "cpu memory pids", "cpu pids memory");
        assert_eq!(place.parent(), (own.clone(), CONTROLLERS.to_vec()));
        group(&own, "cpu", "");
        // Nobody said that the one above is to be divided.
        assert_eq!(place.parent(), (own.clone(), Vec::new()));
        let flags = rustix::fs::XattrFlags::empty();
        if let Err(error) = rustix::fs::setxattr(&mount, "user.delegate", b"1", flags) {
            println!("SKIPPED a_group_is_made_where_there_is_something_to_give: {error}");
            return;
        }
        assert_eq!(place.parent(), (mount.clone(), CONTROLLERS.to_vec()));
        group(&mount, "memory", "memory");
        assert_eq!(place.parent(), (mount.clone(), vec!["memory"]));
        group(&mount, "", "");
        assert_eq!(place.parent(), (own, Vec::new()));
    }

    #[test]
    fn a_group_bounds_what_it_can_and_says_what_it_cannot() {
        let dir = tempfile::tempdir().unwrap();
        let mut group = Group {
            entered: Some(Entered {
                dir: dir.path().to_owned(),
                from: Some(dir.path().to_owned()),
                controllers: vec!["pids"],
            }),
            lacks: Some("no memory".to_owned()),
        };
        let mut report = Confinement::default();
        group.limit(&limits(), &mut report);
        let said = fs::read_to_string(dir.path().join("pids.max")).unwrap();
        assert_eq!(said, limits().tasks().to_string());
        assert_eq!(report.limits["group_tasks"], limits().tasks());
        assert!(!dir.path().join("memory.max").exists());
        assert_eq!(report.cgroup_lacks.as_deref(), Some("no memory"));
        group.entered.as_mut().unwrap().controllers = CONTROLLERS.to_vec();
        group.limit(&limits(), &mut report);
        let said = fs::read_to_string(dir.path().join("memory.max")).unwrap();
        assert_eq!(said, report.limits["memory_bytes"].to_string());
        let wanted = (2 << 30) + (8 << 20) + (8 << 30) / 1000 + ALLOWANCE_BYTES;
        assert_eq!(report.limits["memory_bytes"], wanted);
        group.keep();
    }

    #[test]
    fn a_group_is_that_of_one_machine() {
        let is_for = |dir: &str| is_for(Path::new(dir), "web-1");
        assert!(is_for("/x/snapstore-web-1-77"));
        for other in [
            "/",
            "/x/snapstore-web-1",
            "/x/snapstore-web-1-77-8",
            "/x/snapstore-web-12-7",
            "/x/web-1-7",
        ] {
            assert!(!is_for(other), "{other}");
        }
        // It is recorded before it is there, and one that cannot be recorded is not made.
        let parent = tempfile::tempdir().unwrap();
        let made = make_dir(parent.path(), "web-1", |dir| {
            assert!(!dir.exists());
            Ok(())
        });
        let made = made.unwrap();
        assert!(made.is_dir() && super::is_for(&made, "web-1"));
        make_dir(parent.path(), "other", |_| Err(ErrorKind::Other.into())).unwrap_err();
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1);
    }

    #[test]
    fn only_groups_of_machines_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        assert!(remove_group(dir.path()).is_err());
        assert!(dir.path().exists());
        let group = dir.path().join("snapstore-web-7");
        remove_group(&group).unwrap();
        fs::create_dir(&group).unwrap();
        remove_group(&group).unwrap();
        assert!(!group.exists());
    }
}
