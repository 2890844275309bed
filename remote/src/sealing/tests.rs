use super::*;
use crate::dir::Directory;

type Outcome = Result<(), Box<dyn std::error::Error>>;

const KEY: &str = "packs/00000000000000000000000000000001-00000000";

fn body(domain: u8, key: &str) -> Body {
    Body::of(&objects_key(&DomainKey::of_bytes([domain; 32])), key)
}

fn bytes(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    bytes
}

/// The blocks of an object.
fn blocks(sealed: &[u8]) -> Vec<&[u8]> {
    sealed[HEAD_LEN..].chunks(STORED_LEN).collect()
}

fn with_blocks(sealed: &[u8], blocks: &[&[u8]]) -> Vec<u8> {
    [&sealed[..HEAD_LEN], &blocks.concat()].concat()
}

#[test]
fn what_is_sealed_is_opened_and_is_as_long_as_is_said() {
    let block = BLOCK_LEN;
    for len in [
        0,
        1,
        4096,
        block - 1,
        block,
        block + 1,
        3 * block,
        3 * block + 5,
    ] {
        let plain = bytes(len);
        let sealed = body(1, KEY).seal(&plain);
        let count = len.div_ceil(block).max(1);
        assert_eq!(sealed.len(), 16 + len + 28 * count);
        assert_eq!(opened_len(sealed.len() as u64), len as u64);
        assert_eq!(body(1, KEY).open(sealed.clone()), Ok(plain.clone()));
        assert_eq!(body(1, KEY).seal(&plain), sealed, "a write is tried again");
        let mut parts = plain.chunks(64);
        assert!(!parts.any(|part| part.len() == 64 && sealed.windows(64).any(|it| it == part)));
    }
}

#[test]
fn every_flipped_bit_every_cut_and_every_addition_is_found() {
    for len in [0, 5, 100] {
        let sealed = body(1, KEY).seal(&bytes(len));
        for bit in 0..sealed.len() * 8 {
            let mut flipped = sealed.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(body(1, KEY).open(flipped).is_err(), "bit {bit} of {len}");
        }
        for cut in 0..sealed.len() {
            assert!(body(1, KEY).open(sealed[..cut].to_vec()).is_err(), "{cut}");
        }
    }
    // At the end of a block, too, which what follows does not miss.
    let sealed = body(1, KEY).seal(&bytes(3 * BLOCK_LEN));
    for count in 0..3 {
        let cut = with_blocks(&sealed, &blocks(&sealed)[..count]);
        assert!(body(1, KEY).open(cut).is_err(), "{count} blocks");
    }
    for added in [1, 27, 28, 29, STORED_LEN] {
        let longer = [&sealed[..], &bytes(added)].concat();
        assert!(body(1, KEY).open(longer).is_err(), "{added} bytes");
    }
    let twice = with_blocks(&sealed, &[blocks(&sealed), blocks(&sealed)].concat());
    assert!(body(1, KEY).open(twice).is_err());
}

#[test]
fn no_block_stands_for_another_one() {
    // Of alike blocks, too.
    let sealed = body(1, KEY).seal(&vec![7; 4 * BLOCK_LEN]);
    let of = blocks(&sealed);
    for order in [[1, 0, 2, 3], [0, 2, 1, 3], [0, 0, 2, 3], [0, 1, 3, 2]] {
        let changed = with_blocks(&sealed, &order.map(|at| of[at]));
        assert!(body(1, KEY).open(changed).is_err(), "{order:?}");
    }
    // Of another object, or of another domain, that has the same in it.
    let name = "packs/00000000000000000000000000000001-00000001";
    for other in [body(1, name), body(2, KEY)] {
        let others = other.seal(&vec![7; 4 * BLOCK_LEN]);
        assert_eq!(body(1, KEY).open(others.clone()), Err(OTHER_KEY));
        for at in 0..4 {
            let mut mixed = of.clone();
            mixed[at] = blocks(&others)[at];
            assert!(body(1, KEY).open(with_blocks(&sealed, &mixed)).is_err());
            assert_ne!(mixed[at], of[at]);
        }
    }
    let clear = crate::protocol::seal(*b"SNAPBUCK", "config", b"x");
    assert_eq!(body(1, "config").open(clear), Err(IN_CLEAR));
}

/// Copies of one machine draw the same names: what they write under the same name must not
/// have the same nonces, but where it is the same.
#[test]
fn other_bytes_under_the_same_name_have_other_nonces() {
    let plain = bytes(3 * BLOCK_LEN);
    let mut other = plain.clone();
    other[BLOCK_LEN] ^= 1;
    let (one, two) = (body(1, KEY).seal(&plain), body(1, KEY).seal(&other));
    let same = |at: usize| blocks(&one)[at] == blocks(&two)[at];
    assert_eq!([0, 1, 2].map(same), [true, false, true]);
    assert_ne!(blocks(&one)[1][..12], blocks(&two)[1][..12]);
    // What was a last block is none once more follows.
    let longer = body(1, KEY).seal(&bytes(4 * BLOCK_LEN));
    assert_ne!(blocks(&one)[2][..12], blocks(&longer)[2][..12]);
}

struct Scene {
    _dir: tempfile::TempDir,
    below: Directory,
    sealed: Sealed,
}

impl Scene {
    fn new() -> std::io::Result<Self> {
        let dir = tempfile::tempdir()?;
        let below = Directory::new(dir.path());
        let sealed = Sealed::new(Box::new(below.clone()), &DomainKey::of_bytes([1; 32]));
        Ok(Self {
            _dir: dir,
            below,
            sealed,
        })
    }
}

#[test]
fn a_part_is_read_as_it_would_be_in_clear() -> Outcome {
    let Scene {
        below,
        sealed,
        _dir,
    } = Scene::new()?;
    for len in [0, 100, BLOCK_LEN, 2 * BLOCK_LEN, 3 * BLOCK_LEN + 77] {
        let plain = bytes(len);
        sealed.put(KEY, &plain)?;
        let edges = |at: usize| [at.saturating_sub(1), at, at + 1];
        let starts = (0..=4).flat_map(|block| edges(block * BLOCK_LEN));
        for from in starts.chain([50, len, len + 100_000, 1 << 40]) {
            for part_len in [0, 1, 60, BLOCK_LEN, BLOCK_LEN + 1, 4 * BLOCK_LEN, 1 << 40] {
                let part = Some((from as u64, part_len));
                let end = from.saturating_add(part_len).min(len);
                let expected = &plain[from.min(end)..end];
                let found = sealed.get(KEY, part)?.ok_or("it is there")?;
                assert_eq!(found, expected, "{from} {part_len} of {len}");
            }
        }
    }
    assert_eq!(sealed.get("packs/other", Some((0, 1)))?, None);
    drop(below);
    Ok(())
}

#[test]
fn of_a_part_only_its_blocks_have_to_be_whole() -> Outcome {
    let Scene {
        below,
        sealed,
        _dir,
    } = Scene::new()?;
    let plain = bytes(4 * BLOCK_LEN);
    sealed.put(KEY, &plain)?;
    let whole = below.get(KEY, None)?.ok_or("it is there")?;
    let mut flipped = whole.clone();
    flipped[HEAD_LEN + STORED_LEN + 1000] ^= 1;
    below.put(KEY, &flipped)?;
    let block = BLOCK_LEN as u64;
    for (from, len, is_whole) in [
        (0, BLOCK_LEN, true),
        (0, BLOCK_LEN + 1, false),
        (block, 1, false),
        (2 * block - 1, 1, false),
        (2 * block, 2 * BLOCK_LEN, true),
        (0, 4 * BLOCK_LEN, false),
    ] {
        let got = sealed.get(KEY, Some((from, len)));
        match got {
            Ok(got) => assert!(
                is_whole
                    && got.as_deref()
                        == plain.get(usize::try_from(from)?..usize::try_from(from)? + len)
            ),
            Err(error) => assert!(!is_whole && error.wrong.is_some() && error.key == KEY),
        }
    }
    // Cut at the end of a block: what is there has no end.
    below.put(KEY, &whole[..HEAD_LEN + 2 * STORED_LEN])?;
    assert_eq!(
        sealed.get(KEY, Some((0, 2 * BLOCK_LEN)))?.as_deref(),
        Some(&plain[..2 * BLOCK_LEN])
    );
    for (from, len) in [(0, 3 * BLOCK_LEN), (block, 2 * BLOCK_LEN)] {
        assert!(sealed.get(KEY, Some((from, len))).is_err());
    }
    assert!(sealed.get(KEY, None).is_err());
    below.put(KEY, &whole[..HEAD_LEN])?;
    assert!(sealed.get(KEY, Some((0, 1))).is_err());
    Ok(())
}

#[test]
fn names_of_tags_are_hidden_and_all_others_stay() -> Outcome {
    let Scene {
        below,
        sealed,
        _dir,
    } = Scene::new()?;
    let keys = [
        "config",
        "heads/a",
        "lease/s/0",
        "refs/base/1",
        "refs/base/2",
        "refs/other/1",
    ];
    for key in keys {
        sealed.put(key, key.as_bytes())?;
    }
    let listed = |objects: &dyn Objects, prefix: &str| -> Result<Vec<String>, Unanswered> {
        let found = objects.list(prefix)?.into_iter();
        Ok(found.map(|one| one.key).collect())
    };
    assert_eq!(listed(&sealed, "refs/")?, keys[3..]);
    assert_eq!(listed(&sealed, "refs/base/")?, keys[3..5]);
    assert_eq!(listed(&sealed, "refs/bas/")?, [""; 0]);
    assert_eq!(listed(&sealed, "lease/")?, [keys[2]]);
    let stored = listed(&below, "refs/")?;
    assert_eq!(stored.len(), 3);
    let tells = |key: &String| key.contains("base") || key.contains("other");
    assert!(!stored.iter().any(tells), "{stored:?}");
    // A record of a tag is none of another one, nor of another number.
    for (from, to) in [(3, 4), (3, 5), (5, 3)] {
        let bytes = below
            .get(&sealed.hidden(keys[from]), None)?
            .ok_or("there")?;
        below.put(&sealed.hidden(keys[to]), &bytes)?;
        let error = sealed.get(keys[to], None).err().ok_or("it was read")?;
        assert_eq!((error.wrong, &*error.key), (Some(OTHER_KEY), keys[to]));
        sealed.put(keys[to], keys[to].as_bytes())?;
    }
    // What is none of this key is shown as that, and can be deleted.
    below.put("refs/base/1", b"x")?;
    assert_eq!(listed(&sealed, "refs/")?[0], "refs/?base/1");
    assert!(sealed.get("refs/?base/1", None).is_err());
    assert_eq!(listed(&sealed, "refs/base/")?, keys[3..5]);
    sealed.delete("refs/?base/1")?;
    assert_eq!(listed(&sealed, "refs/")?, keys[3..]);
    sealed.delete(keys[3])?;
    assert!(!sealed.exists(keys[3])? && sealed.exists(keys[4])?);
    Ok(())
}
