//! Machines of several heads of a chain hold what these have in common once.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use snapstore_guests::{TABLE, TOUCH, TouchCommand};
use snapstore_tests::harness::skipped;
use snapstore_tests::vm::{Lab, eventually, signal};

/// A chain of so many snapshots of a machine that writes other pages before each: `head0`,
/// `head1` and so on.
fn chain(lab: &Lab, heads: u32) -> Result<()> {
    lab.run("web", TOUCH, &["--mem", "32M"])?;
    lab.wait_for_text("web", "ready")?;
    for head in 0..heads {
        let command = TouchCommand::Write {
            count: if head == 0 { 4096 } else { 30 },
            first: 1024 + head * 37,
            value: head,
        };
        lab.type_in("web", &command.encode())?;
        // One answer a command.
        eventually("the guest has written", || {
            let answers = lab
                .console("web")?
                .lines()
                .filter(|it| it.starts_with('w'))
                .count();
            Ok((answers > head as usize).then_some(()))
        })?;
        lab.commit(&format!("head{head}"), "web")?;
    }
    lab.stop("web")
}

/// The parts of a machine's memory that are files: the address at which its memory begins,
/// by each of them, and the snapshot whose mount shows them.
fn mapped(lab: &Lab, name: &str) -> Result<Vec<(u64, String)>> {
    let maps = fs::read_to_string(format!("/proc/{}/maps", lab.pid(name)?))?;
    let lines = maps.lines().filter(|line| line.ends_with("/memory.bin"));
    lines
        .map(|line| {
            let (start, _) = line.split_once('-').context("no range")?;
            let path = line.split_whitespace().last().context("no path")?;
            let id = path.rsplit('/').nth(1).context("no directory")?;
            let offset = line.split_whitespace().nth(2).context("no offset")?;
            let begin = u64::from_str_radix(start, 16)? - u64::from_str_radix(offset, 16)?;
            Ok((begin, id.to_owned()))
        })
        .collect()
}

pub(crate) fn id(lab: &Lab, tag: &str) -> Result<String> {
    let shown = lab.cli.json(&["show", tag])?;
    Ok(shown["id"].as_str().context("no id")?.to_owned())
}

/// What the machine's process has in its memory is what the snapshot has. The machine is
/// paused, as it was restored.
pub(crate) fn holds(lab: &Lab, name: &str, tag: &str) -> Result<()> {
    let pid = lab.pid(name)?;
    let begin = mapped(lab, name)?[0].0;
    let stored = lab.stored_all(tag, "memory")?;
    let mut held = vec![0; stored.len()];
    File::open(format!("/proc/{pid}/mem"))?.read_exact_at(&mut held, begin)?;
    let differs = stored
        .chunks(4096)
        .zip(held.chunks(4096))
        .position(|(a, b)| a != b);
    ensure!(
        differs.is_none(),
        "{name} differs from {tag} in page {differs:?}"
    );
    Ok(())
}

#[test]
fn heads_of_a_chain_map_what_they_have_in_common_from_one_mount() -> Result<()> {
    let test = "heads_of_a_chain_map_what_they_have_in_common_from_one_mount";
    let Some(lab) = Lab::with_mounts(test)? else {
        return Ok(());
    };
    if !rustix::process::geteuid().is_root() {
        skipped(test, "only root reads the memory of a machine's process");
        return lab.finish();
    }
    chain(&lab, 4)?;
    let oldest = id(&lab, "head1")?;
    // Not the first of the chain: what comes before it is related, too.
    for head in [1, 0, 2, 3] {
        let (tag, name) = (format!("head{head}"), format!("m{head}"));
        lab.restore(&tag, &["--name", &name, "--paused"])?;
        let parts = mapped(&lab, &name)?;
        let own = id(&lab, &tag)?;
        let of = |id: &str| parts.iter().filter(|(_, it)| it == id).count();
        let own_parts = match own == oldest {
            true => 0,
            false => of(&own),
        };
        ensure!(of(&oldest) > 0, "{name}: {parts:?}");
        ensure!((own_parts > 0) == (own != oldest), "{name}: {parts:?}");
        ensure!(of(&oldest) + own_parts == parts.len(), "{name}: {parts:?}");
        holds(&lab, &name, &tag)?;
    }
    // A snapshot of one of them is whole, and made from its own parent.
    let answer = lab.commit("again", "m3")?;
    ensure!(answer["parent"] == id(&lab, "head3")?, "{answer}");
    let again = lab.stored_all("again", "memory")?;
    ensure!(again == lab.stored_all("head3", "memory")?);
    // The first has gone, and its tag: what it showed stays for the others.
    lab.stop("m1")?;
    lab.cli.ok(&["rm", "head1"])?;
    lab.cli.ok(&["gc"])?;
    holds(&lab, "m3", "head3")?;
    // One that is restored again maps the same; or its own mount alone, if so wanted.
    lab.restore(
        "head2",
        &["--name", "alone", "--paused", "--no-common-memory"],
    )?;
    let own = id(&lab, "head2")?;
    ensure!(mapped(&lab, "alone")?.iter().all(|(_, it)| *it == own));
    holds(&lab, "alone", "head2")?;
    lab.finish()
}

#[test]
fn a_guest_goes_on_over_the_memory_of_others() -> Result<()> {
    let Some(lab) = Lab::with_mounts("a_guest_goes_on_over_the_memory_of_others")? else {
        return Ok(());
    };
    lab.run("web", TABLE, &["--mem", "32M"])?;
    lab.wait_for_steps("web", 2)?;
    for tag in ["one", "two", "three"] {
        lab.commit(tag, "web")?;
        lab.wait_for_steps("web", 2)?;
    }
    lab.stop("web")?;
    for tag in ["one", "two", "three"] {
        lab.restore(tag, &[])?;
        lab.assert_goes_on(tag, tag)?;
    }
    lab.commit("four", "three")?;
    lab.restore("four", &[])?;
    lab.assert_goes_on("four", "four")?;
    // Nobody mistakes what was asked of a part for what a machine touches first.
    lab.cli.ok(&["stop", "--all"])?;
    lab.finish()?;
    let sets = lab.cli.json(&["show", "two"])?["working_sets"].clone();
    ensure!(sets[0]["recordings"] == 0, "{sets}");
    Ok(())
}

/// A snapshot that has nothing to do with the others, or another size, has its own mount.
#[test]
fn strangers_have_nothing_in_common() -> Result<()> {
    let Some(lab) = Lab::with_mounts("strangers_have_nothing_in_common")? else {
        return Ok(());
    };
    for (name, memory, count) in [
        ("large", "32M", 4096),
        ("other", "32M", 4000),
        ("small", "16M", 16),
    ] {
        lab.run(name, TOUCH, &["--mem", memory])?;
        lab.wait_for_text(name, "ready")?;
        let command = TouchCommand::Write {
            count,
            first: 1024,
            value: count,
        };
        lab.type_in(name, &command.encode())?;
        lab.wait_for_text(name, &format!("w{count}"))?;
        lab.commit(name, name)?;
        lab.stop(name)?;
    }
    for name in ["large", "other", "small"] {
        lab.restore(name, &[])?;
        let own = id(&lab, name)?;
        let parts = mapped(&lab, name)?;
        ensure!(parts.iter().all(|(_, it)| *it == own), "{name}: {parts:?}");
    }
    lab.finish()
}

/// As of a machine's own mount: the machine ends and says so, and others go on.
#[test]
fn a_lost_mount_ends_those_that_map_it() -> Result<()> {
    let Some(lab) = Lab::with_mounts("a_lost_mount_ends_those_that_map_it")? else {
        return Ok(());
    };
    chain(&lab, 2)?;
    lab.restore("head0", &["--name", "first"])?;
    let server = lab.mount_server()?;
    lab.restore("head1", &["--name", "second"])?;
    signal(server, Signal::KILL)?;
    // Pages that were never touched.
    let command = TouchCommand::Read {
        count: 2048,
        first: 2048,
    };
    lab.type_in("second", &command.encode())?;
    let said = lab.wait_for_death("second")?;
    ensure!(said.contains("memory"), "{said}");
    lab.cli.ok(&["stop", "--all"])?;
    // The next one has a mount that answers.
    lab.restore("head1", &["--name", "third"])?;
    lab.stop("third")?;
    lab.finish()
}
