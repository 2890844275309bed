#!/usr/bin/env bash
# A stock Debian guest is booted, warmed up, committed while it runs, given two layers
# that are committed too, and restored ten times; every machine is asked what it knows.
# Prints each command with its output. Ends with an error if an answer is not the one
# that it has to be.
#
# Runs on a machine of scripts/bed.sh, in a directory with `snapstore` and `initrd` (as
# scripts/handover.sh makes it); scripts/linux-demo.sh starts it.
set -euo pipefail

CLONES=10
work="$(mktemp -d /tmp/story.XXXXXX)"
export SNAPSTORE_DIR="$work/store" SNAPSTORE_RUNTIME_DIR="$work/run" PATH="$BED_IN:$PATH"
finish() {
    snapstore stop --all >/dev/null 2>&1 || true
    cd /
    rm -rf "$work"
}
trap finish EXIT
cd "$work"
ln -s "$BED_GUEST/vmlinuz" vmlinuz
ln -s "$BED_IN/initrd" initrd
cp --sparse=always "$BED_GUEST/root.img" root.img

# Runs the command line $1 as it is printed; its output is in $output, too.
output=
step() {
    printf '\n$ %s\n' "$1"
    local code=0
    output="$(eval "$1" 2>&1)" || code=$?
    [ -z "$output" ] || printf '%s\n' "$output" | sed 's/^/  /'
    return "$code"
}
tell() { printf '\n# %s\n' "$*"; }
wrong() { echo "error: $*" >&2; exit 1; }
# The last command has to have said this.
said() { [[ "$output" == *"$1"* ]] || wrong "the answer should have been: $1"; }

# What the guest runs: it holds a number for every layer it was given, and adds them up.
cat >adder.py <<'PYTHON'
import os, socket
numbers = {}
server = socket.socket(socket.AF_UNIX)
server.bind("/tmp/adder")
server.listen()
while True:
    peer, _ = server.accept()
    for word in peer.makefile().readline().split():
        name, _, number = word.partition("=")
        if number:
            numbers[name] = int(number)
    peer.sendall(f"{' + '.join(numbers)} = {sum(numbers.values())}, process {os.getpid()}\n".encode())
    peer.close()
PYTHON
cat >ask.py <<'PYTHON'
import socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect("/tmp/adder")
s.sendall((" ".join(sys.argv[1:]) + "\n").encode())
print(s.makefile().read(), end="")
PYTHON

tell "Boot a stock Debian, and put a program into it that keeps its state in memory."
step 'snapstore init'
step 'snapstore run deb --kernel vmlinuz --initrd initrd --cmdline "console=ttyS0 panic=1 quiet" --mem 256M --disk root.img -d'
step 'snapstore exec deb --wait 120 -- uname -srv'
said Debian
step 'snapstore cp adder.py deb:/root/adder.py'
step 'snapstore cp ask.py deb:/root/ask.py'
step 'snapstore exec deb -- sh -c "setsid python3 /root/adder.py >/tmp/adder.log 2>&1 </dev/null &"'
step 'snapstore exec deb -- sh -c "until [ -S /tmp/adder ]; do sleep 0.1; done; python3 /root/ask.py base=1"'
said "base = 1,"
process="${output#*process }"

tell "Commit it while it runs; go on; commit the next layers."
step 'snapstore commit base --vm deb'
for layer in 1 2; do
    step "snapstore exec deb -- sh -c 'python3 /root/ask.py layer$layer=$((layer * 10)); echo $layer > /root/layer$layer; head -c 4M /dev/urandom > /tmp/noise$layer'"
    step "snapstore commit layer$layer --vm deb"
done
step 'snapstore stop deb'

tell "Restore $CLONES machines from the last one. Each goes on where deb was, by itself."
step "snapstore restore layer2 --name clone -n $CLONES -d"
for ((n = 1; n <= CLONES; n++)); do
    step "snapstore exec clone.$n -- python3 /root/ask.py clone=$((n * 100))"
    said "base + layer1 + layer2 + clone = $((31 + n * 100)), process $process"
done
step 'snapstore ps'
step 'snapstore stop --all' >/dev/null

tell "An older one knows nothing of what came later."
step 'snapstore restore base -d'
step 'snapstore exec base -- python3 /root/ask.py'
said "base = 1, process $process"
step 'snapstore exec base -- ls /root/layer1' || true
said "No such file"
step 'snapstore stop base'
step 'snapstore log --graph'
step 'snapstore stats'
step 'snapstore verify --read-data'
