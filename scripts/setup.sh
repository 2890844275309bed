#!/usr/bin/env bash
# Gets this machine ready to build: Debian packages, Rust, and RocksDB's archive.
# What is there already is left as it is.
#
# Without root it installs nothing, but says which command would.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/toolchain.sh

say() { echo "setup: $*" >&2; }
die() { echo "error: $*" >&2; exit 1; }

have() { command -v "$1" >/dev/null; }

# bindgen, which reads RocksDB's header, loads libclang at run time.
have_libclang() {
    [ -n "${LIBCLANG_PATH:-}" ] ||
        compgen -G '/usr/lib*/llvm*/lib/libclang[.-]*so*' >/dev/null ||
        compgen -G '/usr/lib/*/libclang[.-]*so*' >/dev/null ||
        compgen -G '/usr/lib*/libclang[.-]*so*' >/dev/null
}

missing=()
have gcc || missing+=(gcc)
have g++ || missing+=(g++)
have make || missing+=(make)
have clang++ || missing+=(clang)
have_libclang || missing+=(libclang-dev)
have fusermount3 || missing+=(fuse3)
[ -s /etc/ssl/certs/ca-certificates.crt ] || missing+=(ca-certificates)
# Debian's newest Rust, kept current for its browsers. It replaces rustc and cargo.
debian_rust=(rustc-web cargo-web rustfmt-web rust-web-clippy)
if ! have_cargo; then
    missing+=("${debian_rust[@]}")
    say "no cargo of version $rust_needed or newer; Debian's is taken (rustup, https://rustup.rs, is an alternative)"
fi

if [ ${#missing[@]} -gt 0 ]; then
    # Another installation that is under way is waited for.
    install=(apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "${missing[@]}")
    have apt-get || die "missing: ${missing[*]} (the names of Debian's packages; there is no apt-get here)"
    if [ "$(id -u)" != 0 ]; then
        # Those that guests need, too, so that nobody is asked twice.
        for need in qemu-system-x86_64=qemu-system-x86 mke2fs=e2fsprogs cpio=cpio lz4=lz4 xz=xz-utils; do
            PATH="$PATH:/usr/sbin:/sbin" have "${need%%=*}" || install+=("${need#*=}")
        done
        die "missing packages; run: sudo apt-get update && sudo ${install[*]}"
    fi
    say "installing ${missing[*]}"
    { apt-get -q update && DEBIAN_FRONTEND=noninteractive "${install[@]}"; } >&2 ||
        die "could not install what is missing; it takes: ${install[*]}"
    find_cargo || die "Debian's cargo is older than $rust_needed: add the bookworm-security source, or install Rust with rustup (https://rustup.rs)"
fi

# RocksDB is linked from an archive outside the clone. Told to compile, its crate
# ignores where the configuration below may still point.
rocksdb="$(ROCKSDB_COMPILE=1 scripts/rocksdb.sh)"
config=".cargo/config.toml"
wanted="[env]
ROCKSDB_LIB_DIR = \"$rocksdb\"
ROCKSDB_STATIC = \"1\""
# Written only when different, and at once, so that no cargo run sees half of it.
if [ "$(cat "$config" 2>/dev/null)" != "$wanted" ]; then
    mkdir -p .cargo
    echo "$wanted" >"$config.new"
    mv "$config.new" "$config"
    say "wrote $config: RocksDB is in $rocksdb"
fi
