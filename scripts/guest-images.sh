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
mirror="${DEBIAN_MIRROR:-http://deb.debian.org/debian}"
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
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

[ "$(uname -m)" = x86_64 ] || die "the guest's disk is prepared with its own x86-64 programs; this is $(uname -m)"
for tool in apt-get dpkg-deb; do
    command -v "$tool" >/dev/null || die "$tool is missing: the images are made from Debian packages, on Debian or a derivative"
done
PATH="$PATH:/usr/sbin:/sbin"
missing=()
command -v qemu-system-x86_64 >/dev/null || missing+=(qemu-system-x86)
command -v mke2fs >/dev/null || missing+=(e2fsprogs)
command -v cpio >/dev/null || missing+=(cpio)
command -v setpriv >/dev/null || missing+=(util-linux)
[ -f "$keyring" ] || missing+=(debian-archive-keyring)
if [ ${#missing[@]} -gt 0 ]; then
    install=(apt-get install -y --no-install-recommends "${missing[@]}")
    [ "$(id -u)" = 0 ] || die "missing packages; run: sudo ${install[*]}"
    say "installing ${missing[*]}"
    { apt-get update && DEBIAN_FRONTEND=noninteractive "${install[@]}"; } >&2 ||
        die "cannot install what the images need; it takes: ${install[*]}"
fi

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

# Runs the program $2 of the guest's tree on this machine under the name $1, with the
# tree's own C library, so that the host needs neither that Python nor that kmod.
in_tree() {
    local name="$1" program="$2"; shift 2
    "$tree/usr/lib64/ld-linux-x86-64.so.2" --argv0 "$name" \
        --library-path "$tree/usr/lib/x86_64-linux-gnu" "$tree$program" "$@"
}

# Makes $build/{vmlinuz,initrd.gz,root.img}. The packages are resolved by apt
# against an empty system of its own and unpacked without running their scripts,
# which needs no root and no chroot.
make_disk() {
    local work="$build/work" apt deb kernel_package version module path
    rm -rf "$work"
    mkdir -p "$work"/{apt/lists/partial,apt/archives/partial,apt/etc,initrd/{bin,dev,root,modules}}
    tree="$work/tree"
    : >"$work/apt/status"
    echo "deb [arch=amd64 signed-by=$keyring] $mirror bookworm main" >"$work/apt/sources.list"
    # The host's own settings (a proxy, say) stay; its hooks do not apply here.
    cat >"$work/apt/apt.conf" <<CONF
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Post-Invoke;
#clear DPkg::Pre-Install-Pkgs;
#clear APT::Architectures;
APT::Architecture "amd64";
APT::Architectures "amd64";
APT::Sandbox::User "root";
APT::Get::Assume-Yes "true";
APT::Install-Recommends "false";
Acquire::Languages "none";
Acquire::Retries "3";
Dir::Etc::SourceList "$work/apt/sources.list";
Dir::Etc::SourceParts "$work/apt/etc";
Dir::Etc::Preferences "$work/apt/etc/preferences";
Dir::Etc::PreferencesParts "$work/apt/etc";
Dir::State "$work/apt";
Dir::State::Lists "$work/apt/lists";
Dir::State::status "$work/apt/status";
Dir::Cache "$work/apt";
Dir::Cache::Archives "$work/apt/archives";
CONF
    apt=(-c "$work/apt/apt.conf")
    say "downloading Debian packages from $mirror"
    apt-get "${apt[@]}" -q update >&2
    kernel_package="$(apt-cache "${apt[@]}" depends --important linux-image-cloud-amd64 |
        sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p' | head -n 1)"
    [ -n "$kernel_package" ] || die "$mirror offers no linux-image-cloud-amd64"
    version="${kernel_package#linux-image-}"
    apt-get "${apt[@]}" -q --download-only install "${packages[@]}" >&2
    # The kernel's dependencies only serve to make an initrd, which is made here.
    (cd "$work/apt/archives" && apt-get "${apt[@]}" -q download "$kernel_package" >&2)

    say "unpacking $(find "$work/apt/archives" -name '*.deb' | wc -l) packages"
    mkdir -p "$tree"/usr/{bin,sbin,lib,lib64}
    for path in bin sbin lib lib64; do ln -s "usr/$path" "$tree/$path"; done
    for deb in "$work"/apt/archives/*.deb; do
        dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$tree" --keep-directory-symlink
    done
    # What the packages' scripts would have left behind, as far as the guest uses it.
    cp "$tree/usr/share/base-passwd/passwd.master" "$tree/etc/passwd"
    cp "$tree/usr/share/base-passwd/group.master" "$tree/etc/group"
    [ -e "$tree/usr/bin/sh" ] || ln -s dash "$tree/usr/bin/sh"
    echo guest >"$tree/etc/hostname"
    mkdir -p "$tree"/{dev,proc,sys,run,tmp,root,var/lib}
    install -m 755 guest/init "$tree/usr/sbin/init"
    install -m 644 guest/agent.py "$tree/usr/lib/guest-agent.py"
    in_tree depmod /usr/bin/kmod -b "$tree" "$version"
    # Compiled here, the modules need not be compiled by the emulated CPU.
    PYTHONHOME="$tree/usr" in_tree python3.11 /usr/bin/python3.11 -m compileall -q -s "$tree" \
        "$tree/usr/lib/python3.11" "$tree/usr/lib/python3/dist-packages" >&2

    say "making the initrd and the disk"
    cp "$tree/boot/vmlinuz-$version" "$build/vmlinuz"
    cp "$tree/usr/bin/busybox" "$work/initrd/bin/busybox"
    install -m 755 guest/initrd-init "$work/initrd/init"
    for module in virtio_pci virtio_blk crc32c_generic ext4; do
        # One line a module, dependencies first: "insmod PATH" or "builtin NAME".
        in_tree modprobe /usr/bin/kmod -d "$tree" -S "$version" --ignore-install --show-depends "$module"
    done | sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++' >"$work/modules"
    while read -r path; do
        cp "$path" "$work/initrd/modules/"
        basename "$path"
    done <"$work/modules" >"$work/initrd/modules/order"
    (cd "$work/initrd" && find . | cpio --quiet -o -H newc -R 0:0 | gzip -1) >"$build/initrd.gz"
    rm -f "$build/root.img"
    mke2fs -q -t ext4 -E root_owner=0:0 -d "$tree" "$build/root.img" 900M >&2
    rm -rf "$work"
}

# The disk is made again when what goes into it changes.
disk_key="$(echo "$mirror ${packages[*]}" | cat - guest/* | sha256sum | cut -d' ' -f1)"
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
