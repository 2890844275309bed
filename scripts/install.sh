#!/usr/bin/env bash
# Installs what has been built, as PREFIX (/usr/local) and DESTDIR ("") say:
#
#   scripts/install.sh
#
# The program, that of machines, the guest's agent, man pages, completions, systemd's files, licences, examples.
# Man pages and completions come out of the program itself, so that they are those of its --help.
set -euo pipefail
cd "$(dirname "$0")/.."

prefix="${PREFIX:-/usr/local}"
destination="${DESTDIR:-}"
program="${CARGO_TARGET_DIR:-target}/release/snapstore"
[ -x "$program" ] || { echo "error: there is no $program; run make build" >&2; exit 1; }
agent="$(scripts/agent.sh)"

root="$destination$prefix"
share="$root/share"
put() { install -D -m "$1" "$2" "$3"; }

put 755 "$program" "$root/bin/snapstore"
strip "$root/bin/snapstore"
put 755 "$agent" "$root/lib/snapstore/snapstore-agent"
# No program for users: what `snapstore` starts for each machine.
put 755 "${program%/*}/snapstore-machine" "$root/lib/snapstore/snapstore-machine"
strip "$root/lib/snapstore/snapstore-machine"

"$program" generate "$share/man/man1"
for page in "$share"/man/man1/snapstore*.1; do gzip -9 -n -f "$page"; done
mkdir -p "$share/bash-completion/completions" "$share/zsh/site-functions" "$share/fish/vendor_completions.d"
"$program" completions bash >"$share/bash-completion/completions/snapstore"
"$program" completions zsh >"$share/zsh/site-functions/_snapstore"
"$program" completions fish >"$share/fish/vendor_completions.d/snapstore.fish"

# systemd and its tools do not look under /usr/local/share.
lib="$root/lib"
for unit in packaging/systemd/*; do
    put 644 "$unit" "$lib/systemd/system/${unit##*/}"
    sed -i "s,@BINDIR@,$prefix/bin," "$lib/systemd/system/${unit##*/}"
done
put 644 packaging/snapstore.sysusers "$lib/sysusers.d/snapstore.conf"
put 644 packaging/snapstore.tmpfiles "$lib/tmpfiles.d/snapstore.conf"

for file in README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md LICENSE-APACHE LICENSE-MIT python/README.md \
    docs/*.md docs/*.png docs/decisions/*.md; do
    put 644 "$file" "$share/doc/snapstore/$file"
done
for example in packaging/examples/* packaging/grafana/* packaging/snapstore.default; do
    put 644 "$example" "$share/doc/snapstore/examples/${example##*/}"
done
