#!/usr/bin/env bash
# Runs every check and every test, and closes with "N passed, N failed, N skipped".
#
#   scripts/test.sh [--checks-only]
#
# A test that cannot run here prints a line "SKIPPED name: reason". cargo counts it
# as passed; the summary counts it as skipped. Of the checks before the tests, only
# those that fail or cannot run count.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/toolchain.sh

log="$(mktemp)"
failures="$(mktemp)"
trap 'rm -f "$log" "$failures"' EXIT
passed=0 failed=0 skipped=0

# What failed is told once more at the end, since all before it is long. Its lines are at $1.
keep_failures() { grep -E "$1" "$log" >>"$failures" || true; }

say() { printf '\n--- %s ---\n' "$*"; }

# Runs the check called $1: the rest is its command.
check() {
    local name="$1"; shift
    say "$name"
    if ! "$@"; then
        echo "FAILED $name: $*" | tee -a "$failures"
        failed=$((failed + 1))
    fi
}

# The same for a part of the toolchain ($2) that may be missing.
check_with() {
    local name="$1" component="$2"; shift 2
    if ! cargo "$name" --version >/dev/null 2>&1 && command -v rustup >/dev/null; then
        rustup component add "$component" || true
    fi
    if cargo "$name" --version >/dev/null 2>&1; then
        check "$name" "$@"
    else
        say "$name"
        echo "SKIPPED $name: this Rust has no $component and it cannot be added"
        skipped=$((skipped + 1))
    fi
}

check_with fmt rustfmt cargo fmt --all --check
check_with clippy clippy cargo clippy --workspace --all-targets --locked -- -D warnings
# What only the simulator has. Of the workspace, so that other crates are not checked anew with other features.
check_with clippy clippy cargo clippy --workspace --features snapstore-tests/sim \
    --lib --bin sim --test sim --test unconfirmed --locked -- -D warnings
check doc env RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked

if [ "${1:-}" = --checks-only ]; then
    printf '\n%s checks failed, %s skipped\n' "$failed" "$skipped"
    [ "$failed" = 0 ]
    exit
fi

for device in /dev/fuse /dev/kvm; do
    if ! (exec 3<>"$device") 2>/dev/null; then
        printf '\nThis machine offers no usable %s: tests that need it are skipped.\n' "$device"
    fi
done
# Real kernels for the tests that can use them. Without, those say SKIPPED.
if bed="$(scripts/bed.sh prepare | tail -n 1)" && [ -f "$bed/guest/vmlinuz" ]; then
    export SNAPSTORE_KERNELS="$bed/guest/vmlinuz:$bed/guest/vmlinux"
    # And a Debian guest for the monitors that can emulate one.
    export SNAPSTORE_BED="$bed"
fi
# Object stores for the tests of remotes. Without, those say SKIPPED.
scripts/object-servers.sh >/dev/null || true
# The tests run the program, which `cargo test` alone would not build.
check build cargo build --workspace --locked
say tests
status=0
# Colours would hide the results from what reads them below.
CARGO_TERM_COLOR=never cargo test --workspace --locked --no-fail-fast -- --nocapture 2>&1 | tee "$log" || status=$?
# The simulator needs a store that is built for it. Both with the same packages, so that nothing is built twice.
simulator=(cargo test -p snapstore-store -p snapstore-tests --features snapstore-tests/sim --locked --no-fail-fast)
export CARGO_TERM_COLOR=never
"${simulator[@]}" --test sim --test unconfirmed -- --nocapture 2>&1 | tee -a "$log" || status=$?
"${simulator[@]}" --lib -- sim:: index:: --nocapture 2>&1 | tee -a "$log" || status=$?

# Output of tests that run side by side may share a line with cargo's own.
read -r cargo_passed cargo_failed < <(
    grep -oE 'test result: [A-Za-z]+\. [0-9]+ passed; [0-9]+ failed' "$log" |
        awk '{ passed += $4; failed += $6 } END { print passed + 0, failed + 0 }'
) || true
# A test may say more than once that it is skipped.
skips="$(grep -oE '(^|\.\.\. )SKIPPED .*' "$log" | sed 's/^\.\.\. //' | sort -u || true)"
cargo_skipped="$(grep -c . <<<"$skips" || true)"
# A test file that does not compile, or a test process that died, has no result.
if [ "$status" != 0 ] && [ "$cargo_failed" = 0 ]; then cargo_failed=1; fi
passed=$((passed + cargo_passed - cargo_skipped))
failed=$((failed + cargo_failed))
skipped=$((skipped + cargo_skipped))
if [ "$cargo_skipped" != 0 ]; then
    say skipped
    echo "$skips"
fi
if [ "$cargo_failed" != 0 ]; then
    keep_failures '^error: test failed|^    `-p |^error(\[|: could not compile)|^test .* FAILED$|^    [a-z0-9_:]+$|panicked at|^Error: '
fi

# A minute for each target, from what is kept in its corpus. They are built for it, which takes minutes.
say fuzzing
if [ -n "${LINUX_TESTS_UNTIL:-}" ] && [ "$(date +%s)" -gt $((LINUX_TESTS_UNTIL - 600)) ]; then
    echo "SKIPPED fuzzing: this host is slow, and the time there is for it is over"
    skipped=$((skipped + 1))
elif scripts/fuzz.sh "${FUZZ_SECONDS:-60}" 2>&1 | tee "$log"; then
    passed=$((passed + $(grep -c '^fuzz: [a-z]*: Done' "$log" || true)))
else
    failed=$((failed + 1))
    keep_failures '^fuzz: .*: (failed|FAILED)|ERROR: |panicked at|^error'
    echo "FAILED fuzzing" >>"$failures"
fi

say "Python package"
if scripts/python-tests.sh 2>&1 | tee "$log"; then
    passed=$((passed + $(sed -nE "s/^([0-9]+) passed.*/\1/p" "$log" | tail -n 1 | grep . || echo 0)))
    skipped=$((skipped + $(grep -c '^SKIPPED ' "$log" || true)))
else
    failed=$((failed + 1))
    keep_failures '^(FAILED|ERROR) '
    echo "FAILED Python package" >>"$failures"
fi

# Last, because it takes the longest, and waits for nobody: scripts/linux-tests.sh.
say "Linux guests"
status=0
scripts/linux-tests.sh 2>&1 | tee "$log" || status=$?
read -r linux_passed linux_failed < <(
    sed -nE 's/^test result: [A-Za-z]+\. ([0-9]+) passed; ([0-9]+) failed$/\1 \2/p' "$log" | tail -n 1
) || true
passed=$((passed + ${linux_passed:-0}))
failed=$((failed + ${linux_failed:-0}))
skipped=$((skipped + $(grep -c '^SKIPPED ' "$log" || true)))
# Ended without a result.
if [ "$status" != 0 ] && [ "${linux_failed:-0}" = 0 ]; then failed=$((failed + 1)); fi
if [ "$status" != 0 ]; then
    keep_failures '^FAILED |^test .* FAILED|^linux[0-9]*::[a-z0-9_]+: |^[Ee]rror'
    echo "FAILED Linux guests" >>"$failures"
fi

if [ -s "$failures" ]; then
    say failed
    awk '!seen[$0]++' "$failures"
fi
echo
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]
