#!/bin/bash
# What scripts/deb-tests.sh does within a Debian root: KIND is bare (nothing but what Debian
# calls required, and apt) or system (with systemd, fuse3 and man-db). In /t are the package, the relocatable
# archive, unpacked, and a small guest. Each check prints `ok NAME`, `FAILED NAME` or `SKIPPED NAME: REASON`.
set -uo pipefail
kind="$1"
export LC_ALL=C.UTF-8 HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin
failed=0
log=/t/log

# Runs the command $2... as the check $1. `check NAME ! COMMAND` wants it to fail.
check() {
    local name="$kind: $1" code=0; shift
    if [ "$1" = ! ]; then shift; ! "$@" >"$log" 2>&1 || code=1; else "$@" >"$log" 2>&1 || code=$?; fi
    if [ "$code" = 0 ]; then echo "ok $name"; return; fi
    echo "FAILED $name: $*"
    sed 's/^/    /' "$log"
    failed=$((failed + 1))
}
skip() { echo "SKIPPED $kind: $*"; }

# systemd has nothing to say of a unit.
unit() {
    local said code=0
    said="$(systemd-analyze verify --man=yes "$1" 2>&1)" || code=$?
    echo "$said"
    # Of other units of the system it may complain.
    [ "$code" = 0 ] && ! grep -q snapstore <<<"$said"
}
# Every link of the documents to a file of theirs leads to one.
links() {
    local document link broken=0
    for document in /usr/share/doc/snapstore/*.md /usr/share/doc/snapstore/docs/*.md; do
        while read -r link; do
            [ -e "$(dirname "$document")/$link" ] || { echo "$document: $link"; broken=1; }
        # Licences are where Debian has them.
        done < <(grep -v 'LICENSE-' "$document" | grep -o '](\([^)#:]*\))\|](\([^):]*\)#[^)]*)' | sed 's/^](//; s/#.*//; s/)$//' | grep .)
    done
    return "$broken"
}

# Every file that is not the work of dpkg, of a log or of a cache.
files() {
    find / -xdev \( -path /t -o -path /proc -o -path /sys -o -path /dev -o -path /run -o -path /tmp \
        -o -path /var/lib/dpkg -o -path /var/log -o -path /var/cache -o -name '*.pyc' \) -prune -o -print | sort
    # Accounts, too.
    sed 's/^/user /' /etc/passwd
    sed 's/^/group /' /etc/group
}
nothing_left() {
    files >/t/after
    # Not counted: the copies that each change of accounts leaves, and the group kvm, which is Debian's own.
    diff /t/before /t/after | grep '^[<>]' |
        grep -v -e '^> /etc/\(passwd\|group\|shadow\|gshadow\|subuid\|subgid\)-$' -e '^> group kvm:[^:]*:[0-9]*:$' >/t/left
    cat /t/left
    [ ! -s /t/left ]
}
says() { local text="$1"; shift; "$@" 2>&1 | tee /dev/stderr | grep -- "$text" >/dev/null; }

# Commits an image, mounts it, restores what was there: with $1 as the program.
images() {
    local snapstore="$1" dir=/t/images
    rm -rf "$dir" && mkdir -p "$dir/mnt" || return
    export SNAPSTORE_DIR="$dir/store" SNAPSTORE_RUNTIME_DIR="$dir/run"
    head -c 3M /dev/urandom >"$dir/base.ram"
    { head -c 1M "$dir/base.ram"; head -c 2M /dev/urandom; } >"$dir/next.ram"
    "$snapstore" init && "$snapstore" commit base --memory "$dir/base.ram" &&
        "$snapstore" commit next --memory "$dir/next.ram" && "$snapstore" verify --read-data || return
    "$snapstore" export next -o "$dir/next.snap" && "$snapstore" rm base && "$snapstore" gc || return
    [ -c /dev/fuse ] || return 0
    "$snapstore" mount next "$dir/mnt" && cmp "$dir/mnt/memory.bin" "$dir/next.ram"
    local code=$?
    "$snapstore" umount "$dir/mnt" && return "$code"
}
# The guest of machine $2 answers; a slow one may take more than one question.
answers() {
    local try
    for try in $(seq 20); do
        # All of it is read: who leaves at the answer has the command end with a pipe that is broken.
        [ "$(printf p | timeout 60 "$1" console "$2" | grep -c pong)" = 0 ] || return 0
    done
    return 1
}
# Runs the guest, commits it, restores two of it, asks one.
machines() {
    local snapstore="$1" dir=/t/machines code
    rm -rf "$dir" && mkdir -p "$dir" || return
    export SNAPSTORE_DIR="$dir/store" SNAPSTORE_RUNTIME_DIR="$dir/run"
    "$snapstore" init && "$snapstore" run web --kernel /t/guest.bin --mem 16M --detach &&
        "$snapstore" commit warm --vm web && "$snapstore" restore warm --name clone -n 2 --detach &&
        answers "$snapstore" clone.2
    code=$?
    "$snapstore" stop --all && return "$code"
}
doctor() {
    # What the host lacks is not the package's fault; what doctor cannot do, is.
    snapstore doctor --json >/t/doctor.json 2>/t/doctor.err
    local code=$?
    cat /t/doctor.json /t/doctor.err
    [ "$code" -le 1 ] && grep -q '"version"\|"checks"\|"name"' /t/doctor.json && [ ! -s /t/doctor.err ]
}
with_devices() {
    local what="$1"; shift
    if [ -c /dev/fuse ] && [ -c /dev/kvm ]; then check "$what" machines "$@"; else skip "$what: there is no /dev/kvm and /dev/fuse"; fi
}

mkdir -p /t && files >/t/before

check "install" dpkg -i /t/snapstore.deb
check "no dependency is missing" dpkg --audit
check "version" says "^snapstore [0-9]" snapstore --version
check "no library is missing" ! says "not found" ldd /usr/bin/snapstore
check "agent needs no library" ! says "=>" ldd /usr/lib/snapstore/snapstore-agent
check "doctor" doctor
check "images" images snapstore
with_devices "machines" snapstore
check "bash completion" bash -c '. /usr/share/bash-completion/completions/snapstore && complete -p snapstore'
check "zsh completion is there" test -s /usr/share/zsh/vendor-completions/_snapstore
check "fish completion is there" test -s /usr/share/fish/vendor_completions.d/snapstore.fish
check "manual pages are there" test -s /usr/share/man/man1/snapstore-commit.1.gz
check "documents lead to each other" links
check "copyright is there" test -s /usr/share/doc/snapstore/copyright
if [ "$kind" = system ]; then
    check "man" says "snapstore" man -P cat snapstore
    check "man of a command" says "memory-diff" man -P cat snapstore-commit
    for unit in /usr/lib/systemd/system/snapstore-*; do
        check "unit ${unit##*/}" unit "$unit"
    done
    # The check is one.
    sed 's/^User=/Userr=/' /usr/lib/systemd/system/snapstore-gc.service >/t/snapstore-wrong.service
    sed 's,^ExecStart=[^ ]*,ExecStart=/usr/bin/no-snapstore,' /usr/lib/systemd/system/snapstore-gc.service >/t/snapstore-none.service
    check "a unit with an option that is none is found" ! unit /t/snapstore-wrong.service
    check "a unit of a program that is not there is found" ! unit /t/snapstore-none.service
    check "account" getent passwd snapstore
    check "directory" test "$(stat -c '%U %a' /var/lib/snapstore)" = "snapstore 750"
    check "tmpfiles" systemd-tmpfiles --create snapstore.conf
    check "services' program" says snapstore setpriv --reuid snapstore --regid snapstore --clear-groups snapstore --version
    # As snapstore-gc.service and snapstore-verify.service do it.
    as_service() { setpriv --reuid snapstore --regid snapstore --clear-groups env HOME=/nonexistent SNAPSTORE_DIR=/var/lib/snapstore "$@"; }
    check "a store for the services" as_service snapstore init
    check "gc of the service" as_service bash -c 'snapstore forget --expired && snapstore --lock-timeout 3600 gc'
    check "verify of the service" as_service snapstore --lock-timeout 3600 verify --read-data
fi

# The archive that is unpacked anywhere: with the package away, so that nothing of it helps.
check "remove" dpkg -r snapstore
check "no program is left" test ! -e /usr/bin/snapstore
check "settings stay until a purge" test -f /etc/default/snapstore
check "archive: version" says "^snapstore [0-9]" /t/dist/bin/snapstore --version
check "archive: images" images /t/dist/bin/snapstore
with_devices "archive: machines" /t/dist/bin/snapstore
if [ "$kind" = system ]; then
    check "a purge tells of the store that stays" says "/var/lib/snapstore.*kept" dpkg -P snapstore
    check "the store stays" test -f /var/lib/snapstore/config
    check "its owner stays" getent passwd snapstore
    rm -r /var/lib/snapstore
    # Again, with no store.
    check "install again" dpkg -i /t/snapstore.deb
    check "directory again" test -d /var/lib/snapstore
fi
check "purge" dpkg -P snapstore
check "nothing is left" nothing_left
[ "$failed" = 0 ]
