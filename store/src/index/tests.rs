//! What the index promises, and that the double promises the same: both tell the
//! same of one history.

use std::path::Path;

use super::files::{IndexReader, IndexWriter, tidy};
use super::latest::LatestRuns;
use super::{rocks, run};
use crate::id::{ChunkKey, ChunkKind};
use crate::pack::{EntryNumber, Location, PackNumber};

#[cfg(feature = "sim")]
const KEYS: u8 = 12;

#[cfg(feature = "sim")]
fn key(number: u8) -> ChunkKey {
    ChunkKey {
        kind: ChunkKind::from_byte(number % 3).expect("a kind"),
        prefix: [number; 16],
    }
}

fn location(number: u64) -> Location {
    Location {
        pack: PackNumber((number % 5) as u32),
        entry: EntryNumber(number as u32),
    }
}

#[cfg(feature = "sim")]
/// The numbers that a history is drawn from.
struct Draw(u64);

#[cfg(feature = "sim")]
impl Draw {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) % limit
    }
}

#[cfg(feature = "sim")]
/// What an index of one kind tells along the history of a seed: of a writer at once,
/// of readers opened before and after what they look for was flushed.
macro_rules! history {
    ($kind:ident, $path:expr, $seed:expr) => {{
        use super::$kind::{IndexReader, IndexWriter};
        let path: &Path = $path;
        let mut draw = Draw($seed);
        let mut told: Vec<String> = Vec::new();
        let mut writer = Some(IndexWriter::open_or_create(path).unwrap());
        let mut readers: Vec<IndexReader> = Vec::new();
        for step in 0..60 {
            match draw.below(8) {
                0 | 1 => {
                    let entries: Vec<_> = (0..=draw.below(4))
                        .map(|_| (key(draw.below(KEYS.into()) as u8), location(draw.below(99))))
                        .collect();
                    writer.as_ref().unwrap().put(entries).unwrap();
                }
                2 => {
                    let pack = draw.below(5) as u32;
                    let keys: Vec<_> = (0..KEYS).map(key).collect();
                    let writer = writer.as_ref().unwrap();
                    writer.remove_if(keys, |at| at.pack.0 == pack).unwrap();
                }
                3 => writer.as_ref().unwrap().flush().unwrap(),
                4 => {
                    // What was not flushed is lost.
                    drop(writer.take());
                    writer = Some(IndexWriter::open(path).unwrap());
                }
                5 => readers.push(IndexReader::open(path).unwrap()),
                6 => {
                    let number = draw.below(KEYS.into()) as u8;
                    let found = writer.as_ref().unwrap().get(key(number)).unwrap();
                    told.push(format!("{step}: the writer has {number} at {found:?}"));
                }
                _ => {
                    for (which, reader) in readers.iter().enumerate() {
                        let all: Vec<_> = reader.entries().map(|it| it.unwrap()).collect();
                        let keys: Vec<_> = (0..KEYS).map(key).collect();
                        let many = reader.get_many(&keys).unwrap();
                        let one = reader.get(keys[3]).unwrap();
                        let manifests = reader.manifests().count();
                        told.push(format!(
                            "{step}: {which}: {all:?} {many:?} {one:?} {manifests}"
                        ));
                    }
                }
            }
        }
        told
    }};
}

#[cfg(feature = "sim")]
#[test]
fn the_double_tells_what_the_files_tell() {
    let mut looks = 0;
    for seed in 1..40 {
        let dir = tempfile::tempdir().unwrap();
        let files = history!(files, &dir.path().join("files"), seed);
        let double = history!(double, &dir.path().join("double"), seed);
        assert_eq!(files, double, "seed {seed}");
        looks += files.len();
    }
    assert!(looks > 400, "{looks} looks");
}

/// The key of a page, spread over all keys.
fn page(number: u64) -> ChunkKey {
    let hash = blake3::hash(&number.to_le_bytes());
    ChunkKey {
        kind: ChunkKind::Page,
        prefix: *hash.as_bytes().first_chunk().unwrap(),
    }
}

fn publish(path: &Path, entries: impl IntoIterator<Item = (ChunkKey, Location)>) {
    let writer = IndexWriter::open_or_create(path).unwrap();
    writer.put(entries).unwrap();
    writer.flush().unwrap();
}

fn runs_of(path: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(path.join("runs")) else {
        return Vec::new();
    };
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn all(path: &Path) -> Vec<(ChunkKey, Location)> {
    let reader = IndexReader::open(path).unwrap();
    let found: Vec<_> = reader.entries().map(|entry| entry.unwrap()).collect();
    for (key, at) in &found {
        assert_eq!(reader.get(*key).unwrap(), Some(*at));
    }
    found
}

#[test]
fn small_publications_are_runs_and_many_entries_become_a_sorted_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = &dir.path().join("index");
    for number in 0..17 {
        publish(path, [(page(number), location(number))]);
    }
    // The 17th run is the sum of all.
    assert_eq!(runs_of(path), ["00000017.all"]);
    publish(path, [(page(3), location(77))]);
    assert_eq!(runs_of(path), ["00000017.all", "00000018.run"]);
    let before = all(path);
    assert_eq!(before.len(), 17);
    let writer = IndexWriter::open(path).unwrap();
    let gone = location(4);
    writer
        .remove_if([page(4), page(5)], |at| at == gone)
        .unwrap();
    writer.flush().unwrap();
    assert_eq!(all(path).len(), 16);
    drop(writer);

    let old_view = IndexReader::open(path).unwrap();
    publish(path, (100..20_000).map(|n| (page(n), location(n))));
    assert_eq!(runs_of(path), [""; 0]);
    assert_eq!(all(path).len(), 16 + 19_900);
    let reader = IndexReader::open(path).unwrap();
    assert_eq!(reader.get(page(3)).unwrap(), Some(location(77)));
    assert_eq!(reader.get(page(4)).unwrap(), None);
    // What was opened before stays as it was.
    assert_eq!(old_view.get(page(100)).unwrap(), None);
    assert_eq!(old_view.entries().count(), 16);
    assert!(old_view.is_outdated());
}

#[test]
fn the_newest_entries_are_read_without_the_sorted_files() {
    let dir = tempfile::tempdir().unwrap();
    let path = &dir.path().join("index");
    let latest = || LatestRuns::read(path).unwrap().unwrap();
    publish(path, (100..20_000).map(|n| (page(n), location(n))));
    publish(path, [(page(1), location(1)), (page(2), location(2))]);
    publish(path, [(page(1), location(50))]);
    let writer = IndexWriter::open(path).unwrap();
    let is_there = |at| at == location(2);
    writer.remove_if([page(2)], is_there).unwrap();
    writer.flush().unwrap();
    drop(writer);
    std::fs::rename(path.join("CURRENT"), path.join("away")).unwrap();
    assert_eq!(latest().get(page(1)), Some(location(50)));
    // Of what was removed, and of what is in sorted files, it tells nothing.
    assert_eq!(latest().get(page(2)), None);
    assert_eq!(latest().get(page(100)), None);
    std::fs::rename(path.join("away"), path.join("CURRENT")).unwrap();
    publish(path, (30_000..50_000).map(|n| (page(n), location(n))));
    assert_eq!(latest().get(page(1)), None);
}

#[test]
fn many_new_entries_are_left_to_who_opens_the_index() {
    let dir = tempfile::tempdir().unwrap();
    let path = &dir.path().join("index");
    publish(path, [(page(1), location(1))]);
    let changes = (0..60_000).map(|n| (page(n).to_index_key(), Some(location(n))));
    let run = crate::format::index_run::Run::new(&changes.collect());
    run.write(&path.join("runs/00000002.run")).unwrap();
    assert!(LatestRuns::read(path).unwrap().is_none());
}

#[test]
fn what_a_sum_holds_does_not_count_again_where_it_was_left() {
    let dir = tempfile::tempdir().unwrap();
    let path = &dir.path().join("index");
    publish(path, [(page(1), location(1))]);
    let first = std::fs::read(path.join("runs/00000001.run")).unwrap();
    for number in 2..18 {
        publish(path, [(page(number), location(number))]);
    }
    let writer = IndexWriter::open(path).unwrap();
    writer.put([(page(1), location(50))]).unwrap();
    writer.flush().unwrap();
    drop(writer);
    let told = all(path);
    // A power cut brings back what was removed and not flushed.
    std::fs::write(path.join("runs/00000001.run"), first).unwrap();
    assert_eq!(all(path), told);
}

#[test]
fn runs_that_are_numbered_anew_are_read_anew() {
    let dir = tempfile::tempdir().unwrap();
    let path = &dir.path().join("index");
    publish(path, [(page(1), location(1))]);
    let before = IndexReader::open(path).unwrap();
    // Another process makes a sorted file of the runs, and begins with new ones.
    rocks::ingest(path, &before.changes()).unwrap();
    run::take_away(path).unwrap();
    std::fs::create_dir(path.join("runs")).unwrap();
    let changes = [(page(1).to_index_key(), Some(location(3)))].into();
    let anew = crate::format::index_run::Run::new(&changes);
    anew.write(&path.join("runs/00000001.run")).unwrap();
    let now = IndexReader::open(path).unwrap();
    assert_eq!(now.get(page(1)).unwrap(), Some(location(3)));
    assert_eq!(before.get(page(1)).unwrap(), Some(location(1)));
}

#[test]
fn merging_changes_nothing_and_leaves_an_open_view_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = &dir.path().join("index");
    for part in 0..6 {
        publish(
            path,
            (0..17_000).map(|n| (page(n * 2 + part % 2), location(n + part))),
        );
    }
    let view = IndexReader::open(path).unwrap();
    let told = all(path);
    assert_eq!(told.len(), 34_000);
    // The first one lies below all others.
    let unmerged = || rocks::Sorted::open(path).unwrap().unmerged_runs().unwrap();
    assert_eq!(unmerged(), 5);
    tidy(path, 5).unwrap();
    assert_eq!(unmerged(), 5);
    tidy(path, 3).unwrap();
    assert_eq!(unmerged(), 0);
    assert_eq!(all(path), told);
    // The files it reads are deleted by now.
    let still: Vec<_> = view.entries().map(|entry| entry.unwrap()).collect();
    assert_eq!(still, told);
}

#[test]
fn an_index_of_an_older_version_opens_and_is_written_to() {
    let dir = tempfile::tempdir().unwrap();
    let path = &dir.path().join("index");
    rocks::tests::make_as_before(path, (0..40_000).map(|n| (page(n), location(n))));
    assert_eq!(all(path).len(), 40_000);
    publish(path, [(page(1), location(9))]);
    publish(path, (40_000..70_000).map(|n| (page(n), location(n))));
    tidy(path, 0).unwrap();
    assert_eq!(all(path).len(), 70_000);
    let reader = IndexReader::open(path).unwrap();
    assert_eq!(reader.get(page(1)).unwrap(), Some(location(9)));
}

#[test]
fn entries_stay_runs_while_another_process_merges() {
    let dir = tempfile::tempdir().unwrap();
    let path = &dir.path().join("index");
    publish(path, [(page(1), location(1))]);
    let merging = rocks::tests::hold(path);
    publish(path, (2..20_000).map(|n| (page(n), location(n))));
    publish(path, (2..20_000).map(|n| (page(n), location(n + 1))));
    assert_eq!(runs_of(path).len(), 3);
    drop(merging);
    assert_eq!(all(path).len(), 19_999);
    publish(path, [(page(0), location(0))]);
    assert_eq!(runs_of(path), [""; 0]);
    let reader = IndexReader::open(path).unwrap();
    assert_eq!(reader.get(page(7)).unwrap(), Some(location(8)));
    assert_eq!(all(path).len(), 20_000);
}

#[test]
fn a_run_that_is_damaged_is_damage_of_the_index() {
    let dir = tempfile::tempdir().unwrap();
    let path = &dir.path().join("index");
    publish(path, [(page(1), location(1))]);
    let run = path.join("runs/00000001.run");
    let mut bytes = std::fs::read(&run).unwrap();
    bytes[20] ^= 1;
    std::fs::write(&run, bytes).unwrap();
    let error = IndexReader::open(path).map(drop).unwrap_err();
    assert!(
        error.is_damage() && error.to_string().starts_with("index "),
        "{error}"
    );
}

#[test]
fn what_was_looked_up_ahead_lies_under_what_came_since() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("index");
    let writer = IndexWriter::open_or_create(&path).unwrap().without_runs();
    let entries = (0..4).map(|number| (page(number), location(number)));
    writer.put(entries).unwrap();
    writer.flush().unwrap();
    drop(writer);
    let keys: Vec<ChunkKey> = (0..6).map(page).collect();
    let reader = IndexReader::open(&path).unwrap();
    let ahead = reader.look_ahead(&keys).unwrap();
    // Another process changes an entry, adds one, and removes one.
    let other = IndexWriter::open(&path).unwrap();
    other
        .put([(page(1), location(11)), (page(4), location(14))])
        .unwrap();
    other.remove_if([page(2)], |_| true).unwrap();
    other.flush().unwrap();
    drop(other);
    let writer = IndexWriter::open(&path).unwrap();
    assert!(writer.use_ahead(ahead));
    writer.put([(page(3), location(13))]).unwrap();
    let found = keys.iter().map(|key| writer.get(*key).unwrap());
    let expected = [Some(0), Some(11), None, Some(13), Some(14), None];
    assert!(found.eq(expected.map(|number| number.map(location))));
    drop(writer);
    // Once there is another sorted file it says nothing, of whatever was in the runs.
    let ahead = reader.look_ahead(&keys).unwrap();
    let writer = IndexWriter::open(&path).unwrap().without_runs();
    assert!(writer.use_ahead(reader.look_ahead(&keys).unwrap()));
    writer.put([(page(0), location(20))]).unwrap();
    writer.flush().unwrap();
    assert_eq!(writer.get(page(0)).unwrap(), Some(location(20)));
    assert!(!writer.use_ahead(ahead));
    assert_eq!(writer.get(page(0)).unwrap(), Some(location(20)));
}
