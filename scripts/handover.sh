#!/usr/bin/env bash
# Fills a directory with what stock Linux guests need on the machines of scripts/bed.sh
# (give it as --in): `snapstore`, `snapstore-machine`, and `initrd`, the bed's with the guest agent.
#
#   scripts/handover.sh BED DIRECTORY PROGRAM [FILE]...
#
# BED is what `scripts/bed.sh prepare` prints, PROGRAM the snapstore to use; FILEs are
# copied, too.
set -euo pipefail
bed="$1" directory="$2" program="$3"; shift 3
agent="$("$(dirname "$0")/agent.sh")"
handover="$(mktemp -d)"
trap 'rm -rf "$handover"' EXIT
for one in snapstore snapstore-machine; do strip -o "$directory/$one" "${program%/*}/$one"; done
[ $# = 0 ] || cp "$@" "$directory/"
mkdir "$handover/handover"
install -m 755 "$agent" "$handover/handover/agent"
{
    cat "$bed/guest/initrd.gz"
    (cd "$handover" && find . | cpio --quiet -o -H newc -R 0:0)
} >"$directory/initrd"
