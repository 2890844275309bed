#!/usr/bin/env bash
# From a clone to the answer of a restored guest: gets this machine ready, builds the program in a profile that
# compiles quickly, and does the main job with a small guest, showing each command. Says how long each stage took.
#
#   scripts/quickstart.sh
#
# The guest is the one of the tests, which needs no kernel and no disk, and runs on any /dev/kvm. A Debian guest,
# emulated where this machine's /dev/kvm runs no Linux: make demo.
set -euo pipefail
cd "$(dirname "$0")/.."

began=$(date +%s%N)
stage_began=$began
stages=()
# Ends the stage $1.
stage() {
    local now
    now=$(date +%s%N)
    stages+=("$(printf '%-44s %6d.%d s' "$1" $(((now - stage_began) / 1000000000)) $(((now - stage_began) / 100000000 % 10)))")
    stage_began=$now
}
say() { printf '\n%s\n' "$*"; }
skipped=0
skip() { echo "SKIPPED $1: $2"; skipped=$((skipped + 1)); }

say "Getting this machine ready: what is missing is installed, RocksDB is compiled once (two to six minutes)."
scripts/setup.sh
. scripts/toolchain.sh
stage "setup, with RocksDB"
say "Building the program, less optimised than 'make build' does, and without buckets."
cargo build --profile quick --locked -p snapstore --no-default-features
stage "build"

work="$(mktemp -d "${TMPDIR:-/tmp}/snapstore-quickstart.XXXXXX")"
PATH="$(realpath "${CARGO_TARGET_DIR:-target}")/quick:$PATH"
export PATH SNAPSTORE_DIR="$work/store" SNAPSTORE_RUNTIME_DIR="$work/run"
cleanup() {
    snapstore stop --all >/dev/null 2>&1 || true
    [ ! -d "$work/mnt" ] || snapstore umount "$work/mnt" >/dev/null 2>&1 || true
    rm -rf --one-file-system "$work"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# Shows a command as one would type it, and runs it.
run() {
    printf '\n$ %s\n' "$*"
    "$@"
}
usable() { (exec 3<>"$1") 2>/dev/null; }

scripts/small-guest.sh "$work/guest.bin"
head -c 8M /dev/urandom >"$work/image.ram"
cd "$work"
say "A store, and in it two images of memory that differ in one MiB; any monitor's would do."
run snapstore init
run snapstore commit image --memory image.ram
head -c 1M /dev/urandom | dd of=image.ram conv=notrunc status=none
run snapstore commit image+1 --memory image.ram

if ! usable /dev/kvm || ! usable /dev/fuse; then
    skip machine "this machine offers no usable /dev/kvm and /dev/fuse ('snapstore doctor' says what to do)"
else
    say "A machine that counts and checks itself. It is committed while it runs."
    run snapstore run web --kernel guest.bin --mem 64M --detach
    run snapstore commit warm --vm web
    say "Two machines as it was at that instant; one is asked. Each goes on by itself."
    run snapstore restore warm --name clone -n 2 --detach
    printf '\n$ snapstore console clone.1    (typed: p)\n'
    printf p | timeout 60 snapstore console clone.1 | grep -m 1 -B 1 pong >answer || true
    cat answer
    grep -q pong answer || { echo "error: the restored guest did not answer" >&2; exit 1; }
    run snapstore ps
fi
if usable /dev/fuse; then
    say "Any snapshot as files, which any program can read or map."
    mkdir mnt
    run snapstore mount image+1 mnt
    run ls -l mnt
    cmp mnt/memory.bin image.ram
    run snapstore umount mnt
else
    skip mount "this machine offers no usable /dev/fuse"
fi
say "What there is; then one is removed, which harms no other, and its space is freed."
run snapstore log
run snapstore rm image+1
run snapstore gc
[ "$skipped" != 0 ] || run snapstore stop --all
run snapstore verify --read-data
stage "commit, mount, restore, ask, remove"

say "How long it took:"
printf '  %s\n' "${stages[@]}"
stage_began=$began
stages=()
stage "in all"
printf '  %s\n' "${stages[@]}"
say "Next: 'make install', README.md, docs/tutorial.md. A Debian guest: 'make demo', in about ten minutes; it is emulated
where this machine's /dev/kvm runs no Linux."
