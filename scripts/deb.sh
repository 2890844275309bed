#!/usr/bin/env bash
# Makes a package for Debian 12 and newer: target/deb/snapstore_VERSION_amd64.deb. Prints its path.
#
#   scripts/deb.sh
set -euo pipefail
cd "$(dirname "$0")/.."

version="$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)"
out="$PWD/${CARGO_TARGET_DIR:-target}/deb"
stage="$out/stage"
rm -rf "$out"
mkdir -p "$stage/DEBIAN"
DESTDIR="$stage" PREFIX=/usr scripts/install.sh >&2
install -D -m 644 packaging/snapstore.default "$stage/etc/default/snapstore"
rm "$stage/usr/share/doc/snapstore/examples/snapstore.default"
mv "$stage/usr/share/zsh/site-functions" "$stage/usr/share/zsh/vendor-completions"
cat packaging/copyright >"$stage/usr/share/doc/snapstore/copyright"
rm "$stage"/usr/share/doc/snapstore/LICENSE-*

# Debian 12 has version 2.36 of the C library; what is built on a newer one needs that. The libraries of
# C++ are within the program, unless its RocksDB was linked in another way.
needed="$(objdump -T "$stage/usr/bin/snapstore" | grep -o 'GLIBC_2\.[0-9]*' | sort -t. -k2 -n -u | tail -1)"
depends="libc6 (>= ${needed#GLIBC_})"
if readelf -d "$stage/usr/bin/snapstore" | grep NEEDED | grep -q 'libstdc++\|libgcc_s'; then
    depends="$depends, libgcc-s1, libstdc++6 (>= $(gcc -dumpversion))"
fi
cat >"$stage/DEBIAN/control" <<CONTROL
Package: snapstore
Version: $version
Architecture: amd64
Maintainer: The snapstore authors <snapstore@localhost>
Section: admin
Priority: optional
Installed-Size: $(du -sk --exclude=DEBIAN "$stage" | cut -f1)
Depends: $depends
Recommends: fuse3
Suggests: jq
Description: content-addressed snapshots of virtual machines
 Pages of memory and disks are stored once each, however many snapshots hold
 them. Any snapshot can be mounted as flat files, and machines be restored from
 it that read only what they touch.
CONTROL
echo /etc/default/snapstore >"$stage/DEBIAN/conffiles"
cat >"$stage/DEBIAN/postinst" <<'SCRIPT'
#!/bin/sh
set -e
if [ "$1" = configure ]; then
    if command -v systemd-sysusers >/dev/null; then
        systemd-sysusers snapstore.conf || true
    fi
    if command -v systemd-tmpfiles >/dev/null; then
        systemd-tmpfiles --create snapstore.conf || true
    fi
    if [ -d /run/systemd/system ]; then
        systemctl daemon-reload || true
    fi
fi
SCRIPT
cat >"$stage/DEBIAN/prerm" <<'SCRIPT'
#!/bin/sh
set -e
if [ "$1" = remove ] && [ -d /run/systemd/system ]; then
    systemctl disable --now snapstore-gc.timer snapstore-verify.timer snapstore-metrics.timer || true
fi
SCRIPT
cat >"$stage/DEBIAN/postrm" <<'SCRIPT'
#!/bin/sh
set -e
# Stores are never removed; an empty directory is none. Their owner stays with them.
if [ "$1" = purge ]; then
    rmdir /var/lib/snapstore 2>/dev/null || true
    if [ -e /var/lib/snapstore ]; then
        echo "snapstore: the store in /var/lib/snapstore is kept, and the user snapstore, its owner."
        echo "snapstore: remove them with: rm -r /var/lib/snapstore; userdel snapstore"
    elif command -v userdel >/dev/null && getent passwd snapstore >/dev/null; then
        userdel snapstore || true
    fi
fi
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload || true
fi
SCRIPT
chmod 755 "$stage"/DEBIAN/{postinst,prerm,postrm}
dpkg-deb --root-owner-group --build "$stage" "$out/snapstore_${version}_amd64.deb" >&2
rm -rf "$stage"
echo "$out/snapstore_${version}_amd64.deb"
