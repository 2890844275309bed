#!/usr/bin/env bash
# Installs Garage, an object store of several nodes that speaks S3, once, outside the source
# tree, beside the other servers of tests. Compiles it from crates.io. Prints where the program
# is; where it cannot be had it says why, and ends with 1.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/toolchain.sh

version=2.5.0
dir="${SNAPSTORE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/snapstore}/object-servers"
program="$dir/garage/bin/garage"
say() { echo "garage: $*" >&2; }

# It has another licence (AGPL-3.0) than what is built here, and is linked with nothing of it.
install() {
    local began=$SECONDS log="$dir/garage.log"
    find_cargo
    say "compiling Garage $version into $dir: 10 to 20 minutes on two cores, once"
    # Elsewhere, where this project's configuration of cargo does not count. What was compiled
    # stays until the program is there, so that one who was cut off goes on.
    if ! (cd / && CARGO_TARGET_DIR="$dir/garage-build" CARGO_INCREMENTAL=0 \
        CARGO_PROFILE_RELEASE_DEBUG=0 CARGO_PROFILE_RELEASE_OPT_LEVEL=1 CARGO_PROFILE_RELEASE_STRIP=symbols \
        nice -n 19 cargo install --quiet --locked --jobs "${GARAGE_JOBS:-$(nproc)}" \
        --root "$dir/garage" --version "$version" \
        --no-default-features --features bundled-libs,sqlite garage) >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        say "cannot compile Garage $version; tests that need it are skipped ($log)"
        return 1
    fi
    rm -rf "$dir/garage-build" "$log"
    echo "$version" >"$dir/garage.version"
    say "it took $((SECONDS - began)) s"
}

mkdir -p "$dir"
exec 9>"$dir/garage.lock"
flock 9
[ "$(cat "$dir/garage.version" 2>/dev/null)" = "$version" ] || install
echo "$program"
