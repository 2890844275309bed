#!/usr/bin/env bash
# Measures stock Debian guests under the monitor: tests/bed/bench.py, on the machines of
# scripts/bed.sh. Prints its tables, or `SKIPPED linux benchmarks: REASON`.
#
#   scripts/linux-bench.sh [--markdown] [answers|clones|warm]...      which tables [default: all]
#
# Emulated, only ratios mean something, those of times only while nothing else runs; it
# takes about twenty minutes. BENCH_ROUNDS sets how many turns each side takes, BENCH_CPUS how many
# processors the emulated machine has: more of them than the host has idle make figures meaningless.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/toolchain.sh
what="linux benchmarks"
. scripts/linux-ready.sh

rounds=3
[ "$where" = emulated ] || rounds=5
cargo build --quiet --release --locked -p snapstore
mkdir "$work/in"
scripts/handover.sh "$bed" "$work/in" "${CARGO_TARGET_DIR:-target}/release/snapstore" tests/bed/{lab,bench}.py
scripts/bed.sh run --cpus "${BENCH_CPUS:-1}" --timeout "${LINUX_BENCH_TIMEOUT:-3600}" --in "$work/in" -- \
    env "BENCH_ROUNDS=${BENCH_ROUNDS:-$rounds}" python3 ./bench.py "$@" &
pids=($!)
wait "${pids[0]}"
