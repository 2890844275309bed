#!/usr/bin/env bash
# Runs programs on a machine with a working /dev/kvm and /dev/fuse: "the bed". It is a
# first-level Debian machine under QEMU's emulator, which emulates AMD's SVM with
# nested paging, so that stock Debian kernels run as second-level guests in it. The
# host needs no virtualisation. Where its own /dev/kvm can run stock Linux, the
# program runs on the host itself instead, and a line says so.
#
#   scripts/bed.sh prepare
#       installs what is missing, and makes the machines in ~/.cache/snapstore/bed once
#       (needs Debian's mirror); 77 if this machine lacks something for it
#   scripts/bed.sh run [OPTION]... -- COMMAND [ARGUMENT]...
#       runs COMMAND there as root; its output, errors and exit status become those
#       of the script
#   scripts/bed.sh where
#       prints where `run` would run: "native", or "emulated"
#
#   --in DIR         shown to COMMAND, read-only, as its working directory; symbolic
#                    links stay links
#   --out DIR        receives what COMMAND left in $BED_OUT, at most 4 GiB
#   --timeout N      seconds from when all is prepared until it is ended (default 600)
#   --cpus N         of the first-level machine (default 1; each keeps one of the host's
#                    busy, and more than the host has to spare make it slow)
#   --mem N          its memory in MiB (default 2048)
#   --kernel VERSION 6.12 (which has PAGEMAP_SCAN; from bookworm-backports) or 6.1;
#                    default: 6.12 if it was to be had
#   --emulated, --native   do not look where it can run
#   --console FILE   keeps the first-level kernel's messages
#
# COMMAND finds three directories, whose names it takes from the environment because
# only an emulated machine has them at /in, /out and /guest:
#
#   $BED_IN      what --in named
#   $BED_OUT     an empty directory
#   $BED_GUEST   what second-level guests are made of; copy what is to be written:
#       vmlinuz      Debian's cloud kernel 6.1 as shipped (bzImage)
#       vmlinux      the ELF kernel in it, with a PVH entry point
#       initrd.gz    busybox and the modules for virtio-mmio, -blk, -rng, -net, vsock
#                    and ext4; goes on to /dev/vda if there is one
#       busybox      a static one, for initrds of one's own
#       root.img     ext4 disk: bash, coreutils, Python, util-linux, e2fsprogs
#
# A guest says "guest ready" on ttyS0 and gives a root shell there (prompt "guest# ").
# It starts a program found as /handover/agent in its initrd (append a cpio archive of
# format newc to initrd.gz) or as /usr/lib/snapstore/agent on its disk.
#
# The first-level machine has the C library of Debian 12. Its disk is fresh for every
# run, with about 6 GiB free; kernel modules such as dm-flakey can be loaded with
# modprobe. Results beyond COMMAND's own: 77 something is lacking, 124 out of time,
# 125 the bed failed. If the
# machine does not boot or hangs (an emulated CPU that is never woken again), which
# its heartbeat tells, all is done once more; when COMMAND fails, never.
#
# SNAPSTORE_CACHE names another directory than ~/.cache/snapstore, DEBIAN_MIRROR
# another mirror than deb.debian.org.
set -euo pipefail
here="$PWD"
cd "$(dirname "$0")"

bed="${SNAPSTORE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/snapstore}/bed"
# Seconds to wait for the first sign of life, for the next, and for the machine to
# end when all is done. Hosts can be busy.
boot_timeout=120
beat_timeout=60
end_timeout=30

say() { echo "bed: $*" >&2; }
die() { echo "error: $*" >&2; exit 125; }
. bed/prepare.sh

usage() { echo "error: $1 (see scripts/bed.sh --help)" >&2; exit 2; }
number() { case "$2" in '' | *[!0-9]* | 0*) usage "$1 takes a number, not $2" ;; esac; }
absolute() { case "$1" in /*) echo "$1" ;; *) echo "$here/$1" ;; esac; }

# Whether the host's own /dev/kvm can run stock Linux. One that a software KVM
# offers opens, too, but the CPU then has no flag for it.
native_usable() {
    grep -qE '^flags.* (vmx|svm)( |$)' /proc/cpuinfo && (exec 3<>/dev/kvm) 2>/dev/null
}

find_where() { if native_usable; then echo native; else echo emulated; fi; }

# What is called where it would run: native or emulated.
need_programs() {
    if [ "$1" = native ]; then
        debian_need python3=python3 ip=iproute2 modprobe=kmod mke2fs=e2fsprogs
    else
        debian_need qemu-system-x86_64=qemu-system-x86 cpio=cpio mke2fs=e2fsprogs
    fi
}

where=auto in="" out="" timeout=600 cpus=1 mem=2048 kernel="" console=""
verb="${1:-}"
[ $# = 0 ] || shift
case "$verb" in
    prepare) need_programs "$(find_where)"; prepare; echo "$bed"; exit 0 ;;
    where) find_where; exit 0 ;;
    run) ;;
    -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' bed.sh; exit 0 ;;
    *) usage "what to do: prepare, run or where" ;;
esac
while [ $# -gt 0 ]; do
    case "$1" in
        --) shift; break ;;
        --emulated | --native) where="${1#--}"; shift; continue ;;
        --in | --out | --timeout | --cpus | --mem | --kernel | --console) [ $# -ge 2 ] || usage "$1 needs a value" ;;
        *) usage "unknown option $1" ;;
    esac
    case "$1" in
        --in) in="$(absolute "$2")"; [ -d "$in" ] || usage "$in is not a directory" ;;
        --out) out="$(absolute "$2")" ;;
        --console) console="$(absolute "$2")" ;;
        --kernel) kernel="$2" ;;
        *) number "$1" "$2"; declare "${1#--}=$2" ;;
    esac
    shift 2
done
[ $# -gt 0 ] || usage "no command"
if [ "$where" = auto ]; then where="$(find_where)"; fi
need_programs "$where"
prepare
deadline=$((SECONDS + timeout))

mkdir -p "$bed/runs"
# What a run that was killed outright left behind.
find "$bed/runs" -mindepth 1 -maxdepth 1 -mmin +1440 -exec rm -rf {} +
run="$(mktemp -d "$bed/runs/XXXXXX")"
qemu_pid=
stop_machine() {
    if [ -n "$qemu_pid" ]; then
        kill -KILL "$qemu_pid" 2>/dev/null || true
        wait "$qemu_pid" 2>/dev/null || true
        qemu_pid=
    fi
}
cleanup() {
    stop_machine
    rm -rf "$run"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
mkdir -p "$run/in"
[ -z "$out" ] || mkdir -p "$out"

# --- On the host itself ------------------------------------------------------

if [ "$where" = native ]; then
    say "running natively, on this machine's own /dev/kvm"
    mkdir -p "$run"/{out,tmp}
    code=0
    # In the background, so that a signal ends this script at once; the kernel then
    # ends the command.
    (
        cd "${in:-$run/in}"
        BED_IN="$PWD" BED_OUT="${out:-$run/out}" BED_GUEST="$bed/guest" TMPDIR="$run/tmp" \
            exec setpriv --pdeathsig KILL timeout --kill-after=5 "$timeout" setpriv --pdeathsig KILL "$@"
    ) </dev/null &
    qemu_pid=$!
    wait "$qemu_pid" || code=$?
    qemu_pid=
    exit "$code"
fi

# --- In the emulated machine -------------------------------------------------

if [ -z "$kernel" ]; then
    kernel=6.12
    [ -d "$bed/6.12" ] || kernel=6.1
fi
[ -d "$bed/$kernel" ] || die "there is no kernel $kernel in $bed (it is looked for when the bed is made; to make it again, remove $bed/key)"

# The command goes in with the initrd.
mkdir -p "$run/initrd/handover"
printf '%q ' "$@" >"$run/initrd/handover/job"
{ cat "$bed/$kernel/initrd.gz"; debian_initrd "$run/initrd"; } >"$run/initrd.img"
# Room for the files, for the blocks they do not fill, and for the inodes.
in="${in:-$run/in}"
in_kib="$(du -sk --apparent-size "$in" | cut -f1)"
in_files="$(find "$in" | wc -l)"
mke2fs -q -t ext4 -O ^has_journal -E root_owner=0:0,lazy_itable_init=1 -N "$((in_files + 64))" -m 0 \
    -d "$in" "$run/in.img" "$((in_kib + in_kib / 16 + in_files * 5 + 8192))k" >/dev/null

# Boots a machine and copies its output until it says how the command ended: sets
# $code. Returns 1 if it should be tried again.
attempt() {
    local pipe line heard holder_output holder_errors from_output from_errors status copy_output copy_errors
    code=
    rm -f "$run"/{output,errors,status}
    for pipe in output errors status; do mkfifo "$run/$pipe"; done
    # Opened for reading and writing so that no open waits. What is copied ends when
    # QEMU has ended and the holders are closed.
    exec {status}<>"$run/status" {holder_output}<>"$run/output" {holder_errors}<>"$run/errors"
    exec {from_output}<"$run/output" {from_errors}<"$run/errors"
    cat <&"$from_output" {holder_output}>&- {holder_errors}>&- &
    copy_output=$!
    cat <&"$from_errors" >&2 {holder_output}>&- {holder_errors}>&- &
    copy_errors=$!
    exec {from_output}<&- {from_errors}<&-

    # idle=poll: an emulated CPU that halts may never be woken again. Without erms and
    # fsrm, memory is copied by instructions that are not distorted by emulation. QEMU 7.2
    # garbles the flags in cmpxchg16b, which makes Linux 6.12 panic: without cx16 it is
    # not used, in the guests neither.
    local arguments=(
        -nodefaults -no-user-config -display none -no-reboot
        -machine q35 -accel tcg -cpu "max,+svm,-erms,-fsrm,-cx16" -smp "$cpus" -m "$mem"
        -kernel "$bed/$kernel/vmlinuz" -initrd "$run/initrd.img"
        -append "console=ttyS0 loglevel=4 idle=poll panic=1 mitigations=off random.trust_cpu=on"
        -drive "file=$bed/root.img,format=raw,if=virtio,snapshot=on,cache=unsafe"
        -drive "file=$run/in.img,format=raw,if=virtio,readonly=on"
        -device virtio-rng-pci
        -chardev "file,id=console,path=$run/console" -serial chardev:console
        -device virtio-serial-pci
    )
    if [ -n "$out" ]; then
        rm -f "$run/out.img"
        truncate -s 4G "$run/out.img"
        arguments+=(-drive "file=$run/out.img,format=raw,if=virtio,cache=unsafe")
    fi
    for pipe in output errors status; do
        arguments+=(-chardev "file,id=$pipe,path=$run/$pipe" -device "virtserialport,chardev=$pipe,name=$pipe")
    done
    # The kernel ends QEMU should this shell be killed outright. Its overlay of the
    # root disk is a temporary file without a name.
    TMPDIR="$run" setpriv --pdeathsig KILL qemu-system-x86_64 "${arguments[@]}" \
        {holder_output}>&- {holder_errors}>&- </dev/null >"$run/qemu.log" 2>&1 &
    qemu_pid=$!

    local limit="$boot_timeout" again=1
    heard=$SECONDS
    while [ -z "$code" ]; do
        if IFS= read -r -t 1 -u "$status" line; then
            heard=$SECONDS
            case "$line" in
                started) again=0 limit="$beat_timeout" ;;
                exit\ *) code="${line#exit }"; break ;;
            esac
        elif ! kill -0 "$qemu_pid" 2>/dev/null; then
            # It may have spoken last.
            if IFS= read -r -t 0.1 -u "$status" line && [[ "$line" == exit\ * ]]; then
                code="${line#exit }"
            else
                say "the machine ended by itself"
            fi
            break
        fi
        if [ "$SECONDS" -ge "$deadline" ]; then
            say "not done after $timeout seconds"
            code=124
        elif [ "$SECONDS" -ge $((heard + limit)) ]; then
            say "no sign of life from the machine for $limit seconds"
            again=1
            break
        fi
    done
    # Gives a machine that has answered the time to end.
    heard=$SECONDS
    while [ -n "$code" ] && [ "$code" != 124 ] && kill -0 "$qemu_pid" 2>/dev/null &&
        [ "$SECONDS" -lt $((heard + end_timeout)) ]; do sleep 0.05; done
    stop_machine
    exec {holder_output}>&- {holder_errors}>&- {status}>&-
    wait "$copy_output" "$copy_errors" || true
    [ -z "$console" ] || cp "$run/console" "$console" 2>/dev/null || true
    [ -z "$code" ] || return 0
    { tail -n 3 "$run/qemu.log"; tail -n 20 "$run/console"; } >&2 || true
    return "$again"
}

if ! attempt; then
    say "trying once more"
    attempt || true
fi
[ -n "$code" ] || die "the first-level machine failed"
if [ -n "$out" ] && [ "$code" != 124 ]; then
    tar -x -f "$run/out.img" -C "$out" --no-same-owner || die "cannot read what the machine handed back"
fi
exit "$code"
