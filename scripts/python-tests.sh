#!/usr/bin/env bash
# Runs the tests of the Python package against the program that was built:
#
#   scripts/python-tests.sh [PROGRAM]        target/debug/snapstore by default
#
# In an environment of its own under ~/.cache/snapstore, made once; what it needs comes from PyPI.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts="$PWD/scripts"
skip() { echo "SKIPPED python: $*"; exit 0; }
program="$(realpath "${1:-${CARGO_TARGET_DIR:-target}/debug/snapstore}")"
python="$(command -v python3)" || skip "there is no python3"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || skip "python3 is older than 3.11"
"$python" -c 'import venv, ensurepip' 2>/dev/null || skip "python3 has no venv (apt-get install python3-venv)"

cache="${XDG_CACHE_HOME:-$HOME/.cache}/snapstore/python-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
if [ ! -x "$cache/bin/pytest" ]; then
    rm -rf "$cache"
    "$python" -m venv "$cache"
    "$cache/bin/pip" install -q 'pytest>=7' 'numpy>=1.24' 'mypy>=1.8' 'setuptools>=68' wheel || {
        rm -rf "$cache"
        skip "PyPI cannot be reached"
    }
fi
# As a user installs it; what it needs is there already. From a copy, since it is built in place.
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cp -r python "$work/python"
"$cache/bin/pip" install -q --no-build-isolation --no-deps --force-reinstall "$work/python"
cd "$work/python"
"$cache/bin/mypy" --cache-dir "$work/mypy"
# Not the sources that are here, but what was installed.
rm -r snapstore
if command -v as >/dev/null && command -v ld >/dev/null; then
    "$scripts/small-guest.sh" "$work/guest.bin"
    export SNAPSTORE_GUEST="$work/guest.bin"
fi
SNAPSTORE="$program" SNAPSTORE_RUNTIME_DIR="$work/run" "$cache/bin/pytest" -q -p no:cacheprovider tests
