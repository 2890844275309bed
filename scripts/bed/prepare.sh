# Sourced by scripts/bed.sh: makes what the bed's machines are made of.
# shellcheck shell=bash disable=SC2154
. ./debian.sh

# Both levels run this userland: what a Rust program links to, and the tools tests use.
packages=(
    base-files base-passwd bash bsdutils busybox-static coreutils dash diffutils
    e2fsprogs findutils fuse3 grep gzip hostname iproute2 kmod libc-bin libgcc-s1
    libstdc++6 mount ncurses-base procps python3 sed tar util-linux
)
# The modules each level loads before it looks for its disk. The others of the
# first level are on its disk, for modprobe.
machine_modules=(virtio_pci virtio_blk virtio_console virtio_rng kvm_amd fuse tun)
guest_modules=(
    virtio_mmio virtio_blk virtio_rng vmw_vsock_virtio_transport virtio_net
    crc32c_generic ext4
)

# Downloads the newest cloud kernel of the suite $2 and unpacks it into the directory
# $1; sets $version to its release.
fetch_kernel() {
    debian_open "$1.apt" "$2" || return 1
    debian_download_kernel || return 1
    debian_unpack "$1" || return 1
    # The first level need not spend its emulated CPU on this, and busybox cannot.
    find "$1/usr/lib/modules" -name '*.ko.xz' -exec xz -d {} + || return 1
    in_tree "$tree" depmod /usr/bin/kmod -b "$1" "$version"
}

# Makes the initrd $1 with the init script $2 and the modules $5... of release $4 in
# the tree $3. What else belongs in it may lie in the directory $work/initrd already.
make_initrd() {
    local into="$1" init="$2" modules="$3" version="$4" dir="$work/initrd"; shift 4
    mkdir -p "$dir"/{bin,sbin,dev,root,modules}
    cp "$tree/usr/bin/busybox" "$dir/bin/busybox"
    ln -s busybox "$dir/bin/sh"
    install -m 755 bed/initrd-init "$dir/init"
    install -m 755 "$init" "$dir/sbin/init"
    debian_modules "$tree" "$modules" "$version" "$dir/modules" "$@"
    debian_initrd "$dir" | gzip -1 >"$into"
    # So that another can be appended, compressed or not.
    truncate -s %4 "$into"
    rm -r "$dir"
}

# Prints the little-endian number of $3 bytes at the offset $2 of the file $1.
field() { od -A n -t "u$3" -j "$(($2))" -N "$3" "$1" | tr -d ' '; }

# Extracts the ELF kernel in the bzImage $1 to $2. The header tells where it lies
# (Documentation/arch/x86/boot.rst); Debian compresses with LZ4 up to Linux 6.1.
extract_vmlinux() {
    local start length
    start=$((($(field "$1" 0x1f1 1) + 1) * 512 + $(field "$1" 0x248 4)))
    # The payload's last four bytes are its length uncompressed.
    length=$(($(field "$1" 0x24c 4) - 4))
    head -c $((start + length)) "$1" | tail -c "$length" >"$2.lz4"
    lz4 -q -d -f "$2.lz4" "$2"
    rm "$2.lz4"
    [ "$(head -c 4 "$2" | od -A n -c | tr -d ' ')" = '177ELF' ] || die "no ELF kernel in $1"
}

# Makes an ext4 disk $1 of size $2 from the directory $3. Nothing is mounted.
make_ext4() {
    rm -f "$1"
    mke2fs -q -t ext4 -E root_owner=0:0,lazy_itable_init=1,lazy_journal_init=1 -d "$3" "$1" "$2" >/dev/null
}

# Makes $bed/{root.img,guest,6.1,6.12} out of nothing.
make_bed() {
    local work="$bed/work" tree="$bed/work/tree" new="$bed/work/new" version path
    rm -rf "$work"
    mkdir -p "$new"/{guest,6.1}
    say "downloading Debian packages from $debian_mirror"
    debian_open "$work/apt" bookworm || lacking "cannot reach $debian_mirror"
    debian_download "${packages[@]}" || lacking "cannot download from $debian_mirror"
    debian_unpack "$tree"
    debian_configure "$tree" guest
    # Perl only serves to install packages.
    rm -rf "$tree"/usr/share/{doc,man,info,locale,lintian,bash-completion,perl} "$tree"/usr/lib/x86_64-linux-gnu/{perl,libperl*}
    for path in sbin/poweroff sbin/reboot sbin/halt bin/which; do ln -sf ../bin/busybox "$tree/usr/$path"; done
    debian_compile_python "$tree"

    fetch_kernel "$work/6.1" bookworm || die "cannot get a kernel from $debian_mirror"
    cp "$work/6.1/boot/vmlinuz-$version" "$new/6.1/vmlinuz"
    make_initrd "$new/6.1/initrd.gz" bed/machine-init "$work/6.1" "$version" "${machine_modules[@]}"

    say "making the guests' kernel, initrd and disk"
    cp "$new/6.1/vmlinuz" "$new/guest/vmlinuz"
    cp "$tree/usr/bin/busybox" "$new/guest/busybox"
    extract_vmlinux "$new/guest/vmlinuz" "$new/guest/vmlinux"
    make_initrd "$new/guest/initrd.gz" bed/guest-init "$work/6.1" "$version" "${guest_modules[@]}"
    install -m 755 bed/guest-init "$tree/usr/sbin/init"
    make_ext4 "$new/guest/root.img" 400M "$tree"

    # The kernel that has PAGEMAP_SCAN is not in every mirror.
    if (fetch_kernel "$work/6.12" bookworm-backports && echo "$version" >"$work/version"); then
        version="$(cat "$work/version")"
        mkdir "$new/6.12"
        cp "$work/6.12/boot/vmlinuz-$version" "$new/6.12/vmlinuz"
        make_initrd "$new/6.12/initrd.gz" bed/machine-init "$work/6.12" "$version" "${machine_modules[@]}"
    else
        say "no kernel from bookworm-backports: the bed has Linux 6.1 only"
    fi

    say "making the first level's disk"
    mkdir -p "$tree"/{in,out,guest,usr/lib/modules}
    mv "$work"/6.*/usr/lib/modules/* "$tree/usr/lib/modules/"
    cp --sparse=always "$new"/guest/* "$tree/guest/"
    install -m 755 bed/machine-init "$tree/usr/sbin/init"
    make_ext4 "$new/root.img" 8G "$tree"

    # Machines that run on the old files keep them open.
    for path in guest 6.1 6.12; do
        rm -rf "${bed:?}/$path"
        [ ! -e "$new/$path" ] || mv "$new/$path" "$bed/$path"
    done
    mv -f "$new/root.img" "$bed/root.img"
    rm -rf "$work"
}

# Whether the bed is made from the same things. One that could not have Linux 6.12 is
# made again after an hour.
is_current() {
    [ "$(cat "$bed/key" 2>/dev/null)" = "$1" ] &&
        { [ -d "$bed/6.12" ] || [ -z "$(find "$bed/key" -mmin +60)" ]; }
}

# Makes the bed unless it is there already.
prepare() {
    local key
    key="$(echo "$debian_mirror ${packages[*]}" | cat - bed/* debian.sh | sha256sum | cut -d' ' -f1)"
    ! is_current "$key" || return 0
    debian_need mke2fs=e2fsprogs cpio=cpio lz4=lz4 xz=xz-utils "$debian_keyring=debian-archive-keyring"
    mkdir -p "$bed"
    (
        flock -n 9 || { say "waiting for another preparation in $bed"; flock 9; }
        ! is_current "$key" || exit 0
        trap 'rm -rf "$bed/work"' EXIT
        trap 'exit 130' INT
        trap 'exit 143' TERM HUP
        rm -f "$bed/key"
        make_bed
        echo "$key" >"$bed/key"
        say "prepared in $SECONDS seconds: $bed"
    ) 9>"$bed/lock"
}
