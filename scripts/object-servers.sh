#!/usr/bin/env bash
# Installs the object stores that tests start on this machine, once, outside the source
# tree: moto, which speaks S3, and Azurite, which speaks Azure's protocol. Prints their
# directory. Where they cannot be had it says why, and the tests that need them are skipped.
set -euo pipefail

moto=5.2.5
azurite=3.37.0

cache="${SNAPSTORE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/snapstore}"
dir="$cache/object-servers"
say() { echo "object servers: $*" >&2; }

# Installs into a new directory, then moves: what is there is whole.
install() {
    local name="$1" version="$2"; shift 2
    [ "$(cat "$dir/$name.version" 2>/dev/null)" = "$version" ] && return
    say "installing $name $version into $dir: a minute, once"
    if "$@" >&2; then
        echo "$version" >"$dir/$name.version"
    else
        say "cannot install $name; tests that need it are skipped"
    fi
}

install_moto() {
    command -v python3 >/dev/null || { say "there is no python3"; return 1; }
    rm -rf "$dir/moto"
    python3 -m venv "$dir/moto" &&
        "$dir/moto/bin/pip" install -q --disable-pip-version-check "moto[server,s3]==$moto" || {
        rm -rf "$dir/moto"
        return 1
    }
}

install_azurite() {
    command -v npm >/dev/null || { say "there is no npm"; return 1; }
    rm -rf "$dir/node_modules" "$dir"/package*.json
    npm install --prefix "$dir" --silent --no-audit --no-fund "azurite@$azurite" || {
        rm -rf "$dir/node_modules"
        return 1
    }
}

mkdir -p "$dir"
exec 9>"$dir/lock"
flock 9
install moto "$moto" install_moto
install azurite "$azurite" install_azurite
echo "$dir"
