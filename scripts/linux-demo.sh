#!/usr/bin/env bash
# Runs scripts/story.sh, the demonstration on a stock Debian guest: on this machine's own
# /dev/kvm if that can run one, else on an emulated machine, in about five minutes. The
# program is target/release/snapstore. LINUX=no leaves it out.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/toolchain.sh

what="the demonstration on Debian"
if [ "${LINUX:-yes}" = no ]; then
    echo "SKIPPED $what: LINUX=no"
    exit 0
fi
. scripts/linux-ready.sh

about="on this machine's own KVM"
if [ "$where" = emulated ]; then
    about="on an emulated machine, whose times say nothing; about five minutes (LINUX=no leaves it out)"
fi
echo
echo "=== A stock Debian guest, $about ==="
mkdir "$work/in"
scripts/handover.sh "$bed" "$work/in" "${CARGO_TARGET_DIR:-target}/release/snapstore" scripts/story.sh
scripts/bed.sh run --in "$work/in" --timeout "${LINUX_DEMO_TIMEOUT:-1800}" -- bash ./story.sh &
pids=($!)
wait "${pids[0]}"
