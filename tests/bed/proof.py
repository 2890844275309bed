#!/usr/bin/env python3
"""Stock Debian guests under the monitor, committed while they run and restored.

Runs where scripts/bed.sh puts it, as root, with /dev/kvm and /dev/fuse; scripts/linux-tests.sh
starts it. Its directory holds lab.py, `snapstore`, and `initrd`, which carries the guest agent.

    proof.py GROUP...      runs groups of checks; each prints `test linux::NAME ... ok|FAILED`

How much is done comes from the environment. The defaults are for an emulated CPU, where
every step takes seconds; natively scripts/linux-tests.sh sets the larger numbers:

    PROOF_CLONES    machines restored from each head          10
    PROOF_DEPTH     length of the chain of restores           20
    PROOF_COMMITS   commits of a machine under load           12    natively 60
    PROOF_PERIOD    seconds from one such commit to the next   0              1
    PROOF_FILL      MiB that each layer writes to memory       8             64
    PROOF_UNTIL     the moment (seconds since 1970) after which no check begins any more, for slow hosts:
                    the rest is SKIPPED, as is the one that is not done PROOF_GRACE seconds later
    PROOF_GRACE     see there                                400
    PROOF_LABEL     put after "linux" in the names of checks
"""

import functools
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from typing import Any, Callable, NamedTuple

from lab import (
    CMDLINE, DISK, ENV, GUEST, HERE, INITRD, KERNEL, PATIENCE, SNAPSTORE, WORK, Wrong,
    boot, commit, equal, expect, guest, laboratory, note, number, python, restore, snap, stop,
)

CLONES = number("PROOF_CLONES", 10)
DEPTH = number("PROOF_DEPTH", 20)
COMMITS = number("PROOF_COMMITS", 12)
PERIOD = number("PROOF_PERIOD", 0)
FILL = number("PROOF_FILL", 8)
UNTIL = number("PROOF_UNTIL", int(time.time()) + 86_400)
GRACE = number("PROOF_GRACE", 400)
LABEL = "linux" + os.environ.get("PROOF_LABEL", "")
NATIVE = bool(os.environ.get("PROOF_FULL"))
# Three layers lie in a tmpfs, which takes half of the guest's memory at most.
MEMORY = f"{208 + 6 * FILL}M"

# What a guest's kernel never says when all is well.
ALARM = re.compile(
    r"WARNING|BUG|[Oo]ops|stall|lockup|hung task|blocked for more|Call Trace|general protection|"
    r"I/O error|EXT4-fs (error|warning)|Buffer I/O|corrupt|[Uu]nable to handle|unstable|segfault|Out of memory"
)

# What it may say of its clocks where the CPU is emulated and waits for one of the host's: two vCPUs on one see
# each other's TSC warp, and a clock that is read takes longer than the watchdog of clocks allows.
EMULATED_CLOCK = re.compile(
    r"TSCs unsynchronized|clocksource: .*watchdog.* marking unstable|Marking TSC unstable due to clocksource watchdog|"
    r"timekeeping watchdog on CPU\d+: Marking clocksource .tsc. as unstable because the skew is too large"
)


# --- The guest's side --------------------------------------------------------

# A module of a layer, with state of its own in a process that goes on.
MODULE = '''
import hashlib, os, random, socket, sys, threading, time
LAYER = {layer}
TOKEN = "{token}"
def answer(x):
    return hashlib.sha256(f"{{LAYER}}:{{x}}".encode()).hexdigest()[:16]
def serve():
    heap = random.Random(TOKEN).randbytes(1 << 20)
    ticks = [0]
    def tick():
        while True:
            time.sleep(0.05)
            ticks[0] += 1
    threading.Thread(target=tick, daemon=True).start()
    server = socket.socket(socket.AF_UNIX)
    server.bind("/tmp/sock%d" % LAYER)
    server.listen(8)
    while True:
        peer, _ = server.accept()
        digest = hashlib.md5(heap).hexdigest()
        peer.sendall(f"{{TOKEN}} {{digest}} {{os.getpid()}} {{ticks[0]}}".encode())
        peer.close()
if __name__ == "__main__":
    serve()
'''

# Writes the layer given by its number: a module, memory, files, and a process.
ADD_LAYER = '''
import hashlib, importlib, os, random, subprocess, sys, time
layer, token, fill, module = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
sys.path.insert(0, "/root")
open("/root/layer%d.py" % layer, "w").write(module)
m = importlib.import_module("layer%d" % layer)
assert m.TOKEN == token
r = random.Random(token)
with open("/tmp/big%d" % layer, "wb") as f:
    for _ in range(fill):
        f.write(r.randbytes(1 << 20))
open("/tmp/mark%d" % layer, "w").write(token)
os.mkdir("/root/dir%d" % layer)
for i in range(20):
    open("/root/dir%d/f%d" % (layer, i), "wb").write(r.randbytes(5000 * i))
open("/root/mark%d" % layer, "w").write(token)
if layer > 1:
    os.rename("/root/dir%d/f0" % (layer - 1), "/root/dir%d/moved" % layer)
    os.unlink("/root/dir%d/f1" % (layer - 1))
os.sync()
subprocess.Popen([sys.executable, "/root/layer%d.py" % layer], stdin=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
for _ in range(600):
    if os.path.exists("/tmp/sock%d" % layer): break
    time.sleep(0.1)
'''

# Prints all that the checks compare.
PROBE = '''
import glob, hashlib, importlib, json, os, re, socket, subprocess, sys, time
sys.path.insert(0, "/root")
def md5(path):
    return hashlib.md5(open(path, "rb").read()).hexdigest()
def ask(path):
    s = socket.socket(socket.AF_UNIX); s.settimeout(60); s.connect(path)
    return s.makefile().read().split()
now = time.time()
out = {"time": now, "random": os.urandom(16).hex()}
out["uptime"] = float(open("/proc/uptime").read().split()[0])
out["boot_id"] = open("/proc/sys/kernel/random/boot_id").read()
out["disk_marks"] = {p: open(p).read() for p in glob.glob("/root/mark*")}
out["memory_marks"] = {p: open(p).read() for p in glob.glob("/tmp/mark*")}
out["big"] = {p: md5(p) for p in glob.glob("/tmp/big*")}
out["files"] = {p: md5(p) for p in sorted(glob.glob("/root/dir*/*"))}
out["answers"] = {}
for p in glob.glob("/root/layer*.py"):
    m = importlib.import_module(os.path.basename(p)[:-3])
    out["answers"][p] = [m.TOKEN, m.answer(42)]
out["processes"], out["ticks"] = {}, {}
for p in glob.glob("/tmp/sock*"):
    a = ask(p)
    out["processes"][p] = a[:2]
    out["ticks"][p] = int(a[3])
time.sleep(0.5)
out["later"] = {p: int(ask(p)[3]) for p in out["ticks"]}
# Usable: what is written is read back, past the page cache.
token = os.urandom(8).hex()
with open("/root/use", "w") as f:
    f.write(token * 1000); f.flush(); os.fsync(f.fileno())
    os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
out["usable"] = open("/root/use").read() == token * 1000
out["shell"] = subprocess.run("echo $((6*7)); df -T / | tail -1", shell=True, capture_output=True, text=True).stdout.split()
out["dmesg"] = subprocess.run(["dmesg"], capture_output=True, text=True).stdout
out["cpus"] = re.findall(r"^cpu[0-9]+ (.*)$", open("/proc/stat").read(), re.M)
print(json.dumps(out))
'''

KEYS = ("disk_marks", "memory_marks", "big", "files", "answers", "processes")


def token(layer):
    return hashlib.sha256(f"layer {layer}".encode()).hexdigest()[:24]


def add_layer(machine, layer):
    python(machine, ADD_LAYER, str(layer), token(layer), str(FILL), MODULE.format(layer=layer, token=token(layer)))


@functools.cache
def wanted_after(layers):
    """What a probe finds after so many layers, worked out without a guest."""
    big, files = {}, {}
    for layer in range(1, layers + 1):
        source = random.Random(token(layer))
        digest = hashlib.md5()
        for _ in range(FILL):
            digest.update(source.randbytes(1 << 20))
        big[f"/tmp/big{layer}"] = digest.hexdigest()
        for i in range(20):
            files[f"/root/dir{layer}/f{i}"] = hashlib.md5(source.randbytes(5000 * i)).hexdigest()
        if layer > 1:
            files[f"/root/dir{layer}/moved"] = files.pop(f"/root/dir{layer - 1}/f0")
            files.pop(f"/root/dir{layer - 1}/f1")
    each = range(1, layers + 1)
    return {
        "disk_marks": {f"/root/mark{n}": token(n) for n in each},
        "memory_marks": {f"/tmp/mark{n}": token(n) for n in each},
        "big": big,
        "files": files,
        "answers": {f"/root/layer{n}.py":
                    [token(n), hashlib.sha256(f"{n}:42".encode()).hexdigest()[:16]] for n in each},
        "processes": {f"/tmp/sock{n}":
                      [token(n), hashlib.md5(random.Random(token(n)).randbytes(1 << 20)).hexdigest()] for n in each},
    }


def off_by(found, before, after):
    """Seconds that the guest's clock is off the host's, which is read before and after."""
    return max(0.0, before - found, found - after)


def alarms(messages):
    """What a guest's kernel should not have said."""
    bad = [line for line in messages.splitlines() if ALARM.search(line)]
    return [line for line in bad if NATIVE or not EMULATED_CLOCK.search(line)]


def probe(machine, source=PROBE):
    """Probes a guest; its kernel must be content, its clock right and its disk usable."""
    before = time.time()
    found = json.loads(python(machine, source))
    found["off"] = off_by(found["time"], before, time.time())
    bad = alarms(found["dmesg"])
    if bad:
        # With what came before and after it, which tells the cause if anything does.
        lines = found["dmesg"].splitlines()
        first = lines.index(bad[0])
        print("\n".join(f"    {machine}: {line}" for line in lines[max(first - 10, 0):first + 60]), flush=True)
    expect(not bad, f"{machine}: its kernel says " + "; ".join(bad[:5]))
    expect("Linux version" in found["dmesg"] or len(found["dmesg"]) > 2000, "dmesg tells nothing")
    # A guest that was restored beside others is told the time seconds after it is able to answer.
    deadline = time.time() + 20 * PATIENCE
    while found["off"] > 2 and time.time() < deadline:
        before = time.time()
        found["off"] = off_by(float(guest(machine, "date", "+%s.%N")), before, time.time())
    expect(found["off"] <= 2, f"{machine}: the clock is off by {found['off']:.1f} s")
    expect(found["usable"], f"{machine}: what it writes is not what it reads")
    equal(found["shell"][0], "42", f"{machine}: its shell's sum")
    equal(found["shell"][2], "ext4", f"{machine}: its root")
    for path, ticks in found["ticks"].items():
        expect(found["later"][path] > ticks, f"{machine}: the process at {path} stands still")
    return found


def same(found, wanted, what):
    for key in KEYS:
        equal(found[key], wanted[key], f"{what}: {key}")


def check_disk(tag):
    """The snapshot's disk is a sound ext4: its journal is replayed, then nothing is wrong."""
    directory, copy = f"{WORK}/mount", f"{WORK}/copy.img"
    os.makedirs(directory, exist_ok=True)
    snap("mount", tag, directory)
    try:
        subprocess.run(["cp", "--sparse=always", f"{directory}/disk0.img", copy], check=True, timeout=120 * PATIENCE)
    finally:
        snap("umount", directory)
    replay = subprocess.run(["e2fsck", "-E", "journal_only", "-y", copy], timeout=120 * PATIENCE, capture_output=True, text=True)
    expect(replay.returncode in (0, 1), f"{tag}: replaying the journal: {replay.stdout}{replay.stderr}")
    clean = subprocess.run(["e2fsck", "-fn", copy], timeout=120 * PATIENCE, capture_output=True, text=True)
    # Free blocks and inodes are counted anew at each mount; the superblock's numbers are old by design.
    problems = [line for line in clean.stdout.splitlines() if line.strip() and not re.match(
        r"Pass \d|.*: \d+/\d+ files|Free (blocks|inodes) count wrong \(|Fix\? no|.*\*+ WARNING: Filesystem still has errors",
        line)]
    expect(not problems and clean.returncode in (0, 4), f"{tag}: e2fsck ({clean.returncode}): {clean.stdout}{clean.stderr}")
    return copy


# --- The checks --------------------------------------------------------------

results = {"ok": 0, "FAILED": 0, "SKIPPED": 0}


class Check(NamedTuple):
    name: str
    function: Callable[..., None]
    arguments: tuple[Any, ...] = ()
    # Whether those after it make no sense without it.
    needed: bool = False


class Lacking(Exception):
    """What a check cannot do without is not there."""


class OutOfTime(BaseException):
    """The time there is for checks is over. No error of what is checked."""


def out_of_time(*_):
    raise OutOfTime


def skip(check, reason):
    results["SKIPPED"] += 1
    print(f"SKIPPED {LABEL}::{check.name}: {reason}", flush=True)


def tidy():
    """So that the next check can name its machines as it likes."""
    for command in (["ps"], ["stop", "--all"]):
        subprocess.run([SNAPSTORE, *command], env=ENV, timeout=60 * PATIENCE, stdin=subprocess.DEVNULL)


def passes(check):
    begin, slow = time.monotonic(), "this host is slow, and the time there is for such checks is over"
    if time.time() > UNTIL:
        skip(check, slow)
        return False
    signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, UNTIL + GRACE - time.time())
    try:
        check.function(*check.arguments)
        verdict = "ok"
    except OutOfTime:
        skip(check, slow)
        tidy()
        return False
    except Lacking as lacking:
        skip(check, lacking)
        return False
    except Exception as error:
        verdict = "FAILED"
        if not isinstance(error, (Wrong, subprocess.TimeoutExpired)):
            traceback.print_exc(file=sys.stdout)
        print(f"{LABEL}::{check.name}: {str(error)[:3000]}", flush=True)
        tidy()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    results[verdict] += 1
    print(f"test {LABEL}::{check.name} ... {verdict} ({time.monotonic() - begin:.1f} s)", flush=True)
    return verdict == "ok"


def run_checks(checks):
    """All of them, each with a line of its own, whatever happens to others."""
    lacking = None
    for check in checks:
        if lacking:
            skip(check, f"it needs {lacking}")
        elif not passes(check) and check.needed:
            lacking = check.name


# What was found in the machine that all layers come from, when it had booted.
original = {}


def boots_debian():
    boot("deb", mem=MEMORY)
    expect("Debian" in guest("deb", "sh", "-c", "uname -v"), "not Debian's kernel")
    equal(guest("deb", "sh", "-c", "exit 7", code=7), "", "exit code passed on")
    found = probe("deb")
    same(found, wanted_after(0), "booted")
    expect(found["uptime"] < 120 * PATIENCE, "just booted")
    original.update(found)
    commit("l0", "deb")


def makes_layer(layer):
    add_layer("deb", layer)
    same(probe("deb"), wanted_after(layer), "before the commit")
    commit(f"l{layer}", "deb")
    # The machine goes on, undisturbed.
    expect(guest("deb", "cat", f"/tmp/mark{layer}") == token(layer), "the machine lost its mark")


def head_restores(layer):
    tag = f"l{layer}"
    restore(tag, None, "-n", str(CLONES))
    names = [f"{tag}.{n}" for n in range(1, CLONES + 1)] if CLONES > 1 else [tag]
    found = {}
    for name in names:
        found[name] = probe(name)
        # All that was there, and nothing of later layers.
        same(found[name], wanted_after(layer), name)
    equal(len({one["random"] for one in found.values()}), len(names), "different random numbers")
    if len(names) > 1:
        # Clones share nothing that one of them writes.
        guest(names[0], "sh", "-c", "echo mine > /root/mine; echo mine > /tmp/mine; sync")
        guest(names[1], "sh", "-c", "test ! -e /root/mine && test ! -e /tmp/mine")
    for name, one in found.items():
        # It was not booted: its uptime goes on from the commit. Its clock was set, not carried along.
        equal(one["boot_id"], original["boot_id"], f"{name}: the boot that it comes from")
        expect(one["uptime"] > original["uptime"], f"{name}: uptime {one['uptime']}")
    stop(*names)


def clock_is_set():
    """A clock that nobody sets is seen to be off: else the clock's check would prove nothing."""
    restore("l0", "late")
    guest("late", "date", "-s", "@1700000000")
    before = time.time()
    off = off_by(float(guest("late", "date", "+%s.%N")), before, time.time())
    expect(off > 2, "a wrong clock is not seen")
    stop("late")


def clock_is_set_after_a_pause():
    """A guest that stood still is told the time: else it takes certificates for ones of the future."""
    restore("l0", "late")
    guest("late", "date", "+%s")
    snap("pause", "late")
    time.sleep(8)
    snap("resume", "late")
    deadline = time.monotonic() + 60 * PATIENCE
    while True:
        before = time.time()
        off = off_by(float(guest("late", "date", "+%s.%N")), before, time.time())
        if off <= 2:
            break
        expect(time.monotonic() < deadline, f"its clock is off by {off:.1f} s for a minute")
        time.sleep(1)
    stop("late")


def reseeds_where_it_must():
    """A guest with the agent goes on, and is said to have entropy of its own."""
    snap("restore", "l0", "-d", "--name", "sown", "--require-reseed")
    status = json.loads(snap("ps", "sown", "--json"))
    status = status.get("machines", [status])[0]
    expect(status["reseeded"] is True, f"it is not said to be reseeded: {status}")
    guest("sown", "true")
    stop("sown")


def disks_are_sound():
    for layer in range(4):
        copy = check_disk(f"l{layer}")
        listing = subprocess.run(["debugfs", "-R", "ls -p /root", copy], timeout=60 * PATIENCE, capture_output=True, text=True).stdout
        for n in range(1, 4):
            equal(f"/mark{n}/" in listing, n <= layer, f"l{layer}: mark {n} on the disk")
    # A broken disk is seen.
    with open(copy, "r+b") as file:
        subprocess.run(["debugfs", "-w", "-R", "clri /root/mark1", copy], timeout=60 * PATIENCE, capture_output=True)
    broken = subprocess.run(["e2fsck", "-fn", copy], timeout=120 * PATIENCE, capture_output=True, text=True)
    expect(broken.returncode == 4 and "deleted/unused inode" in broken.stdout, f"a broken disk passes: {broken.stdout}")


def flat_equals_layers():
    boot("flat", mem=MEMORY)
    for layer in (1, 2, 3):
        add_layer("flat", layer)
    commit("flat", "flat")
    stop("flat")
    restore("flat", "flat2")
    flat = probe("flat2")
    stop("flat2")
    same(flat, wanted_after(3), "flat")
    restore("l3", "layered")
    same(probe("layered"), flat, "layered")
    stop("layered")
    check_disk("flat")


def chain_of_restores():
    tag = "l1"
    for depth in range(1, DEPTH + 1):
        name = f"c{depth}"
        restore(tag, name)
        python(name, "import sys; n = sys.argv[1]\n"
               "for d in ('/tmp', '/root'): open(f'{d}/chain', 'a').write(n + ' ')", str(depth))
        tag = f"chain{depth}"
        commit(tag, name)
        stop(name)
    restore(tag, "end")
    wanted = "".join(f"{n} " for n in range(1, DEPTH + 1))
    for path in ("/tmp/chain", "/root/chain"):
        equal(guest("end", "cat", path), wanted, path)
    same(probe("end"), wanted_after(1), "the end of the chain")
    stop("end")
    # A link in the middle knows nothing of the later ones.
    middle = (DEPTH + 1) // 2
    restore(f"chain{middle}", "middle")
    equal(guest("middle", "cat", "/tmp/chain"), "".join(f"{n} " for n in range(1, middle + 1)), "the middle")
    stop("middle")
    check_disk(tag)


# Writes memory and disk without pause; each round checks the one before.
LOAD = '''
import hashlib, mmap, os, sys, time
os.chdir("/root")
pages = 1024
memory = mmap.mmap(-1, pages * 4096)
n = 0
def page(n, i):
    return hashlib.sha256(b"%d %d" % (n, i)).digest() * 128
while True:
    for i in range(pages):
        if n and memory[i * 4096:(i + 1) * 4096] != page(n, i):
            open("/root/BAD", "a").write("page %d of round %d\\n" % (i, n))
        memory[i * 4096:(i + 1) * 4096] = page(n + 1, i)
    n += 1
    body = b"%d " % n + hashlib.sha256(b"%d" % n).digest() * 2000
    with open("load.new", "wb") as f:
        f.write(hashlib.sha256(body).digest() + body)
        f.flush(); os.fsync(f.fileno())
    os.rename("load.new", "load")
    open("/tmp/load", "w").write(str(n))
    with open("log", "a") as f:
        f.write("%d\\n" % n)
'''
LOAD_CHECK = '''
import hashlib, json, os, sys, time
def look():
    raw = open("/root/load", "rb").read()
    good = hashlib.sha256(raw[32:]).digest() == raw[:32]
    return good, int(raw[32:].split(b" ")[0])
good, first = look()
deadline = time.time() + 400
last = first
while last < first + 2 and time.time() < deadline:
    time.sleep(0.2)
    good2, last = look()
    good = good and good2
log = [int(x) for x in open("/root/log")]
print(json.dumps({"good": good, "first": first, "last": last, "bad": os.path.exists("/root/BAD"),
    "log": log == list(range(1, len(log) + 1)), "memory": int(open("/tmp/load").read() or 0)}))
'''


def look_at_load(machine):
    found = json.loads(python(machine, LOAD_CHECK))
    expect(found["good"] and not found["bad"] and found["log"], f"{machine}: {found}")
    expect(found["last"] >= found["first"] + 2, f"{machine}: the load stands still: {found}")
    return found


def commits_under_load():
    restore("l0", "load")
    python("load", "import subprocess, sys\n"
           "open('/root/load.py', 'w').write(sys.argv[1])\n"
           "subprocess.Popen([sys.executable, '/root/load.py'], stdin=subprocess.DEVNULL,"
           " stdout=open('/root/load.out', 'w'), stderr=subprocess.STDOUT, start_new_session=True)", LOAD)
    deadline = time.time() + 60 * PATIENCE
    while guest("load", "test", "-s", "/tmp/load", code=None) is None or "1" not in guest(
            "load", "sh", "-c", "test -s /root/load && echo 1 || echo 0"):
        expect(time.time() < deadline, "the load does not start: " + guest("load", "cat", "/root/load.out"))
    for n in range(COMMITS):
        due = time.monotonic() + PERIOD
        commit(f"load{n}", "load")
        time.sleep(max(0, due - time.monotonic()))
    at_end = look_at_load("load")["last"]
    stop("load")
    before = 0
    for n in range(COMMITS):
        restore(f"load{n}", "again")
        found = look_at_load("again")
        expect(before <= found["first"] <= at_end, f"load{n}: round {found['first']} after {before}, before {at_end}")
        before = found["first"]
        if n == COMMITS - 1:
            probe("again")
            # The check sees a file that is not whole.
            python("again", "import os; os.system('pkill -f root/load[.]py')\n"
                   "d = bytearray(open('/root/load', 'rb').read()); d[5000] ^= 1; open('/root/load', 'wb').write(d)")
            broken = python("again", LOAD_CHECK.replace("400", "0"))
            expect(not json.loads(broken)["good"], "a broken file passes")
        stop("again")
    check_disk(f"load{COMMITS - 1}")


def runs(machine):
    """Whether it is listed as more than starting."""
    lines = snap("ps", code=None).splitlines()
    return any(line.split()[:1] == [machine] and "starting" not in line for line in lines)


def ends(command, message, *, from_tag="l0"):
    """Attached, the command's exit code and message tell how the guest ended."""
    attached = subprocess.Popen([SNAPSTORE, "restore", from_tag, "--name", "ending"], env=ENV,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        deadline = time.time() + 60 * PATIENCE
        while not runs("ending"):
            expect(time.time() < deadline and attached.poll() is None, "the machine is not there")
            time.sleep(0.2)
        guest("ending", "true", wait=60)
        # In the background, so that the command may end before the machine does.
        guest("ending", "sh", "-c", f"(sleep 0.5; {command}) >/dev/null 2>&1 </dev/null &", code=None)
        out = attached.communicate(timeout=90 * PATIENCE)[0].decode(errors="replace")
    finally:
        if attached.poll() is None:
            attached.kill()
            snap("stop", "ending", code=None)
            attached.wait(10)
    equal(attached.returncode, 0, f"exit code after {command}, which printed {out[-500:]}")
    expect(message in out, f"{command}: no {message!r} in {out[-500:]!r}")
    expect("ending" not in snap("ps"), f"{command}: the machine is still listed")


# Debian's cloud kernel has no /dev/port (dd would make a file of that name): ioperm, and
# mov dx, di; mov eax, esi; out dx, al; ret
SAY_READY = '''
import ctypes, mmap, os
libc = ctypes.CDLL(None, use_errno=True)
assert libc.ioperm(0x620, 1, 1) == 0, os.strerror(ctypes.get_errno())
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(bytes.fromhex("6689fa89f0eec3"))
out = ctypes.CFUNCTYPE(None, ctypes.c_ushort, ctypes.c_ubyte)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
out(0x620, 120)
open("/tmp/later", "w").write("after")
'''


def commits_when_ready():
    options = ("--commit-when", "ready", "--tag", "ready", "--or-restore", "ready")
    boots = ("--kernel", KERNEL, "--initrd", INITRD, "--mem", "256M", "--disk", DISK, "-d")
    # It is done when the commit is.
    first = subprocess.Popen([SNAPSTORE, "run", "first", *boots, "--cmdline", CMDLINE, *options], env=ENV,
                             stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        deadline = time.time() + 60 * PATIENCE
        while not runs("first"):
            expect(time.time() < deadline and first.poll() is None, "the machine is not there")
            time.sleep(0.2)
        guest("first", "true", wait=120)
        snap("show", "ready", code=3)
        guest("first", "sh", "-c", "echo before > /root/when; echo before > /tmp/when; sync")
        python("first", SAY_READY)
        out = first.communicate(timeout=150 * PATIENCE)[0].decode(errors="replace")
        equal(first.returncode, 0, f"exit code of run, which printed {out}")
    finally:
        if first.poll() is None:
            first.kill()
    snap("show", "ready")
    equal(guest("first", "cat", "/tmp/later").strip(), "after", "the guest goes on")
    stop("first")
    snap("run", "second", *boots, "--cmdline", CMDLINE, *options)
    equal(guest("second", "cat", "/tmp/when", "/root/when").split(), ["before", "before"], "marks")
    probe("second")
    stop("second")
    # Another command line is another configuration: it boots.
    snap("run", "third", *boots, "--cmdline", CMDLINE + " other", "--paused", "--or-restore", "ready")
    equal(json.loads(snap("ps", "third", "--json"))["origin"]["snapshot"], None, "what a machine that boots comes from")
    stop("third")


def boots_an_elf_kernel():
    """The kernel that a bzImage holds, as a file of its own, entered by PVH."""
    boot("elf", kernel=f"{GUEST}/vmlinux")
    expect("Debian" in guest("elf", "sh", "-c", "uname -v"), "not Debian's kernel")
    commit("elf", "elf")
    stop("elf")
    restore("elf", "elf2")
    same(probe("elf2"), wanted_after(0), "an ELF kernel, restored")
    stop("elf2")


def memory_of(size, least):
    """Boots with so much memory, of which the guest touches the upper part, too."""
    boot("sized", mem=size)
    total = int(re.search(r"MemTotal: *(\d+)", guest("sized", "cat", "/proc/meminfo")).group(1))
    expect(least * 0.9 < total / 1024 <= least, f"{size}: the guest has {total // 1024} MiB")
    add_layer("sized", 1)
    commit(f"sized{size}", "sized")
    stop("sized")
    restore(f"sized{size}", "again")
    same(probe("again"), wanted_after(1), size)
    stop("again")


def boots_processors(cpus):
    """All vCPUs are started, and run programs."""
    boot("many", "--cpus", str(cpus), wait=120 + 60 * cpus)
    equal(guest("many", "nproc").strip(), str(cpus), "nproc")
    for cpu in range(cpus):
        equal(guest("many", "taskset", "-c", str(cpu), "echo", "here").strip(), "here", f"a program on CPU {cpu}")
    bad = alarms(guest("many", "dmesg"))
    expect(not bad, "its kernel says " + "; ".join(bad[:5]))
    stop("many")


def processors(cpus):
    """All vCPUs work before a commit and after the restore."""
    boot("smp", "--cpus", str(cpus), wait=120 + 60 * cpus)
    add_layer("smp", 1)
    python("smp", "import subprocess, sys\nfor c in range(int(sys.argv[1])):\n"
           "  subprocess.Popen(['taskset', '-c', str(c), 'sh', '-c', 'while :; do sleep 0.5; done'],"
           " stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)",
           str(cpus))
    commit(f"smp{cpus}", "smp")
    stop("smp")
    restore(f"smp{cpus}", "smp2")
    found = probe("smp2")
    same(found, wanted_after(1), "smp")
    equal(guest("smp2", "nproc").strip(), str(cpus), "nproc")
    time.sleep(3)
    later = probe("smp2")
    for cpu in range(cpus):
        # user, nice, system: work, not only idle time.
        busy = [sum(int(x) for x in one["cpus"][cpu].split()[:3]) for one in (found, later)]
        expect(busy[1] > busy[0], f"CPU {cpu} does nothing: {busy}")
        equal(guest("smp2", "taskset", "-c", str(cpu), "echo", "here").strip(), "here", f"a program on CPU {cpu}")
    stop("smp2")


# A guest of nothing but busybox, which waits.
GENERATION_INIT = """#!/bin/busybox sh
busybox mount -t devtmpfs dev /dev
echo "it waits" >/dev/ttyS0
while :; do busybox sleep 1; done
"""


def archive(files):
    """A cpio archive of format newc: paths to (mode, content)."""
    out = bytearray()
    for number, (path, (mode, content)) in enumerate([*files.items(), ("TRAILER!!!", (0, b""))]):
        fields = (number + 1, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(path) + 1, 0)
        out += b"070701" + b"".join(b"%08x" % field for field in fields) + path.encode() + b"\0"
        out += bytes(-len(out) % 4) + content
        out += bytes(-len(out) % 4)
    return bytes(out)


def says(machine, wanted, wait=90):
    """Waits until a machine's console has this."""
    deadline = time.time() + wait * PATIENCE
    while wanted not in (out := snap("console", machine, "--print")):
        expect(time.time() < deadline, f"{machine} does not say {wanted!r}: {out[-800:]!r}")
        time.sleep(0.3)
    return out


def vm_generation(kernel):
    """A kernel with a driver for it is told that it was restored, without any agent."""
    if not os.path.exists(kernel):
        raise Lacking("no kernel with a driver for it")
    files = {"dev": (0o40755, b""), "bin": (0o40755, b""), "init": (0o100755, GENERATION_INIT.encode())}
    with open(f"{GUEST}/busybox", "rb") as file:
        files["bin/busybox"] = (0o100755, file.read())
    with open(f"{WORK}/generation", "wb") as file:
        file.write(archive(files))
    snap("run", "gen", "--kernel", kernel, "--initrd", f"{WORK}/generation", "--mem", "256M", "-d",
         "--cmdline", CMDLINE.replace("quiet", "loglevel=6"))
    says("gen", "it waits", wait=180)
    commit("gen", "gen")
    restore("gen", None, "-n", "2")
    # Linux's words, drivers/char/random.c.
    forked = "crng reseeded due to virtual machine fork"
    for clone in ("gen.1", "gen.2"):
        says(clone, forked)
    expect(forked not in snap("console", "gen", "--print"), "the machine that was saved takes itself for another")
    stop("--all")


# In the guest: whoever connects sends a length and so many bytes, gets their MD5, and as many
# bytes with theirs.
SERVE_NETWORK = '''
import hashlib, os, socket, threading
def serve(peer):
    stream = peer.makefile("rb")
    length = int(stream.readline())
    peer.sendall(hashlib.md5(stream.read(length)).hexdigest().encode())
    mine = os.urandom(length)
    peer.sendall(mine + hashlib.md5(mine).hexdigest().encode())
    peer.close()
server = socket.create_server(("", 7000))
while True:
    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
'''

EXCHANGE = '''
import hashlib, os, socket, sys
def exchange(address, length):
    with socket.create_connection((address, 7000), timeout=240) as peer:
        stream, mine = peer.makefile("rb"), os.urandom(length)
        peer.sendall(b"%d\\n" % length + mine)
        assert stream.read(32).decode() == hashlib.md5(mine).hexdigest(), "sent"
        theirs = stream.read(length)
        assert len(theirs) == length and stream.read(32).decode() == hashlib.md5(theirs).hexdigest(), "received"
'''
exec(EXCHANGE)


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, timeout=20 * PATIENCE, stdin=subprocess.DEVNULL)


def interface(machine):
    """The machine's only interface, as `ps` tells."""
    [found] = json.loads(snap("ps", machine, "--json"))["networks"]
    return found


def address_in(machine):
    return guest(machine, "cat", "/sys/class/net/eth0/address").strip()


def addresses_agree(machine, wanted):
    """The agent sets the address soon after the guest has begun to run."""
    deadline = time.time() + 30 * PATIENCE
    while address_in(machine) != wanted:
        expect(time.time() < deadline, f"{machine}: eth0 is {address_in(machine)}, the device {wanted}")
        time.sleep(0.2)


def set_ip(machine, address):
    guest(machine, "sh", "-c", f"ip address flush dev eth0 && ip address add {address}/24 dev eth0 && ip link set eth0 up")


def network():
    # Not to be confused with an interface of a host on which this runs natively.
    bridge, net, size = f"snb{os.getpid() % 10000}", "198.18.77", (4 if NATIVE else 2) << 20
    taps = [f"snt{os.getpid() % 10000}-{n}" for n in range(3)]
    made = []
    try:
        subprocess.run(["modprobe", "-a", "tun", "bridge"], timeout=20 * PATIENCE, stdin=subprocess.DEVNULL)
        ip("link", "add", bridge, "type", "bridge")
        made.append(bridge)
        ip("address", "add", f"{net}.1/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        for tap in taps:
            ip("tuntap", "add", tap, "mode", "tap")
            made.append(tap)
            ip("link", "set", tap, "master", bridge, "up")
        network_between(taps, net, size)
    finally:
        snap("stop", "--all", code=None)
        for name in made:
            subprocess.run(["ip", "link", "delete", name], timeout=20 * PATIENCE)


def network_between(taps, net, size):
    missing = ("run", "net", "--kernel", KERNEL, "--initrd", INITRD, "--cmdline", CMDLINE, "-d", "--net")
    snap(*missing, taps[0] + "x", code=3)
    boot("net", "--net", taps[0])
    original = interface("net")
    equal((original["tap"], original["link_up"]), (taps[0], True), "ps")
    equal(address_in("net"), original["mac"], "the address at boot")
    snap("run", "net2", *missing[2:], taps[0], code=5)
    equal(len(json.loads(snap("ps", "--json"))["machines"]), 1, "machines after refusals")
    set_ip("net", f"{net}.2")
    python("net", "import subprocess, sys\n"
           "subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,"
           " stderr=subprocess.DEVNULL, start_new_session=True)", SERVE_NETWORK)
    deadline = time.time() + 60 * PATIENCE
    while True:
        try:
            exchange(f"{net}.2", 1)
            break
        except ConnectionRefusedError:
            expect(time.time() < deadline, "the guest's server does not start")
            time.sleep(0.5)
    begin = time.monotonic()
    exchange(f"{net}.2", size)
    note(f"{2 * size >> 20} MiB in {time.monotonic() - begin:.1f} s")

    # Commits, one after the other, while bytes go both ways. The first, of all there is, before that.
    commit("net0", "net")
    done, rounds, errors = threading.Event(), [], []

    def traffic():
        try:
            while not done.is_set():
                exchange(f"{net}.2", size)
                rounds.append(time.monotonic())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=traffic)
    thread.start()
    try:
        for n in (1, 2):
            time.sleep(0.5)
            commit(f"net{n}", "net")
        last = time.monotonic()
        deadline = last + 60 * PATIENCE
        while not errors and sum(end > last for end in rounds) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        done.set()
        thread.join()
    expect(not errors, f"traffic during commits: {errors}")
    expect(sum(end > last for end in rounds) >= 2, f"traffic stands still after commits: {len(rounds)} rounds")
    note(f"{len(rounds)} exchanges of {2 * size >> 20} MiB around 2 commits")

    # More taps than interfaces: nothing is started, and the taps are free afterwards.
    snap("restore", "net2", "-d", "--name", "none", "--net", taps[1], "--net", taps[2], code=1)
    equal(len(json.loads(snap("ps", "--json"))["machines"]), 1, "machines after a refusal")

    # Two clones on taps of their own, beside the original.
    restore("net2", "clone", "-n", "2", "--net", taps[0][:-1] + "{}")
    clones = ["clone.1", "clone.2"]
    found = {name: interface(name) for name in clones}
    for name, tap in zip(clones, taps[1:]):
        equal((found[name]["tap"], found[name]["link_up"]), (tap, True), f"{name}: ps")
        equal(found[name]["saved_mac"], original["mac"], f"{name}: the saved address")
        addresses_agree(name, found[name]["mac"])
    equal(len({original["mac"], *(one["mac"] for one in found.values())}), 3, "different addresses")
    for name, last in zip(clones, (11, 12)):
        set_ip(name, f"{net}.{last}")
    for last in (11, 12, 2):
        exchange(f"{net}.{last}", size)
    # From clone to clone, past the host.
    python(clones[0], EXCHANGE + "exchange(sys.argv[1], int(sys.argv[2]))", f"{net}.12", str(size // 4))
    for name in clones:
        bad = alarms(guest(name, "dmesg"))
        expect(not bad, f"{name}: its kernel says {bad[:5]}")
    # A clone's commit has its address, and its children have others.
    commit("grandparent", clones[0])
    stop("net", *clones)
    restore("grandparent", "grandchild", "--net", f"{taps[1]},mac=02:00:00:00:be:ef")
    equal(interface("grandchild")["saved_mac"], found[clones[0]]["mac"], "the clone's address, saved")
    addresses_agree("grandchild", "02:00:00:00:be:ef")
    exchange(f"{net}.11", size)
    stop("grandchild")

    # Without a tap the link is down, and all else as it was.
    restore("net2", "alone")
    equal((interface("alone")["tap"], interface("alone")["link_up"]), (None, False), "ps without a tap")
    equal(guest("alone", "cat", "/sys/class/net/eth0/carrier").strip(), "0", "carrier without a tap")
    addresses_agree("alone", interface("alone")["mac"])
    guest("alone", "sh", "-c", f"ping -c 1 -W 1 {net}.1 || busybox ping -c 1 -W 1 {net}.1", code=1)
    # A tap that goes takes the link with it, and nothing else.
    stop("alone")
    restore("net2", "cut", "--net", taps[2])
    equal(guest("cut", "cat", "/sys/class/net/eth0/carrier").strip(), "1", "carrier with a tap")
    ip("link", "delete", taps[2])
    deadline = time.time() + 20 * PATIENCE
    while guest("cut", "cat", "/sys/class/net/eth0/carrier").strip() != "0":
        expect(time.time() < deadline, "the guest is not told that its tap is gone")
        time.sleep(0.2)
    stop("cut")


def store_is_sound():
    snap("verify", "--read-data", timeout=300)
    equal(snap("ps", "--json").strip() in ("[]", '{"machines":[]}', ""), True, "no machine is left: " + snap("ps"))


def then_stopped(function, *arguments):
    function(*arguments)
    stop("deb")


def heads(*layers):
    return [Check(f"head_{layer}_restores", head_restores, (layer,)) for layer in layers]


def core():
    return [
        Check("boots_debian", boots_debian, needed=True),
        Check("layer_1", makes_layer, (1,), needed=True),
        Check("layer_2", makes_layer, (2,), needed=True),
        Check("layer_3", then_stopped, (makes_layer, 3), needed=True),
        *heads(3, 2, 1, 0),
        Check("clock_is_set", clock_is_set),
        Check("clock_is_set_after_a_pause", clock_is_set_after_a_pause),
        Check("reseeds_where_it_must", reseeds_where_it_must),
        Check("disks_are_sound", disks_are_sound),
        Check("flat_equals_layers", flat_equals_layers),
        Check("chain_of_restores", chain_of_restores),
        Check("store_is_sound", store_is_sound),
    ]


def identity():
    """What a restored guest is told, without the rest."""
    return [
        Check("boots_for_identity", then_stopped, (boots_debian,), needed=True),
        Check("clock_is_set", clock_is_set),
        Check("clock_is_set_after_a_pause", clock_is_set_after_a_pause),
        Check("reseeds_where_it_must", reseeds_where_it_must),
    ]


def more():
    return [
        Check("boots_for_more", then_stopped, (boots_debian,), needed=True),
        Check("commits_under_load", commits_under_load),
        Check("poweroff", ends, ("poweroff -f", "powered the machine off")),
        Check("reboot", ends, ("reboot -f", "the guest reset the machine")),
        Check("panic", ends, ("echo c > /proc/sysrq-trigger", "the guest reset the machine")),
        Check("commits_when_ready", commits_when_ready),
        Check("boots_an_elf_kernel", boots_an_elf_kernel),
        Check("vm_generation", vm_generation, (f"{HERE}/vmlinuz-6.12",)),
        Check("network", network),
        Check("more_store_is_sound", store_is_sound),
    ]


def machines():
    return [
        # What 5 GiB does, 512 MiB does too.
        *([Check("memory_512M", memory_of, ("512M", 512))] if NATIVE else []),
        Check("memory_5G", memory_of, ("5G", 5120)),
        Check("two_processors", processors, (2,)),
        # Emulated, a commit of four vCPUs takes too long: all of them wait for one CPU.
        Check("four_processors", processors if NATIVE else boots_processors, (4,)),
        Check("machines_store_is_sound", store_is_sound),
    ]


def smoke():
    return [
        Check("boots_debian", boots_debian, needed=True),
        Check("layer_1", then_stopped, (makes_layer, 1), needed=True),
        *heads(1, 0),
        Check("store_is_sound", store_is_sound),
    ]


GROUPS = {"core": core, "identity": identity, "machines": machines, "more": more, "smoke": smoke}


def main():
    with laboratory():
        for group in sys.argv[1:]:
            run_checks(GROUPS[group]())
            note(f"{group} is done")
    return 1 if results["FAILED"] or not (results["ok"] or results["SKIPPED"]) else 0


sys.exit(main())
