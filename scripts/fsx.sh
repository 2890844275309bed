#!/usr/bin/env bash
# Prints where fsx is, the file system exerciser (https://github.com/asomers/fsx-rs). Compiles it
# once, from crates.io, into ~/.cache/snapstore (SNAPSTORE_CACHE).
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/toolchain.sh
find_cargo

version=0.3.2
dir="${SNAPSTORE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/snapstore}/fsx-$version"
if [ ! -x "$dir/bin/fsx" ]; then
    # Elsewhere, where this project's configuration of cargo does not count.
    (cd / && cargo install --quiet --locked --root "$dir" --version "$version" fsx) >&2
fi
echo "$dir/bin/fsx"
