//! Assembles `src/asm/*.S` into flat images, with the assembler and the linker
//! of GNU binutils: what Rust's own linking on Linux needs anyway.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

const GUESTS: [&str; 10] = [
    "table", "touch", "churn", "ports", "mmio", "triple", "halt", "spin", "ready", "clock",
];

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/asm");
    match assemble_all() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            println!("cargo::error={}", message.replace('\n', " | "));
            ExitCode::FAILURE
        }
    }
}

fn assemble_all() -> Result<(), String> {
    let out = env::var_os("OUT_DIR").ok_or("OUT_DIR is not set: run this through cargo")?;
    let out = PathBuf::from(out);
    let sources = Path::new("src/asm");
    for guest in GUESTS {
        let object = out.join(guest).with_extension("o");
        run(Command::new("as")
            .args(["--32", "--fatal-warnings", "-I"])
            .arg(sources)
            .arg("-o")
            .arg(&object)
            .arg(sources.join(guest).with_extension("S")))?;
        run(Command::new("ld")
            .args(["-m", "elf_i386", "--build-id=none", "--oformat", "binary"])
            .arg("-T")
            .arg(sources.join("flat.ld"))
            .arg("-o")
            .arg(out.join(guest).with_extension("bin"))
            .arg(&object))?;
    }
    Ok(())
}

fn run(command: &mut Command) -> Result<(), String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| {
        format!(
            "cannot run `{name}` to assemble the test guests: {error}; \
             install GNU binutils for x86 (Debian: `apt-get install binutils`)"
        )
    })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!(
        "`{name}` could not assemble a test guest for x86: {}",
        said.trim()
    ))
}
