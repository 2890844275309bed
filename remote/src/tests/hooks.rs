//! Pages of snapshots that have nothing to do with each other, found by hooks.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs;
use std::sync::{Arc, Mutex};

use snapstore_store::Silent;

use super::{Outcome, PAGE, Scene, commit, image, list, read};
use crate::hooks::Run;
use crate::objects::{Objects, Requests, kind_of};
use crate::pack::{Pack, decode_list};
use crate::protocol::{CondemnRecord, Name, Options, Part, Session, Unanswered};
use crate::{PushReport, Remote};

type Pushed = Result<PushReport, Box<dyn std::error::Error>>;

/// The pages of `one`, but for the first seven, and 100 others.
fn alike(one: &[u8]) -> Vec<u8> {
    let mut bytes = one[7 * PAGE..].to_vec();
    bytes.extend_from_slice(&image(&[2; 100]));
    bytes
}

/// Pushes from a store of its own.
fn push_from(scene: &Scene, remote: &Remote, tag: &str, store: &str, bytes: &[u8]) -> Pushed {
    let store = scene.store(store)?;
    commit(&store, tag, bytes, None)?;
    Ok(remote.push(&store, tag, tag, true, &Silent)?)
}

fn is_read_as(scene: &Scene, remote: &Remote, tag: &str, bytes: &[u8]) -> Outcome {
    let name = format!("reads {tag} {:032x}", crate::random()?);
    let store = scene.store(&name)?;
    remote.pull(&store, tag, tag, false, &Silent)?;
    assert!(
        read(&store, tag)? == bytes,
        "{tag} is read as something else"
    );
    // What is wrong with a run is named, and costs nothing.
    let mut findings = remote.verify(true)?.findings;
    findings.retain(|finding| !finding.object.starts_with("hooks"));
    assert_eq!(findings, []);
    Ok(())
}

pub fn pages_of_others_are_found_by_hooks(scene: &Scene) -> Outcome {
    let remote = scene.remote()?;
    let first = image(&[1; 3000]);
    let report = push_from(scene, &remote, "one", "one", &first)?;
    assert_eq!((report.pages, report.found_pages), (3000, 0));
    assert_eq!(scene.keys("hooks")?.len(), 1);
    let second = alike(&first);
    let report = push_from(scene, &remote, "other", "other", &second)?;
    let found = (report.pages, report.reused_pages, report.found_pages);
    assert_eq!(found, (100, 2993, 2993), "{report:?}");
    is_read_as(scene, &remote, "other", &second)?;
    // What only the first one named is still needed.
    remote.remove("one")?;
    remote.collect(Options::default())?;
    is_read_as(scene, &remote, "other", &second)?;
    // Of a hundred pages there may be none in the sample.
    let report = push_from(scene, &remote, "third", "third", &second)?;
    assert!(report.found_pages >= 2993, "{report:?}");
    Ok(())
}

/// Names are never used again, so what a store has of them is not read again.
#[test]
fn runs_are_read_once_and_what_is_kept_is_not_trusted() -> Outcome {
    let scene = Scene::new()?;
    let remote = scene.remote()?;
    let first = image(&[1; 3000]);
    push_from(&scene, &remote, "one", "one", &first)?;
    let store = scene.store("other")?;
    commit(&store, "a", &alike(&first), None)?;
    let cache = scene.dir.path().join("other/cache");
    let kept = || -> Result<Vec<_>, Box<dyn std::error::Error>> {
        let buckets = list(&cache)?;
        let files = buckets.iter().map(|bucket| list(bucket));
        Ok(files.collect::<Result<Vec<_>, _>>()?.concat())
    };
    remote.push(&store, "a", "a", false, &Silent)?;
    let files = kept()?;
    assert_eq!(files.len(), 1, "{files:?}");
    // In the bucket it is damaged, and here it is not.
    let run = scene.keys("hooks")?.remove(0);
    let bytes = scene.bytes(&run)?;
    scene.replace(&run, b"damaged")?;
    let mut again = image(&[3; 50]);
    again.extend_from_slice(&first);
    commit(&store, "b", &again, None)?;
    let report = remote.push(&store, "b", "b", false, &Silent)?;
    assert_eq!(report.pages, 50, "{report:?}");
    // Here it is damaged, and in the bucket it is not.
    scene.replace(&run, &bytes)?;
    for file in kept()? {
        fs::write(file, b"damaged")?;
    }
    again.extend_from_slice(&image(&[4; 50]));
    commit(&store, "c", &again, None)?;
    let report = remote.push(&store, "c", "c", false, &Silent)?;
    assert!(report.pages <= 100, "{report:?}");
    // What is gone there goes here.
    for key in scene.keys("hooks")? {
        remote.bucket.delete(&key)?;
    }
    commit(&store, "d", &image(&[5; 50]), None)?;
    remote.push(&store, "d", "d", false, &Silent)?;
    assert_eq!(kept()?.len(), 0);
    Ok(())
}

/// It costs what is uploaded again, and nothing else.
#[test]
fn a_run_that_is_wrong_costs_no_data() -> Outcome {
    let first = image(&[1; 3000]);
    let second = alike(&first);
    let other_name = Name {
        session: Session(77),
        number: 7,
    };
    // Of a pack that is not there, of a list that is elsewhere, and of another pack's.
    let lying: [fn(&mut Pack); 4] = [
        |pack| pack.name.number += 9,
        |pack| pack.list_at += 1,
        |pack| pack.list_at = u32::MAX - 5,
        |pack| pack.list_len = 5 << 20,
    ];
    for wrong in 0..9 {
        let scene = Scene::new()?;
        let remote = scene.remote()?;
        push_from(&scene, &remote, "one", "one", &first)?;
        let run = scene.keys("hooks")?.remove(0);
        let bytes = scene.bytes(&run)?;
        match wrong {
            0 => remote.bucket.delete(&run)?,
            1 => scene.replace(&run, b"")?,
            2 => scene.replace(&run, &bytes[..bytes.len() - 1])?,
            3 => scene.replace(&run, &[&bytes[..], b"more"].concat())?,
            // One of another name.
            4 => remote.bucket.put(&other_name.hooks_key(), &bytes)?,
            _ => {
                let pack = scene.longest("packs")?;
                let Some(Part::Pack(name)) = Part::parse(&pack) else {
                    return Err("it has another name".into());
                };
                let bytes = scene.bytes(&pack)?;
                let list_len = 4 + 3000 * 41 + 32;
                let list_at = bytes.len() - 32 - list_len;
                let held = decode_list(name, &bytes[list_at..][..list_len]);
                let held = held.ok_or("it is its list")?;
                let mut pack = Pack {
                    name,
                    bytes: Vec::new(),
                    ids: held.iter().map(|held| held.id).collect(),
                    list_at: u32::try_from(list_at)?,
                    list_len: u32::try_from(list_len)?,
                };
                lying[wrong - 5](&mut pack);
                let mut run_of_it = Run::default();
                run_of_it.add(&pack);
                scene.replace(&run, &run_of_it.encode(&run))?;
            }
        }
        let report = push_from(&scene, &remote, "other", "other", &second)?;
        let expected = if wrong == 4 { 100 } else { 3093 };
        assert_eq!(report.pages, expected, "{wrong}: {report:?}");
        is_read_as(&scene, &remote, "other", &second)?;
    }
    Ok(())
}

#[test]
fn where_links_and_other_things_stand_in_the_way_pushes_go_on() -> Outcome {
    let scene = Scene::new()?;
    let remote = scene.remote()?;
    let outside = scene.dir.path().join("outside");
    fs::create_dir(&outside)?;
    std::os::unix::fs::symlink(&outside, scene.bucket().join("hooks"))?;
    let first = image(&[1; 300]);
    let report = push_from(&scene, &remote, "one", "one", &first)?;
    assert_eq!(report.pages, 300);
    assert_eq!(list(&outside)?, Vec::<std::path::PathBuf>::new());
    is_read_as(&scene, &remote, "one", &first)
}

/// The record that the tag has is not one on whose word such a pack may be used.
#[test]
fn what_is_condemned_is_not_reused_on_the_word_of_who_does_not_need_it() -> Outcome {
    let scene = Scene::new()?;
    let remote = scene.remote()?;
    let first = image(&[1; 3000]);
    push_from(&scene, &remote, "one", "one", &first)?;
    let pack = scene.longest("packs")?;
    push_from(&scene, &remote, "other", "small", &image(&[9; 50]))?;
    let name = Name {
        session: Session(5),
        number: 0,
    };
    let key = name.condemn_key();
    let part = Part::parse(&pack).ok_or("it is one")?;
    let record = CondemnRecord {
        parts: BTreeSet::from([part]),
    };
    remote.bucket.put(&key, &record.encode(&key))?;
    let second = alike(&first);
    let report = push_from(&scene, &remote, "other", "other", &second)?;
    assert_eq!((report.pages, report.found_pages), (3093, 0), "{report:?}");
    is_read_as(&scene, &remote, "other", &second)
}

#[test]
fn runs_go_with_their_packs_and_of_many_one_is_made() -> Outcome {
    let scene = Scene::new()?;
    let remote = scene.remote()?;
    let store = scene.store("store")?;
    let mut all = Vec::new();
    for number in 0..70_u8 {
        let (tag, bytes) = (format!("t{number}"), image(&vec![number + 1; 400]));
        commit(&store, &tag, &bytes, None)?;
        remote.push(&store, &tag, &tag, false, &Silent)?;
        all.extend_from_slice(&bytes);
    }
    assert!(scene.keys("hooks")?.len() > 64);
    remote.remove("t3")?;
    remote.collect(Options::default())?;
    assert_eq!(scene.keys("hooks")?.len(), 1);
    assert_eq!(scene.keys("packs")?.len(), 69);
    // Sixteen packs are read.
    let report = push_from(&scene, &remote, "all", "all", &all)?;
    assert_eq!(report.found_pages, 16 * 400, "{report:?}");
    is_read_as(&scene, &remote, "all", &all)?;
    let mut tags: Vec<String> = (0..70).map(|number| format!("t{number}")).collect();
    tags.retain(|tag| tag != "t3");
    tags.push("all".to_owned());
    assert!(remote.remove_all(&tags).1.is_ok());
    remote.collect(Options::default())?;
    assert_eq!(scene.keys("packs")?, Vec::<String>::new());
    assert_eq!(scene.keys("hooks")?, Vec::<String>::new());
    Ok(())
}

/// How much hooks find, of images of guests that were made on two hosts: `HOOKS_IMAGES` names
/// the two files.
#[test]
fn what_hooks_find_of_images() -> Outcome {
    let Ok(images) = std::env::var("HOOKS_IMAGES") else {
        println!("SKIPPED what_hooks_find_of_images: HOOKS_IMAGES names no images");
        return Ok(());
    };
    let mut paths = images.split(':');
    let (Some(one), Some(other)) = (paths.next(), paths.next()) else {
        return Err("HOOKS_IMAGES is ONE:OTHER".into());
    };
    let scene = Scene::new()?;
    let (one, other) = (fs::read(one)?, fs::read(other)?);
    let pages = |bytes: &[u8]| -> Vec<[u8; 32]> {
        let pages = bytes.chunks(PAGE);
        let pages = pages.filter(|page| page.iter().any(|byte| *byte != 0));
        pages.map(|page| blake3::hash(page).into()).collect()
    };
    let known: HashSet<_> = pages(&one).into_iter().collect();
    let new: HashSet<_> = pages(&other).into_iter().collect();
    let shared = new.intersection(&known).count();
    let remote = scene.remote()?;
    let first = push_from(&scene, &remote, "one", "one", &one)?;
    let hooks = scene.longest("hooks")?;
    println!(
        "one: {first:?}, a run of {} bytes",
        scene.bytes(&hooks)?.len()
    );
    let counted = Counting {
        bucket: scene.remote()?.bucket,
        reads: Mutex::default(),
    };
    let counted = Arc::new(counted);
    let mut remote = scene.remote()?;
    remote.bucket = Box::new(counted.clone());
    let second = push_from(&scene, &remote, "other", "other", &other)?;
    println!("other: {second:?}");
    let exact = scene.store("exact")?;
    commit(&exact, "other", &other, None)?;
    for key in scene.keys("hooks")? {
        remote.bucket.delete(&key)?;
    }
    let without = remote.push(&exact, "other", "without", true, &Silent)?;
    println!("without hooks: {without:?}");
    println!(
        "different pages of the second: {}, of these in the first: {shared}; uploaded without \
         hooks: {}, with: {}",
        new.len(),
        without.pages,
        second.pages,
    );
    println!("reads: {:?}", counted.reads.lock().expect("no panic"));
    Ok(())
}

/// Counts reads of packs and runs: requests, and bytes.
#[derive(Debug)]
struct Counting {
    bucket: Box<dyn Objects>,
    reads: Mutex<BTreeMap<String, (u64, u64)>>,
}

impl Objects for Arc<Counting> {
    fn create(&self) -> Result<(), Unanswered> {
        self.bucket.create()
    }
    fn is_absent(&self) -> bool {
        self.bucket.is_absent()
    }
    fn put(&self, key: &str, bytes: &[u8]) -> Result<(), Unanswered> {
        self.bucket.put(key, bytes)
    }
    fn get(&self, key: &str, part: Option<(u64, usize)>) -> Result<Option<Vec<u8>>, Unanswered> {
        let bytes = self.bucket.get(key, part)?;
        let mut reads = self.reads.lock().expect("no panic");
        let of_kind = reads.entry(kind_of(key).to_owned()).or_default();
        of_kind.0 += 1;
        of_kind.1 += bytes.as_ref().map_or(0, |bytes| bytes.len() as u64);
        Ok(bytes)
    }
    fn exists(&self, key: &str) -> Result<bool, Unanswered> {
        self.bucket.exists(key)
    }
    fn list(&self, prefix: &str) -> Result<Vec<crate::protocol::Listed>, Unanswered> {
        self.bucket.list(prefix)
    }
    fn delete(&self, key: &str) -> Result<(), Unanswered> {
        self.bucket.delete(key)
    }
    fn requests(&self) -> Option<Requests> {
        None
    }
}
