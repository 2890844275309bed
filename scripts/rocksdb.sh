#!/usr/bin/env bash
# Builds RocksDB's static archive once, outside the source tree, and prints the
# directory that holds it (for ROCKSDB_LIB_DIR).
#
# cargo would compile RocksDB for every profile and every clean clone; this
# archive serves them all. The cache key is the version of librocksdb-sys in
# Cargo.lock.
#
# Most of the compiler's time goes into the same headers, file after file. So the
# sources are compiled in groups: one file that includes fifteen of them, as
# RocksDB's own "unity" build does. If a compiler refuses that, the crate's own
# build is used, which takes several times as long.
set -euo pipefail
cd "$(dirname "$0")/.."

cache="${SNAPSTORE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/snapstore}"
version="$(sed -n '/^name = "librocksdb-sys"/{n;s/version = "\(.*\)"/\1/p}' Cargo.lock)"
[ -n "$version" ] || { echo "error: Cargo.lock names no librocksdb-sys" >&2; exit 1; }
dir="$cache/rocksdb-$version"
build="$cache/rocksdb-build"

say() { echo "rocksdb: $*" >&2; }

# The directory of the crate's sources, as cargo unpacked it.
crate_dir() {
    cargo fetch --locked >&2 || return 1
    local home="${CARGO_HOME:-$HOME/.cargo}" found
    found="$(find "$home/registry/src" -mindepth 2 -maxdepth 2 -type d -name "librocksdb-sys-$version" | head -n 1)"
    [ -n "$found" ] && echo "$found"
}

# Compiles the sources in groups into $build/librocksdb.a.
build_in_groups() {
    local crate sources per_group=15
    crate="$(crate_dir)" || return 1
    rm -rf "$build" && mkdir -p "$build"
    # The crate brings a generated build_version.cc of its own.
    mapfile -t sources < <(grep -v '^ *$' "$crate/rocksdb_lib_sources.txt" | grep -v 'util/build_version.cc')
    local n=0 group
    while [ $((n * per_group)) -lt ${#sources[@]} ]; do
        group="$build/group$(printf %03d "$n").cc"
        printf "#include \"$crate/rocksdb/%s\"\n" "${sources[@]:$((n * per_group)):$per_group}" >"$group"
        n=$((n + 1))
    done
    printf '#include "%s/build_version.cc"\n' "$crate" >"$build/version.cc"
    local flags=(-std=c++20 -O2 -fPIC -w -DNDEBUG -DHAVE_ALIGNED_NEW -DHAVE_UINT128_EXTENSION
        -DOS_LINUX -DROCKSDB_PLATFORM_POSIX -DROCKSDB_LIB_IO_POSIX -DROCKSDB_SCHED_GETCPU_PRESENT
        -DROCKSDB_AUXV_GETAUXVAL_PRESENT -DROCKSDB_FALLOCATE_PRESENT -DROCKSDB_RANGESYNC_PRESENT
        -ffunction-sections -fdata-sections -include cstdint
        -I"$crate/rocksdb/include" -I"$crate/rocksdb" -I"$crate")
    find "$build" -name '*.cc' -print0 | sort -z |
        xargs -0 -P "$(nproc)" -I{} "${CXX:-g++}" "${flags[@]}" -c {} -o {}.o || return 1
    ar crs "$build/librocksdb.a" "$build"/*.o
}

# Lets the crate compile them one by one.
build_one_by_one() {
    local archive
    env -u ROCKSDB_LIB_DIR -u ROCKSDB_STATIC -u RUSTFLAGS ROCKSDB_COMPILE=1 \
        CARGO_PROFILE_RELEASE_DEBUG=false CARGO_PROFILE_RELEASE_OPT_LEVEL=2 \
        cargo build --locked --release -p librocksdb-sys --target-dir "$build/target" >&2 || return 1
    archive="$(find "$build/target/release/build" -name librocksdb.a -printf '%T@ %p\n' | sort -n | tail -n 1 | cut -d' ' -f2-)"
    [ -n "$archive" ] || { echo "error: the build left no librocksdb.a under $build" >&2; return 1; }
    cp "$archive" "$build/librocksdb.a"
}

# What links RocksDB finds these two beside it, before the system's shared libraries, so that programs need
# nothing but the C library: the archive of C++'s library, and GCC's own in two archives.
put_libraries() {
    local cxx
    cxx="$("${CXX:-g++}" -print-file-name=libstdc++.a)"
    # Another library of C++, or no archive of it: shared libraries do.
    [ -f "$cxx" ] && [ -f "$("${CC:-gcc}" -print-file-name=libgcc_eh.a)" ] || return 0
    ln -sfn "$(realpath "$cxx")" "$dir/libstdc++.a"
    echo 'GROUP ( -lgcc_eh -lgcc )' >"$dir/libgcc_s.a.new"
    mv "$dir/libgcc_s.a.new" "$dir/libgcc_s.a"
}

if [ ! -f "$dir/librocksdb.a" ]; then
    mkdir -p "$cache"
    exec 9>"$cache/rocksdb.lock"
    flock 9
fi
if [ ! -f "$dir/librocksdb.a" ]; then
    # clang compiles RocksDB faster than g++.
    if command -v clang++ >/dev/null; then export CC=clang CXX=clang++; fi
    say "building RocksDB $version into $dir: a few minutes on two cores, once"
    start=$SECONDS
    if ! build_in_groups; then
        say "the compiler refused the sources in groups; one by one it takes 15 to 20 minutes"
        build_one_by_one || exit 1
    fi
    say "built in $((SECONDS - start)) s"
    mkdir -p "$dir"
    mv "$build/librocksdb.a" "$dir/librocksdb.a"
    rm -rf "$build"
fi
[ -e "$dir/libstdc++.a" ] || put_libraries
echo "$dir"
