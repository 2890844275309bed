#!/usr/bin/env bash
# Builds RocksDB's static archive once, outside the source tree, and prints the
# directory that holds it (for ROCKSDB_LIB_DIR).
#
# RocksDB takes about 30 CPU minutes to compile and cargo would do it again for
# every profile and every clean clone; this archive serves them all. The cache
# key is the version of librocksdb-sys in Cargo.lock.
set -euo pipefail
cd "$(dirname "$0")/.."

cache="${SNAPSTORE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/snapstore}"
version="$(sed -n '/^name = "librocksdb-sys"/{n;s/version = "\(.*\)"/\1/p}' Cargo.lock)"
[ -n "$version" ] || { echo "error: Cargo.lock names no librocksdb-sys" >&2; exit 1; }
dir="$cache/rocksdb-$version"

if [ ! -f "$dir/librocksdb.a" ]; then
    mkdir -p "$cache"
    exec 9>"$cache/rocksdb.lock"
    flock 9
fi
if [ ! -f "$dir/librocksdb.a" ]; then
    # clang compiles most of RocksDB's files faster than g++.
    if command -v clang++ >/dev/null; then export CC=clang CXX=clang++; fi
    echo "Building RocksDB $version into $dir: about 15-20 minutes on two cores, once." >&2
    build="$cache/rocksdb-build"
    env -u ROCKSDB_LIB_DIR -u ROCKSDB_STATIC -u RUSTFLAGS \
        CARGO_PROFILE_RELEASE_DEBUG=false CARGO_PROFILE_RELEASE_OPT_LEVEL=2 \
        cargo build --locked --release -p librocksdb-sys --target-dir "$build" >&2
    archive="$(find "$build/release/build" -name librocksdb.a -printf '%T@ %p\n' | sort -n | tail -n 1 | cut -d' ' -f2-)"
    [ -n "$archive" ] || { echo "error: the build left no librocksdb.a under $build" >&2; exit 1; }
    mkdir -p "$dir"
    cp "$archive" "$dir/librocksdb.a.tmp"
    mv "$dir/librocksdb.a.tmp" "$dir/librocksdb.a"
    rm -rf "$build"
fi
echo "$dir"
