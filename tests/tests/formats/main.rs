//! Stores of every format there was, byte for byte as the program of their time
//! left them: they are read, verified, committed to, collected and repaired.
//!
//! `tests/fixtures/FORMAT/hashes.txt` says what they hold, a line an image: store,
//! tag, image, length, BLAKE3. `make.py` beside it says what is odd about each.
//! `store-v1` was left by the first program, `store-v1-node-deltas` by one that
//! stored deltas of nodes in encoding 3 and files of any length, `store-v2` by the first
//! one of format 2, `store-v2-patches` by the first one that made patches. `stream-v1` is what a store of `store-v2` was exported as.

mod fixture;
mod upgrades;

use std::fs;
use std::path::Path;

use anyhow::{Context as _, ensure};
use snapstore_store::{Store, StoreFormat};
use snapstore_tests::harness::{Cli, noise, skipped};
use snapstore_vmm::state::MachineState;

use fixture::{Fixture, list};

/// Stores whose snapshots can all be read as they are.
const OF_FORMAT_1: [&str; 7] = [
    "store-v1/chain",
    "store-v1/delta-on-delta",
    "store-v1/dead-delta",
    "store-v1/condemned",
    "store-v1/large-pages",
    "store-v1-node-deltas/node-deltas",
    "store-v1-node-deltas/repacked",
];

/// The same of format 2; `upgrading` is half upgraded.
const OF_FORMAT_2: [&str; 6] = [
    "store-v2/chain",
    "store-v2/repacked",
    "store-v2/upgraded",
    "store-v2/upgrading",
    "store-v2-patches/chain",
    "store-v2-patches/optimized",
];

fn all() -> impl Iterator<Item = &'static str> {
    OF_FORMAT_1.into_iter().chain(OF_FORMAT_2)
}

#[test]
fn they_are_read_and_verified() -> anyhow::Result<()> {
    for name in all() {
        let fixture = Fixture::unpack(name)?;
        fixture.holds_all().context(name)?;
        fixture.is_undamaged().context(name)?;
        fixture.holds_all().context(name)?;
    }
    Ok(())
}

#[test]
fn they_are_committed_to_and_collected() -> anyhow::Result<()> {
    for name in all() {
        let fixture = Fixture::unpack(name)?;
        fixture.can_be_committed_to().context(name)?;
        fixture.cli.ok(&["rm", "new"])?;
        for _ in 0..2 {
            fixture.cli.ok(&["gc"]).context(name)?;
        }
        fixture.holds_all().context(name)?;
        fixture.cli.ok(&["rm", "known"])?;
        fixture.can_be_committed_to().context(name)?;
    }
    Ok(())
}

/// They go through a stream of today into a store of either format, and so does a
/// stream of each version that there was.
#[test]
fn they_are_exported_and_imported() -> anyhow::Result<()> {
    let into = |fixture: &Fixture, stream: &str, format| -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let first = &Store::open(fixture.cli.store())?;
        let path = dir.path().join("store");
        drop(Store::create_in_format(&path, first.page_size(), format)?);
        let cli = Cli::new(&path);
        cli.ok(&["import", stream])?;
        for expected in &fixture.images {
            expected.is_in(&Store::open(&path)?)?;
        }
        if format == StoreFormat::Two {
            ensure!(Store::open(&path)?.tags()? == fixture.ids()?, "ids changed");
        }
        cli.ok(&["verify", "--read-data"]).map(drop)
    };
    for name in all() {
        let fixture = Fixture::unpack(name)?;
        let stream = fixture.dir.path().join("stream").display().to_string();
        let tags = fixture.ids()?;
        let tags: Vec<&str> = tags.keys().map(String::as_str).collect();
        let arguments = [&["export", "-o", &stream], &tags[..]].concat();
        fixture.cli.ok(&arguments).context(name)?;
        for format in [StoreFormat::One, StoreFormat::Two] {
            into(&fixture, &stream, format).context(name)?;
        }
    }
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let stream = fixtures.join("stream-v1/chain.snapstream");
    let fixture = Fixture::unpack("store-v2/chain")?;
    for format in [StoreFormat::One, StoreFormat::Two] {
        into(&fixture, &stream.display().to_string(), format).context("stream-v1")?;
    }
    Ok(())
}

#[test]
fn they_lose_tags_and_are_collected() -> anyhow::Result<()> {
    let fixture = Fixture::unpack("store-v1/chain")?;
    fixture.cli.ok(&["rm", "base+1"])?;
    fixture.cli.ok(&["gc", "--keep-percent", "100"])?;
    fixture.cli.ok(&["gc", "--keep-percent", "100"])?;
    fixture.holds(|tag| tag != "base+1")?;
    fixture.is_undamaged()?;
    let fixture = Fixture::unpack("store-v1/condemned")?;
    let packs = || -> anyhow::Result<usize> { Ok(list(&fixture.cli.store().join("packs"))?.len()) };
    assert_eq!(packs()?, 4, "three packs and one that was never finished");
    fixture.cli.ok(&["gc"])?;
    fixture.cli.ok(&["gc"])?;
    assert_eq!(packs()?, 1, "what was condemned is deleted");
    fixture.holds_all()?;
    fixture.is_undamaged()
}

#[test]
fn they_are_repaired() -> anyhow::Result<()> {
    for name in all() {
        let fixture = Fixture::unpack(name)?;
        fs::remove_dir_all(fixture.cli.store().join("index"))?;
        fixture.cli.ok(&["repair"]).context(name)?;
        fixture.holds_all().context(name)?;
        fixture.can_be_committed_to().context(name)?;
    }
    Ok(())
}

/// A collection of the old program took the standalone copy of a page away, and left
/// a delta in its place, on which another one is based. All bytes are there: `verify`
/// says that `c3` cannot be read, and `repair` stores the page standalone again.
#[test]
fn a_delta_on_a_delta_is_found_and_mended() -> anyhow::Result<()> {
    let fixture = Fixture::unpack("store-v1/delta-on-delta-collected")?;
    fixture.holds(|tag| tag == "c1")?;
    let verified = fixture.cli.run(&["verify", "--read-data"])?;
    let text = String::from_utf8_lossy(&verified.stdout).into_owned();
    ensure!(verified.status.code() == Some(4), "{text}");
    ensure!(text.contains("needed by c3"), "{text}");
    ensure!(fixture.holds_all().is_err(), "c3 can be read");
    fixture.cli.ok(&["repair"])?;
    fixture.holds_all()?;
    fixture.cli.ok(&["verify", "--read-data"])?;
    fixture.cli.ok(&["gc"])?;
    fixture.holds_all()
}

/// The state of a machine is decoded, whatever CPU this host has.
#[test]
fn a_machine_can_be_restored() -> anyhow::Result<()> {
    const TEST: &str = "a_machine_can_be_restored";
    let fixture = Fixture::unpack("store-v1/machine")?;
    fixture.is_undamaged()?;
    let store = Store::open(fixture.cli.store())?;
    for tag in ["booted", "again"] {
        let manifest = store.manifest(store.resolve(tag)?)?;
        let image = manifest.image("vmstate").context("no vmstate")?;
        let bytes = store.read_file_image(image, 16 << 20)?;
        assert_eq!(bytes[..12], *b"SNAPVMST\x01\0\0\0", "{tag}");
        let state = MachineState::decode(&bytes)?;
        assert_eq!(state.memory_bytes, 16 << 20, "{tag}");
        // What it is written as today is the same machine.
        let again = MachineState::decode(&state.encode())?;
        assert_eq!(again.vcpus, state.vcpus, "{tag}");
        assert_eq!(again.devices, state.devices, "{tag}");
    }
    for device in ["/dev/kvm", "/dev/fuse"] {
        let opened = fs::File::options().read(true).write(true).open(device);
        if let Err(error) = opened {
            skipped(TEST, &format!("{device}: {error}"));
            return Ok(());
        }
    }
    let runtime = fixture.dir.path().join("run").display().to_string();
    let cli = fixture
        .cli
        .clone()
        .with_env("SNAPSTORE_RUNTIME_DIR", &runtime);
    let restored = cli.run(&["restore", "again", "--detach", "--name", "vm"])?;
    let error = String::from_utf8_lossy(&restored.stderr).into_owned();
    if !restored.status.success() {
        // Only what the guest was told of its CPU may stand in the way.
        let is_of_cpu = error.contains("CPU")
            && (error.contains("feature") || error.contains("the same vendor"));
        ensure!(is_of_cpu, "{error}");
        skipped(TEST, error.trim());
        return Ok(());
    }
    let committed = cli.run(&["commit", "later", "--vm", "vm"]);
    cli.ok(&["stop", "vm"])?;
    let committed = committed?;
    ensure!(committed.status.success(), "{committed:?}");
    // Of the format of today, and as good as the old one.
    cli.ok(&["restore", "later", "--detach", "--name", "vm"])?;
    cli.ok(&["stop", "vm"])?;
    Ok(())
}

/// What a store of format 1 gets is of format 1: the first programs read all of it.
#[test]
fn they_stay_what_they_are() -> anyhow::Result<()> {
    for name in OF_FORMAT_1 {
        let fixture = Fixture::unpack(name)?;
        let config = fs::read(fixture.cli.store().join("config"))?;
        let before = list(&fixture.cli.store().join("packs"))?;
        fixture.can_be_committed_to().context(name)?;
        fixture.changes_little()?;
        fixture.cli.ok(&["gc", "--keep-percent", "100"])?;
        for pack in list(&fixture.cli.store().join("packs"))? {
            let bytes = fs::read(&pack)?;
            ensure!(
                bytes[8..12] == [1, 0, 0, 0],
                "{} is of another version",
                pack.display()
            );
            if !before.contains(&pack) {
                let of_nodes = kinds_and_encodings(&bytes)?;
                let of_nodes = of_nodes.iter().any(|byte| [0x21, 0x31].contains(byte));
                ensure!(!of_nodes, "{name}: {} has deltas of nodes", pack.display());
            }
        }
        ensure!(fs::read(fixture.cli.store().join("config"))? == config);
        ensure!(!fixture.cli.store().join("config-copy").exists());
        // The first programs know RocksDB, and no runs beside it.
        fixture.has_no_runs().context(name)?;
        fixture.holds_all()?;
        fixture.is_read_by_the_first_program(name)?;
        fixture.cli.ok(&["repair"])?;
        fixture.has_no_runs().context(name)?;
    }
    Ok(())
}

/// Kind and encoding of each chunk of a pack of version 1.
fn kinds_and_encodings(pack: &[u8]) -> anyhow::Result<Vec<u8>> {
    let seal = pack.len() - 64;
    let footer = usize::try_from(u64::from_le_bytes(pack[seal..seal + 8].try_into()?))?;
    Ok(pack[footer..seal]
        .chunks_exact(24)
        .map(|it| it[20])
        .collect())
}

#[test]
fn labels_and_parents_are_read() -> anyhow::Result<()> {
    let fixture = Fixture::unpack("store-v1/chain")?;
    let store = Store::open(fixture.cli.store())?;
    let mut parent = None;
    for (step, tag) in ["base", "base+1", "base+2"].into_iter().enumerate() {
        let id = store.resolve(tag)?;
        let manifest = store.manifest(id)?;
        assert_eq!(manifest.parent, parent, "{tag}");
        assert_eq!(manifest.first_tag, tag);
        assert_eq!(manifest.labels["step"], step.to_string());
        assert_eq!(manifest.labels["os"], "none");
        parent = Some(id);
    }
    Ok(())
}

/// In a store of format 1 a commit's entries have no place but RocksDB, which who merges
/// its files has for himself.
#[test]
fn a_commit_waits_for_who_merges_the_index() -> anyhow::Result<()> {
    let fixture = Fixture::unpack("store-v1/chain")?;
    let memory = fixture.dir.path().join("memory");
    fs::write(&memory, noise(77, 16 * 4096))?;
    let lock = fixture.cli.store().join("index/LOCK");
    let merging = fs::File::options().read(true).write(true).open(lock)?;
    let held = rustix::fs::FlockOperation::NonBlockingLockExclusive;
    rustix::fs::fcntl_lock(&merging, held)?;
    let memory = memory.display().to_string();
    let mut commit = fixture
        .cli
        .command(&["commit", "waits", "--memory", &memory, "--no-parent"])?
        .spawn()?;
    std::thread::sleep(std::time::Duration::from_millis(1500));
    ensure!(commit.try_wait()?.is_none(), "it did not wait");
    drop(merging);
    let status = commit.wait()?;
    ensure!(status.success(), "{status}");
    fixture.cli.ok(&["verify", "--read-data"])?;
    Ok(())
}
