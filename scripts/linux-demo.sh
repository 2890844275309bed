#!/usr/bin/env bash
# Runs scripts/story.sh, the demonstration on a stock Debian guest: on this machine's own
# /dev/kvm if that can run one, else on an emulated machine, in about three minutes. The
# program is target/release/snapstore. LINUX=no leaves it out.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/toolchain.sh

skip() { echo "SKIPPED the demonstration on Debian: $*"; exit 0; }

[ "${LINUX:-yes}" != no ] || skip "LINUX=no"
[ "$(uname -m)" = x86_64 ] || skip "this is $(uname -m)"
where="$(scripts/bed.sh where)"
if [ "$where" = native ]; then
    [ "$(id -u)" = 0 ] || skip "mounting and /dev/kvm need root here"
    about="on this machine's own KVM"
else
    # The first-level machine has Debian 12's C library.
    libc="$(getconf GNU_LIBC_VERSION | sed 's/.* //')"
    printf '%s\n' "$libc" 2.36 | sort -CV || skip "the program built here needs glibc $libc, the emulated machine has 2.36"
    about="on an emulated machine, whose times say nothing; about three minutes (LINUX=no leaves it out)"
fi
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
if ! timeout 900 scripts/bed.sh prepare >"$work/prepare" 2>&1; then
    cat "$work/prepare" >&2
    skip "the machine cannot be prepared: $(tail -n 1 "$work/prepare")"
fi
bed="$(tail -n 1 "$work/prepare")"
echo
echo "=== A stock Debian guest, $about ==="
mkdir "$work/in"
scripts/handover.sh "$bed" "$work/in" "${CARGO_TARGET_DIR:-target}/release/snapstore" scripts/story.sh
scripts/bed.sh run --in "$work/in" --timeout "${LINUX_DEMO_TIMEOUT:-900}" -- bash ./story.sh
