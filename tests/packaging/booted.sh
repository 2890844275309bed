#!/bin/bash
# What scripts/deb-tests.sh does within a Debian root whose systemd runs: the package's services do what their timers
# would have them do, and its removal ends the timers. The package is installed; in /t is its file. Each check prints
# `ok NAME` or `FAILED NAME`.
set -uo pipefail
export LC_ALL=C.UTF-8 HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin
failed=0
log=/t/log
store=/var/lib/snapstore

check() {
    local name="booted: $1" code=0; shift
    if [ "$1" = ! ]; then shift; ! "$@" >"$log" 2>&1 || code=1; else "$@" >"$log" 2>&1 || code=$?; fi
    if [ "$code" = 0 ]; then echo "ok $name"; return; fi
    echo "FAILED $name: $*"
    sed 's/^/    /' "$log"
    failed=$((failed + 1))
}
# What systemd says of the unit $1.
property() { systemctl show -P "$2" "$1"; }
# What was logged of the unit $1 since this was asked last.
logged() { journalctl --sync; journalctl --no-pager -q -o cat -u "$1" --cursor-file="/t/cursor-$1"; }
# Starts the service $1, which has to end with the exit code $2 and to say $3 (nothing in particular, if that is empty).
ended() {
    local code=0 said
    logged "$1" >/dev/null
    systemctl reset-failed "$1" 2>/dev/null
    systemctl start "$1" || code=$?
    said="$(logged "$1")"
    echo "$said"
    # A service that has succeeded is forgotten at once.
    if [ "$2" = 0 ]; then
        [ "$code" = 0 ] || return
    else
        [ "$code" != 0 ] && [ "$(property "$1" ExecMainStatus)" = "$2" ] || return
    fi
    grep -q -- "$3" <<<"$said"
}
as_owner() { setpriv --reuid snapstore --regid snapstore --clear-groups env HOME=/nonexistent SNAPSTORE_DIR="$store" "$@"; }
tags() { as_owner snapstore tags -q | sort | tr '\n' ' '; }

check "the package's user is there" getent passwd snapstore
for service in gc verify metrics; do
    # The program would fail.
    check "$service: nothing happens where there is no store" ended "snapstore-$service.service" 0 ""
done

head -c 1M /dev/urandom >/tmp/image
chmod 644 /tmp/image
check "store" as_owner snapstore init
check "commit" as_owner snapstore commit kept --memory /tmp/image
head -c 1M /dev/urandom >/tmp/image
check "commit of what has expired" as_owner snapstore commit old --memory /tmp/image --label expires=2020-01-01T00:00:00Z
before="$(du -s "$store/packs" | cut -f1)"
check "gc.service" ended snapstore-gc.service 0 "^Freed 1"
check "it has removed what had expired, and no more" test "$(tags)" = "kept "
check "it has freed the space" test "$(du -s "$store/packs" | cut -f1)" -lt "$before"
check "verify.service" ended snapstore-verify.service 0 "^Nothing is damaged"
check "metrics.service" ended snapstore-metrics.service 0 ""
prom=/run/snapstore-metrics/snapstore.prom
check "metrics of the store" grep -q '^snapstore_store_tags 1$' "$prom"
check "others can read them" test "$(stat -c %a "$prom")" = 644

# What /etc/default/snapstore says counts.
echo 'GC_OPTIONS="--max-store 1K"' >>/etc/default/snapstore
check "gc.service fails beyond a limit that was set" ended snapstore-gc.service 1 "too much is left"
sed -i '$d' /etc/default/snapstore

check "timers" systemctl enable --now snapstore-gc.timer snapstore-verify.timer snapstore-metrics.timer
for timer in gc verify metrics; do
    check "$timer.timer waits" test "$(property "snapstore-$timer.timer" ActiveState)" = active
done
written_again() {
    rm -f "$prom"
    for _ in $(seq 120); do [ ! -s "$prom" ] || return 0; sleep 1; done
    return 1
}
check "metrics.timer has them written by itself" written_again

# A page that the disk has changed.
pack="$(find "$store/packs" -name '*.pack' | head -n 1)"
chmod u+w "$pack"
printf '\377\377\377\377' | dd of="$pack" bs=1 seek=20000 conv=notrunc status=none
check "verify.service fails on damage" ended snapstore-verify.service 4 "^DAMAGED"

check "remove" dpkg -r snapstore
for timer in gc verify metrics; do
    check "$timer.timer is gone" test "$(property "snapstore-$timer.timer" ActiveState)" = inactive
done
check "no timer is left that starts with the system" ! compgen -G '/etc/systemd/system/*/snapstore*'
rm -r "$store"
check "purge" dpkg -P snapstore
check "no unit is left" test "$(property snapstore-gc.service LoadState)" = not-found
check "no user is left" ! getent passwd snapstore
[ "$failed" = 0 ]
