//! Things in a store's directory that are no files of a store: nothing waits for
//! them, and they are in nobody's way but of who asks for them.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context as _, ensure};
use snapstore_tests::harness::{noise, program};

use crate::{Fixture, PAGE};

const KINDS: [&str; 7] = [
    "a directory",
    "a full directory",
    "a named pipe",
    "a socket",
    "a link",
    "a dangling link",
    "a link to a device",
];

fn make(kind: &str, at: &Path) -> anyhow::Result<()> {
    let _ = fs::remove_file(at);
    match kind {
        "a directory" => fs::create_dir(at)?,
        "a full directory" => {
            fs::create_dir(at)?;
            fs::write(at.join("file"), "mine")?;
        }
        "a named pipe" => {
            let made = Command::new("mkfifo").arg(at).status()?;
            ensure!(made.success(), "mkfifo");
        }
        "a socket" => drop(UnixListener::bind(at)?),
        "a link" => {
            let target = at.parent().context("a root")?.join("../../elsewhere");
            fs::write(&target, "mine")?;
            symlink(target, at)?;
        }
        "a dangling link" => symlink("/nowhere/at/all", at)?,
        _ => symlink("/dev/zero", at)?,
    }
    Ok(())
}

/// What is written for the user is none of the store's files, whatever the path says.
#[test]
fn no_output_is_written_into_the_store() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    fixture.commit("base", &noise(1, 4 * PAGE), &[])?;
    let store = fixture.cli.store();
    let (link, dir_link) = (fixture.path("link"), fixture.path("dir-link"));
    symlink(store.join("config"), &link)?;
    symlink(store.join("packs"), &dir_link)?;
    let pack = format!("{}/packs/00000001.pack", store.display());
    ensure!(Path::new(&pack).exists(), "there is a pack");
    for place in [
        pack,
        format!("{}/packs/new", store.display()),
        format!("{}/tags/../new", store.display()),
        format!("{dir_link}/new"),
        link,
    ] {
        for command in [&["export", "base"][..], &["report"], &["metrics"]] {
            let arguments = [command, &["-o", &place]].concat();
            fixture.refused(2, "name a file elsewhere", &arguments)?;
        }
    }
    fixture.cli.ok(&["verify", "--read-data"])?;
    Ok(())
}

/// Runs the program, which must end by itself.
fn run(fixture: &Fixture, arguments: &[&str]) -> anyhow::Result<(i32, String)> {
    let Output {
        status,
        stdout,
        stderr,
    } = Command::new("timeout")
        .arg("120")
        .arg(program()?)
        .arg("--store")
        .arg(fixture.cli.store())
        .args(arguments)
        .output()?;
    let said = String::from_utf8_lossy(&[stdout, stderr].concat()).into_owned();
    let code = status.code().context("killed")?;
    ensure!(code < 6, "{arguments:?} ended with {code}: {said}");
    Ok((code, said))
}

fn done(fixture: &Fixture, arguments: &[&str]) -> anyhow::Result<String> {
    let (code, said) = run(fixture, arguments)?;
    ensure!(code == 0, "{arguments:?} ended with {code}: {said}");
    Ok(said)
}

fn with_base() -> anyhow::Result<Fixture> {
    let fixture = Fixture::new()?;
    fixture.commit("base", &noise(1, 8 * PAGE), &[])?;
    fixture.file("next", &noise(2, 8 * PAGE))?;
    Ok(fixture)
}

/// All that has to work whatever lies about.
fn others_work(fixture: &Fixture) -> anyhow::Result<()> {
    done(fixture, &["show", "base"])?;
    let next = fixture.path("next");
    done(fixture, &["commit", "next", "--memory", &next])?;
    done(fixture, &["tag", "next", "again"])?;
    done(fixture, &["diff", "base", "next"])?;
    done(fixture, &["rm", "again"])?;
    ensure!(fixture.memory("base")? == noise(1, 8 * PAGE), "base");
    ensure!(fixture.memory("next")? == noise(2, 8 * PAGE), "next");
    let elsewhere = fixture.dir.path().join("elsewhere");
    if elsewhere.exists() {
        ensure!(fs::read(&elsewhere)? == b"mine", "written through a link");
    }
    Ok(())
}

#[test]
fn in_the_place_of_a_tag() -> anyhow::Result<()> {
    for kind in KINDS {
        let fixture = with_base()?;
        let odd = fixture.cli.store().join("tags/odd");
        make(kind, &odd)?;
        others_work(&fixture).context(kind)?;
        for arguments in [&["tags"][..], &["verify"], &["show", "odd"], &["gc"]] {
            let (code, said) = run(&fixture, arguments)?;
            ensure!(code == 4 && said.contains("tags/odd"), "{kind}: {said}");
            ensure!(said.contains("not a file"), "{kind}: {said}");
        }
        let (code, said) = run(&fixture, &["rm", "odd"])?;
        let is_full = kind == "a full directory";
        ensure!((code == 0) != is_full, "{kind}: {said}");
        if is_full {
            done(&fixture, &["repair"])?;
            let kept = fixture.cli.store().join("damaged/odd/file");
            ensure!(fs::read(kept)? == b"mine", "a user's file is gone");
        }
        ensure!(fs::symlink_metadata(&odd).is_err(), "{kind} is still there");
        done(&fixture, &["gc"])?;
        done(&fixture, &["verify"])?;
    }
    Ok(())
}

#[test]
fn in_the_place_of_a_pack() -> anyhow::Result<()> {
    for kind in KINDS {
        let fixture = with_base()?;
        let odd = fixture.cli.store().join("packs/0000ffff.pack");
        make(kind, &odd)?;
        others_work(&fixture).context(kind)?;
        done(&fixture, &["tags"])?;
        let (code, said) = run(&fixture, &["verify"])?;
        ensure!(
            code == 4 && said.contains("0000ffff.pack"),
            "{kind}: {said}"
        );
        ensure!(said.contains("no snapshot needs it"), "{kind}: {said}");
        done(&fixture, &["rm", "next"])?;
        let said = done(&fixture, &["gc"])?;
        ensure!(said.contains("0000ffff.pack"), "{kind}: {said}");
        done(&fixture, &["repair"])?;
        done(&fixture, &["verify", "--read-data"])?;
    }
    Ok(())
}

/// Things that nobody asks for.
#[test]
fn beside_packs_and_leases_and_as_temporary_files() -> anyhow::Result<()> {
    for kind in KINDS {
        for place in [
            "packs/0000fffe.open",
            "leases/1-0",
            "tags/.next.new",
            "recent-tags",
            "locks/next-pack",
            "mounts.log",
            ".collector.new",
        ] {
            let fixture = with_base()?;
            let odd = fixture.cli.store().join(place);
            make(kind, &odd)?;
            let all = || -> anyhow::Result<()> {
                let (code, said) = run(
                    &fixture,
                    &["commit", "x", "--memory", &fixture.path("next")],
                )?;
                // Numbers of packs are handed out through this file, so it has to be one;
                // and what is not empty is not removed for a temporary file.
                let in_the_way = kind == "a full directory" && place.ends_with(".new");
                if place == "locks/next-pack" {
                    ensure!(code == 4 && said.contains(place), "{code}: {said}");
                    let (code, said) = run(&fixture, &["verify"])?;
                    ensure!(code == 4 && said.contains(place), "{code}: {said}");
                    done(&fixture, &["repair"])?;
                } else if in_the_way {
                    ensure!(code == 0 || said.contains(place), "{said}");
                    done(&fixture, &["repair"])?;
                }
                others_work(&fixture)?;
                done(&fixture, &["verify"])?;
                done(&fixture, &["rm", "base"])?;
                done(&fixture, &["gc"])?;
                done(&fixture, &["repair"]).map(drop)
            };
            all().with_context(|| format!("{kind} as {place}"))?;
        }
    }
    Ok(())
}

#[test]
fn in_the_place_of_the_configuration_or_the_collectors_state() -> anyhow::Result<()> {
    for kind in KINDS {
        for place in ["config", "collector"] {
            let fixture = with_base()?;
            make(kind, &fixture.cli.store().join(place))?;
            let (code, said) = run(&fixture, &["verify"])?;
            ensure!(code == 4 && said.contains(place), "{kind}: {said}");
            done(&fixture, &["repair"])?;
            done(&fixture, &["verify"])?;
            others_work(&fixture)?;
        }
    }
    Ok(())
}

#[test]
fn in_the_place_of_a_lock() -> anyhow::Result<()> {
    for kind in KINDS {
        for lock in ["publish", "collect", "allocate"] {
            let fixture = with_base()?;
            make(kind, &fixture.cli.store().join("locks").join(lock))?;
            let next = fixture.path("next");
            let taker = match lock {
                "publish" => &["rm", "base"][..],
                "collect" => &["gc"],
                _ => &["commit", "next", "--memory", &next],
            };
            let (code, said) = run(&fixture, taker)?;
            ensure!(code == 4 && said.contains(lock), "{kind} {lock}: {said}");
            done(&fixture, &["show", "base"])?;
            done(&fixture, &["repair"])?;
            others_work(&fixture)?;
        }
    }
    Ok(())
}

/// RocksDB would wait for the other end of a pipe, and follow a link.
#[test]
fn what_is_no_file_in_the_index_is_damage_of_it() -> anyhow::Result<()> {
    for kind in ["a named pipe", "a socket", "a link"] {
        let fixture = with_base()?;
        make(kind, &fixture.cli.store().join("index/CURRENT"))?;
        for arguments in [&["verify"][..], &["show", "base"], &["gc"]] {
            let (code, said) = run(&fixture, arguments)?;
            ensure!(
                code == 4 || code == 0,
                "{kind}: {arguments:?} ended with {code}: {said}"
            );
        }
        let (code, said) = run(&fixture, &["verify"])?;
        ensure!(
            code == 4 && said.contains("CURRENT"),
            "{kind}: {code}: {said}"
        );
        run(&fixture, &["repair"])?;
        done(&fixture, &["verify", "--read-data"])?;
        others_work(&fixture)?;
    }
    Ok(())
}

/// What only some need is in the way of these alone.
#[test]
fn a_file_in_the_place_of_protections_or_working_sets_is_in_few_ways() -> anyhow::Result<()> {
    for (name, who_asks) in [("protected", &["tags"][..]), ("working-sets", &[])] {
        let fixture = with_base()?;
        let dir = fixture.cli.store().join(name);
        let _ = fs::remove_dir_all(&dir);
        fs::write(&dir, "mine")?;
        let asking = who_asks.iter().chain(&["verify"]);
        for command in asking {
            let (code, said) = run(&fixture, &[command])?;
            ensure!(
                code == 4 && said.contains(name),
                "{name}: {command}: {code}: {said}"
            );
        }
        done(&fixture, &["show", "base"])?;
        let (_, said) = run(&fixture, &["repair"])?;
        let aside = fixture.cli.store().join("damaged").join(name);
        ensure!(fs::read(aside)? == b"mine", "{said}");
        done(&fixture, &["verify", "--read-data"])?;
        others_work(&fixture)?;
    }
    Ok(())
}

#[test]
fn a_file_in_the_place_of_a_directory_is_named_and_set_aside() -> anyhow::Result<()> {
    for name in ["index", "leases", "locks", "packs", "tags"] {
        let fixture = with_base()?;
        let dir = fixture.cli.store().join(name);
        fs::remove_dir_all(&dir)?;
        fs::write(&dir, "mine")?;
        for arguments in [&["verify"][..], &["gc"], &["tags"]] {
            let (code, said) = run(&fixture, arguments)?;
            ensure!(
                code == 4 && said.contains(name),
                "{name}: {arguments:?}: {code}: {said}"
            );
        }
        let (_, said) = run(&fixture, &["repair"])?;
        ensure!(dir.is_dir(), "{name}: {said}");
        ensure!(
            fs::read(fixture.cli.store().join("damaged").join(name))? == b"mine",
            "{said}"
        );
        // What was in it is lost, and nothing else.
        if !["packs", "tags"].contains(&name) {
            done(&fixture, &["verify", "--read-data"])?;
            others_work(&fixture)?;
        }
    }
    Ok(())
}
