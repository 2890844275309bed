#!/usr/bin/env bash
# Makes RAM images of a real guest: stock Debian under QEMU's emulator, which
# needs no KVM. Prints the directory that holds them as its last line.
#
#   scripts/guest-images.sh [--dir DIR]
#
#   base.ram     booted, a Python service running
#   base+1.ram   the same guest after it wrote, imported and ran a small module
#   base+2.ram   then after about 8 MiB of log text, in memory and on disk
#   base+3.ram   then after about 64 MiB of random bytes, numbers and objects
#   other.ram    a second boot of a fresh copy of the same disk, as base.ram
#
# Every image is the guest's whole 512 MiB of RAM, copied while it stands still.
# A directory that already holds all of them is left as it is. The guest's disk
# and kernel stay in DIR/build, so images made again need no download.
#
# DEBIAN_MIRROR names another mirror than deb.debian.org.
set -euo pipefail
cd "$(dirname "$0")"

cache="${SNAPSTORE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/snapstore}"
dir="$cache/guest-images"
images=(base.ram base+1.ram base+2.ram base+3.ram other.ram)
ram_bytes=$((512 * 1024 * 1024))

# What the guest's disk is made of, besides what these depend on.
packages=(
    base-files base-passwd bash bsdutils busybox-static coreutils dash diffutils
    findutils grep gzip hostname init-system-helpers kmod libc-bin mount
    ncurses-base sed tar util-linux
    python3 python3-yaml python3-pygments python3-cryptography
)

# Seconds to wait for the boot, for a command's work, and for QEMU's monitor.
boot_timeout=300
work_timeout=300
monitor_timeout=30

say() { echo "guest-images: $*" >&2; }
die() { echo "error: $*" >&2; exit 1; }
. ./debian.sh

while [ $# -gt 0 ]; do
    case "$1" in
        --dir) [ $# -ge 2 ] || die "--dir needs a directory"; dir="$2"; shift 2 ;;
        --dir=*) dir="${1#--dir=}"; shift ;;
        -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' guest-images.sh; exit 0 ;;
        *) die "unknown argument $1 (usage: scripts/guest-images.sh [--dir DIR])" ;;
    esac
done
case "$dir" in /*) ;; *) dir="$OLDPWD/$dir" ;; esac

complete() {
    [ -f "$dir/complete" ] || return 1
    local image
    for image in "${images[@]}"; do
        [ "$(stat -c %s "$dir/$image" 2>/dev/null)" = "$ram_bytes" ] || return 1
    done
}

if complete; then echo "$dir"; exit 0; fi

# --- What this machine must have ---------------------------------------------

debian_need qemu-system-x86_64=qemu-system-x86 mke2fs=e2fsprogs cpio=cpio setpriv=util-linux \
    "$debian_keyring=debian-archive-keyring"

mkdir -p "$dir"
exec 9>"$dir/lock"
if ! flock -n 9; then say "waiting for another run in $dir"; flock 9; fi
if complete; then echo "$dir"; exit 0; fi

build="$dir/build"
run="$build/run"
qemu_pid=
stop_guest() {
    if [ -n "$qemu_pid" ]; then
        kill -KILL "$qemu_pid" 2>/dev/null || true
        wait "$qemu_pid" 2>/dev/null || true
        qemu_pid=
    fi
}
cleanup() {
    stop_guest
    rm -rf "$run" "$build/work"
    rm -f "$dir"/*.ram.tmp
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# --- The guest's kernel, initrd and disk -------------------------------------

# Makes $build/{vmlinuz,initrd.gz,root.img}.
make_disk() {
    local work="$build/work" tree="$build/work/tree"
    rm -rf "$work"
    mkdir -p "$work"/initrd/{bin,dev,root,modules}
    say "downloading Debian packages from $debian_mirror"
    debian_open "$work/apt" bookworm
    debian_download "${packages[@]}"
    debian_download_kernel
    debian_unpack "$tree"
    debian_configure "$tree" guest
    install -m 755 guest/init "$tree/usr/sbin/init"
    install -m 644 guest/agent.py "$tree/usr/lib/guest-agent.py"
    in_tree "$tree" depmod /usr/bin/kmod -b "$tree" "$version"
    debian_compile_python "$tree"

    say "making the initrd and the disk"
    cp "$tree/boot/vmlinuz-$version" "$build/vmlinuz"
    cp "$tree/usr/bin/busybox" "$work/initrd/bin/busybox"
    install -m 755 guest/initrd-init "$work/initrd/init"
    debian_modules "$tree" "$tree" "$version" "$work/initrd/modules" virtio_pci virtio_blk crc32c_generic ext4
    debian_initrd "$work/initrd" | gzip -1 >"$build/initrd.gz"
    rm -f "$build/root.img"
    mke2fs -q -t ext4 -E root_owner=0:0 -d "$tree" "$build/root.img" 900M >&2
    rm -rf "$work"
}

# The disk is made again when what goes into it changes.
disk_key="$(echo "$debian_mirror ${packages[*]}" | cat - guest/* | sha256sum | cut -d' ' -f1)"
mkdir -p "$build"
if [ "$(cat "$build/key" 2>/dev/null)" != "$disk_key" ]; then
    rm -f "$build/key"
    make_disk
    echo "$disk_key" >"$build/key"
fi

# --- Running the guest -------------------------------------------------------
#
# These functions return 1 on a failure that a fresh boot may not repeat, so each
# step says `|| return 1`: `set -e` has no effect in a function whose status is
# tested.

# Reads lines from descriptor $1 until one matches the pattern $2, for at most $3
# seconds; sets $line. A line that matches $4 ends the wait as a failure.
await() {
    local fd="$1" pattern="$2" deadline=$((SECONDS + $3)) bad="$4" part
    line=
    while [ "$SECONDS" -lt "$deadline" ]; do
        part=
        if IFS= read -r -t 1 -u "$fd" part; then
            line="${line}${part%$'\r'}"
            # shellcheck disable=SC2053
            if [[ "$line" == $pattern ]]; then return 0; fi
            # shellcheck disable=SC2053
            if [[ "$line" == $bad ]]; then say "the guest or QEMU answered: $line"; return 1; fi
            line=
        else
            line+="$part"
            if ! kill -0 "$qemu_pid" 2>/dev/null; then
                say "QEMU ended: $(tail -n 3 "$run/qemu.log")"
                return 1
            fi
        fi
    done
    say "no answer within $3 seconds (expected $pattern)"
    return 1
}

# Has QEMU's monitor do $1 and waits until it is done.
monitor() {
    echo "{\"execute\":\"$1\"}" >&"$qmp"
    await "$qmp_answer" '*"return"*' "$monitor_timeout" '*"error"*'
}

# Has the guest's agent do $1 and waits until it is done.
agent() {
    say "guest: $1"
    echo "$1" >&"$port"
    await "$port_answer" "ok $1" "$work_timeout" 'failed*'
}

# Boots a fresh copy of the disk and waits for the agent.
#
# The monitor and the agent's serial port are pairs of named pipes, which bash can
# speak by itself. They are opened for reading and writing so that no open waits.
boot_guest() {
    stop_guest
    rm -rf "$run"
    mkdir -p "$run"
    cp --sparse=always "$build/root.img" "$run/root.img"
    mkfifo "$run"/{qmp,port}.{in,out}
    exec {qmp}<>"$run/qmp.in" {qmp_answer}<>"$run/qmp.out" {port}<>"$run/port.in" {port_answer}<>"$run/port.out"
    # idle=poll: an emulated CPU that halts may never be woken again.
    local arguments=(
        -nodefaults -no-user-config -display none -no-reboot
        -machine q35,memory-backend=ram -accel tcg -cpu max -smp 1 -m 512M
        -object "memory-backend-file,id=ram,size=512M,mem-path=$run/ram.bin,share=on"
        -kernel "$build/vmlinuz" -initrd "$build/initrd.gz"
        -append "console=ttyS0 idle=poll panic=-1"
        -drive "file=$run/root.img,format=raw,if=virtio,cache=unsafe"
        -chardev "file,id=console,path=$run/console.log" -serial chardev:console
        -chardev "pipe,id=port,path=$run/port" -serial chardev:port
        -chardev "pipe,id=qmp,path=$run/qmp" -mon chardev=qmp,mode=control
    )
    # The kernel ends QEMU should this shell be killed outright.
    setpriv --pdeathsig KILL qemu-system-x86_64 "${arguments[@]}" 9>&- \
        </dev/null >"$run/qemu.log" 2>&1 &
    qemu_pid=$!
    await "$qmp_answer" '*"QMP"*' "$monitor_timeout" '*"error"*' || return 1
    monitor qmp_capabilities || return 1
    await "$port_answer" 'ok start' "$boot_timeout" 'failed*' || return 1
    # What the boot leaves to be done in the background.
    sleep 3
}

# Copies the RAM of the guest while it stands still to the image $1.
take() {
    monitor stop || return 1
    cp --sparse=always "$run/ram.bin" "$dir/$1.tmp"
    [ "$(stat -c %s "$dir/$1.tmp")" = "$ram_bytes" ] || die "$1 has the wrong size"
    say "took $1"
    monitor cont
}

take_base() {
    say "booting the first guest"
    boot_guest || return 1
    take base.ram || return 1
    agent small && take base+1.ram || return 1
    agent medium && take base+2.ram || return 1
    agent large && take base+3.ram || return 1
    stop_guest
}

take_other() {
    say "booting the second guest"
    boot_guest || return 1
    take other.ram || return 1
    stop_guest
}

# Does $1, once more from its boot if need be.
with_retry() {
    "$1" && return 0
    say "trying once more; the console's last lines were:"
    tail -n 20 "$run/console.log" >&2 || true
    "$1" && return 0
    tail -n 40 "$run/console.log" >&2 || true
    die "the guest failed twice"
}

rm -f "$dir/complete"
with_retry take_base
with_retry take_other
for image in "${images[@]}"; do mv "$dir/$image.tmp" "$dir/$image"; done
touch "$dir/complete"
say "done after $SECONDS seconds"
echo "$dir"
