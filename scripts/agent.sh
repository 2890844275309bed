#!/usr/bin/env bash
# Builds the guest agent as one static program that runs in any x86-64 Linux guest,
# and prints its path.
#
#   scripts/agent.sh
#
# Static by the GNU C library's archive (Debian: libc6-dev), so that no other
# toolchain is needed; the agent looks up no users and no hosts.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/toolchain.sh

target=x86_64-unknown-linux-gnu
directory="${CARGO_TARGET_DIR:-target}/agent"
# Flags of its own directory: the rest of the workspace is not built again for them.
# With --target, they do not reach build scripts.
CARGO_TARGET_DIR="$directory" RUSTFLAGS="-C target-feature=+crt-static -C relocation-model=static -C strip=symbols" \
    cargo build --quiet --release --locked --target "$target" -p snapstore-agent >&2
realpath "$directory/$target/release/snapstore-agent"
