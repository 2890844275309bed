#!/usr/bin/env bash
# Installs Ceph's S3 gateway, and what it needs below it, from Debian's packages. As root
# only; else it says which command does it, and ends with 1. Tests start a cluster of their
# own with it (tests/src/servers/radosgw.rs): no service of these packages is left running.
set -euo pipefail

packages="radosgw ceph-common ceph-mon ceph-osd python3"
programs="radosgw radosgw-admin ceph monmaptool ceph-mon ceph-osd python3"
say() { echo "radosgw: $*" >&2; }

is_there() {
    local program
    for program in $programs; do command -v "$program" >/dev/null || return 1; done
}

# What systemd would start of the packages that were not there before.
end_services() {
    local units
    [ -d /run/systemd/system ] || return 0
    units="$(comm -13 "$before" <(installed) | xargs -r dpkg -L |
        sed -nE 's,^(/usr)?/lib/systemd/system/([^/@]+\.(service|socket|target|timer))$,\2,p')"
    # shellcheck disable=SC2086 # several words
    [ -z "$units" ] || systemctl disable --now $units >/dev/null 2>&1 || true
}

installed() { dpkg-query -W -f '${db:Status-Abbrev} ${binary:Package}\n' | sed -n 's/^ii *//p' | sort; }

is_there && exit
# shellcheck disable=SC2086 # several words
install="apt-get install -y --no-install-recommends $packages"
if ! command -v apt-get >/dev/null; then
    say "there is no apt-get to install $packages; tests that need them are skipped"
    exit 1
fi
if [ "$(id -u)" != 0 ]; then
    say "tests that need it are skipped. To install it, as root: $install"
    exit 1
fi
before="$(mktemp)" log="$(mktemp)"
trap 'rm -f "$before" "$log"' EXIT
installed >"$before"
say "installing Debian's packages: $packages"
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get update && $install; } >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    say "cannot install it; tests that need it are skipped: $install"
    end_services
    exit 1
fi
end_services
is_there
