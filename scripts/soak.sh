#!/usr/bin/env bash
# Looks for faults for as long as it is given: SECONDS of them (3600 by default).
#
#   scripts/soak.sh [SECONDS] [PART...]
#
# Half of the time goes to the simulator, on histories that nobody has seen yet.
# The rest goes to real processes: machines that are run, committed, restored and killed
# at random; copies of a store that go on by themselves; mounts that come and go at one
# path; fsx on a writable view that is committed meanwhile; a store of very many packs; hosts
# that share a bucket on three nodes of Garage, which are killed and stopped; and the story
# of five images of a real guest (commit them, remove a tag in the middle, collect, lose the
# index, repair, mount, compare), while something else keeps the machine busy and the page
# cache is dropped. Ends with 1 at the first fault, and always with a summary: which parts,
# how long, what they did, what was skipped and why. Part `radosgw` is a bucket of Ceph's S3
# whose gateways and disk are killed: it installs Debian's packages of these.
#
# SOAK_FAULT=PART puts a fault into a part, which has to find it: simulator, copies, views,
# garage, radosgw, story.
# STORY_ROUNDS=N tells the story at least so often.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/toolchain.sh

parts="simulator machines fuzzing copies mounts views packs garage radosgw story"
total="${1:-3600}"
for each in "${@:2}"; do
    [[ " $parts " == *" $each "* ]] || { echo "soak: no part is called $each: $parts" >&2; exit 2; }
done
[ "$#" -gt 1 ] && parts="${*:2}"
fault="${SOAK_FAULT:-}"
work="$(mktemp -d)"
noise=()
summary=()
skipped=()
part=""
began=0
clean() {
    for pid in "${noise[@]}"; do kill "$pid" 2>/dev/null || true; done
    umount -l "$work/mount" 2>/dev/null || true
    "${snapstore:-false}" umount "$work/view" >/dev/null 2>&1 || true
    [ -z "$part" ] || summary+=("$(printf '%-10s %5d s  FAILED' "$part" $((SECONDS - began)))")
    say "summary"
    printf '    %s\n' "${summary[@]}" "${skipped[@]}"
    say "${#skipped[@]} skipped"
    rm -rf "$work"
}
trap clean EXIT
say() { printf 'soak: %s\n' "$*"; }
die() { say "FAILED: $*"; exit 1; }
skip() { skipped+=("SKIPPED $*"); say "SKIPPED $*"; }
# What a part has done, for the summary: the last line of its output like this.
did() { grep -Eo "$1" "$work/$part.log" | tail -1 || true; }
run() {
    part="$1" began=$SECONDS
    say "$part"
    "$part"
    grep -E '^SKIPPED|[[:space:]]SKIPPED ' "$work/$part.log" >"$work/skipped" 2>/dev/null || true
    while read -r line; do skipped+=("$part: $line"); done <"$work/skipped"
    summary+=("$(printf '%-10s %5d s  %s' "$part" $((SECONDS - began)) "$done_by_part")")
    part=""
}
log() { tee -a "$work/$part.log"; }

# One of these parts is told.
any_of() {
    local each
    for each; do [[ " $parts " != *" $each "* ]] || return 0; done
    return 1
}
# Whatever is built takes minutes.
if any_of views story; then cargo build --release --locked -p snapstore; fi
if any_of machines mounts packs; then cargo build --locked -p snapstore; fi
snapstore="$PWD/target/release/snapstore"

simulator() {
    local seed put_back=()
    seed="$(date +%s)000000"
    [ "$fault" != simulator ] || put_back=(--fault BaseNotMarked)
    cargo run --locked -p snapstore-tests --features sim --bin sim -- \
        --from "$seed" --seconds $((total / 2)) "${put_back[@]}" | log ||
        die "the simulator has found something"
    done_by_part="$(did '^[0-9]+ histories'), from seed $seed"
}

machines() {
    nice scripts/soak-machines.py $((total / 8)) | log || die "machines"
    done_by_part="$(tail -1 "$work/$part.log")"
}

fuzzing() {
    scripts/fuzz.sh $((total >= 3600 ? 600 : total / 24 + 1)) | log || die "a fuzz target"
    done_by_part="$(tail -1 "$work/$part.log")"
}

copies() {
    COPIES_FAULT="$([ "$fault" != copies ] || echo 1)" COPIES_SEED="$(date +%s)" \
        COPIES_HISTORIES=$((total / 6 + 1)) \
        cargo test --locked -p snapstore-tests --test copies -- --nocapture | log || die "a copy"
    done_by_part="$(did '^[0-9]+ histories of copies')"
}

mounts() {
    SNAPSTORE_SOAK_ROUNDS=$((total / 6)) \
        cargo test --locked -p snapstore-tests --test mount soak -- --nocapture | log || die "a mount"
    done_by_part="$((total / 6)) rounds"
}

# fsx does with the file $1 of the view what $2 (weights) allows, while the view is committed.
exercise() {
    local pid options=()
    printf '%s\n' "$2" >"$work/fsx.toml"
    [ "$fault" != views ] || options=(--inject 500)
    "$fsx" -f "$work/fsx.toml" -N 2000 -S "$seed" -P "$work" "${options[@]}" "$work/view/$1" \
        >"$work/fsx.log" 2>&1 &
    pid=$!
    noise+=("$pid")
    while kill -0 "$pid" 2>/dev/null; do
        "$snapstore" commit now --replace --mount "$work/view" >/dev/null || die "a commit of a view"
    done
    wait "$pid" || { cat "$work/fsx.log"; die "fsx of $1, seed $seed"; }
}

views() {
    local fsx seed runs=0 end=$((SECONDS + total / 24))
    : | log
    if ! fsx="$(scripts/fsx.sh)"; then
        skip "views: fsx cannot be compiled"
        done_by_part="nothing"
        return
    fi
    seed="$(date +%s)"
    export SNAPSTORE_DIR="$work/view-store"
    mkdir -p "$work/view"
    "$snapstore" init >/dev/null
    head -c 1048576 /dev/urandom >"$work/image"
    "$snapstore" commit image --memory "$work/image" --no-parent >/dev/null
    "$snapstore" mount --rw --overlay-dir "$work" image "$work/view" >/dev/null
    local both="fsync = 1
fdatasync = 1
invalidate = 1
punch_hole = 5
sendfile = 2
posix_fadvise = 2
copy_file_range = 2"
    while [ "$SECONDS" -lt "$end" ] || [ "$runs" = 0 ]; do
        # An image keeps its length.
        exercise memory.bin "blockmode = true
[weights]
truncate = 0
$both"
        exercise state "[weights]
close_open = 1
$both"
        seed=$((seed + 1)) runs=$((runs + 2))
    done
    "$snapstore" umount "$work/view" >/dev/null
    done_by_part="fsx held $runs times, up to seed $((seed - 1))"
}

packs() {
    local packs=$((total >= 3600 ? 100000 : 10000))
    SCALE_PACKS="$packs" \
        cargo test --locked -p snapstore-tests --test bounds many_packs -- --nocapture | log ||
        die "many packs"
    done_by_part="$packs packs with 1024 descriptors"
}

garage() {
    local seed
    : | log
    if ! scripts/garage.sh >/dev/null; then
        skip "garage: it cannot be compiled"
        done_by_part="nothing"
        return
    fi
    seed="$(date +%s)"
    [ "$fault" != garage ] || export SNAPSTORE_GARAGE_FAULT=1
    SNAPSTORE_GARAGE_SEED="$seed" SNAPSTORE_GARAGE_SECONDS=$((total / 12 + 1)) \
        cargo test --locked -p snapstore-remote garage::nodes -- --nocapture | log ||
        die "a bucket on Garage, seed $seed"
    done_by_part="$(did '^[0-9]+ pushes .*'), seed $seed"
}

# The tests of buckets, then hosts that share one.
radosgw() {
    local seed
    : | log
    if ! scripts/radosgw.sh >/dev/null; then
        skip "radosgw: it cannot be installed"
        done_by_part="nothing"
        return
    fi
    seed="$(date +%s)"
    export SNAPSTORE_RADOSGW=1
    if [ "$fault" != radosgw ]; then
        cargo test --locked -p snapstore-remote --lib in_radosgw:: -- --nocapture | log ||
            die "a test of buckets on radosgw"
    else
        export SNAPSTORE_RADOSGW_FAULT=1
    fi
    SNAPSTORE_RADOSGW_SEED="$seed" SNAPSTORE_RADOSGW_SECONDS=$((total / 12 + 1)) \
        cargo test --locked -p snapstore-remote --lib radosgw::gateways -- --nocapture | log ||
        die "a bucket on radosgw, seed $seed"
    done_by_part="$(did '^[0-9]+ pushes .*'), seed $seed"
}

# The snapshot $1 is the image $2, seen through a mount.
compare() {
    "$snapstore" mount "$1" "$work/mount" >/dev/null || die "round $round: mount $1"
    cmp "$work/mount/memory.bin" "$images/$2" || die "round $round: $1 is not $2"
    "$snapstore" umount "$work/mount" >/dev/null || die "round $round: umount $1"
}

# A byte of the largest pack is another one.
flip() {
    local pack
    # shellcheck disable=SC2012 # names of hexadecimal digits
    pack="$(ls -S "$SNAPSTORE_DIR"/packs/*.pack | head -1)"
    printf '\xa5\x5a' | dd of="$pack" bs=1 seek=1000000 conv=notrunc status=none
}

story() {
    # One process that computes, and one that empties the page cache.
    while :; do :; done &
    noise+=($!)
    if [ -w /proc/sys/vm/drop_caches ]; then
        while sleep 1; do echo 1 >/proc/sys/vm/drop_caches; done &
        noise+=($!)
    else
        skip "dropping the page cache: needs root"
    fi
    images="$(scripts/guest-images.sh)"
    export SNAPSTORE_DIR="$work/store"
    mkdir -p "$work/mount"
    : | log
    round=0
    local end=$((SECONDS + total / 8)) rounds="${STORY_ROUNDS:-1}"
    while [ "$SECONDS" -lt "$end" ] || [ "$round" -lt "$rounds" ]; do
        round=$((round + 1))
        tell
    done
    done_by_part="the story of five images held $round times"
}

tell() {
    rm -rf "$SNAPSTORE_DIR"
    "$snapstore" init >/dev/null
    local parent=--no-parent name
    for name in base base+1 base+2 base+3; do
        # shellcheck disable=SC2086 # two words or one
        "$snapstore" commit "$name" --memory "$images/$name.ram" $parent >/dev/null
        parent="--parent $name"
    done
    "$snapstore" commit other --memory "$images/other.ram" --no-parent >/dev/null
    "$snapstore" rm base+1 >/dev/null
    "$snapstore" gc >/dev/null
    rm -rf "$SNAPSTORE_DIR/index"
    [ "$fault" != story ] || flip
    "$snapstore" repair >/dev/null || die "round $round: repair"
    "$snapstore" verify --read-data >/dev/null || die "round $round: verify"
    for name in base base+2 base+3 other; do compare "$name" "$name.ram"; done
    "$snapstore" rm base >/dev/null
    "$snapstore" gc >/dev/null
    for name in base+2 base+3 other; do compare "$name" "$name.ram"; done
    "$snapstore" verify --read-data >/dev/null || die "round $round: verify after gc"
}

for each in $parts; do run "$each"; done
say "nothing found"
