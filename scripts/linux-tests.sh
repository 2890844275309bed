#!/usr/bin/env bash
# Boots stock Debian guests under the monitor, commits them while they run and restores
# them: tests/bed/proof.py, on the machines of scripts/bed.sh. Prints a line for every
# check, `test linux::NAME ... ok|FAILED`, and closes with
# `test result: ok. N passed; M failed`, or with `SKIPPED linux guests: REASON`.
#
#   scripts/linux-tests.sh [GROUP]...      groups: core, machines, more, smoke61 (default:
#                                          all of these); identity has some checks of core
#
# The program is the one that the tests run, target/debug/snapstore. Emulated, groups run side by
# side, each in a first-level machine of one CPU: about twenty minutes on two cores. Natively the numbers
# are larger (see proof.py, whose PROOF_ variables can be set here, too).
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/toolchain.sh

# Seconds after which no check begins any more, and when that is at the latest (since 1970). What
# is left then is SKIPPED: where an emulated CPU is slow, all checks may take hours.
until=$(($(date +%s) + ${LINUX_TESTS_SECONDS:-1800}))
if [ "${LINUX_TESTS_UNTIL:-$until}" -lt "$until" ]; then until="$LINUX_TESTS_UNTIL"; fi
# Seconds that a check may take beyond that; as PROOF_GRACE in proof.py.
grace=400
groups=("$@")
[ ${#groups[@]} -gt 0 ] || groups=(core more machines smoke61)

what="linux guests"
. scripts/linux-ready.sh
if [ "$where" = native ]; then
    export PROOF_COMMITS="${PROOF_COMMITS:-60}"
    export PROOF_FULL=1 PROOF_PERIOD="${PROOF_PERIOD:-1}" PROOF_FILL="${PROOF_FILL:-64}"
fi

if [ "$where" = emulated ] && [ ! -d "$bed/6.12" ]; then
    echo "SKIPPED linux::pagemap_scan: the bed has no Linux 6.12, and Linux 6.1 cannot list what was written"
fi
cargo build --quiet --locked -p snapstore
mkdir "$work/in"
scripts/handover.sh "$bed" "$work/in" "${CARGO_TARGET_DIR:-target}/debug/snapstore" tests/bed/{lab,proof}.py
# A kernel with a driver for the VM generation identifier.
[ ! -f "$bed/6.12/vmlinuz" ] || cp "$bed/6.12/vmlinuz" "$work/in/vmlinuz-6.12"

# Runs a group; its output goes to a file so that groups do not mix.
run_group() {
    local left=$((until - $(date +%s))) group="$1" label=""
    [ "$left" -gt 0 ] || left=0
    # The machine's start, and its end, come on top.
    local options=(--timeout "$((left + grace + 180))" --in "$work/in")
    case "$1" in
        smoke61)
            # Without PAGEMAP_SCAN and asynchronous write protection, another way to find what changed.
            group=smoke
            if [ "$where" = emulated ]; then options+=(--kernel 6.1) label=61; fi ;;
    esac
    local settings=("PROOF_UNTIL=$until" "PROOF_GRACE=$grace") name
    for name in PROOF_CLONES PROOF_DEPTH PROOF_COMMITS PROOF_PERIOD PROOF_FILL PROOF_FULL; do
        [ -z "${!name:-}" ] || settings+=("$name=${!name}")
    done
    local code=0 bed_pid
    scripts/bed.sh run "${options[@]}" -- env "PROOF_LABEL=$label" "${settings[@]}" python3 ./proof.py "$group" \
        >"$work/$1.all" 2>&1 &
    bed_pid=$!
    trap 'kill "$bed_pid" 2>/dev/null' TERM
    wait "$bed_pid" || code=$?
    # Of a machine that hung and was started again, only the second run counts.
    awk '/^bed: trying once more$/ { kept = "" } { kept = kept $0 "\n" } END { printf "%s", kept }' \
        "$work/$1.all" >"$work/$1.log"
    # Ended without saying which check failed.
    if [ "$code" != 0 ] && ! grep -qE '^test .* FAILED' "$work/$1.log"; then
        echo "the group $1 ended with $code" >>"$work/$1.log"
        echo "test linux::group_$1 ... FAILED" >>"$work/$1.log"
    fi
}

# At most two at a time, which suits two cores; the longest begin first.
begin=$SECONDS
for group in "${groups[@]}"; do
    while [ "$(jobs -rp | wc -l)" -ge 2 ]; do wait -n || true; done
    run_group "$group" &
    pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || true; done
pids=()
for group in "${groups[@]}"; do
    echo "-- $group"
    cat "$work/$group.log"
done
passed="$(cat "$work"/*.log | grep -cE '^test linux[0-9]*::.* \.\.\. ok' || true)"
failed="$(cat "$work"/*.log | grep -cE '^test linux[0-9]*::.* \.\.\. FAILED' || true)"
echo "Linux guests ($where): $((SECONDS - begin)) seconds"
verdict=ok
[ "$failed" = 0 ] || verdict=FAILED
echo "test result: $verdict. $passed passed; $failed failed"
# Each check that there was no time for says SKIPPED. Groups that say nothing at all have failed.
skipped="$(cat "$work"/*.log | grep -cE '^SKIPPED linux' || true)"
[ "$failed" = 0 ] && [ $((passed + skipped)) -gt 0 ]
