//! Working sets: files beside snapshots that may be lost at any time.

use std::time::{Duration, UNIX_EPOCH};

use snapstore_store::{Error, Seen, SnapshotId, WorkingSet};

use super::*;

fn fixture() -> (Fixture, SnapshotId, WorkingSet) {
    let fixture = Fixture::new(PageSize::KIB_4);
    let input = memory(InputData::Bytes(noise(1, 1 << 20).into()), InputKind::Full);
    let base = fixture.commit("base", ParentChoice::Nothing, input);
    let seen = Seen {
        touched: vec![7, 3, 200],
        ..Seen::default()
    };
    let set = WorkingSet::merged(None, &seen, UNIX_EPOCH + Duration::from_secs(1));
    (fixture, base.unwrap().id, set)
}

fn file(store: &Store, id: SnapshotId) -> PathBuf {
    store.path().join(format!("working-sets/{id}.memory"))
}

#[test]
fn a_working_set_is_kept_as_long_as_its_snapshot() {
    let (fixture, id, set) = fixture();
    let store = &fixture.store;
    assert_eq!(store.working_set(id, "memory").unwrap(), None);
    store.keep_working_set(id, "memory", &set).unwrap();
    collect(store);
    let kept = fixture.other().working_set(id, "memory").unwrap();
    assert_eq!(kept, Some(set));
    assert_eq!(store.working_set(id, "disk0").unwrap(), None);
    // What a process that was killed has left of one.
    let unfinished = store.path().join("working-sets/.x.new.17.new");
    std::fs::write(&unfinished, "half").unwrap();
    let (_, pin) = store.pin("base").unwrap();
    remove(store, "base");
    collect(store);
    assert!(!unfinished.exists());
    assert!(file(store, id).exists(), "it is pinned");
    drop(pin);
    collect_all(store);
    assert!(!store.path().join("working-sets").exists());
}

fn assert_damaged(store: &Store, id: SnapshotId, image: &str) {
    let error = store.working_set(id, image).unwrap_err();
    assert!(matches!(error, Error::Damaged(_)), "{error}");
}

#[test]
fn a_damaged_working_set_is_nobodys_damage_but_its_own() {
    let (fixture, id, set) = fixture();
    let store = &fixture.store;
    store.keep_working_set(id, "memory", &set).unwrap();
    let path = file(store, id);
    let good = std::fs::read(&path).unwrap();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        std::fs::write(&path, &bad).unwrap();
        let error = store.working_set(id, "memory").unwrap_err();
        assert!(
            matches!(error, Error::Damaged(_) | Error::Newer { .. }),
            "{error}"
        );
        std::fs::write(&path, &good[..at]).unwrap();
        assert_damaged(store, id, "memory");
    }
    let report = store.verify(true, &Silent).unwrap();
    assert!(report.findings.is_empty(), "{:?}", report.findings);
    collect(store);
    Store::repair(store.path(), &Silent).unwrap();
    store.keep_working_set(id, "memory", &set).unwrap();
    assert_eq!(store.working_set(id, "memory").unwrap(), Some(set));
    // That of another image is not this one's.
    std::fs::copy(&path, path.with_extension("disk0")).unwrap();
    assert_damaged(store, id, "disk0");
}
