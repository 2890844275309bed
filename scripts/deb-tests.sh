#!/usr/bin/env bash
# Installs the package of `make deb` into fresh Debian roots, with nothing of this tree, uses it there and removes
# it; uses the archive of `make dist` there, too (tests/packaging/in-root.sh):
#
#   scripts/deb-tests.sh [SUITE]...        bookworm and trixie
#
# Roots are made by debootstrap, once, into ~/.cache/snapstore/debian-roots. DEBIAN_MIRROR names another mirror.
# What is done within has no network, and process ids and mounts of its own.
set -euo pipefail
cd "$(dirname "$0")/.."

skip() { echo "SKIPPED deb: $*"; exit 0; }
say() { echo "deb-tests: $*" >&2; }

target="${CARGO_TARGET_DIR:-target}"
package="$(compgen -G "$target/deb/snapstore_*.deb" | head -n 1)" || { echo "error: there is no package; run make deb" >&2; exit 1; }
archive="$(compgen -G "$target/dist/snapstore-*.tar.gz" | head -n 1)" || { echo "error: there is no archive; run make dist" >&2; exit 1; }
[ "$(id -u)" = 0 ] || skip "making a root needs root"
command -v debootstrap >/dev/null || skip "debootstrap is missing (apt-get install debootstrap)"
unshare --mount --pid --fork true 2>/dev/null || skip "unshare(2) is not allowed here"

cache="${SNAPSTORE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/snapstore}/debian-roots"
mirror="${DEBIAN_MIRROR:-http://deb.debian.org/debian}"
mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9
work="$(mktemp -d)"
trap 'rm -rf --one-file-system "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# Runs the command $2... in the root $1. What it mounts and starts ends with it.
in_root() {
    local root="$1"; shift
    # shellcheck disable=SC2016
    unshare --mount --pid --fork --kill-child "${unshare[@]}" bash -c '
        set -e
        mount --make-rprivate /
        mount --bind "$1" "$1"
        mount -t proc proc "$1/proc"
        mount --rbind /dev "$1/dev"
        mount -t tmpfs tmpfs "$1/run"
        cd "$1"; shift
        # Not chroot alone: in that the kernel makes no user namespaces, which machines need.
        pivot_root . .
        umount -l .
        exec chroot . "$@"' - "$root" "$@"
}

# Boots the systemd of the root $1, which runs /t/booted.sh and ends. 9: that cannot be had here, as it says.
boot() {
    local root="$1" groups=/sys/fs/cgroup code=0
    [ -f "$groups/cgroup.procs" ] || groups=/sys/fs/cgroup/unified
    groups="$groups/snapstore-deb-tests.$$"
    mkdir "$groups" 2>/dev/null || { echo "there are no control groups of version 2 to be had"; return 9; }
    printf '%s\n' '[Unit]' Requires=basic.target After=basic.target Wants=t.service AllowIsolate=yes \
        >"$root/etc/systemd/system/t.target"
    # What it prints is shown as it comes; the exit code of systemd is that of the service.
    printf '%s\n' '[Unit]' After=basic.target SuccessAction=exit FailureAction=exit \
        '[Service]' Type=oneshot 'ExecStart=/bin/bash /t/booted.sh' TimeoutStartSec=900 \
        StandardOutput=append:/t/said StandardError=append:/t/said >"$root/etc/systemd/system/t.service"
    # shellcheck disable=SC2016
    bash -c 'echo $$ >"$1/cgroup.procs"; shift; exec "$@"' - "$groups" \
        unshare --mount --pid --fork --kill-child --net --cgroup --uts --ipc bash -c '
        set -e
        root="$1"
        mount --make-rprivate /
        mount --bind "$root" "$root"
        mount -t proc proc "$root/proc"
        mount -t sysfs -o ro sysfs "$root/sys"
        mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
        mount -t tmpfs -o mode=755 tmpfs "$root/dev"
        for node in null zero full random urandom tty; do
            touch "$root/dev/$node"
            mount --bind "/dev/$node" "$root/dev/$node"
        done
        mkdir "$root/dev/pts" "$root/dev/shm"
        mount -t devpts devpts "$root/dev/pts"
        mount -t tmpfs tmpfs "$root/dev/shm"
        mount -t tmpfs -o mode=755 tmpfs "$root/run"
        mount -t tmpfs tmpfs "$root/tmp"
        cd "$root"
        pivot_root . .
        umount -l .
        exec chroot . env -i container=chroot PATH=/usr/sbin:/usr/bin:/sbin:/bin \
            /lib/systemd/systemd --unit=t.target --log-target=console --log-level=notice' - "$root" \
        </dev/null >"$work/console" 2>&1 || code=$?
    find "$groups" -depth -type d -exec rmdir {} + 2>/dev/null || true
    [ ! -s "$root/t/said" ] || cat "$root/t/said"
    if [ "$code" != 0 ] || [ ! -s "$root/t/said" ]; then
        echo "FAILED booted: systemd ended with $code"
        tail -n 20 "$work/console" | sed 's/^/    /'
        return 1
    fi
}

# Makes the roots SUITE-bare.tar and SUITE-system.tar.
make_roots() {
    local suite="$1" root="$work/new"
    say "making $suite: some two minutes, once"
    debootstrap --variant=minbase "$suite" "$root" "$mirror" >"$work/debootstrap.log" 2>&1 ||
        { tail -n 3 "$work/debootstrap.log" >&2; return 1; }
    rm -f "$root"/var/cache/apt/archives/*.deb
    tar -C "$root" -cf "$work/bare.tar" .
    cp /etc/resolv.conf "$root/etc/resolv.conf"
    unshare=()
    # Services must not start, and manual pages are what is looked at.
    in_root "$root" env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
        systemd fuse3 man-db >"$work/apt.log" 2>&1 || { tail -n 3 "$work/apt.log" >&2; return 1; }
    rm -f "$root"/var/cache/apt/archives/*.deb
    tar -C "$root" -cf "$work/system.tar" .
    rm -rf --one-file-system "$root"
    mv "$work/system.tar" "$cache/$suite-system.tar"
    mv "$work/bare.tar" "$cache/$suite-bare.tar"
}

failed=0
check() {
    local name="$1" code=0; shift
    "$@" >"$work/log" 2>&1 || code=$?
    if [ "$code" = 0 ]; then echo "ok $name"; return; fi
    echo "FAILED $name: $*"
    sed 's/^/    /' "$work/log"
    failed=$((failed + 1))
}

# What is said of the program: its size, what it needs, how fast it starts.
mkdir "$work/dist"
tar -C "$work/dist" --strip-components=1 -xzf "$archive"
program="$work/dist/bin/snapstore"
nothing_but_glibc() {
    local library
    for library in $(readelf -d "$program" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p'); do
        case "$library" in
            libc.so.6 | libm.so.6 | libpthread.so.0 | libdl.so.2 | librt.so.1 | ld-linux-x86-64.so.2) ;;
            *) echo "needs $library"; return 1 ;;
        esac
    done
}
glibc_of_debian_12() {
    local newest
    newest="$(objdump -T "$program" | grep -o 'GLIBC_2\.[0-9]*' | sort -t. -k2 -n | tail -n 1)"
    echo "$newest"
    [ "${newest#GLIBC_2.}" -le 36 ]
}
check "needs nothing but the C library" nothing_but_glibc
check "needs no newer C library than Debian 12 has" glibc_of_debian_12
echo "size: $(stat -c %s "$program") bytes; starts in $(python3 - "$program" <<'PYTHON'
import subprocess, sys, time
def once():
    start = time.perf_counter()
    subprocess.run([sys.argv[1], "--version"], stdout=subprocess.DEVNULL, check=True)
    return (time.perf_counter() - start) * 1e3
print("%.1f ms (the fastest of 100)" % min(once() for _ in range(100)))
PYTHON
)"
scripts/small-guest.sh "$work/guest.bin"

for suite in "${@:-bookworm trixie}"; do for suite in $suite; do
    if [ ! -f "$cache/$suite-bare.tar" ]; then
        make_roots "$suite" || { echo "SKIPPED $suite: cannot be made from $mirror"; continue; }
    fi
    for kind in bare system booted; do
        root="$work/$suite-$kind"
        mkdir "$root"
        tar -C "$root" -xf "$cache/$suite-${kind/booted/system}.tar"
        mkdir "$root/t"
        cp "$package" "$root/t/snapstore.deb"
        cp -r "$work/dist" "$root/t/dist"
        cp "$work/guest.bin" tests/packaging/{in-root,booted}.sh "$root/t/"
        echo "--- $suite, $kind ---"
        unshare=(--net)
        if [ "$kind" != booted ]; then
            in_root "$root" /bin/bash /t/in-root.sh "$kind" || failed=$((failed + 1))
        else
            check "booted: install" in_root "$root" dpkg -i /t/snapstore.deb
            code=0
            boot "$root" >"$work/booted" 2>&1 || code=$?
            if [ "$code" = 9 ]; then echo "SKIPPED booted: $(cat "$work/booted")"; else cat "$work/booted"; fi
            [ "$code" = 0 ] || [ "$code" = 9 ] || failed=$((failed + 1))
        fi
        rm -rf --one-file-system "$root"
    done
done; done
[ "$failed" = 0 ]
