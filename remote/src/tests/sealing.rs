//! Encrypted remotes: what a bucket tells, and what is refused.

use std::fs;
use std::path::{Path, PathBuf};

use snapstore_store::{ErrorClass, Silent};

use super::{Outcome, Scene, commit, image, read};
use crate::protocol::{self, Options};
use crate::{DomainKey, Error, Place, Remote};

/// All files below a directory.
fn files(dir: &Path, found: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        match path.is_dir() {
            true => files(&path, found)?,
            false => found.push(path),
        }
    }
    Ok(())
}

fn all(scene: &Scene) -> std::io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    files(&scene.bucket(), &mut found)?;
    found.sort();
    Ok(found)
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

#[test]
fn nothing_in_the_bucket_is_in_clear() -> Outcome {
    let scene = Scene::sealed()?;
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
    for path in all(&scene)? {
        let name = path.display().to_string();
        assert!(!name.contains("secret") && !name.contains(&id), "{name}");
        let bytes = fs::read(&path)?;
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
    for scene in [&one, &two] {
        let store = scene.store("store")?;
        commit(&store, "t", &image(&[1; 600]), None)?;
        scene.remote()?.push(&store, "t", "t", false, &Silent)?;
        for path in all(scene)? {
            let bytes = fs::read(&path)?;
            for part in bytes[12..].chunks_exact(16) {
                assert!(blocks.insert(part.to_vec()), "{}", path.display());
            }
        }
    }
    let tags = |scene: &Scene| super::list(&scene.bucket().join("refs"));
    assert_ne!(tags(&one)?[0].file_name(), tags(&two)?[0].file_name());
    Ok(())
}

#[test]
fn only_the_key_of_a_remote_opens_it() -> Outcome {
    let scene = Scene::sealed()?;
    let store = scene.store("store")?;
    commit(&store, "t", &image(&[1; 40]), None)?;
    scene.remote()?.push(&store, "t", "t", false, &Silent)?;
    let before: Vec<_> = all(&scene)?;
    let clear = Scene::new()?;
    clear.remote()?.push(&store, "t", "t", false, &Silent)?;
    let is_other = |error: &Error| matches!(error, Error::OtherKey { .. });
    let is_none = |error: &Error| matches!(error, Error::NoKey { .. });
    let is_clear = |error: &Error| matches!(error, Error::InClearThere { .. });
    type Case<'a> = (&'a Scene, Option<&'a str>, &'a dyn Fn(&Error) -> bool);
    let cases: [Case<'_>; 3] = [
        (&scene, Some("wrong"), &is_other),
        (&scene, None, &is_none),
        (&clear, Some("wrong"), &is_clear),
    ];
    for (scene, key, expected) in cases {
        // With the configuration, and where it is lost: heads tell, too.
        for is_lost in [false, true] {
            let remote = by(scene, key)?;
            let other = scene.store(&format!("{}-{}", key.unwrap_or("none"), is_lost))?;
            let config = scene.bucket().join("config");
            let kept = scene.dir.path().join("config");
            if is_lost {
                fs::rename(&config, &kept)?;
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
                        .lazy(&other, "t", &super::lazy::options(scene))
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
                assert!(!config.exists());
                fs::rename(&kept, &config)?;
            }
            assert_eq!(other.tag("t")?, None);
        }
    }
    assert_eq!(all(&scene)?, before);
    for scene in [&scene, &clear] {
        let other = scene.store("other")?;
        scene.remote()?.pull(&other, "t", "t", false, &Silent)?;
    }
    Ok(())
}

/// Whatever whoever keeps the bucket does to an object: what needs it is refused, and names it, and verify
/// does.
#[test]
fn what_is_done_to_an_encrypted_object_is_found() -> Outcome {
    let scene = Scene::sealed()?;
    let remote = scene.remote()?;
    let store = scene.store("store")?;
    commit(&store, "t", &image(&[1; 600]), None)?;
    remote.push(&store, "t", "t", false, &Silent)?;
    let keys = ["packs", "heads", "refs/t"].map(|kind| scene.longest(kind));
    commit(&store, "u", &image(&[2; 600]), None)?;
    remote.push(&store, "u", "u", false, &Silent)?;
    let files = all(&scene)?;
    for key in keys {
        let key = key?;
        let name = key.rsplit('/').next().ok_or("a name")?;
        let is_it = |path: &&PathBuf| path.ends_with(name);
        let path = files.iter().find(is_it).ok_or("its file")?;
        // Beside a record in another tag's directory.
        let kind = &key[..key.find('/').ok_or("a kind")? + 1];
        let is_like = |path: &&PathBuf| {
            let below = path.strip_prefix(scene.bucket());
            !is_it(path) && below.is_ok_and(|below| below.starts_with(kind))
        };
        let other = fs::read(files.iter().find(is_like).ok_or("another")?)?;
        let whole = fs::read(path)?;
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
            fs::write(path, bytes)?;
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
            fs::write(path, added)?;
            let findings = remote.verify(true)?.findings;
            assert!(findings.iter().any(|one| one.object == key), "{findings:?}");
        }
        fs::write(path, &whole)?;
        assert_eq!(remote.verify(true)?.findings, []);
        let other = scene.store(&format!("{}-last", kind.trim_end_matches('/')))?;
        remote.pull(&other, "t", "t", false, &Silent)?;
        assert_eq!(read(&other, "t")?, image(&[1; 600]));
    }
    Ok(())
}

/// What stands there under a name of no tag is a finding, and in nobody's way.
#[test]
fn a_name_of_another_key_is_a_finding_and_no_tag() -> Outcome {
    let scene = Scene::sealed()?;
    let remote = scene.remote()?;
    let store = scene.store("store")?;
    commit(&store, "t", &image(&[1; 6]), None)?;
    remote.push(&store, "t", "t", false, &Silent)?;
    let tag = super::list(&scene.bucket().join("refs"))?.remove(0);
    let record = super::list(&tag)?.remove(0);
    let odd = scene.bucket().join("refs/t");
    fs::create_dir(&odd)?;
    fs::copy(&record, odd.join(record.file_name().ok_or("a name")?))?;
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
#[test]
fn of_a_snapshot_that_stays_there_only_what_was_changed_is_refused() -> Outcome {
    let scene = Scene::sealed()?;
    let (store, bytes) = super::lazy::with_base(&scene, &[1; 600])?;
    let path = scene.object("packs");
    let whole = fs::read(&path)?;
    let mut flipped = whole.clone();
    flipped[16 + 40 * 16412 + 100] ^= 1;
    fs::write(&path, flipped)?;
    let options = super::lazy::options(&scene);
    let lazy = scene.remote()?.lazy(&store, "base", &options)?;
    let reader = super::lazy::memory(&lazy);
    let mut refused = Vec::new();
    for (number, expected) in bytes.chunks(super::PAGE).enumerate() {
        match super::lazy::page(&reader, number) {
            Ok(page) => assert!(page == expected, "page {number} is another"),
            Err(error) => {
                assert_eq!(error.class(), ErrorClass::Damaged, "{error}");
                assert!(error.to_string().contains("packs/"), "{error}");
                refused.push(number);
            }
        }
    }
    assert!(!refused.is_empty() && refused.len() < 20, "{refused:?}");
    fs::write(&path, whole)?;
    for number in refused {
        let page = super::lazy::page(&reader, number)?;
        assert!(page == bytes[number * super::PAGE..][..super::PAGE]);
    }
    Ok(())
}

#[test]
fn a_condemnation_that_was_changed_is_told_with_the_way_out() -> Outcome {
    let scene = Scene::sealed()?;
    let remote = scene.remote()?;
    let name = "condemn/00000000000000000000000000000abc-00000001";
    fs::create_dir_all(scene.bucket().join("condemn"))?;
    fs::write(scene.bucket().join(name), b"SNAPSEAL of another one")?;
    let findings = remote.verify(false)?.findings;
    assert_eq!(findings.len(), 1, "{findings:?}");
    assert_eq!(findings[0].object, name);
    assert!(findings[0].problem.contains("delete this object"));
    Ok(())
}

/// A configuration that was changed in any of its bytes is made anew, by who has the key alone.
#[test]
fn only_the_key_of_a_remote_mends_its_configuration() -> Outcome {
    let scene = Scene::sealed()?;
    let store = scene.store("store")?;
    commit(&store, "t", &image(&[1; 40]), None)?;
    scene.remote()?.push(&store, "t", "t", false, &Silent)?;
    let path = scene.bucket().join("config");
    let whole = fs::read(&path)?;
    for at in 0..whole.len() {
        let mut flipped = whole.clone();
        flipped[at] ^= 1;
        fs::write(&path, &flipped)?;
        for key in [None, Some("wrong")] {
            let made = by(&scene, key)?.init(4096);
            assert!(made.is_err(), "{at} {key:?}");
            assert_eq!(fs::read(&path)?, flipped, "{at} {key:?}");
        }
        let remote = scene.remote()?;
        assert!(remote.tags().is_err(), "{at}");
        remote.init(4096)?;
        assert_eq!(remote.tags()?.len(), 1, "{at}");
    }
    Ok(())
}
