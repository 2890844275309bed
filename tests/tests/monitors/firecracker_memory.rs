//! Firecracker's guests give memory back and use it again.

use anyhow::ensure;
use serde_json::json;

use crate::firecracker::{Double, write};
use crate::{Fixture, PAGE, double, http, set};

const PAGES: usize = 1024;

/// Has pages taken from the guest, as a balloon does.
fn discard(socket: &str, memory: &mut [u8], page: usize, count: usize) -> anyhow::Result<()> {
    let body = json!({"page": page, "count": count});
    http(socket, "PUT", "/test/discard", &body)?;
    memory[page * PAGE..(page + count) * PAGE].fill(0);
    Ok(())
}

#[test]
fn what_a_balloon_took_is_zero_and_what_was_written_there_since_is_kept() -> anyhow::Result<()> {
    let test = "what_a_balloon_took_is_zero_and_what_was_written_there_since_is_kept";
    let Some(fixture) = Fixture::new(test)? else {
        return Ok(());
    };
    let Some(program) = double(&fixture, test, "firecracker", &[])? else {
        return Ok(());
    };
    let first = Double::boot(&fixture, &program, &[])?;
    let mut memory = vec![0; PAGES * PAGE];
    for page in (0..64).chain(PAGES - 8..PAGES) {
        let fill = u8::try_from(page % 250 + 1)?;
        write(&first.socket, page, fill)?;
        set(&mut memory, page, fill);
    }
    fixture
        .cli
        .ok(&["commit", "t0", "--firecracker", &first.socket])?;
    let exec = program.display().to_string();
    // In the middle, twice over, at the end of memory, and at its beginning.
    let taken = [(8, 8), (12, 8), (PAGES - 4, 4), (0, 2)];
    for (layer, (page, count)) in taken.into_iter().enumerate() {
        let (from, tag) = (format!("t{layer}"), format!("t{}", layer + 1));
        let restore = ["restore", &from, "--with", "firecracker", "--exec", &exec];
        fixture.cli.ok(&restore)?;
        let socket = fixture.of_machine(&from, "api.sock");
        discard(&socket, &mut memory, page, count)?;
        let between = format!("{tag}-taken");
        fixture
            .cli
            .ok(&["commit", &between, "--firecracker", &socket])?;
        ensure!(
            fixture.shown(&between, "memory.bin")? == memory,
            "layer {layer}: what was taken is not zero"
        );
        write(&socket, page + 1, 251)?;
        set(&mut memory, page + 1, 251);
        let answer = fixture
            .cli
            .json(&["commit", &tag, "--firecracker", &socket])?;
        assert_eq!(answer["parent_tag"], from.as_str(), "{answer}");
        ensure!(
            fixture.shown(&tag, "memory.bin")? == memory,
            "layer {layer}: what was written is lost"
        );
        fixture.cli.ok(&["stop", "--all"])?;
    }
    Ok(())
}
