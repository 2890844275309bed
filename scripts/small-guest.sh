#!/usr/bin/env bash
# Assembles the small guest of tests (vmm/guests/src/asm/table.S) into FILE, for `snapstore run --kernel FILE`.
# It permutes a table for ever, checks itself at each step, and answers `p` on its console with `pong`.
#
#   scripts/small-guest.sh FILE
set -euo pipefail
file="$(realpath -m "$1")"
cd "$(dirname "$0")/../vmm/guests/src/asm"

# As vmm/guests/build.rs does.
object="$(mktemp)"
trap 'rm -f "$object"' EXIT
as --32 --fatal-warnings -I . -o "$object" table.S
ld -m elf_i386 --build-id=none --oformat binary -T flat.ld -o "$file" "$object"
