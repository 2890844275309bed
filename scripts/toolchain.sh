# To be sourced: puts a cargo that is new enough first in PATH.
#
# An old cargo earlier in PATH must not hide a newer one, so the usual places are
# asked in turn. If none has one, PATH stays as it is and `have_cargo` fails.
# shellcheck shell=bash

rust_needed="$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)"

# rust-toolchain.toml names the stable channel. Where rustup has only a toolchain that is called by its version, that
# one is taken and nothing is fetched.
if [ -z "${RUSTUP_TOOLCHAIN:-}" ] && command -v rustup >/dev/null && ! rustup toolchain list 2>/dev/null | grep -q '^stable'; then
    rustup_default="$(cd / && rustup show active-toolchain 2>/dev/null | cut -d ' ' -f 1)" || true
    [ -z "$rustup_default" ] || export RUSTUP_TOOLCHAIN="$rustup_default"
    unset rustup_default
fi

# Whether the program $1 is a cargo of at least that version. A rustup proxy
# without a toolchain is not.
is_new_cargo() {
    local version
    version="$("$1" --version 2>/dev/null)" || return 1
    version="${version#cargo }"
    printf '%s\n' "$rust_needed" "${version%%[ -]*}" | sort -CV
}

have_cargo() { command -v cargo >/dev/null && is_new_cargo cargo; }

find_cargo() {
    local dir
    have_cargo && return 0
    for dir in "${CARGO_HOME:-$HOME/.cargo}/bin" /usr/bin /usr/local/bin; do
        if [ -x "$dir/cargo" ] && is_new_cargo "$dir/cargo"; then
            PATH="$dir:$PATH"
            export PATH
            hash -r
            return 0
        fi
    done
    return 1
}

find_cargo || true
