# Sourced by the scripts that make machines out of Debian's packages: resolves,
# downloads and unpacks packages without touching the host's own, makes initrds.
#
# Packages are resolved by apt against an empty system in a directory of its own
# and unpacked without running their scripts, which needs no root and no chroot.
# The sourcing script defines say and die. What this machine lacks, and nobody's
# fault, ends it with the exit code 77: rights, packages, a mirror within reach.
#
# DEBIAN_MIRROR names another mirror than deb.debian.org.
# shellcheck shell=bash

debian_mirror="${DEBIAN_MIRROR:-http://deb.debian.org/debian}"
debian_keyring=/usr/share/keyrings/debian-archive-keyring.gpg
PATH="$PATH:/usr/sbin:/sbin"

lacking() { echo "error: $*" >&2; exit 77; }

# Installs what is missing on the host; each argument is PROGRAM=PACKAGE, or
# /FILE=PACKAGE.
debian_need() {
    [ "$(uname -m)" = x86_64 ] || lacking "the guest's disk is prepared with its own x86-64 programs; this is $(uname -m)"
    local tool need missing=()
    for tool in apt-get dpkg-deb; do
        command -v "$tool" >/dev/null || lacking "$tool is missing: guests are made from Debian packages, on Debian or a derivative"
    done
    for need in "$@"; do
        # A path with a slash is looked up as it is.
        [ -f "${need%%=*}" ] || command -v "${need%%=*}" >/dev/null || missing+=("${need#*=}")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    # Another installation that is under way is waited for.
    local install=(apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "${missing[@]}")
    [ "$(id -u)" = 0 ] || lacking "missing packages; run: sudo apt-get update && sudo ${install[*]}"
    say "installing ${missing[*]}"
    { apt-get update && DEBIAN_FRONTEND=noninteractive "${install[@]}"; } >&2 ||
        lacking "cannot install what the guests need; it takes: ${install[*]}"
}

# Starts an empty system in the directory $1 that knows the suite $2, and makes
# it the one that the functions below work on. Fails if the suite is out of reach.
debian_open() {
    local root="$1" suite="$2"
    archives="$root/archives"
    mkdir -p "$root/lists/partial" "$archives/partial" "$root/etc"
    : >"$root/status"
    echo "deb [arch=amd64 signed-by=$debian_keyring] $debian_mirror $suite main" >"$root/sources.list"
    # The host's own settings (a proxy, say) stay; its hooks do not apply here.
    cat >"$root/apt.conf" <<CONF
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
APT::Update::Error-Mode "any";
Acquire::Languages "none";
Acquire::Retries "3";
Dir::Etc::SourceList "$root/sources.list";
Dir::Etc::SourceParts "$root/etc";
Dir::Etc::Preferences "$root/etc/preferences";
Dir::Etc::PreferencesParts "$root/etc";
Dir::State "$root";
Dir::State::Lists "$root/lists";
Dir::State::status "$root/status";
Dir::Cache "$root";
Dir::Cache::Archives "$archives";
CONF
    apt=(-c "$root/apt.conf")
    apt-get "${apt[@]}" -qq update >&2
}

# Downloads the packages $@ and what they depend on.
debian_download() {
    apt-get "${apt[@]}" -qq --download-only install "$@" >&2
}

# Downloads the newest cloud kernel alone and sets $version to its release. Its
# dependencies only serve to make an initrd, which is made here.
debian_download_kernel() {
    local package
    package="$(apt-cache "${apt[@]}" depends --important linux-image-cloud-amd64 |
        sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p' | head -n 1)"
    [ -n "$package" ] || lacking "$debian_mirror offers no linux-image-cloud-amd64"
    version="${package#linux-image-}"
    (cd "$archives" && apt-get "${apt[@]}" -qq download "$package" >&2)
}

# Unpacks what was downloaded into the directory $1.
debian_unpack() {
    local tree="$1" path deb
    say "unpacking $(find "$archives" -name '*.deb' | wc -l) packages"
    mkdir -p "$tree"/usr/{bin,sbin,lib,lib64}
    for path in bin sbin lib lib64; do ln -s "usr/$path" "$tree/$path"; done
    for deb in "$archives"/*.deb; do
        dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$tree" --keep-directory-symlink
    done
}

# What the packages' scripts would have left behind in the tree $1 of the host $2,
# as far as the guests use it.
debian_configure() {
    local tree="$1"
    cp "$tree/usr/share/base-passwd/passwd.master" "$tree/etc/passwd"
    cp "$tree/usr/share/base-passwd/group.master" "$tree/etc/group"
    [ -e "$tree/usr/bin/sh" ] || ln -s dash "$tree/usr/bin/sh"
    echo "$2" >"$tree/etc/hostname"
    mkdir -p "$tree"/{dev,proc,sys,run,tmp,root,var/lib}
}

# Runs the program $3 of the guest's tree $1 on this machine under the name $2, with
# the tree's own C library, so that the host needs neither that Python nor that kmod.
in_tree() {
    local tree="$1" name="$2" program="$3"; shift 3
    "$tree/usr/lib64/ld-linux-x86-64.so.2" --argv0 "$name" \
        --library-path "$tree/usr/lib/x86_64-linux-gnu" "$tree$program" "$@"
}

# Compiles the tree $1's Python modules, so that no emulated CPU needs to.
debian_compile_python() {
    PYTHONHOME="$1/usr" in_tree "$1" python3.11 /usr/bin/python3.11 -m compileall -q -s "$1" \
        "$1/usr/lib/python3.11" "$1/usr/lib/python3/dist-packages" >&2
}

# Copies the modules named after $4 and what they need, out of those of release $3
# below the tree $2 into the directory $4; $4/order lists them, dependencies first.
# The tree $1 lends its kmod.
debian_modules() {
    local tree="$1" modules="$2" version="$3" into="$4" module path; shift 4
    for module in "$@"; do
        # One line a module, dependencies first: "insmod PATH" or "builtin NAME".
        in_tree "$tree" modprobe /usr/bin/kmod -d "$modules" -S "$version" --ignore-install --show-depends "$module"
    done | sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++' |
        while read -r path; do
            cp "$path" "$into/"
            basename "$path"
        done >"$into/order"
}

# Prints the directory $1 as an initrd.
debian_initrd() {
    (cd "$1" && find . | cpio --quiet -o -H newc -R 0:0)
}
