//! The number of a pack is where to look, and nothing of what is there: whatever files
//! have which names, no pack passes for another one.

use std::fs;
use std::path::PathBuf;
use std::sync::Mutex;

use snapstore_store::{
    Error, ErrorClass, GcOptions, InputData, InputKind, PageSize, ParentChoice, Progress, Silent,
    Store,
};

use crate::{Fixture, memory, noise, remove, request};

const PAGE: usize = 4096;

fn image(seed: u64) -> Vec<u8> {
    noise(seed, 200 * PAGE)
}

fn commit(store: &Store, tag: &str, bytes: Vec<u8>) {
    let input = memory(InputData::Bytes(bytes.into()), InputKind::Full);
    let request = request(tag, ParentChoice::Nothing, vec![input]);
    store.commit(&request, &Silent).unwrap();
}

/// What a tag holds; an error is damage.
fn read(store: &Store, tag: &str) -> Result<Vec<u8>, Error> {
    let manifest = store.manifest(store.resolve(tag)?)?;
    store.read_file_image(manifest.image("memory").unwrap(), 1 << 30)
}

fn is_right_or_damaged(store: &Store, tag: &str, bytes: &[u8]) {
    match read(store, tag) {
        Ok(found) => assert!(found == bytes, "{tag} has other bytes"),
        Err(error) => assert_eq!(error.class(), ErrorClass::Damaged, "{error}"),
    }
}

fn pack(store: &Store, number: u32) -> PathBuf {
    store.path().join(format!("packs/{number:08x}.pack"))
}

#[test]
fn packs_that_changed_their_names_pass_for_no_others() {
    let fixture = Fixture::new(PageSize::KIB_4);
    let open = fixture.other();
    for seed in 1..3 {
        commit(&fixture.store, &format!("t{seed}"), image(seed));
    }
    // One process has them open under their first names.
    assert!(read(&open, "t1").unwrap() == image(1));
    let aside = fixture.store.path().join("aside");
    fs::rename(pack(&open, 1), &aside).unwrap();
    fs::rename(pack(&open, 2), pack(&open, 1)).unwrap();
    fs::rename(&aside, pack(&open, 2)).unwrap();
    for store in [&open, &fixture.other()] {
        for seed in 1..3 {
            is_right_or_damaged(store, &format!("t{seed}"), &image(seed));
        }
    }
    // A commit relies on nothing that is not there.
    for store in [&open, &fixture.other()] {
        commit(store, "again", image(1));
        assert!(read(&fixture.other(), "again").unwrap() == image(1));
        remove(store, "again");
    }
    Store::repair(fixture.store.path(), &Silent).unwrap();
    for seed in 1..3 {
        assert!(read(&fixture.other(), &format!("t{seed}")).unwrap() == image(seed));
    }
}

/// A counter that was restored from a copy hands out a number that is used already
/// elsewhere: here that of a pack which another process has open.
#[test]
fn a_number_that_is_used_again_is_another_pack() {
    let fixture = Fixture::new(PageSize::KIB_4);
    let open = fixture.other();
    commit(&fixture.store, "t1", image(1));
    assert!(read(&open, "t1").unwrap() == image(1));
    remove(&fixture.store, "t1");
    fs::remove_file(pack(&open, 1)).unwrap();
    fs::write(open.path().join("locks/next-pack"), "0000000001\n").unwrap();
    commit(&fixture.store, "t2", image(2));
    assert!(pack(&open, 1).exists());
    assert!(read(&open, "t2").unwrap() == image(2));
    // Of the pack that is gone it takes nothing.
    commit(&open, "t1", image(1));
    for store in [&open, &fixture.other()] {
        for seed in 1..3 {
            assert!(read(store, &format!("t{seed}")).unwrap() == image(seed));
        }
    }
}

/// What was condemned was another pack.
#[test]
fn a_pack_under_a_condemned_number_is_none_that_is_condemned() {
    let fixture = Fixture::new(PageSize::KIB_4);
    let store = &fixture.store;
    commit(store, "t1", image(1));
    commit(store, "t2", image(2));
    remove(store, "t1");
    // The first pack is condemned, and waits for a commit that is under way.
    let collected = Mutex::new(None);
    let input = memory(InputData::Bytes(image(3).into()), InputKind::Full);
    let other = fixture.other();
    let collector = Meanwhile(|| {
        let mut collected = collected.lock().unwrap();
        if collected.is_none() {
            *collected = Some(other.gc(GcOptions::default(), &Silent).unwrap());
        }
    });
    let request = request("t3", ParentChoice::Nothing, vec![input]);
    store.commit(&request, &collector).unwrap();
    let collected = collected.into_inner().unwrap().unwrap();
    assert_eq!((collected.waiting_packs, collected.deleted_packs), (1, 0));
    // Now another one is there.
    fs::rename(pack(store, 2), pack(store, 1)).unwrap();
    Store::repair(store.path(), &Silent).unwrap();
    // Its chunks may be used: only the manifest is new.
    let again = fixture.other();
    let input = memory(InputData::Bytes(image(2).into()), InputKind::Full);
    let request = crate::request("t4", ParentChoice::Nothing, vec![input]);
    let committed = again.commit(&request, &Silent).unwrap();
    assert_eq!(
        committed.manifest.added_chunks, 0,
        "the manifest is not counted"
    );
    again.gc(GcOptions::default(), &Silent).unwrap();
    for (tag, seed) in [("t2", 2), ("t3", 3), ("t4", 2)] {
        assert!(read(&fixture.other(), tag).unwrap() == image(seed), "{tag}");
    }
}

/// Does something while a commit reads its inputs.
struct Meanwhile<F>(F);

impl<F: Fn() + Sync> Progress for Meanwhile<F> {
    fn begin(&self, _what: &str, _total: u64) {
        self.0();
    }

    fn advance(&self, _done: u64) {}
}
