#!/usr/bin/env bash
# Makes target/dist/snapstore-VERSION-x86_64.tar.gz: a directory that can be put anywhere,
# with a program that needs nothing but the C library. Prints its path.
#
#   scripts/dist.sh
set -euo pipefail
cd "$(dirname "$0")/.."

version="$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)"
name="snapstore-$version-x86_64"
out="$PWD/${CARGO_TARGET_DIR:-target}/dist"
rm -rf "$out"
mkdir -p "$out"
DESTDIR="$out" PREFIX="/$name" scripts/install.sh >&2
# A place of its own has no units that name it.
rm -r "$out/$name"/lib/{systemd,sysusers.d,tmpfiles.d}
tar -C "$out" --owner=0 --group=0 --sort=name -czf "$out/$name.tar.gz" "$name"
rm -r "${out:?}/$name"
echo "$out/$name.tar.gz"
