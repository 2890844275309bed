//! `snapstore cp`: files to and from a guest, by commands that its agent runs.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use serde_json::json;
use snapstore_host::Usage;
use snapstore_host::runtime::Runtime;
use snapstore_store::Error;
use snapstore_vmm::agent::{self, AgentError, Exec, Stream};

use super::exec::{connect, explained};
use super::export::{Part, STANDARD};
use crate::args::CpArgs;
use crate::context::Context;
use crate::format::size;

/// Writes its input to the file $1, or to $2 in the directory $1, with the permissions $3. The
/// file is there at once or not at all; what is no regular file, such as a device, is written to.
const TAKE: &str = r#"
to=$1
[ ! -d "$to" ] || to=${to%/}/$2
[ ! -L "$to" ] || to=$(readlink -f "$to")
if [ -e "$to" ] && [ ! -f "$to" ]; then exec cat >"$to"; fi
umask 077
part=$to.$$.part
if cat >"$part" && chmod "$3" "$part" && mv -f "$part" "$to"; then exit 0; fi
rm -f "$part"
exit 1
"#;

/// The most of what a command of the guest complains of that is told.
const MOST_COMPLAINT_BYTES: usize = 4096;

/// One of the two.
enum Place<'a> {
    Guest { machine: &'a str, path: String },
    Host(&'a Path),
}

fn place(text: &OsStr) -> Place<'_> {
    let parts = text.to_str().and_then(|text| text.split_once(':'));
    match parts {
        Some((machine, path)) if !machine.is_empty() && !machine.contains('/') => Place::Guest {
            machine,
            // Not to be taken for an option.
            path: match path.starts_with('-') {
                true => format!("./{path}"),
                false => path.to_owned(),
            },
        },
        _ => Place::Host(Path::new(text)),
    }
}

pub fn run(context: &Context, args: &CpArgs) -> anyhow::Result<ExitCode> {
    let context = &context.stopped_by_signals()?;
    let (bytes, to) = match (place(&args.from), place(&args.to)) {
        (Place::Host(from), Place::Guest { machine, path }) => {
            let bytes = into_guest(context, args, from, machine, path)?;
            (bytes, args.to.clone())
        }
        (Place::Guest { machine, path }, Place::Host(to)) => {
            if to == Path::new(STANDARD) {
                if context.json() {
                    bail!(Usage(
                        "standard output cannot have both the file and the JSON object; name a \
                         file"
                            .to_owned()
                    ));
                }
                let mut out = io::stdout().lock();
                out_of_guest(context, args, machine, path, &mut out)?;
                out.flush().context("cannot write to standard output")?;
                return Ok(ExitCode::SUCCESS);
            }
            let to = within(to, Path::new(&path));
            let bytes = into_file(&to, |file| out_of_guest(context, args, machine, path, file))?;
            (Some(bytes), to.into_os_string())
        }
        _ => bail!(Usage(
            "name a file of a guest, MACHINE:PATH, and one of this host; one with a colon in its \
             name is ./NAME"
                .to_owned()
        )),
    };
    let value = json!({
        "from": args.from.to_string_lossy(),
        "to": to.to_string_lossy(),
        "bytes": bytes,
    });
    let to = to.to_string_lossy();
    let what = bytes.map_or("standard input".to_owned(), size);
    context.answer(&value, || format!("Copied {what} to {to}."))?;
    Ok(ExitCode::SUCCESS)
}

fn into_guest(
    context: &Context,
    args: &CpArgs,
    from: &Path,
    machine: &str,
    path: String,
) -> anyhow::Result<Option<u64>> {
    let stdin = io::stdin();
    let file = match from == Path::new(STANDARD) {
        true => None,
        false => Some(File::open(from).with_context(|| format!("cannot open {}", from.display()))?),
    };
    let found = file.as_ref().map(File::metadata).transpose();
    let found = found.with_context(|| format!("cannot look at {}", from.display()))?;
    if found.as_ref().is_some_and(fs::Metadata::is_dir) {
        bail!(
            "{0} is a directory; send an archive of it: tar -c {0} | snapstore exec {machine} -i -- \
             tar -x -C DIR",
            from.display()
        );
    }
    let mode = found.as_ref().map(|found| found.permissions().mode());
    let mode = format!("{:o}", mode.map_or(0o644, |mode| mode & 0o777));
    let name = from.file_name().unwrap_or(OsStr::new("stdin"));
    let name = name.to_string_lossy().into_owned();
    let command = ["sh", "-c", TAKE, "sh", &path, &name, &mode];
    let file = file.as_ref().map_or(stdin.as_fd(), File::as_fd);
    in_guest(
        context,
        args,
        machine,
        &command,
        Some(file),
        &mut io::sink(),
    )?;
    // Of a pipe nobody knows.
    Ok(rustix::fs::tell(file).ok())
}

fn out_of_guest(
    context: &Context,
    args: &CpArgs,
    machine: &str,
    path: String,
    out: &mut dyn Write,
) -> anyhow::Result<u64> {
    in_guest(context, args, machine, &["cat", &path], None, out)
}

/// Runs a command in the guest, which has to succeed; how long its output is.
fn in_guest(
    context: &Context,
    args: &CpArgs,
    machine: &str,
    command: &[&str],
    stdin: Option<BorrowedFd<'_>>,
    out: &mut dyn Write,
) -> anyhow::Result<u64> {
    let runtime = Runtime::open()?;
    let client = connect(&runtime, &runtime.running(machine)?, args.wait)?;
    let exec = Exec {
        command: command.iter().map(ToString::to_string).collect(),
        ..Exec::default()
    };
    let (mut bytes, mut complaint) = (0, Vec::new());
    let ended = client.exec(&exec, stdin, &mut |stream, content| {
        if context.cancel().is_cancelled() {
            return Err(io::Error::other("stopped by a signal"));
        }
        match stream {
            Stream::Stdout => {
                bytes += content.len() as u64;
                out.write_all(content)
            }
            Stream::Stderr => {
                let room = MOST_COMPLAINT_BYTES - complaint.len();
                complaint.extend_from_slice(&content[..room.min(content.len())]);
                Ok(())
            }
        }
    });
    if context.cancel().is_cancelled() {
        bail!(Error::Cancelled);
    }
    let ended = match ended {
        Ok(ended) => ended,
        // A copy that is cut off has failed, also one whose reader went away.
        Err(error @ AgentError::Local(_)) => bail!("{error}"),
        Err(error) => return Err(explained(error, &runtime, machine, command[0])?),
    };
    if ended.code != Some(0) {
        let complaint = String::from_utf8_lossy(&complaint);
        bail!(
            "the guest of {machine} could not copy it: {}",
            agent::plain(complaint.trim())
        );
    }
    Ok(bytes)
}

/// In a directory the file has the name that it had.
fn within(to: &Path, from: &Path) -> PathBuf {
    match from.file_name() {
        Some(name) if to.is_dir() => to.join(name),
        _ => to.to_owned(),
    }
}

/// The file appears once it is whole. What is there and is no regular file is written to.
fn into_file(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> anyhow::Result<u64>,
) -> anyhow::Result<u64> {
    let cannot = |what: &str| format!("cannot {what} {}", path.display());
    if fs::metadata(path).is_ok_and(|found| !found.is_file()) {
        let file = File::options().write(true).open(path);
        return write(&mut file.with_context(|| cannot("write"))?);
    }
    let mut part: OsString = path.into();
    part.push(format!(".{}.part", std::process::id()));
    let part = Part(part.into());
    let mut file = File::create_new(&part.0).with_context(|| cannot("create"))?;
    let bytes = write(&mut file)?;
    fs::rename(&part.0, path).with_context(|| cannot("write"))?;
    Ok(bytes)
}
