//! `cp` and `exec`: the agent of these guests is this process, behind the machine's socket.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Result, ensure};
use snapstore_guests::TABLE;
use snapstore_tests::vm::Lab;

/// A machine `web` whose guest's files are those of this host.
fn with_agent(test: &str) -> Result<Option<Lab>> {
    let Some(lab) = Lab::new(test)? else {
        return Ok(None);
    };
    lab.run("web", TABLE, &[])?;
    let socket = lab.vm_dir("web").join("vsock.sock");
    // The machine's own: nobody listens in its guest.
    let _ = fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket)?;
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let line = snapstore_agent_protocol::read_line(&mut stream);
            if line.is_ok_and(|line| line.as_deref() == Some(b"CONNECT 1024"))
                && stream.write_all(b"OK 1073741824\n").is_ok()
            {
                std::thread::spawn(move || snapstore_agent::serve(&mut stream));
            }
        }
    });
    Ok(Some(lab))
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

#[test]
fn files_are_copied_both_ways() -> Result<()> {
    let Some(lab) = with_agent("files_are_copied_both_ways")? else {
        return Ok(());
    };
    let (here, guest) = (lab.path("here"), lab.path("guest dir"));
    fs::create_dir(&here)?;
    fs::create_dir(&guest)?;
    let bytes: Vec<u8> = (0..300_000_u32).map(|at| (at % 251) as u8).collect();
    let file = here.join("a file");
    fs::write(&file, &bytes)?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o750))?;

    // Into a directory, under its name, and under another name, over what was there.
    let there = guest.join("a file");
    let said = lab
        .cli
        .ok(&["cp", &text(&file), &format!("web:{}", text(&guest))])?;
    ensure!(said.contains("293 KiB"), "{said}");
    ensure!(fs::read(&there)? == bytes);
    ensure!(fs::metadata(&there)?.permissions().mode() & 0o777 == 0o750);
    let other = guest.join("other");
    fs::write(&other, "old")?;
    let link = guest.join("link");
    symlink(&other, &link)?;
    lab.cli
        .ok(&["cp", &text(&file), &format!("web:{}", text(&link))])?;
    ensure!(fs::read(&other)? == bytes && fs::symlink_metadata(&link)?.is_symlink());

    // And back.
    let back = here.join("back");
    let answer = lab
        .cli
        .json(&["cp", &format!("web:{}", text(&there)), &text(&back)])?;
    ensure!(answer["bytes"] == 300_000, "{answer}");
    ensure!(fs::read(&back)? == bytes);
    fs::remove_file(&file)?;
    lab.cli
        .ok(&["cp", &format!("web:{}", text(&there)), &text(&here)])?;
    ensure!(fs::read(&file)? == bytes);
    let shown = lab
        .cli
        .run(&["cp", &format!("web:{}", text(&other)), "-"])?;
    ensure!(shown.status.success() && shown.stdout == bytes);
    // Nothing half done is left.
    for dir in [&here, &guest] {
        for entry in fs::read_dir(dir)? {
            let name = entry?.file_name();
            ensure!(!name.to_string_lossy().contains("part"), "{name:?}");
        }
    }
    lab.finish()
}

#[test]
fn a_copy_that_fails_leaves_what_was_there() -> Result<()> {
    let Some(lab) = with_agent("a_copy_that_fails_leaves_what_was_there")? else {
        return Ok(());
    };
    let file = lab.file("file", b"new")?;
    let kept = lab.file("kept", b"kept")?;
    let said = lab.cli.fails(1, &["cp", "web:/no/such/file", &kept])?;
    ensure!(
        said.contains("the guest of web") && said.contains("/no/such/file"),
        "{said}"
    );
    ensure!(fs::read(&kept)? == b"kept");
    ensure!(!fs::read_dir(lab.path(""))?.any(|entry| {
        entry.is_ok_and(|entry| entry.file_name().to_string_lossy().ends_with(".part"))
    }));
    let said = lab.cli.fails(1, &["cp", &file, "web:/no/such/dir/file"])?;
    ensure!(said.contains("the guest of web"), "{said}");
    // What the guest complains of does nothing to a terminal.
    let odd = "web:/no/such/\x1b[2J\ndir/file";
    let said = lab.cli.fails(1, &["cp", &file, odd])?;
    ensure!(said.contains("/no/such/ [2J dir"), "{said:?}");
    let said = lab.cli.fails(1, &["cp", "/no/such/file", "web:/tmp"])?;
    ensure!(said.contains("cannot open /no/such/file"), "{said}");
    let said = lab.cli.fails(1, &["cp", "/tmp", "web:/tmp"])?;
    ensure!(said.contains("tar -x"), "{said}");
    lab.cli.fails(3, &["cp", "nobody:/etc/passwd", &kept])?;
    for sides in [
        [&file[..], &kept],
        ["web:/a", "web:/b"],
        ["./web:/a", &kept],
        [":/a", &kept],
    ] {
        let said = lab.cli.fails(2, &["cp", sides[0], sides[1]])?;
        ensure!(said.contains("MACHINE:PATH"), "{sides:?}: {said}");
    }
    lab.finish()
}

#[test]
fn a_copy_whose_reader_goes_away_has_failed() -> Result<()> {
    let Some(lab) = with_agent("a_copy_whose_reader_goes_away_has_failed")? else {
        return Ok(());
    };
    let big = lab.file("big", &vec![b'x'; 1 << 20])?;
    let mut command = lab.cli.command(&["cp", &format!("web:{big}"), "-"])?;
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    drop(child.stdout.take());
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(1), "{output:?}");
    ensure!(said.contains("Broken pipe"), "{said}");
    // Nor is one whole of which the last bytes cannot be written.
    let small = lab.file("small", b"without a new line")?;
    let mut command = lab.cli.command(&["cp", &format!("web:{small}"), "-"])?;
    let full = fs::File::options().write(true).open("/dev/full")?;
    let output = command.stdout(full).stderr(Stdio::piped()).output()?;
    ensure!(output.status.code() == Some(1), "{output:?}");
    lab.finish()
}

#[test]
fn a_command_is_told_from_a_machine_without_an_agent() -> Result<()> {
    let Some(lab) = with_agent("a_command_is_told_from_a_machine_without_an_agent")? else {
        return Ok(());
    };
    let ended = lab
        .cli
        .run(&["exec", "web", "--", "sh", "-c", "echo out; exit 7"])?;
    ensure!(
        ended.status.code() == Some(7) && ended.stdout == b"out\n",
        "{ended:?}"
    );
    let said = lab
        .cli
        .fails(127, &["exec", "web", "--", "/no/such/command"])?;
    ensure!(
        said.contains("web has no command /no/such/command"),
        "{said}"
    );
    // Nobody listens any more.
    let socket = lab.vm_dir("web").join("vsock.sock");
    fs::remove_file(&socket)?;
    drop(UnixListener::bind(&socket)?);
    let said = lab
        .cli
        .fails(1, &["exec", "web", "--wait", "0", "--", "true"])?;
    ensure!(
        said.contains("does the guest run snapstore-agent"),
        "{said}"
    );
    // What it comes to is told once.
    ensure!(said.matches("Connection refused").count() == 1, "{said}");
    lab.finish()
}
