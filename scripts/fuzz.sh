#!/usr/bin/env bash
# Runs the fuzz targets of the monitor (vmm/fuzz) and of the store (store/fuzz), with the
# Rust that is there:
#
#   scripts/fuzz.sh [SECONDS [TARGET...]]
#
# each for SECONDS (60 by default), two at a time, beginning with what is kept in their
# corpus. What is found is added to a directory of its own and not to that.
# Ends with 1 at a finding, and names the file that shows it.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/toolchain.sh

seconds="${1:-60}"
shift || true
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(state virtio vsock kernel agent control frozen stream files)
# The directory of a target.
home() { dirname "$(dirname "$(ls {vmm,store}/fuzz/fuzz_targets/"$1".rs 2>/dev/null)")"; }

# What cargo-fuzz passes, but for the sanitizer, which needs an unstable compiler.
flags="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4"
flags+=" -Cllvm-args=-sanitizer-coverage-inline-8bit-counters"
flags+=" -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares"
flags+=" -Ccodegen-units=1 -Cdebug-assertions -Coverflow-checks"
host="$(rustc -vV | sed -n 's/^host: //p')"
out="$PWD/target/fuzz"
# With --target, so that the flags are not for build scripts.
for dir in vmm/fuzz store/fuzz; do
    bins=()
    for target in "${targets[@]}"; do
        [ "$(home "$target")" != "$dir" ] || bins+=(--bin "$target")
    done
    [ ${#bins[@]} -gt 0 ] || continue
    (cd "$dir" && RUSTFLAGS="$flags" cargo build --release --locked --target "$host" --target-dir "$out" "${bins[@]}")
done

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
one() {
    local target="$1"
    mkdir -p "$work/$target" "$out/found"
    if "$out/$host/release/$target" -max_total_time="$seconds" -timeout=20 -rss_limit_mb=2048 \
        -max_len=32768 -artifact_prefix="$out/found/$target-" \
        "$work/$target" "$(home "$target")/corpus/$target" >"$work/$target.log" 2>&1; then
        echo "fuzz: $target: $(grep -aE '^Done ' "$work/$target.log" | tail -n 1)"
    else
        tail -n 40 "$work/$target.log"
        echo "fuzz: FAILED $target: see $out/found"
        touch "$work/failed"
    fi
}
for target in "${targets[@]}"; do
    while [ "$(jobs -rp | wc -l)" -ge 2 ]; do wait -n || true; done
    one "$target" &
done
wait
[ ! -e "$work/failed" ]
