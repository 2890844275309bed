//! Where snapshots can be mounted, and where not.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context as _, ensure};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount};
use snapstore_store::mount_table;
use snapstore_tests::harness::{noise, program, skipped};

use crate::lifecycle::{shows_base, with_base};
use crate::{Fixture, PAGE};

/// Names that somebody may well give a directory.
pub const NAMES: &[&[u8]] = &[
    b"plain",
    b"a,b",
    b"a b",
    b"a\nb",
    b"a\\b",
    b"a\\054b,ro,fsname=x",
    b"lat\xe9in",
    b"#[0] 'x' \"y\" $(z) \t%s",
];

/// The program on a store of any name.
fn snapstore(store: &Path, arguments: &[&OsStr]) -> anyhow::Result<Output> {
    let mut command = Command::new(program()?);
    Ok(command.arg("--store").arg(store).args(arguments).output()?)
}

fn succeeds(output: &Output) -> anyhow::Result<()> {
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {said}", output.status);
    Ok(())
}

/// How many mounts are on a directory.
fn mounted_on(dir: &Path) -> anyhow::Result<usize> {
    let table = mount_table()?;
    Ok(table.iter().filter(|entry| entry.dir == dir).count())
}

#[test]
fn a_mount_never_hides_its_own_store() -> anyhow::Result<()> {
    let Some(fixture) = with_base("a_mount_never_hides_its_own_store")? else {
        return Ok(());
    };
    let store = fixture.cli.store().to_owned();
    std::os::unix::fs::symlink(fixture.dir.path(), fixture.path("link"))?;
    fs::create_dir(fixture.path("bound"))?;
    let bound = mount_bind(fixture.dir.path(), fixture.path("bound"));
    let mut places = vec![
        store.clone(),
        fixture.dir.path().to_owned(),
        "/".into(),
        store.join("packs"),
        store.join("leases"),
        fixture.path("link"),
        fixture.path("link/store"),
    ];
    match bound {
        Ok(()) => places.extend([fixture.path("bound"), fixture.path("bound/store")]),
        Err(error) => skipped(
            "a_mount_never_hides_its_own_store (bind mounts)",
            &error.to_string(),
        ),
    }
    for place in places {
        let before = mounted_on(&place)?;
        let error = fixture
            .cli
            .fails(1, &["mount", "base", &place.display().to_string()])?;
        ensure!(error.contains("choose another directory"), "{error}");
        // As a server alone, too: it is what decides.
        let arguments = [
            "mount",
            "--foreground",
            "base",
            &place.display().to_string(),
        ];
        fixture.cli.fails(1, &arguments)?;
        ensure!(mounted_on(&place)? == before, "{}", place.display());
    }
    if bound.is_ok() {
        unmount(fixture.path("bound"), UnmountFlags::DETACH)?;
    }
    Ok(())
}

/// The store's own name may be a link, and what the link is in may be hidden by
/// nobody either.
#[test]
fn a_mount_hides_no_way_to_its_store() -> anyhow::Result<()> {
    let Some(fixture) = with_base("a_mount_hides_no_way_to_its_store")? else {
        return Ok(());
    };
    fs::create_dir(fixture.path("ways"))?;
    let way = fixture.path("ways/store");
    std::os::unix::fs::symlink(fixture.cli.store(), &way)?;
    let ways = fixture.path("ways");
    let arguments = ["mount".as_ref(), "base".as_ref(), ways.as_os_str()];
    let ended = snapstore(&way, &arguments)?;
    ensure!(ended.status.code() == Some(1), "{}", ended.status);
    ensure!(mounted_on(&ways)? == 0);
    Ok(())
}

#[test]
fn a_mount_never_hides_the_runtime_directory() -> anyhow::Result<()> {
    let Some(fixture) = with_base("a_mount_never_hides_the_runtime_directory")? else {
        return Ok(());
    };
    let runtime = fixture.path("run/deep/snapstore");
    fs::create_dir_all(&runtime)?;
    let cli = fixture
        .cli
        .clone()
        .with_env("SNAPSTORE_RUNTIME_DIR", &runtime.display().to_string());
    for dir in ["run", "run/deep", "run/deep/snapstore"] {
        let dir = fixture.path(dir).display().to_string();
        let error = cli.fails(1, &["mount", "base", &dir])?;
        ensure!(error.contains("would hide"), "{error}");
    }
    Ok(())
}

#[test]
fn stores_and_mount_points_may_be_called_anything() -> anyhow::Result<()> {
    if Fixture::new("stores_and_mount_points_may_be_called_anything")?.is_none() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    any_names(dir.path(), &|store, arguments| snapstore(store, arguments))
}

/// Mounts, reads, looks up and unmounts under all names.
fn any_names(
    dir: &Path,
    run: &dyn Fn(&Path, &[&OsStr]) -> anyhow::Result<Output>,
) -> anyhow::Result<()> {
    let image = dir.join("image");
    fs::write(&image, noise(1, 8 * PAGE))?;
    for name in NAMES {
        let path = |what: &str| -> PathBuf {
            let mut path = OsString::from(what);
            path.push(OsStr::from_bytes(name));
            dir.join(path)
        };
        let (store, mnt) = (path("store "), path("mnt "));
        let run = |arguments: &[&OsStr]| run(&store, arguments);
        succeeds(&run(&["init".as_ref()])?)?;
        let commit = ["commit", "base", "--memory"].map(OsStr::new);
        succeeds(&run(&[&commit[..], &[image.as_os_str()]].concat())?)?;
        let user = fs::metadata(&store)?;
        fs::create_dir(&mnt)?;
        let owner = std::os::unix::fs::MetadataExt::uid(&user);
        std::os::unix::fs::chown(&mnt, Some(owner), None)?;
        let mount = ["mount".as_ref(), "base".as_ref(), mnt.as_os_str()];
        succeeds(&run(&mount)?).with_context(|| format!("{mnt:?}"))?;
        // Once more is busy, whatever the name is.
        let again = run(&mount)?;
        ensure!(again.status.code() == Some(5), "{mnt:?}: {}", again.status);
        for more in [&[][..], &["--json"]] {
            let show = ["show".as_ref(), "--mount".as_ref(), mnt.as_os_str()];
            let more = more.iter().map(OsStr::new);
            let output = run(&show.into_iter().chain(more).collect::<Vec<_>>())?;
            succeeds(&output).with_context(|| format!("{mnt:?}"))?;
        }
        let umount = run(&["umount".as_ref(), mnt.as_os_str()]);
        succeeds(&umount?).with_context(|| format!("{mnt:?}"))?;
        ensure!(
            fs::read_dir(&mnt)?.next().is_none(),
            "{mnt:?} is still mounted"
        );
    }
    Ok(())
}

#[test]
fn names_of_other_mounts_do_not_matter() -> anyhow::Result<()> {
    let test = "names_of_other_mounts_do_not_matter";
    let Some(mut fixture) = with_base(test)? else {
        return Ok(());
    };
    for (number, name) in NAMES.iter().enumerate() {
        let odd = fixture.dir.path().join(OsStr::from_bytes(name));
        fs::create_dir(&odd)?;
        // Its source is as odd.
        let made = mount(
            OsStr::from_bytes(name),
            &odd,
            "tmpfs",
            MountFlags::empty(),
            None,
        );
        if let Err(error) = made {
            skipped(test, &error.to_string());
            return Ok(());
        }
        fixture.mounts.push(odd);
        let (dir, _) = fixture.mount(Some("base"), &format!("mnt{number}"))?;
        shows_base(&dir)?;
        fixture.umount(&dir)?;
    }
    Ok(())
}

#[test]
fn of_several_mounts_at_once_one_succeeds() -> anyhow::Result<()> {
    let Some(mut fixture) = with_base("of_several_mounts_at_once_one_succeeds")? else {
        return Ok(());
    };
    let dir = fixture.mountpoint("mnt")?;
    let shown = dir.display().to_string();
    for _ in 0..5 {
        let started: Vec<_> = (0..6)
            .map(|_| {
                let mut command = fixture.cli.command(&["mount", "base", &shown])?;
                command.stderr(std::process::Stdio::piped());
                Ok(command.stdout(std::process::Stdio::null()).spawn()?)
            })
            .collect::<anyhow::Result<_>>()?;
        let mut codes = Vec::new();
        for child in started {
            codes.push(child.wait_with_output()?.status.code());
        }
        codes.sort_unstable();
        ensure!(codes == [0, 5, 5, 5, 5, 5].map(Some), "{codes:?}");
        ensure!(mounted_on(&dir)? == 1, "{} mounts", mounted_on(&dir)?);
        shows_base(&dir)?;
        fixture.umount(&dir)?;
        ensure!(mounted_on(&dir)? == 0);
    }
    Ok(())
}
