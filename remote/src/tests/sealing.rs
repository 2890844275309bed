//! Encrypted remotes: what a bucket tells, and what is refused.

use snapstore_store::{ErrorClass, Silent};

use super::{Outcome, Scene, commit, image, read};
use crate::protocol::{self, Options};
use crate::{DomainKey, Error, Place, Remote};

/// What a bucket may hold, but for its configuration.
const KINDS: [&str; 7] = [
    "refs", "heads", "packs", "hooks", "lease", "fence", "condemn",
];

/// The bucket as who keeps it sees it: objects as they are stored, by the names that they have there.
struct Stored(Remote);

impl Stored {
    fn of(scene: &Scene) -> crate::Result<Self> {
        let place = Place {
            key: None,
            ..scene.place.clone()
        };
        Ok(Self(Remote::at(&place)?))
    }

    /// The names of all objects.
    fn keys(&self) -> crate::Result<Vec<String>> {
        let mut keys = Vec::new();
        if self.0.bucket.exists("config")? {
            keys.push("config".to_owned());
        }
        for kind in KINDS {
            let found = self.0.bucket.list(&format!("{kind}/"))?;
            keys.extend(found.into_iter().map(|one| one.key));
        }
        Ok(keys)
    }

    fn get(&self, key: &str) -> Result<Vec<u8>, Box<dyn std::error::Error>> {
        Ok(self.0.bucket.get(key, None)?.ok_or("it is there")?)
    }

    fn delete(&self, key: &str) -> crate::Result<()> {
        Ok(self.0.bucket.delete(key)?)
    }

    /// Puts other bytes there, as no host would.
    fn replace(&self, key: &str, bytes: &[u8]) -> crate::Result<()> {
        self.delete(key)?;
        Ok(self.0.bucket.put(key, bytes)?)
    }
}

/// The remote by another key, or by none.
fn by(scene: &Scene, key: Option<&str>) -> Result<Remote, Box<dyn std::error::Error>> {
    let key = key.map(|name| scene.dir.path().join(name));
    if let Some(key) = key.as_ref().filter(|key| !key.exists()) {
        DomainKey::make(key)?;
    }
    let place = Place {
        key,
        ..scene.place.clone()
    };
    Ok(Remote::at(&place)?)
}

pub fn nothing_in_the_bucket_is_in_clear(scene: &Scene) -> Outcome {
    let remote = scene.remote()?;
    let store = scene.store("store")?;
    let mut bytes = image(&[1; 40]);
    // A page that compression leaves as it is, and one of text.
    bytes[4096..8192].copy_from_slice(&b"an old story, told again, ".repeat(158)[..4096]);
    commit(&store, "secret-name", &bytes, None)?;
    remote.push(&store, "secret-name", "secret-name", false, &Silent)?;
    let id = remote.snapshot_of("secret-name")?.to_string();
    let mut hidden: Vec<Vec<u8>> = bytes.chunks(4096).map(|page| page[..64].to_vec()).collect();
    hidden.push(b"an old story".to_vec());
    hidden.push(b"secret-name".to_vec());
    hidden.push(b"memory".to_vec());
    hidden.push(crate::remote::who().into_bytes());
    hidden.push(id.clone().into_bytes());
    let binary = (0..32).map(|at| u8::from_str_radix(&id[2 * at..2 * at + 2], 16));
    hidden.push(binary.collect::<Result<_, _>>()?);
    let stored = Stored::of(scene)?;
    for name in stored.keys()? {
        assert!(!name.contains("secret") && !name.contains(&id), "{name}");
        let bytes = stored.get(&name)?;
        assert!(bytes.starts_with(b"SNAPSEAL"), "{name}");
        for hidden in &hidden {
            let found = bytes.windows(hidden.len()).any(|it| it == hidden);
            assert!(!found, "{name}: {:?}", String::from_utf8_lossy(hidden));
        }
    }
    Ok(())
}

/// The same snapshots under the same keys are other bytes in another domain.
#[test]
fn domains_have_nothing_in_common() -> Outcome {
    let (one, two) = (Scene::sealed()?, Scene::sealed()?);
    let mut blocks = std::collections::HashSet::new();
    let mut tags = Vec::new();
    for scene in [&one, &two] {
        let store = scene.store("store")?;
        commit(&store, "t", &image(&[1; 600]), None)?;
        scene.remote()?.push(&store, "t", "t", false, &Silent)?;
        let stored = Stored::of(scene)?;
        for name in stored.keys()? {
            let bytes = stored.get(&name)?;
            for part in bytes[12..].chunks_exact(16) {
                assert!(blocks.insert(part.to_vec()), "{name}");
            }
            tags.extend(name.strip_prefix("refs/").map(|rest| rest[..26].to_owned()));
        }
    }
    assert_eq!(tags.len(), 2);
    assert_ne!(tags[0], tags[1]);
    Ok(())
}

pub fn only_the_key_of_a_remote_opens_it(scene: &Scene) -> Outcome {
    let store = scene.store("store")?;
    commit(&store, "t", &image(&[1; 40]), None)?;
    scene.remote()?.push(&store, "t", "t", false, &Silent)?;
    let before = Stored::of(scene)?.keys()?;
    let clear = scene.beside_in_clear()?;
    clear.remote()?.push(&store, "t", "t", false, &Silent)?;
    let is_other = |error: &Error| matches!(error, Error::OtherKey { .. });
    let is_none = |error: &Error| matches!(error, Error::NoKey { .. });
    let is_clear = |error: &Error| matches!(error, Error::InClearThere { .. });
    type Case<'a> = (&'a Scene, Option<&'a str>, &'a dyn Fn(&Error) -> bool);
    let cases: [Case<'_>; 3] = [
        (scene, Some("wrong"), &is_other),
        (scene, None, &is_none),
        (&clear, Some("wrong"), &is_clear),
    ];
    for (scene, key, expected) in cases {
        // With the configuration, and where it is lost: heads tell, too.
        for is_lost in [false, true] {
            let remote = by(scene, key)?;
            let other = scene.store(&format!("{}-{}", key.unwrap_or("none"), is_lost))?;
            let stored = Stored::of(scene)?;
            let config = stored.get("config")?;
            if is_lost {
                stored.delete("config")?;
            } else {
                for error in [
                    remote.push(&store, "t", "t", true, &Silent).err(),
                    remote.pull(&other, "t", "t", false, &Silent).err(),
                    remote.tags().err(),
                    remote.verify(true).err(),
                    remote.collect(Options::default()).err(),
                    remote.remove("t").err(),
                    remote.leases().err(),
                    remote.check().err(),
                    by(scene, key)?
                        .lazy(&other, "t", &super::moody::options(scene))
                        .err(),
                ] {
                    let error = error.ok_or("it was done")?;
                    assert!(expected(&error), "{key:?}: {error:?}");
                    assert!(error.to_string().contains(&scene.place.url), "{error}");
                }
            }
            let error = remote.init(4096).err().ok_or("it was made")?;
            assert!(expected(&error), "{key:?} {is_lost}: {error:?}");
            if is_lost {
                assert!(!stored.0.bucket.exists("config")?);
                stored.replace("config", &config)?;
            }
            assert_eq!(other.tag("t")?, None);
        }
    }
    assert_eq!(Stored::of(scene)?.keys()?, before);
    for scene in [scene, &clear] {
        let other = scene.store("other")?;
        scene.remote()?.pull(&other, "t", "t", false, &Silent)?;
    }
    Ok(())
}

/// Whatever whoever keeps the bucket does to an object: what needs it is refused, and names it, and verify
/// does.
pub fn what_is_done_to_an_encrypted_object_is_found(scene: &Scene) -> Outcome {
    let remote = scene.remote()?;
    let store = scene.store("store")?;
    commit(&store, "t", &image(&[1; 600]), None)?;
    remote.push(&store, "t", "t", false, &Silent)?;
    let keys = ["packs", "heads", "refs/t"].map(|kind| scene.longest(kind));
    commit(&store, "u", &image(&[2; 600]), None)?;
    remote.push(&store, "u", "u", false, &Silent)?;
    let stored = Stored::of(scene)?;
    let names = stored.keys()?;
    for key in keys {
        let key = key?;
        let name = key.rsplit('/').next().ok_or("a name")?;
        let is_it = |stored: &&String| stored.rsplit('/').next() == Some(name);
        let at = names.iter().find(is_it).ok_or("it is stored")?;
        // Beside a record in another tag's directory.
        let kind = &key[..key.find('/').ok_or("a kind")? + 1];
        let is_like = |stored: &&String| !is_it(stored) && stored.starts_with(kind);
        let other = stored.get(names.iter().find(is_like).ok_or("another")?)?;
        let whole = stored.get(at)?;
        let flipped = |at: usize| {
            let mut flipped = whole.clone();
            flipped[at] ^= 1;
            flipped
        };
        let added = [&whole[..], &whole].concat();
        let mut hostile = vec![
            ("of another name", other),
            ("empty", Vec::new()),
            ("in clear", remote.bucket.get(&key, None)?.ok_or("there")?),
            ("cut at the end", whole[..whole.len() - 1].to_vec()),
            ("another check", flipped(12)),
            ("flipped", flipped(40)),
            ("flipped at the end", flipped(whole.len() - 1)),
        ];
        // Of a pack a pull reads parts, which are where they were.
        if kind != "packs/" {
            hostile.push(("added", added.clone()));
            hostile.push(("a byte added", [&whole[..], &[0]].concat()));
        }
        if whole.len() > 16 + 16412 {
            hostile.push(("cut at a block", whole[..16 + 16412].to_vec()));
            let (head, blocks) = whole.split_at(16);
            let (one, rest) = blocks.split_at(16412);
            let (two, rest) = rest.split_at(16412);
            hostile.push(("blocks swapped", [head, two, one, rest].concat()));
        }
        for (number, (what, bytes)) in hostile.into_iter().enumerate() {
            stored.replace(at, &bytes)?;
            let findings = remote.verify(true)?.findings;
            let named = findings.iter().any(|one| one.object == key);
            assert!(named, "{key}: {what}: {findings:?}");
            // The first bytes of an object, and a pack's last ones, are for who reads all of it.
            let is_beside = what == "another check" || what.ends_with("at the end");
            if is_beside && kind == "packs/" {
                continue;
            }
            let other = scene.store(&format!("{}-{number}", kind.trim_end_matches('/')))?;
            let error = remote.pull(&other, "t", "t", false, &Silent).err();
            let error = error.ok_or_else(|| format!("{key}: {what}: it was pulled"))?;
            let is_damage = matches!(error, Error::Protocol(protocol::Error::Damaged { .. }));
            assert!(is_damage && error.to_string().contains(name), "{error:?}");
            assert_eq!(other.tag("t")?, None);
        }
        if kind == "packs/" {
            stored.replace(at, &added)?;
            let findings = remote.verify(true)?.findings;
            assert!(findings.iter().any(|one| one.object == key), "{findings:?}");
        }
        stored.replace(at, &whole)?;
        assert_eq!(remote.verify(true)?.findings, []);
        let other = scene.store(&format!("{}-last", kind.trim_end_matches('/')))?;
        remote.pull(&other, "t", "t", false, &Silent)?;
        assert_eq!(read(&other, "t")?, image(&[1; 600]));
    }
    Ok(())
}

/// What stands there under a name of no tag is a finding, and in nobody's way.
pub fn a_name_of_another_key_is_a_finding_and_no_tag(scene: &Scene) -> Outcome {
    let remote = scene.remote()?;
    let store = scene.store("store")?;
    commit(&store, "t", &image(&[1; 6]), None)?;
    remote.push(&store, "t", "t", false, &Silent)?;
    let stored = Stored::of(scene)?;
    let names = stored.keys()?;
    let record = names.iter().find(|name| name.starts_with("refs/"));
    let record = record.ok_or("a record")?;
    let name = record.rsplit('/').next().ok_or("a name")?;
    stored.replace(&format!("refs/t/{name}"), &stored.get(record)?)?;
    let tags: Vec<_> = remote.tags()?.into_iter().map(|one| one.tag).collect();
    assert_eq!(tags, ["t"]);
    let findings = remote.verify(true)?.findings;
    assert_eq!(findings.len(), 1, "{findings:?}");
    assert_eq!(findings[0].object, "refs/?t/");
    let other = scene.store("other")?;
    remote.pull(&other, "t", "t", false, &Silent)?;
    remote.collect(Options::default())?;
    Ok(())
}

/// A mount refuses what was changed, and nothing beside it.
pub fn of_a_snapshot_that_stays_there_only_what_was_changed_is_refused(scene: &Scene) -> Outcome {
    let (store, bytes) = super::moody::with_base(scene, &[1; 600])?;
    let (stored, pack) = (Stored::of(scene)?, scene.longest("packs")?);
    let whole = stored.get(&pack)?;
    let mut flipped = whole.clone();
    flipped[16 + 40 * 16412 + 100] ^= 1;
    stored.replace(&pack, &flipped)?;
    let options = super::moody::options(scene);
    let lazy = scene.remote()?.lazy(&store, "base", &options)?;
    let reader = super::moody::memory(&lazy);
    let mut refused = Vec::new();
    for (number, expected) in bytes.chunks(super::PAGE).enumerate() {
        match super::moody::page(&reader, number) {
            Ok(page) => assert!(page == expected, "page {number} is another"),
            Err(error) => {
                assert_eq!(error.class(), ErrorClass::Damaged, "{error}");
                assert!(error.to_string().contains("packs/"), "{error}");
                refused.push(number);
            }
        }
    }
    assert!(!refused.is_empty() && refused.len() < 20, "{refused:?}");
    stored.replace(&pack, &whole)?;
    for number in refused {
        let page = super::moody::page(&reader, number)?;
        assert!(page == bytes[number * super::PAGE..][..super::PAGE]);
    }
    Ok(())
}

pub fn a_condemnation_that_was_changed_is_told_with_the_way_out(scene: &Scene) -> Outcome {
    let remote = scene.remote()?;
    let name = "condemn/00000000000000000000000000000abc-00000001";
    Stored::of(scene)?.replace(name, b"SNAPSEAL of another one")?;
    let findings = remote.verify(false)?.findings;
    assert_eq!(findings.len(), 1, "{findings:?}");
    assert_eq!(findings[0].object, name);
    assert!(findings[0].problem.contains("delete this object"));
    Ok(())
}

/// A configuration that was changed in any of its bytes is made anew, by who has the key alone.
pub fn only_the_key_of_a_remote_mends_its_configuration(scene: &Scene) -> Outcome {
    let store = scene.store("store")?;
    commit(&store, "t", &image(&[1; 40]), None)?;
    scene.remote()?.push(&store, "t", "t", false, &Silent)?;
    let stored = Stored::of(scene)?;
    let whole = stored.get("config")?;
    // What is read is the same for every kind of bucket.
    let step = if scene.is_directory() { 1 } else { 23 };
    for at in (0..whole.len()).step_by(step) {
        let mut flipped = whole.clone();
        flipped[at] ^= 1;
        stored.replace("config", &flipped)?;
        for key in [None, Some("wrong")] {
            let made = by(scene, key)?.init(4096);
            assert!(made.is_err(), "{at} {key:?}");
            assert_eq!(stored.get("config")?, flipped, "{at} {key:?}");
        }
        let remote = scene.remote()?;
        assert!(remote.tags().is_err(), "{at}");
        remote.init(4096)?;
        assert_eq!(remote.tags()?.len(), 1, "{at}");
    }
    Ok(())
}
