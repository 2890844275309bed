# shellcheck shell=bash
# Sourced by what runs stock Linux guests on the machines of scripts/bed.sh, with $what
# being its name. Sets
#
#   $where   native or emulated
#   $bed     what `scripts/bed.sh prepare` prints
#   $work    a temporary directory, removed at the end, as are the processes in $pids
#
# or says `SKIPPED $what: REASON` and ends the script.
skip() { echo "SKIPPED $what: $*"; exit 0; }

where="$(scripts/bed.sh where)"
if [ "$where" = native ]; then
    [ "$(id -u)" = 0 ] || skip "mounting and /dev/kvm need root here"
else
    # The first-level machine has Debian 12's C library.
    libc="$(getconf GNU_LIBC_VERSION | sed 's/.* //')"
    printf '%s\n' "$libc" 2.36 | sort -CV || skip "the program built here needs glibc $libc, the bed has 2.36"
fi
[ "$(uname -m)" = x86_64 ] || skip "this is $(uname -m)"

work="$(mktemp -d)"
pids=()
cleanup() {
    local pid
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
    wait
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# Installs what is missing and prepares the bed. Only what this machine lacks is skipped.
code=0
scripts/bed.sh prepare >"$work/prepare" 2>&1 || code=$?
if [ "$code" != 0 ]; then
    cat "$work/prepare" >&2
    [ "$code" != 77 ] || skip "$(sed -n 's/^error: //p' "$work/prepare" | tail -n 1)"
    echo "error: the bed cannot be prepared" >&2
    exit 1
fi
bed="$(tail -n 1 "$work/prepare")"
if [ "$where" = emulated ] && ! scripts/bed.sh run --timeout 200 -- true >"$work/try" 2>&1; then
    cat "$work/try" >&2
    echo "error: the bed's machine does not run" >&2
    exit 1
fi
