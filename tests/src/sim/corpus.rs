//! Histories that fail with some fault, as short as they can be, and what is near to
//! them: half are left as they are, in the other half something is added, left out
//! or happens a little earlier or later.

mod script;

use fastrand::Rng;
use snapstore_store::StoreFormat;
use snapstore_store::sim::StepKind;

use self::script::{Script, commit, image};
use super::draw::Draft;
use super::plan::{Action, Class, Damage, Mishap, Mounting, Parent, Plan, Schedule};
use Class::At;
use StepKind::{Create, IndexFlush, Lock, RemoveDir, Rename, SyncDir, SyncFile, Unlink, Write};

const SCRIPTS: [fn() -> Script; 18] = [
    leaf_outlives_its_pages,
    dead_delta_beside_a_copy,
    published_while_collected,
    condemned_twice,
    lease_taken_late,
    number_used_again,
    killed_while_collected,
    commit_beside_a_repair,
    tagged_while_deleted,
    room_made_beside_a_writer,
    parent_removed_meanwhile,
    tagged_again_too_late,
    upgrade_goes_on_where_one_was_killed,
    condemned_before_an_upgrade,
    two_keys_of_a_chunk,
    damaged_while_repaired,
    large_pack_of_a_commit_that_fails,
    rebased_beside_a_commit,
];

const SCRIPTS_OF_MOUNTS: [fn() -> Script; 1] = [recorded_while_collected];

impl Plan {
    /// One of the scripts, or near to it.
    pub(super) fn known(rng: Rng) -> Self {
        Self::of_scripts(&SCRIPTS, rng)
    }

    /// The same of those in which somebody mounts.
    pub(super) fn known_of_mounts(rng: Rng) -> Self {
        Self::of_scripts(&SCRIPTS_OF_MOUNTS, rng)
    }

    fn of_scripts(scripts: &[fn() -> Script], mut rng: Rng) -> Self {
        let mut script = scripts[rng.usize(..scripts.len())]();
        let full_in_the_end = rng.u8(..8) == 0;
        let mut draft = Draft::of_few_images(rng, 3);
        draft.next_op = 1000;
        if draft.rng.bool() {
            for _ in 0..draft.rng.usize(1..=2) {
                script.change(&mut draft);
            }
        }
        Self {
            actors: script.actors,
            faults: script.faults,
            schedule: Schedule::Seams(script.seams),
            pack_chunks: script.pack_chunks,
            full_in_the_end,
            format: script.format.unwrap_or(match draft.rng.u8(..4) {
                0 => StoreFormat::One,
                _ => StoreFormat::Two,
            }),
            seed: draft.rng.u64(..),
        }
    }
}

/// A leaf stays in a pack that other chunks keep, while one of its pages was in a
/// pack that is deleted; then the same image is committed again.
fn leaf_outlives_its_pages() -> Script {
    use Parent::Nothing;
    Script::of([vec![
        commit(0, Nothing, &[(0, 0), (1, 0)], &[]),
        commit(1, Nothing, &[(0, 0), (3, 0)], &[(4, 0), (4, 1)]),
        Action::Remove(0),
        commit(2, Nothing, &[(5, 0)], &[(4, 0), (4, 1)]),
        Action::Remove(1),
        Action::Gc(50),
        commit(0, Nothing, &[(0, 0), (3, 0)], &[]),
    ]])
}

/// A collection has read the tags when a snapshot is committed and its working set is
/// recorded.
fn recorded_while_collected() -> Script {
    let mounting = Mounting {
        touched: vec![1],
        part: false,
        late: false,
    };
    Script::of([
        vec![Action::Gc(50)],
        vec![
            commit(0, Parent::Nothing, &[(0, 0)], &[]),
            Action::Mount(0, mounting),
        ],
    ])
    .overtaken(0, At(Lock, "locks/allocate"), 2, 2)
}

/// A commit finds a dead delta whose base has been moved: the index alone leads there.
/// Before it is acknowledged an optimisation makes a delta of that base.
fn rebased_beside_a_commit() -> Script {
    use Parent::{Nothing, Tag};
    let script = Script::of([
        vec![
            commit(0, Nothing, &[(0, 0)], &[(4, 0), (5, 0), (3, 0)]),
            commit(1, Tag(0), &[(0, 1)], &[(1, 0)]),
            commit(2, Nothing, &[(0, 0)], &[(1, 0)]),
            commit(3, Tag(2), &[(0, 2)], &[]),
            Action::Remove(1),
            Action::Remove(0),
            Action::Gc(50),
            commit(4, Nothing, &[(0, 1)], &[(2, 0)]),
        ],
        vec![Action::Optimize(None)],
    ]);
    Script {
        format: Some(StoreFormat::Two),
        ..script.overtaken(7, At(Rename, "packs/"), 1, 1)
    }
}

/// A delta whose base was collected is in a pack that is kept. Its page is stored
/// anew, moved by a collection, and then somebody repairs.
fn dead_delta_beside_a_copy() -> Script {
    use Parent::{Nothing, Tag};
    Script::of([vec![
        commit(0, Nothing, &[(0, 0)], &[]),
        commit(1, Tag(0), &[(0, 1)], &[(1, 0)]),
        commit(1, Nothing, &[(3, 0)], &[(1, 0)]),
        Action::Remove(0),
        Action::Gc(50),
        commit(0, Nothing, &[(0, 1)], &[(4, 0), (5, 0), (3, 1)]),
        commit(2, Nothing, &[(0, 1)], &[]),
        Action::Remove(0),
        Action::Gc(50),
        Action::Repair,
    ]])
}

/// A commit has sealed its pack and waits; what it holds is stored by another one as a
/// delta, and moved. The commit enters its copy while a collection runs that has read
/// the index, and is killed before it sets its tag.
fn published_while_collected() -> Script {
    use Parent::{Nothing, Tag};
    Script::of([
        vec![commit(0, Nothing, &[(0, 1)], &[])],
        vec![
            commit(1, Nothing, &[(0, 0)], &[]),
            commit(2, Tag(1), &[(0, 1)], &[]),
            Action::Gc(100),
            Action::Gc(50),
        ],
    ])
    .overtaken(0, At(Lock, "locks/publish"), 1, 3)
    .overtaken(4, At(Lock, "locks/publish"), 1, 0)
    .ends(0, At(Rename, "tags/"), 1, Mishap::Kill)
}

/// What a commit relies on is condemned; it takes it off the list while a second
/// collection writes that.
fn condemned_twice() -> Script {
    use Parent::Nothing;
    Script::of([
        vec![
            commit(0, Nothing, &[(0, 1)], &[]),
            Action::Remove(0),
            commit(0, Nothing, &[(0, 1)], &[(1, 0)]),
        ],
        vec![Action::Gc(50), Action::Gc(50)],
    ])
    .overtaken(2, At(Write, "packs/"), 1, 1)
    .overtaken(4, At(Rename, "collector"), 1, 0)
}

/// A commit is about to take its lease while a collection condemns what it will rely
/// on; the collection has looked at the leases when it does.
fn lease_taken_late() -> Script {
    use Parent::Nothing;
    Script::of([
        vec![
            commit(0, Nothing, &[(0, 1)], &[]),
            Action::Remove(0),
            commit(0, Nothing, &[(0, 1)], &[(1, 0)]),
        ],
        vec![Action::Gc(50)],
    ])
    .overtaken(2, At(Lock, "locks/allocate"), 1, 0)
    .overtaken(3, At(Unlink, "packs/"), 1, 0)
}

/// A collection is killed after it has deleted packs and before it has forgotten that
/// they are condemned, and the power failure takes the counter of packs back. Then a
/// commit fills more than one pack while somebody collects.
fn number_used_again() -> Script {
    use Parent::Nothing;
    let wide = |pages: &[(u8, u8)]| Action::Commit {
        tag: 0,
        parent: Nothing,
        memory: image(512, pages),
        disk: None,
        diff: false,
        keep: false,
    };
    let mut script = Script::of([
        vec![
            wide(&[(0, 0), (1, 0)]),
            Action::Remove(0),
            Action::Gc(50),
            Action::Read(0),
            wide(&[(3, 0), (4, 0), (5, 0)]),
        ],
        vec![Action::Gc(50)],
    ])
    // It has let go of its first pack, and asks for the number of the second.
    .overtaken(4, At(Lock, "locks/allocate"), 4, 1)
    // The first time it condemns, the second time it forgets.
    .ends(2, At(SyncFile, ".collector.new"), 2, Mishap::Kill)
    .ends(3, Class::Any, 1, Mishap::PowerCut);
    script.pack_chunks = 1;
    // A newer format tells packs of the same number apart.
    script.in_format_1()
}

/// A commit relies on a page that is being collected, and is killed before it sets its
/// tag. What it has entered is committed again.
fn killed_while_collected() -> Script {
    use Parent::Nothing;
    Script::of([
        vec![
            commit(0, Nothing, &[(0, 0)], &[]),
            Action::Remove(0),
            commit(0, Nothing, &[(0, 0), (1, 0)], &[]),
        ],
        vec![Action::Gc(50), commit(1, Nothing, &[(0, 0), (1, 0)], &[])],
    ])
    .overtaken(2, At(Lock, "locks/publish"), 1, 0)
    // It has condemned, and is about to delete.
    .overtaken(3, At(Lock, "locks/publish"), 2, 0)
    .ends(2, At(Rename, "tags/"), 1, Mishap::Kill)
}

/// A page is damaged. While a repair looks at the packs a commit begins that relies on
/// it, and that is acknowledged when the pack has been set aside.
fn commit_beside_a_repair() -> Script {
    use Parent::Nothing;
    Script::of([
        vec![
            commit(0, Nothing, &[(0, 0)], &[]),
            Action::Damage(Damage::FlipByte, 100),
            commit(1, Nothing, &[(0, 0), (3, 0)], &[]),
        ],
        vec![Action::Repair],
    ])
    .overtaken(2, At(Lock, "locks/allocate"), 1, 0)
    .overtaken(3, At(IndexFlush, "index.new"), 1, 0)
}

/// A snapshot that has lost its tag gets one again while a collection deletes it.
fn tagged_while_deleted() -> Script {
    Script::of([
        vec![
            commit(0, Parent::Nothing, &[(0, 0)], &[]),
            Action::Remove(0),
            Action::Revive(1, 0),
        ],
        vec![Action::Gc(50)],
    ])
    .overtaken(2, At(Lock, "locks/publish"), 1, 0)
    .overtaken(3, At(Unlink, "packs/"), 1, 0)
}

/// What a commit relies on is dead, and a collection finds the disk full.
fn room_made_beside_a_writer() -> Script {
    use Parent::Nothing;
    Script::of([
        vec![
            commit(0, Nothing, &[(0, 0)], &[]),
            Action::Remove(0),
            commit(0, Nothing, &[(0, 0), (1, 0)], &[]),
        ],
        vec![Action::Gc(50)],
    ])
    .overtaken(2, At(Write, "packs/"), 1, 1)
    .ends(3, At(Create, ".collector.new"), 1, Mishap::DiskFull(300))
}

/// A collection is killed when it has condemned a pack that is to be repacked. A commit
/// carries a disk over out of that, and its parent is removed and collected meanwhile.
fn parent_removed_meanwhile() -> Script {
    let changes = Action::Commit {
        tag: 1,
        parent: Parent::Tag(2),
        memory: image(1, &[(5, 0)]),
        disk: None,
        diff: true,
        keep: false,
    };
    Script::of([
        vec![
            commit(0, Parent::Nothing, &[(0, 0)], &[(1, 0)]),
            commit(2, Parent::Tag(0), &[(3, 0)], &[(1, 0)]),
            // A part of the first pack is dead.
            Action::Remove(0),
            Action::Gc(100),
            changes,
        ],
        vec![Action::Remove(2), Action::Gc(50)],
    ])
    .overtaken(4, At(Write, "packs/"), 1, 2)
    .ends(3, At(SyncFile, "packs/"), 1, Mishap::Kill)
}

/// What has lost its tag is collected, and is given another one by a process that has its
/// pack open still, before the index forgets it.
fn tagged_again_too_late() -> Script {
    Script::of([
        vec![
            commit(0, Parent::Nothing, &[(0, 0)], &[]),
            Action::Read(0),
            Action::Remove(0),
            Action::Revive(1, 0),
        ],
        vec![Action::Gc(50)],
    ])
    .same_process(1)
    .same_process(2)
    .same_process(3)
    .overtaken(3, At(Lock, "locks/publish"), 1, 0)
    // It has condemned, deleted, and is about to clean the index.
    .overtaken(4, At(Lock, "locks/publish"), 3, 0)
}

/// An upgrade is killed before the configuration is durable that says so. Another one
/// goes on, and the power fails.
fn upgrade_goes_on_where_one_was_killed() -> Script {
    use Parent::Nothing;
    let script = Script::of([
        vec![commit(0, Nothing, &[(0, 0)], &[]), Action::Upgrade],
        vec![Action::Upgrade],
    ]);
    script
        .ends(1, At(SyncDir, ""), 2, Mishap::Kill)
        .ends(2, At(SyncDir, "packs"), 1, Mishap::PowerCut)
        .in_format_1()
}

/// A collection of a store of format 1 ends when it has condemned a pack; then the store
/// is upgraded and collected again.
fn condemned_before_an_upgrade() -> Script {
    use Parent::Nothing;
    let script = Script::of([vec![
        commit(0, Nothing, &[(0, 0)], &[]),
        Action::Remove(0),
        Action::Gc(50),
        Action::Upgrade,
        Action::Gc(50),
    ]]);
    script
        .ends(2, At(SyncDir, "tags"), 1, Mishap::Kill)
        .in_format_1()
}

/// An upgrade ends when one pack of two is done. A collection copies the other beside a
/// commit, so that both copies stay, each with an entry of the index; the next one copies
/// again.
fn two_keys_of_a_chunk() -> Script {
    use Parent::{Nothing, Tag};
    let mut script = Script::of([
        vec![
            commit(1, Nothing, &[(3, 0)], &[]),
            commit(1, Tag(1), &[(3, 0)], &[]),
            Action::Upgrade,
            commit(0, Tag(1), &[(5, 0)], &[]),
            Action::Gc(100),
        ],
        vec![Action::Gc(100)],
    ])
    .ends(2, At(Create, "packs/"), 2, Mishap::PowerCut)
    .overtaken(3, At(Lock, "locks/publish"), 1, 1)
    .in_format_1();
    script.pack_chunks = 3;
    script
}

/// A bit flips in a pack that a repair has looked at; then what is in it is committed
/// again.
fn damaged_while_repaired() -> Script {
    use Parent::Nothing;
    let mut script = Script::of([
        vec![
            commit(0, Nothing, &[(0, 0), (3, 0)], &[]),
            Action::Damage(Damage::FlipByte, 0),
            commit(1, Nothing, &[(0, 0)], &[]),
        ],
        vec![Action::Repair],
    ])
    .overtaken(1, Class::Any, 1, 0)
    .overtaken(3, At(RemoveDir, "index.new"), 1, 2);
    script.pack_chunks = 1;
    script
}

/// A commit has entered its pack and waits to set its tag. Another one relies on that and
/// is acknowledged; then the first one fails.
fn large_pack_of_a_commit_that_fails() -> Script {
    use Parent::Nothing;
    let pages = [(0, 0), (3, 0), (4, 0), (5, 0)];
    Script::of([
        vec![commit(0, Nothing, &pages, &[])],
        vec![commit(1, Nothing, &pages, &[])],
    ])
    .overtaken(0, At(Lock, "locks/publish"), 2, 1)
    .ends(0, At(SyncFile, "tags/"), 1, Mishap::IoError)
}
