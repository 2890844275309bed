#!/usr/bin/env bash
# Looks for faults for as long as it is given: SECONDS of them (3600 by default).
#
#   scripts/soak.sh [SECONDS]
#
# Half of the time goes to the simulator, on histories that nobody has seen yet.
# The rest goes to real processes: machines that are run, committed, restored and killed
# at random; mounts that come and go at one path; a store of very many packs; and the
# story of five images of a real guest (commit them, remove a tag in the middle,
# collect, lose the index, repair, mount, compare), while something else keeps the
# machine busy and the page cache is dropped. Ends with 1 at the first fault.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/toolchain.sh

total="${1:-3600}"
work="$(mktemp -d)"
noise=()
clean() {
    for pid in "${noise[@]}"; do kill "$pid" 2>/dev/null || true; done
    umount -l "$work/mount" 2>/dev/null || true
    rm -rf "$work"
}
trap clean EXIT
say() { printf 'soak: %s\n' "$*"; }
die() { say "FAILED: $*"; exit 1; }

cargo build --release --locked -p snapstore
cargo build --locked -p snapstore
snapstore="$PWD/target/release/snapstore"

seed="$(date +%s)000000"
say "simulator from seed $seed for $((total / 2)) s"
cargo run --locked -p snapstore-tests --features sim --bin sim -- --from "$seed" --seconds $((total / 2)) ||
    die "the simulator has found something"

say "machines"
nice scripts/soak-machines.py $((total / 8)) || die "machines"

say "fuzzing"
scripts/fuzz.sh $((total >= 3600 ? 600 : total / 24 + 1)) || die "a fuzz target"

say "mounts that come and go"
SNAPSTORE_SOAK_ROUNDS=$((total / 6)) cargo test --locked -p snapstore-tests --test mount soak -- --nocapture ||
    die "a mount"

packs=$((total >= 3600 ? 100000 : 10000))
say "$packs packs with 1024 descriptors"
SCALE_PACKS="$packs" cargo test --locked -p snapstore-tests --test bounds many_packs -- --nocapture ||
    die "many packs"

# One process that computes, and one that empties the page cache.
while :; do :; done &
noise+=($!)
if [ -w /proc/sys/vm/drop_caches ]; then
    while sleep 1; do echo 1 >/proc/sys/vm/drop_caches; done &
    noise+=($!)
else
    say "SKIPPED dropping the page cache: needs root"
fi

images="$(scripts/guest-images.sh)"
export SNAPSTORE_DIR="$work/store"
mkdir -p "$work/mount"
# The snapshot $1 is the image $2, seen through a mount.
compare() {
    "$snapstore" mount "$1" "$work/mount" >/dev/null || die "round $round: mount $1"
    cmp "$work/mount/memory.bin" "$images/$2" || die "round $round: $1 is not $2"
    "$snapstore" umount "$work/mount" >/dev/null || die "round $round: umount $1"
}
round=0
end=$((SECONDS + total / 8))
while [ "$SECONDS" -lt "$end" ] || [ "$round" -lt 1 ]; do
    round=$((round + 1))
    rm -rf "$SNAPSTORE_DIR"
    "$snapstore" init >/dev/null
    parent=--no-parent
    for name in base base+1 base+2 base+3; do
        # shellcheck disable=SC2086 # two words or one
        "$snapstore" commit "$name" --memory "$images/$name.ram" $parent >/dev/null
        parent="--parent $name"
    done
    "$snapstore" commit other --memory "$images/other.ram" --no-parent >/dev/null
    "$snapstore" rm base+1 >/dev/null
    "$snapstore" gc >/dev/null
    rm -rf "$SNAPSTORE_DIR/index"
    "$snapstore" repair >/dev/null || die "round $round: repair"
    "$snapstore" verify --read-data >/dev/null || die "round $round: verify"
    for name in base base+2 base+3 other; do compare "$name" "$name.ram"; done
    "$snapstore" rm base >/dev/null
    "$snapstore" gc >/dev/null
    for name in base+2 base+3 other; do compare "$name" "$name.ram"; done
    "$snapstore" verify --read-data >/dev/null || die "round $round: verify after gc"
done
say "the story of five images held $round times"
say "nothing found"
