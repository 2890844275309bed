//! Stores and a bucket that they share.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use snapstore_store::{
    CommitRequest, ImageRole, Input, InputData, InputKind, PageSize, ParentChoice, Silent, Store,
};

#[cfg(feature = "cloud")]
use snapstore_tests::servers;

use crate::protocol::{self, Options};
use crate::{DomainKey, Error, Place, Remote};

mod bodies;
mod costs;
mod dying;
#[cfg(feature = "cloud")]
mod faults;
mod first;
#[cfg(feature = "cloud")]
mod garage;
#[cfg(feature = "cloud")]
mod hedging;
mod hooks;
mod lazy;
mod mending;
mod moody;
#[cfg(feature = "cloud")]
mod network;
mod over;
mod overtaken;
mod racing;
#[cfg(feature = "cloud")]
mod radosgw;
mod repacking;
mod rounds;
mod sealing;
mod seen;
mod silent;

type Outcome = Result<(), Box<dyn std::error::Error>>;

const PAGE: usize = 4096;

fn image(pages: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (at, seed) in pages.iter().enumerate() {
        if *seed == 0 {
            bytes.extend_from_slice(&[0; PAGE]);
            continue;
        }
        let mut page = vec![0; PAGE];
        let mut hasher = blake3::Hasher::new();
        hasher.update(&[*seed]).update(&at.to_le_bytes());
        hasher.finalize_xof().fill(&mut page);
        bytes.extend_from_slice(&page);
    }
    bytes
}

fn commit(store: &Store, tag: &str, bytes: &[u8], parent: Option<&str>) -> Outcome {
    let request = CommitRequest {
        tag: tag.to_owned(),
        inputs: vec![Input {
            name: "memory".to_owned(),
            role: ImageRole::Memory,
            data: InputData::Bytes(bytes.to_vec().into()),
            kind: InputKind::Full,
        }],
        parent: match parent {
            Some(parent) => ParentChoice::Named(parent.to_owned()),
            None => ParentChoice::Nothing,
        },
        ..CommitRequest::default()
    };
    store.commit(&request, &Silent)?;
    Ok(())
}

fn read(store: &Store, tag: &str) -> Result<Vec<u8>, Box<dyn std::error::Error>> {
    let memory = store.snapshot(tag)?.image("memory").ok_or("no memory")?;
    let mut bytes = vec![0; usize::try_from(memory.size_bytes())?];
    memory.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// A new bucket, or why there can be none here.
type Made = Result<Result<Scene, String>, Box<dyn std::error::Error>>;

struct Scene {
    dir: tempfile::TempDir,
    place: Place,
}

impl Scene {
    /// Of a bucket that is a directory.
    fn new() -> Result<Self, Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let url = format!("file://{}", dir.path().join("bucket").display());
        let scene = Self {
            dir,
            place: Place::new(&url),
        };
        scene.remote()?.init(4096)?;
        Ok(scene)
    }

    /// The same, encrypted.
    fn sealed() -> Result<Self, Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let url = format!("file://{}", dir.path().join("bucket").display());
        let scene = Self {
            place: Place::new(&url),
            dir,
        };
        scene.with_key()
    }

    /// Of a bucket of a server.
    #[cfg(feature = "cloud")]
    fn of(server: &servers::Found) -> Made {
        let server = match server {
            Ok(server) => server,
            Err(why) => return Ok(Err(why.clone())),
        };
        let scene = Self::at(server.place())?;
        scene.remote()?.init(4096)?;
        Ok(Ok(scene))
    }

    /// The same, encrypted.
    #[cfg(feature = "cloud")]
    fn sealed_of(server: &servers::Found) -> Made {
        match server {
            Ok(server) => Self::at(server.place())?.with_key().map(Ok),
            Err(why) => Ok(Err(why.clone())),
        }
    }

    /// Where no remote is yet.
    #[cfg(feature = "cloud")]
    fn at(place: servers::Place) -> std::io::Result<Self> {
        Ok(Self {
            dir: tempfile::tempdir()?,
            place: place_of(place),
        })
    }

    fn with_key(mut self) -> Result<Self, Box<dyn std::error::Error>> {
        let key = self.dir.path().join("key");
        DomainKey::make(&key)?;
        self.place.key = Some(key);
        self.remote()?.init(4096)?;
        Ok(self)
    }

    /// One in clear, where the bucket of this one is.
    fn beside_in_clear(&self) -> Result<Self, Box<dyn std::error::Error>> {
        let scene = Self {
            dir: tempfile::tempdir()?,
            place: Place {
                url: format!("{}-in-clear", self.place.url),
                key: None,
                ..self.place.clone()
            },
        };
        scene.remote()?.init(4096)?;
        Ok(scene)
    }

    fn remote(&self) -> crate::Result<Remote> {
        Ok(Remote::at(&self.place)?.patience(Duration::from_secs(0), false))
    }

    /// Where a bucket is that is a directory.
    fn bucket(&self) -> PathBuf {
        self.dir.path().join("bucket")
    }

    fn store(&self, name: &str) -> snapstore_store::Result<Store> {
        Store::create(&self.dir.path().join(name), PageSize::default())
    }

    /// The longest object of a kind, as a file.
    fn object(&self, kind: &str) -> PathBuf {
        let key = self.longest(kind).expect("there is one");
        let path = self.bucket().join(&key);
        if path.exists() {
            return path;
        }
        // The name of its tag is hidden.
        let name = key.rsplit('/').next().expect("it has a name");
        let tags = list(&self.bucket().join("refs")).expect("there are records");
        let mut named = tags.into_iter().map(|tag| tag.join(name));
        named.find(|path| path.exists()).expect("its file")
    }

    fn is_directory(&self) -> bool {
        self.place.url.starts_with("file:")
    }

    fn keys(&self, kind: &str) -> crate::Result<Vec<String>> {
        let found = self.remote()?.bucket.list(&format!("{kind}/"))?;
        Ok(found.into_iter().map(|one| one.key).collect())
    }

    fn longest(&self, kind: &str) -> Result<String, Box<dyn std::error::Error>> {
        let found = self.remote()?.bucket.list(&format!("{kind}/"))?;
        let longest = found.into_iter().max_by_key(|one| one.len_bytes);
        Ok(longest.ok_or("there is one")?.key)
    }

    fn bytes(&self, key: &str) -> Result<Vec<u8>, Box<dyn std::error::Error>> {
        Ok(self.remote()?.bucket.get(key, None)?.ok_or("it is there")?)
    }

    /// Puts other bytes there, as no host would.
    fn replace(&self, key: &str, bytes: &[u8]) -> Outcome {
        let remote = self.remote()?;
        remote.bucket.delete(key)?;
        Ok(remote.bucket.put(key, bytes)?)
    }
}

/// How a server's bucket is reached.
#[cfg(feature = "cloud")]
fn place_of(place: servers::Place) -> Place {
    let servers::Place {
        url,
        endpoint,
        region,
        credentials,
    } = place;
    Place {
        url,
        endpoint: Some(endpoint),
        region,
        allow_http: true,
        credentials: Some(credentials),
        machine_role: false,
        key: None,
        retry_seconds: Some(10),
    }
}

fn list(dir: &Path) -> std::io::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir)?;
    entries.map(|entry| Ok(entry?.path())).collect()
}

fn count(dir: &Path) -> usize {
    fs::read_dir(dir).map_or(0, Iterator::count)
}

/// A file without an end, and one that waits for a writer: told as what it is, and verify
/// goes on with the others.
#[test]
fn what_is_no_object_is_neither_waited_for_nor_read() -> Outcome {
    type Replace = fn(&Path) -> std::io::Result<()>;
    let replace: [(&str, Replace); 3] = [
        ("a named pipe", |path| {
            let (kind, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR);
            Ok(rustix::fs::mknodat(rustix::fs::CWD, path, kind, mode, 0)?)
        }),
        ("a symbolic link", |path| {
            std::os::unix::fs::symlink("/dev/zero", path)
        }),
        ("longer than any", |path| {
            fs::File::create(path)?.set_len(1 << 40)
        }),
    ];
    for kind in ["packs", "heads", "config"] {
        for (says, replace) in replace {
            let scene = Scene::new()?;
            let remote = scene.remote()?;
            let store = scene.store("store")?;
            commit(&store, "t", &image(&[1; 6]), None)?;
            remote.push(&store, "t", "t", false, &Silent)?;
            let path = match kind {
                "config" => scene.bucket().join(kind),
                kind => scene.object(kind),
            };
            fs::remove_file(&path)?;
            replace(&path)?;
            let other = scene.store("other")?;
            let error = match remote.pull(&other, "t", "t", false, &Silent) {
                Ok(pulled) => return Err(format!("{kind}, {says}: {pulled:?}").into()),
                Err(error) => error,
            };
            assert!(error.to_string().contains(says), "{kind}: {error}");
            let is_damage = matches!(&error, Error::Protocol(protocol::Error::Damaged { .. }));
            assert!(is_damage, "{kind}: {error:?}");
            if kind != "config" {
                let findings = remote.verify(true)?.findings;
                assert_eq!(findings.len(), 1, "{findings:?}");
                assert!(findings[0].problem.contains(says), "{findings:?}");
            }
        }
    }
    Ok(())
}

/// As where a filesystem is not mounted: that is no bucket without a remote, and where a store
/// has used one, none is made.
#[test]
fn a_directory_with_nothing_in_it_is_no_new_bucket() -> Outcome {
    let scene = Scene::new()?;
    let remote = scene.remote()?;
    let store = scene.store("store")?;
    commit(&store, "t", &image(&[1; 6]), None)?;
    fs::remove_dir_all(scene.bucket())?;
    for is_made in [false, true] {
        if is_made {
            fs::create_dir(scene.bucket())?;
        }
        let gone = |error: Error| matches!(error, Error::NothingThere { .. });
        let pushed = remote.push(&store, "t", "t", false, &Silent);
        assert!(pushed.is_err_and(gone));
        assert!(remote.collect(Options::default()).is_err_and(gone));
        assert!(remote.tags().is_err_and(gone));
        let used = scene.remote()?.was_there(true);
        assert!(used.init(4096).is_err_and(gone));
        assert_eq!(count(&scene.bucket()), 0);
    }
    // Something else is there.
    fs::create_dir(scene.bucket().join("lost+found"))?;
    let none = |error: Error| matches!(error, Error::NoRemote { .. });
    assert!(remote.tags().is_err_and(none));
    scene.remote()?.was_there(true).init(4096)?;
    remote.push(&store, "t", "t", false, &Silent)?;
    Ok(())
}

/// Another bucket's directory behind a link is neither read nor written nor emptied.
#[test]
fn a_link_does_not_lead_out_of_the_bucket() -> Outcome {
    for kind in [
        "packs",
        "heads",
        "refs",
        "lease",
        "condemn",
        "unfinished",
        "probe",
    ] {
        let scene = Scene::new()?;
        let remote = scene.remote()?;
        let store = scene.store("store")?;
        commit(&store, "t", &image(&[1; 6]), None)?;
        remote.push(&store, "t", "t", false, &Silent)?;
        let other = scene.dir.path().join("other");
        fs::create_dir(&other)?;
        for name in ["0", "1"] {
            let name = format!("00000000000000000000000000000abc-0000000{name}");
            fs::write(other.join(name), b"another's")?;
        }
        let before = list(&other)?;
        let linked = scene.bucket().join(kind);
        if linked.exists() {
            fs::remove_dir_all(&linked)?;
        }
        std::os::unix::fs::symlink(&other, &linked)?;
        let told = |error: Error| {
            let error = error.to_string();
            error.contains(kind) && error.contains("symbolic link")
        };
        commit(&store, "u", &image(&[2; 6]), None)?;
        let collected = remote.collect(Options::default());
        let pushed = remote.push(&store, "u", "u", false, &Silent);
        // Only probes go there.
        if kind != "probe" {
            assert!(pushed.is_err_and(told), "{kind}");
            // A collection that finds nothing writes nothing.
            assert!(kind == "unfinished" || collected.is_err_and(told), "{kind}");
        }
        assert!(remote.check().is_err() || !["probe", "unfinished"].contains(&kind));
        assert_eq!(list(&other)?, before, "{kind}");
    }
    Ok(())
}

#[test]
fn what_a_killed_host_left_of_asking_for_the_time_goes_after_a_day() -> Outcome {
    let scene = Scene::new()?;
    let remote = scene.remote()?;
    for (name, hours) in [("probe/old", 25), ("probe/new", 1)] {
        remote.bucket.put(name, b"")?;
        let file = fs::File::options()
            .write(true)
            .open(scene.bucket().join(name))?;
        file.set_modified(std::time::SystemTime::now() - Duration::from_secs(hours * 3600))?;
    }
    remote.now()?;
    assert_eq!(scene.keys("probe")?, ["probe/new"]);
    Ok(())
}

/// It may be what protects packs, so nothing is collected.
#[test]
fn what_stands_in_place_of_a_record_is_told() -> Outcome {
    let replace: [fn(&Path) -> std::io::Result<()>; 2] = [
        |path| std::os::unix::fs::symlink("/dev/null", path),
        |path| fs::create_dir(path),
    ];
    for replace in replace {
        let scene = Scene::new()?;
        let remote = scene.remote()?;
        let store = scene.store("store")?;
        commit(&store, "t", &image(&[1; 6]), None)?;
        remote.push(&store, "t", "t", false, &Silent)?;
        let path = scene.object("refs/t");
        fs::remove_file(&path)?;
        replace(&path)?;
        let damaged =
            |error: Error| matches!(error, Error::Protocol(protocol::Error::Damaged { .. }));
        assert!(remote.collect(Options::default()).is_err_and(damaged));
        assert_eq!(count(&scene.bucket().join("packs")), 1);
        assert_eq!(remote.verify(false)?.findings.len(), 1);
    }
    Ok(())
}

#[test]
fn a_name_that_no_tag_can_have_is_a_finding_and_no_tag() -> Outcome {
    let scene = Scene::new()?;
    let remote = scene.remote()?;
    let store = scene.store("store")?;
    commit(&store, "t", &image(&[1; 6]), None)?;
    remote.push(&store, "t", "t", false, &Silent)?;
    let record = scene.object("refs/t");
    let odd = scene.bucket().join("refs/\u{1b}[31mred");
    fs::create_dir(&odd)?;
    fs::copy(&record, odd.join(record.file_name().ok_or("a name")?))?;
    let tags = remote.tags()?;
    assert_eq!(tags.len(), 1, "{tags:?}");
    let findings = remote.verify(false)?.findings;
    assert_eq!(findings.len(), 1, "{findings:?}");
    assert_eq!(findings[0].object, "refs/\\u{1b}[31mred/");
    Ok(())
}

#[test]
fn a_name_that_is_no_text_is_told() -> Outcome {
    use std::os::unix::ffi::OsStrExt as _;
    for kind in ["refs", "packs", "heads"] {
        let scene = Scene::new()?;
        let remote = scene.remote()?;
        let store = scene.store("store")?;
        commit(&store, "t", &image(&[1; 6]), None)?;
        remote.push(&store, "t", "t", false, &Silent)?;
        let name = std::ffi::OsStr::from_bytes(b"a\xff");
        fs::write(scene.bucket().join(kind).join(name), b"")?;
        let told = |error: Error| error.to_string().contains("no text");
        assert!(
            remote.collect(Options::default()).is_err_and(told),
            "{kind}"
        );
    }
    Ok(())
}
