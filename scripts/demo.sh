#!/usr/bin/env bash
# Runs the demonstration (cli/examples/demo) on RAM images of a real guest, which it makes if need be, then
# the story of a running Debian guest: scripts/linux-demo.sh (LINUX=no leaves it out).
#
#   scripts/demo.sh [OPTION OF THE DEMONSTRATION]...
#
# IMAGES="tag=file tag=file ..." names other images, in the order to commit them.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/toolchain.sh

images=()
if [ -n "${IMAGES:-}" ]; then
    for image in $IMAGES; do images+=(--image "$image"); done
else
    dir="$(scripts/guest-images.sh)" || {
        echo "error: there are no guest images; with images of your own: make demo IMAGES=\"base=FILE base+1=FILE\"" >&2
        exit 1
    }
    for tag in base base+1 base+2 base+3 other; do
        images+=(--image "$tag=$dir/$tag.ram")
    done
fi
target="${CARGO_TARGET_DIR:-target}"
"$target/release/examples/demo" "${images[@]}" "$@"
scripts/linux-demo.sh
