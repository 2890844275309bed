//! What is refused: the exit code, the message, and no trace left behind.

use snapstore_tests::harness::{noise, skipped};

use crate::{Fixture, PAGE};

/// A store that holds `base`, two pages of memory and a disk.
fn with_base() -> anyhow::Result<Fixture> {
    let fixture = Fixture::new()?;
    let disk = fixture.file("disk", &noise(2, 2 * PAGE))?;
    let disk = format!("root={disk}");
    fixture.commit("base", &noise(1, 2 * PAGE), &["--disk", &disk])?;
    Ok(fixture)
}

#[test]
fn an_image_cut_within_a_page() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let path = fixture.file("cut", &noise(3, 3 * PAGE + 100))?;
    let says = format!("{path} is 12388 bytes long, which is no multiple");
    fixture.refused(1, &says, &["commit", "new", "--memory", &path])?;
    let disk = format!("root={path}");
    fixture.refused(1, &says, &["commit", "new", "--disk", &disk])
}

#[test]
fn a_cut_image_after_a_good_one() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let good = fixture.file("good", &noise(4, 8 * PAGE))?;
    let cut = format!("root={}", fixture.file("cut", &noise(3, PAGE + 1))?);
    let arguments = ["commit", "new", "--memory", &good, "--disk", &cut];
    fixture.refused(1, "no multiple", &arguments)
}

#[test]
fn an_empty_image() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let path = fixture.file("empty", &[])?;
    fixture.refused(1, "is empty", &["commit", "new", "--memory", &path])
}

#[test]
fn a_file_that_is_not_there_is_named_and_its_error_said_once() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let path = fixture.path("nowhere");
    let arguments = ["commit", "new", "--memory", &path];
    fixture.refused(1, &format!("cannot open {path}"), &arguments)?;
    let error = fixture.cli.fails(1, &arguments)?;
    assert_eq!(error.matches("os error 2").count(), 1, "{error}");
    Ok(())
}

#[test]
fn what_is_not_a_regular_file() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let dir = fixture.dir.path().display().to_string();
    for path in [dir.as_str(), "/dev/null"] {
        let arguments = ["commit", "new", "--memory", path];
        fixture.refused(1, "is not a regular file", &arguments)?;
    }
    Ok(())
}

#[test]
fn nothing_to_commit() -> anyhow::Result<()> {
    let fixture = with_base()?;
    fixture.refused(2, "nothing to commit", &["commit", "new"])
}

#[test]
fn page_sizes_that_there_are_not() -> anyhow::Result<()> {
    let fixture = Fixture::without_store()?;
    let error = fixture.cli.fails(2, &["init", "--page-size", "8K"])?;
    assert!(error.contains("8192"), "{error}");
    fixture.cli.fails(2, &["init", "--page-size", "large"])?;
    assert!(!fixture.cli.store().exists(), "nothing is created");
    Ok(())
}

#[test]
fn a_store_where_something_is_already() -> anyhow::Result<()> {
    let fixture = with_base()?;
    fixture.refused(1, "holds a store already", &["init"])?;
    let other = fixture.path("other");
    std::fs::create_dir(&other)?;
    std::fs::write(format!("{other}/file"), "mine")?;
    fixture.refused(1, "is not empty", &["init", "--store", &other])
}

#[test]
fn tags_that_there_are_not() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let image = fixture.file("image", &noise(1, 2 * PAGE))?;
    let dir = fixture.path("mnt");
    std::fs::create_dir(&dir)?;
    for arguments in [
        &["show", "nobody"][..],
        &["log", "nobody"],
        &["tag", "nobody", "new"],
        &["diff", "base", "nobody"],
        &["rm", "nobody"],
        &["rm", "base", "nobody"],
        &["rm", "--dry-run", "nobody"],
        &["mount", "nobody", &dir],
        &["commit", "new", "--memory", &image, "--parent", "nobody"],
    ] {
        fixture.refused(3, "no tag or snapshot \"nobody\"", arguments)?;
    }
    Ok(())
}

#[test]
fn every_command_without_a_store() -> anyhow::Result<()> {
    let fixture = Fixture::without_store()?;
    let image = fixture.file("image", &noise(1, PAGE))?;
    for arguments in [
        &["tags"][..],
        &["log"],
        &["stats"],
        &["gc"],
        &["verify"],
        &["repair"],
        &["show", "base"],
        &["commit", "base", "--memory", &image],
    ] {
        let error = fixture.cli.fails(3, arguments)?;
        assert!(error.contains("snapstore init"), "{arguments:?}: {error}");
        assert!(!fixture.cli.store().exists(), "{arguments:?}");
    }
    Ok(())
}

#[test]
fn a_tag_that_exists() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let image = fixture.file("image", &noise(9, 2 * PAGE))?;
    let commit = ["commit", "base", "--memory", &image];
    fixture.refused(1, "use --replace", &commit)?;
    fixture.cli.ok(&["tag", "base", "other"])?;
    fixture.refused(1, "use --replace", &["tag", "base", "other"])?;
    fixture.cli.ok(&[&commit[..], &["--replace"]].concat())?;
    assert_eq!(fixture.memory("base")?, noise(9, 2 * PAGE));
    fixture.cli.ok(&["tag", "base", "other", "--replace"])?;
    assert_eq!(fixture.memory("other")?, noise(9, 2 * PAGE));
    Ok(())
}

#[test]
fn names_that_are_no_tags() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let image = fixture.file("image", &noise(9, 2 * PAGE))?;
    let long = "x".repeat(129);
    let mnt = fixture.path("mnt");
    std::fs::create_dir(&mnt)?;
    for name in [".", "..", "../x", ".hidden", "a b", "ü", &long] {
        let commit = ["commit", name, "--memory", &image];
        fixture.refused(2, "cannot be a tag", &commit)?;
    }
    for name in ["", "a/b"] {
        for arguments in [
            &["commit", name, "--memory", &image][..],
            &["commit", name, "--vm", "none"],
            &["commit", "new", "--memory", &image, "--parent", name],
            &["tag", "base", name],
            &["tag", "nobody", name],
            &["tag", name, "new"],
            &["rm", name],
            &["rm", "base", name],
            &["rm", "--dry-run", name],
            &["show", name],
            &["log", name],
            &["diff", "base", name],
            &["diff", name, "base"],
            &["run", "vm", "--kernel", &image, "--or-restore", name],
        ] {
            let error = fixture.cli.fails(2, arguments)?;
            let once = error.matches("error:").count() == 1;
            anyhow::ensure!(once, "{arguments:?} says: {error}");
            fixture.refused(2, "cannot be a tag", arguments)?;
        }
    }
    // These take a tag of a remote, too.
    for (name, says) in [
        ("", "cannot be a tag"),
        ("a/b/c", "\"b/c\" cannot be a tag"),
        ("/b", "\"\" cannot be the name of a remote"),
        ("a/", "cannot be a tag"),
        ("../b", "\"..\" cannot be the name of a remote"),
    ] {
        for arguments in [&["mount", name, &mnt][..], &["restore", name, "--detach"]] {
            fixture.refused(2, says, arguments)?;
        }
    }
    for arguments in [&["mount", "a/b", &mnt][..], &["restore", "a/b", "--detach"]] {
        fixture.refused(3, "there is no remote", arguments)?;
    }
    Ok(())
}

#[test]
fn names_that_are_no_names_of_remotes() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let says = "cannot be the name of a remote";
    for arguments in [
        &["remote", "add", "a b", "file:///nowhere"][..],
        &["remote", "forget", "a/b"],
        &["remote", "init", ""],
        &["remote", "check", ".a"],
        &["remote", "tags", "a b"],
        &["remote", "rm", "a b", "base"],
        &["remote", "gc", "a b"],
        &["remote", "verify", "a b"],
        &["remote", "leases", "a b"],
        &["push", "base", "a b"],
        &["pull", "a b/base"],
    ] {
        fixture.refused(2, says, arguments)?;
    }
    let pull = ["pull", "a/base", "--as", "a b"];
    fixture.refused(2, "cannot be a tag", &pull)?;
    fixture.refused(2, "is given twice", &["remote", "rm", "none", "a", "a"])
}

#[test]
fn names_that_are_no_names_of_images_or_labels() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let image = fixture.file("image", &noise(9, 2 * PAGE))?;
    for (option, value, says) in [
        ("--disk", format!("a/b={image}"), "cannot be an image name"),
        ("--disk", format!("={image}"), "the form NAME=FILE"),
        ("--disk", "root=".to_owned(), "the form NAME=FILE"),
        ("--file", format!("../x={image}"), "cannot be an image name"),
        (
            "--file",
            format!("manifest.json={image}"),
            "cannot be an attached file",
        ),
        ("--file", format!("memory.bin={image}"), "is given twice"),
        ("--label", "a b=c".to_owned(), "cannot be a label"),
        (
            "--label",
            "a=b\u{7}c".to_owned(),
            "cannot be a label's value",
        ),
        ("--label", "a=".to_owned(), "the form KEY=VALUE"),
    ] {
        let arguments = ["commit", "new", "--memory", &image, option, &value];
        fixture.refused(2, says, &arguments)?;
    }
    Ok(())
}

/// What is refused for its words alone does not even create the default store.
#[test]
fn a_wrong_name_creates_no_store() -> anyhow::Result<()> {
    let fixture = Fixture::without_store()?;
    let image = fixture.file("image", &noise(9, 2 * PAGE))?;
    let disk = format!("x={image}");
    let direct = format!("{image}:direct");
    let own = format!("file://{}", fixture.path("data/snapstore/bucket"));
    let ready = ["--kernel", &image, "--commit-when", "ready", "--tag", "t"];
    let labels = ["--label", "a=1", "--label", "a=2"];
    for arguments in [
        &["commit", "a/b", "--memory", &image][..],
        &["remote", "list", "-o", "{nobody}"],
        &["--json", "remote", "list", "-o", "{name}"],
        &["remote", "tags", "site", "-o", "{nobody}"],
        &["remote", "leases", "site", "-o", "{nobody}"],
        &["remote", "add", "site", "gopher://there"],
        &["remote", "add", "site", &own],
        &[&["commit", "new", "--vm", "none"], &labels[..]].concat(),
        &[&["commit", "new", "--qmp", "none"], &labels[..]].concat(),
        &[&["run", "a/b"], &ready[..]].concat(),
        &[&["run", "vm", "--disk", &direct], &ready[..]].concat(),
        &[
            &["run", "vm", "--disk", &direct, "--or-restore", "t"],
            &ready[..],
        ]
        .concat(),
        &["commit", "new", "--disk", &disk, "--disk", &disk],
        &[
            "commit", "new", "--memory", &image, "--label", "a=1", "--label", "a=2",
        ],
        &["init", "--page-size", "8K"],
    ] {
        let output = std::process::Command::new(snapstore_tests::harness::program()?)
            .args(arguments)
            .env_remove("SNAPSTORE_DIR")
            .env("XDG_DATA_HOME", fixture.path("data"))
            .env("SNAPSTORE_RUNTIME_DIR", fixture.path("run"))
            .output()?;
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        assert!(!fixture.dir.path().join("data").exists(), "{arguments:?}");
    }
    Ok(())
}

/// Memory and disks count.
#[test]
fn a_snapshot_of_too_many_files() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let image = fixture.file("image", &noise(9, 2 * PAGE))?;
    let files: Vec<String> = (0..256).map(|at| format!("f{at}={image}")).collect();
    let files: Vec<&str> = files.iter().flat_map(|it| ["--file", it]).collect();
    let with = |more: &[&str]| -> Vec<String> {
        let all = [&["commit", "new"], more, &files].concat();
        all.into_iter().map(str::to_owned).collect()
    };
    let refused = |code, says: &str, more: &[&str]| -> anyhow::Result<()> {
        let arguments = with(more);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        fixture.refused(code, says, &arguments)
    };
    refused(2, "257 images and files are given", &["--memory", &image])?;
    let inherits = ["--inherit", "--parent", "base"];
    refused(1, "more than 256 images and files", &inherits)?;
    let arguments = with(&[]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    fixture.cli.ok(&arguments).map(drop)
}

#[test]
fn names_given_twice() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let image = fixture.file("image", &noise(9, 2 * PAGE))?;
    let disk = format!("root={image}");
    let memory = format!("memory={image}");
    for arguments in [
        &["commit", "new", "--disk", &disk, "--disk", &disk][..],
        &["commit", "new", "--memory", &image, "--disk", &memory],
        &[
            "commit", "new", "--memory", &image, "--label", "a=1", "--label", "a=2",
        ],
    ] {
        fixture.refused(2, "is given twice", arguments)?;
    }
    let stream = fixture.path("stream");
    for arguments in [
        &["rm", "base", "base"][..],
        &["export", "base", "base", "-o", &stream],
        &["stop", "a", "a"],
    ] {
        fixture.refused(2, "is given twice", arguments)?;
    }
    fixture.cli.ok(&["show", "base"])?;
    Ok(())
}

/// A whole id stands for one snapshot, whatever tags there are.
#[test]
fn a_tag_cannot_have_the_name_of_an_id() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    let (one, other) = (noise(1, 2 * PAGE), noise(2, 2 * PAGE));
    fixture.commit("one", &one, &["--no-parent"])?;
    fixture.commit("other", &other, &["--no-parent"])?;
    let id = |tag: &str| -> anyhow::Result<String> {
        let shown = fixture.cli.json(&["show", tag])?;
        Ok(shown["id"].as_str().unwrap_or_default().to_owned())
    };
    let (id_of_one, memory) = (id("one")?, fixture.path("memory"));
    let says = "are the id of a snapshot";
    fixture.refused(2, says, &["tag", "other", &id_of_one])?;
    fixture.refused(2, says, &["commit", &id_of_one, "--memory", &memory])?;
    Ok(())
}

#[test]
fn diffs_without_a_fitting_parent() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let image = fixture.sparse("image", 3 * PAGE as u64, &[(1, &noise(9, PAGE))])?;
    let diff = ["commit", "new", "--memory", &image, "--diff"];
    fixture.refused(2, "--parent", &diff)?;
    let with_parent = [&diff[..], &["--parent", "base"]].concat();
    fixture.refused(
        1,
        "but the parent's image \"memory\" has 8192",
        &with_parent,
    )?;
    let disk = format!("data={}", fixture.sparse("sparse", 2 * PAGE as u64, &[])?);
    let other = ["commit", "new", "--disk-diff", &disk, "--parent", "base"];
    fixture.refused(1, "needs a parent that has this image", &other)
}

#[test]
fn arguments_that_make_no_sense() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let image = fixture.file("image", &noise(9, 2 * PAGE))?;
    for arguments in [
        &["no-such-command"][..],
        &["gc", "--keep-percent", "101"],
        &[
            "commit",
            "new",
            "--memory",
            &image,
            "--parent",
            "base",
            "--no-parent",
        ],
        &["commit", "new", "--disk", "no-equals-sign"],
        &["commit", "-x", "--memory", &image],
        &["rm"],
        &["tags", "--lock-timeout", "-1"],
    ] {
        fixture
            .refused(2, "Usage:", arguments)
            .or_else(|_| fixture.refused(2, "--help", arguments))?;
    }
    Ok(())
}

#[test]
fn a_directory_that_is_not_mounted_cannot_be_unmounted() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let dir = fixture.dir.path().display().to_string();
    fixture.refused(3, "not a snapstore mount", &["umount", &dir])
}

/// What is wrong with a tap is said before anything is started.
#[test]
fn taps_that_cannot_be_used() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let runtime = fixture.path("run");
    let cli = fixture
        .cli
        .clone()
        .with_env("SNAPSTORE_RUNTIME_DIR", &runtime);
    let kernel = fixture.file("kernel", b"flat")?;
    let refused = |code, net: &str, says: &str| -> anyhow::Result<()> {
        let error = cli.fails(code, &["run", "vm", "--kernel", &kernel, "--net", net])?;
        assert!(error.contains(says), "{net}: {error}");
        Ok(())
    };
    refused(2, "a/b", "cannot name a tap")?;
    refused(
        2,
        "snap-none,mac=ff:ff:ff:ff:ff:ff",
        "not an interface's address",
    )?;
    refused(3, "snap-none", "`ip tuntap add snap-none mode tap`")?;
    let tun = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun");
    match tun {
        Ok(_) => refused(1, "lo", "lo is no tap")?,
        Err(error) => skipped(
            "taps_that_cannot_be_used",
            &format!("/dev/net/tun: {error}"),
        ),
    }
    let restore = ["restore", "base", "--detach", "--net", "snap-none"];
    let error = cli.fails(3, &restore)?;
    assert!(error.contains("ip tuntap add snap-none"), "{error}");
    let error = cli.fails(1, &[&restore[..], &["-n", "2"]].concat())?;
    assert!(error.contains("cannot share the tap snap-none"), "{error}");
    for directory in ["vms", "mounts"] {
        let left = crate::list(&std::path::Path::new(&runtime).join(directory))?;
        assert!(left.is_empty(), "{left:?}");
    }
    Ok(())
}
