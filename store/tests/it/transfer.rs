//! Snapshots that go from one store into another.

use std::collections::BTreeMap;
use std::io::{self, Read};

use snapstore_store::{
    Damage, Error, ErrorClass, ExportRequest, Exported, GcOptions, ImageRole, ImportRequest,
    Imported, Input, InputData, InputKind, PageSize, ParentChoice, Result, Silent, SnapshotId,
    Store, StoreFormat,
};

use super::{collect_all, noise, remove, request};

const PAGE: usize = 4096;

fn store_of(dir: &tempfile::TempDir, name: &str, format: StoreFormat) -> Store {
    let path = dir.path().join(name);
    Store::create_in_format(&path, PageSize::KIB_4, format).unwrap()
}

fn commit(store: &Store, tag: &str, parent: ParentChoice, bytes: &[u8]) -> SnapshotId {
    let input = |name: &str, role, bytes: &[u8]| Input {
        name: name.to_owned(),
        role,
        data: InputData::Bytes(bytes.to_vec().into()),
        kind: InputKind::Full,
    };
    let mut request = request(
        tag,
        parent,
        vec![
            input("memory", ImageRole::Memory, bytes),
            input("root", ImageRole::Disk, &bytes[..PAGE + 512]),
            input("vmstate", ImageRole::File, b"registers"),
        ],
    );
    request.labels.insert("os".to_owned(), "none".to_owned());
    store.commit(&request, &Silent).unwrap().id
}

/// Pages of noise, of which some are zero and one is like its neighbour.
fn image(seed: u64, pages: usize) -> Vec<u8> {
    let mut bytes = noise(seed, pages * PAGE);
    bytes[3 * PAGE..5 * PAGE].fill(0);
    let page = bytes[..PAGE].to_vec();
    bytes[PAGE..2 * PAGE].copy_from_slice(&page);
    bytes
}

/// The same with few bytes changed in some pages: stored as deltas.
fn later(bytes: &[u8], seed: u64) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for page in (0..bytes.len() / PAGE).step_by(7) {
        bytes[page * PAGE + 100..][..8].copy_from_slice(&noise(seed, 8));
    }
    bytes
}

fn export(store: &Store, names: &[&str], chain: bool) -> Result<(Exported, Vec<u8>)> {
    let request = ExportRequest {
        snapshots: names.iter().map(|name| (*name).to_owned()).collect(),
        chain,
        label: "the stream".into(),
    };
    let mut stream = Vec::new();
    let exported = store.export(&request, &mut stream, &Silent)?;
    assert_eq!(exported.stream_bytes, stream.len() as u64);
    Ok((exported, stream))
}

fn import(store: &Store, stream: impl Read) -> Result<Imported> {
    let request = ImportRequest {
        label: "the stream".into(),
        ..ImportRequest::default()
    };
    store.import(&request, stream, &Silent)
}

/// What every image of a snapshot reads as, and its labels.
fn content(store: &Store, name: &str) -> BTreeMap<String, Vec<u8>> {
    let manifest = store.manifest(store.resolve(name).unwrap()).unwrap();
    let images = manifest.images.iter().map(|image| {
        let bytes = store.read_file_image(image, 1 << 30).unwrap();
        (image.name.clone(), bytes)
    });
    let labels = format!("{:?}", manifest.labels).into_bytes();
    images.chain([("labels".to_owned(), labels)]).collect()
}

fn assert_whole(store: &Store) {
    let store = Store::open(store.path()).unwrap();
    let report = store.verify(true, &Silent).unwrap();
    assert_eq!(report.findings, []);
}

/// A chain of three.
fn chain(store: &Store) -> [SnapshotId; 3] {
    let first = image(1, 600);
    let second = later(&first, 2);
    let third = later(&second, 3);
    let named = |tag: &str| ParentChoice::Named(tag.to_owned());
    [
        commit(store, "a", ParentChoice::Nothing, &first),
        commit(store, "b", named("a"), &second),
        commit(store, "c", named("b"), &third),
    ]
}

#[test]
fn a_chain_goes_between_stores_of_all_formats() {
    let dir = tempfile::tempdir().unwrap();
    let formats = [StoreFormat::One, StoreFormat::Two];
    for from in formats {
        let old = store_of(&dir, &format!("old-{from:?}"), from);
        let ids = chain(&old);
        let (exported, stream) = export(&old, &["c"], true).unwrap();
        assert_eq!(exported.snapshots.len(), 3);
        assert_eq!(exported.left_out, []);
        for to in formats {
            let new = store_of(&dir, &format!("new-{from:?}-{to:?}"), to);
            let imported = import(&new, &stream[..]).unwrap();
            let exported_as = |at: usize| imported.snapshots[at].exported_as;
            assert_eq!([0, 1, 2].map(exported_as), ids);
            for tag in ["a", "b", "c"] {
                assert_eq!(content(&new, tag), content(&old, tag), "{from:?} {to:?}");
            }
            assert_whole(&new);
            let keeps_ids = (from, to) != (StoreFormat::Two, StoreFormat::One);
            for (at, id) in ids.iter().enumerate() {
                let snapshot = &imported.snapshots[at];
                assert_eq!(snapshot.id == *id, keeps_ids, "{from:?} {to:?}");
                let parent = new.manifest(snapshot.id).unwrap().parent;
                let before = at.checked_sub(1).map(|at| imported.snapshots[at].id);
                assert_eq!(parent, before, "who descends from whom stays");
            }
            // What was stored as deltas is so again.
            let took = |id: &SnapshotId| old.manifest(*id).unwrap().added_bytes;
            let most = ids.iter().map(took).sum::<u64>() + (64 << 10);
            assert!(imported.added_bytes <= most, "{imported:?} {most}");
            // It can be gone on with, collected, and given on.
            let next = later(&image(1, 600), 4);
            commit(&new, "d", ParentChoice::Named("c".to_owned()), &next);
            remove(&new, "a");
            new.gc(GcOptions::default(), &Silent).unwrap();
            assert_eq!(content(&new, "c"), content(&old, "c"));
            assert_whole(&new);
        }
    }
}

#[test]
fn what_was_imported_is_imported_again_without_being_written() {
    let dir = tempfile::tempdir().unwrap();
    let old = store_of(&dir, "old", StoreFormat::Two);
    chain(&old);
    let (_, stream) = export(&old, &["c"], true).unwrap();
    for format in [StoreFormat::One, StoreFormat::Two] {
        let new = store_of(&dir, &format!("new-{format:?}"), format);
        let first = import(&new, &stream[..]).unwrap();
        assert!(first.added_chunks > 600);
        let again = import(&new, &stream[..]).unwrap();
        assert_eq!(again.added_chunks, 0);
        assert_eq!(again.snapshots, first.snapshots);
    }
}

#[test]
fn one_snapshot_without_its_ancestors_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let old = store_of(&dir, "old", StoreFormat::Two);
    let ids = chain(&old);
    let (exported, stream) = export(&old, &["c"], false).unwrap();
    assert_eq!(exported.snapshots.len(), 1);
    let new = store_of(&dir, "new", StoreFormat::Two);
    import(&new, &stream[..]).unwrap();
    assert_eq!(new.tag("c").unwrap(), Some(ids[2]));
    assert_eq!(new.manifest(ids[2]).unwrap().parent, Some(ids[1]));
    assert!(!new.has_snapshot(ids[1]).unwrap());
    assert_eq!(content(&new, "c"), content(&old, "c"));
    assert_whole(&new);
    remove(&new, "c");
    collect_all(&new);
}

#[test]
fn lineages_that_share_pages_share_them_in_the_stream() {
    let dir = tempfile::tempdir().unwrap();
    let old = store_of(&dir, "old", StoreFormat::Two);
    let one = image(1, 1000);
    let mut other = image(2, 1000);
    // At other places of another chain.
    other[..512 * PAGE].copy_from_slice(&one[200 * PAGE..712 * PAGE]);
    commit(&old, "one", ParentChoice::Nothing, &one);
    commit(&old, "other", ParentChoice::Nothing, &other);
    let alone = export(&old, &["one"], false).unwrap().1.len()
        + export(&old, &["other"], false).unwrap().1.len();
    let (exported, stream) = export(&old, &["one", "other"], false).unwrap();
    assert!(stream.len() + 400 * PAGE < alone);
    // 1000 pages each, of which two are zero, one is like another, 509 are shared.
    assert!(exported.chunks < 1600, "{}", exported.chunks);

    // Into a store that has one of them already, and another of its pages.
    let new = store_of(&dir, "new", StoreFormat::Two);
    commit(&new, "mine", ParentChoice::Nothing, &one[..300 * PAGE]);
    let imported = import(&new, &stream[..]).unwrap();
    assert!(imported.added_chunks + 290 < exported.chunks);
    for tag in ["one", "other"] {
        assert_eq!(content(&new, tag), content(&old, tag));
    }
    assert_whole(&new);
    // What each needs stays when the others go.
    remove(&new, "one");
    remove(&new, "mine");
    for _ in 0..2 {
        new.gc(GcOptions::default(), &Silent).unwrap();
    }
    assert_eq!(content(&new, "other"), content(&old, "other"));
    assert_whole(&new);
}

#[test]
fn an_ancestor_without_a_tag_is_left_out_and_told() {
    let dir = tempfile::tempdir().unwrap();
    let old = store_of(&dir, "old", StoreFormat::Two);
    let ids = chain(&old);
    remove(&old, "b");
    let (exported, stream) = export(&old, &["c"], true).unwrap();
    let sent: Vec<_> = exported.snapshots.iter().map(|it| it.id).collect();
    assert_eq!(
        sent,
        [ids[0], ids[2]],
        "as long as it can be read, it is passed over"
    );
    assert_eq!(exported.left_out, [ids[1]]);
    let new = store_of(&dir, "new", StoreFormat::Two);
    import(&new, &stream[..]).unwrap();
    assert_eq!(content(&new, "c"), content(&old, "c"));
    // By its id it can be named, and has the tag that it had.
    let (exported, stream) = export(&old, &[&ids[1].to_string()], false).unwrap();
    assert_eq!(exported.snapshots[0].tags, ["b"]);
    import(&new, &stream[..]).unwrap();
    assert_eq!(new.tag("b").unwrap(), Some(ids[1]));
}

/// Reads so many bytes, then fails as a connection does.
struct Broken<'a>(&'a [u8], usize);

impl Read for Broken<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let most = out.len().min(self.1);
        if most == 0 {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        let read = self.0.read(&mut out[..most])?;
        self.1 -= read;
        Ok(read)
    }
}

#[test]
fn an_import_that_breaks_off_is_gone_on_with() {
    let dir = tempfile::tempdir().unwrap();
    let old = store_of(&dir, "old", StoreFormat::Two);
    // More than a pack has to have to be finished with its snapshot.
    commit(&old, "large", ParentChoice::Nothing, &image(1, 1500));
    commit(&old, "other", ParentChoice::Nothing, &image(2, 1500));
    let (exported, stream) = export(&old, &["large", "other"], false).unwrap();
    let new = store_of(&dir, "new", StoreFormat::Two);
    let error = import(&new, Broken(&stream, stream.len() - 100)).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
    assert_eq!(new.tags().unwrap().len(), 0, "none is set before the end");
    assert_whole(&new);
    let imported = import(&new, &stream[..]).unwrap();
    assert!(
        imported.added_chunks < exported.chunks * 2 / 3,
        "{imported:?}"
    );
    assert_eq!(content(&new, "large"), content(&old, "large"));
    assert_eq!(content(&new, "other"), content(&old, "other"));
    assert_whole(&new);
    // Broken off for good, nothing of it stays.
    let third = store_of(&dir, "third", StoreFormat::Two);
    import(&third, Broken(&stream, stream.len() - 100)).unwrap_err();
    collect_all(&third);
}

#[test]
fn an_import_that_breaks_off_within_a_snapshot_is_gone_on_with() {
    let dir = tempfile::tempdir().unwrap();
    let old = store_of(&dir, "old", StoreFormat::Two);
    commit(&old, "large", ParentChoice::Nothing, &image(1, 10_000));
    let (exported, stream) = export(&old, &["large"], false).unwrap();
    let added = |stream: &[u8], then: &Store| {
        import(then, stream).unwrap_err();
        assert_eq!(then.tags().unwrap().len(), 0);
        assert_whole(then);
        let imported = import(then, &stream_of(&old)[..]).unwrap();
        assert_eq!(content(then, "large"), content(&old, "large"));
        imported.added_chunks
    };
    // What came is kept where more was to come.
    let cut = store_of(&dir, "cut", StoreFormat::Two);
    let again = added(&stream[..stream.len() / 2], &cut);
    assert!(again < exported.chunks * 3 / 5, "{again}");
    // One that is killed keeps pieces; as one does whose stream is wrong.
    let mut wrong = stream.clone();
    let last = wrong.len() - 100;
    wrong[last] ^= 1;
    let killed = store_of(&dir, "killed", StoreFormat::Two);
    let again = added(&wrong, &killed);
    assert!(again < exported.chunks / 2, "{again}");
}

fn stream_of(store: &Store) -> Vec<u8> {
    export(store, &["large"], false).unwrap().1
}

#[test]
fn a_stream_that_was_cut_off_or_changed_anywhere_leaves_no_tag() {
    let dir = tempfile::tempdir().unwrap();
    let old = store_of(&dir, "old", StoreFormat::Two);
    let bytes = image(1, 12);
    commit(&old, "a", ParentChoice::Nothing, &bytes);
    let later = later(&bytes, 2);
    commit(&old, "b", ParentChoice::Named("a".to_owned()), &later);
    let (_, stream) = export(&old, &["b"], true).unwrap();
    let new = store_of(&dir, "new", StoreFormat::Two);
    let refused = |stream: &[u8], what: &str| {
        let error = import(&new, stream).expect_err(what);
        assert!(error.to_string().contains("the stream"), "{what}: {error}");
        let is_told = match &error {
            Error::Damaged(Damage::Stream { offset_bytes, .. }) => {
                *offset_bytes <= stream.len() as u64
            }
            Error::NotAStream { .. } => true,
            _ => false,
        };
        assert!(is_told, "{what}: {error}");
        assert_eq!(new.tags().unwrap().len(), 0, "{what}");
    };
    for at in (0..stream.len()).step_by(97) {
        let mut flipped = stream.clone();
        flipped[at] ^= 1 << (at % 8);
        refused(&flipped, &format!("bit flipped in byte {at}"));
    }
    for len in (0..stream.len()).step_by(997).chain([stream.len() - 1]) {
        refused(&stream[..len], &format!("cut off after {len} bytes"));
    }
    refused(&[&stream[..], b"x"].concat(), "more than its end");
    // Nothing of all that is in the way of the whole one.
    import(&new, &stream[..]).unwrap();
    assert_eq!(content(&new, "b"), content(&old, "b"));
    assert_whole(&new);
}

#[test]
fn what_cannot_go_into_this_store_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let old = store_of(&dir, "old", StoreFormat::Two);
    commit(&old, "a", ParentChoice::Nothing, &image(1, 12));
    let (_, stream) = export(&old, &["a"], false).unwrap();
    let path = dir.path().join("large-pages");
    let large = Store::create(&path, PageSize::KIB_64).unwrap();
    let error = import(&large, &stream[..]).unwrap_err();
    assert_eq!(error.class(), ErrorClass::Invalid);
    assert!(error.to_string().contains("pages of 4096 bytes"), "{error}");
    for cut in [&b""[..], &stream[..5]] {
        let error = import(&old, cut).unwrap_err();
        assert_eq!(error.class(), ErrorClass::Damaged, "{error}");
    }
    let error = import(&old, &b"snapshots, surely"[..]).unwrap_err();
    assert!(matches!(error, Error::NotAStream { .. }), "{error}");

    // A name that is taken, unless it may be moved; the same snapshot is no other.
    import(&old, &stream[..]).unwrap();
    let new = store_of(&dir, "new", StoreFormat::Two);
    let mine = commit(&new, "a", ParentChoice::Nothing, &image(2, 12));
    let error = import(&new, &stream[..]).unwrap_err();
    assert!(matches!(error, Error::TagExists { .. }), "{error}");
    assert_eq!(new.tag("a").unwrap(), Some(mine));
    let request = ImportRequest {
        replace: true,
        ..ImportRequest::default()
    };
    new.import(&request, &stream[..], &Silent).unwrap();
    assert_eq!(content(&new, "a"), content(&old, "a"));
    // Of a snapshot that is not there.
    let error = export(&new, &["b"], false).unwrap_err();
    assert_eq!(error.class(), ErrorClass::NotFound);
}

#[test]
fn a_damaged_snapshot_is_not_exported() {
    let dir = tempfile::tempdir().unwrap();
    let old = store_of(&dir, "old", StoreFormat::Two);
    commit(&old, "a", ParentChoice::Nothing, &image(1, 12));
    let pack = std::fs::read_dir(old.path().join("packs")).unwrap();
    let pack = pack.into_iter().next().unwrap().unwrap().path();
    let mut bytes = std::fs::read(&pack).unwrap();
    bytes[5000] ^= 1;
    std::fs::write(&pack, bytes).unwrap();
    let error = export(&Store::open(old.path()).unwrap(), &["a"], false).unwrap_err();
    assert_eq!(error.class(), ErrorClass::Damaged, "{error}");
}

#[test]
fn a_copy_is_an_export_and_an_import() {
    let dir = tempfile::tempdir().unwrap();
    let old = store_of(&dir, "old", StoreFormat::Two);
    let ids = chain(&old);
    let new = store_of(&dir, "new", StoreFormat::Two);
    let request = |name: &str| ExportRequest {
        snapshots: vec![name.to_owned()],
        chain: true,
        label: "the old store".into(),
    };
    // One thread has to be enough.
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(1)
        .build()
        .unwrap();
    let pool = std::sync::Arc::new(pool);
    let (from, to) = (
        old.clone().with_pool(pool.clone()),
        new.clone().with_pool(pool),
    );
    let import = ImportRequest::default();
    let (exported, imported) = to
        .copy_from(&from, &request("c"), &import, &Silent)
        .unwrap();
    assert_eq!(exported.chunks, imported.chunks);
    assert_eq!(new.tag("c").unwrap(), Some(ids[2]));
    assert_eq!(content(&new, "a"), content(&old, "a"));
    assert_whole(&new);

    let copy =
        |to: &Store, from: &Store, name| to.copy_from(from, &request(name), &import, &Silent);
    // The error is that of whoever failed.
    let error = copy(&new, &old, "nothing").unwrap_err();
    assert!(matches!(error, Error::NotFound { .. }), "{error}");
    let error = copy(&store_of(&dir, "taken", StoreFormat::Two), &old, "none").unwrap_err();
    assert!(matches!(error, Error::NotFound { .. }), "{error}");
    let taken = Store::open(&dir.path().join("taken")).unwrap();
    commit(&taken, "c", ParentChoice::Nothing, &image(9, 12));
    let error = copy(&taken, &old, "c").unwrap_err();
    assert!(matches!(error, Error::TagExists { .. }), "{error}");
}
