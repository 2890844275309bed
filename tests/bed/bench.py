#!/usr/bin/env python3
"""Measures stock Debian guests: how soon they answer, what a restore reads, what clones take, and
how soon they work.

Runs where scripts/bed.sh puts it, as root, with /dev/kvm and /dev/fuse; scripts/linux-bench.sh
starts it. Its directory holds lab.py, `snapstore`, and `initrd`, which carries the guest agent.

    bench.py [--markdown] [answers|clones|warm]...      prints these tables [default: all]

How much is done comes from the environment:

    BENCH_ROUNDS    how many turns each side takes            3
    BENCH_CLONES    machines restored from one snapshot      10

A first answer is what `exec NAME -- echo` prints, counted from the start of `run` or `restore`.
Each restore makes a mount of its own, whose server and page cache end with the machine: it reads
the image through FUSE from the start. The store's files are in the host's page cache, as are the
kernel, the initrd and the disk that a boot reads.

Read through the mount are the pages of an image that are in the mount's page cache right after
the first answer, by mincore(2): what the guest and its devices touched, and what the kernel read
around that. Pages have 4 KiB.

Of restores until a piece of work is done (`warm`), the store's packs are not in the page cache,
but of those from a mount that stays and that has read the whole memory. The guest had done
the same work before its commit, and three restores had done it, so that its working set is
recorded; each restore finds that set, and no later one.
"""

import contextlib
import ctypes
import json
import mmap
import os
import shutil
import statistics
import sys
import time

from lab import (
    EMULATED, ENV, WORK, boot, commit, equal, expect, guest, laboratory, note, number,
    restore, run, snap, stop,
)

ROUNDS = number("BENCH_ROUNDS", 3)
STORE = ENV["SNAPSTORE_DIR"]
WORKING_SETS = f"{STORE}/working-sets"
# Of the snapshots that are restored, in commits after the first.
DEPTHS = (0, 3, 20)
CLONES = number("BENCH_CLONES", 10)
# Restores that record a working set before it is measured what it is worth.
RECORDINGS = 3
# The memory of the chain's guest, and of one with a snapshot of its own.
SMALL, LARGE = "256M", "1G"
PAGE_BYTES = 4096
# What Python is to import.
MODULES = ("argparse, asyncio, concurrent.futures, csv, ctypes, dataclasses, datetime, decimal, difflib, email.message, "
           "fractions, gzip, hashlib, http.client, inspect, ipaddress, json, logging.config, multiprocessing, optparse, "
           "pathlib, pdb, pickle, shelve, smtplib, socketserver, sqlite3, ssl, statistics, subprocess, tarfile, tempfile, "
           "typing, unittest.mock, urllib.request, uuid, xml.dom.minidom, xml.etree.ElementTree, xmlrpc.client, zipfile")
# A service that keeps 32 MiB of what is on the disk, and for an answer reads half of its pages.
SERVICE = """
import os, random, socket
kept = bytearray()
for directory, _, names in os.walk("/usr/lib"):
    for path in (f"{directory}/{name}" for name in names):
        if len(kept) < 32 << 20 and os.path.isfile(path) and not os.path.islink(path):
            kept += open(path, "rb").read()
pages = random.Random(1).sample(range(0, 32 << 20, 4096), 4096)
server = socket.create_server(("127.0.0.1", 7000))
while True:
    asker, _ = server.accept()
    asker.sendall(b"%d\\n" % sum(map(kept.__getitem__, pages)))
    asker.close()
"""
ASK = "until exec 3<>/dev/tcp/127.0.0.1/7000; do sleep 0.1; done; read -r answer <&3; echo \"$answer\""
# By its tag, what a restored guest does, and what that is called.
WORKS = {
    "python": (("python3", "-c", f"import {MODULES}; print('here')"), "Python has imported its modules"),
    "service": (("bash", "-c", ASK), "a service has read 16 MiB"),
}


# --- What is measured --------------------------------------------------------


def first_answer(name, start):
    """Seconds until the guest's shell has answered, and of these until `start` was done."""
    begin = time.monotonic()
    start()
    started = time.monotonic()
    equal(guest(name, "echo", "here", wait=150).strip(), "here", f"{name}'s first answer")
    return time.monotonic() - begin, started - begin


def booted():
    whole, _ = first_answer("boot", lambda: run("boot", mem=SMALL))
    stop("boot")
    return {"answer": whole}


def restored(tag):
    """A restore through a new mount, which ends with it."""
    no_mount_is_left()
    whole, command = first_answer("one", lambda: restore(tag, "one"))
    found = {"answer": whole, "command": command, **read_through(mount_of_machines()), **memory_of("one")}
    stop("one")
    return found


def restored_page_by_page():
    """What is touched: of this mount the kernel reads nothing around a fault."""
    no_mount_is_left()
    directory = f"{WORK}/single"
    os.makedirs(directory, exist_ok=True)
    snap("mount", "d0", directory, "--read-ahead", "4K")
    restore("d0", "one")
    guest("one", "echo", "here", wait=150)
    found = read_through(directory)
    stop("one")
    snap("umount", directory)
    return found


def mounts():
    with open("/proc/mounts", encoding="utf-8") as file:
        return [line.split()[1] for line in file if line.startswith("snapstore:")]


def mount_of_machines():
    (directory,) = mounts()
    return directory


def no_mount_is_left(staying=()):
    """Waits until there are only those that stay."""
    deadline = time.monotonic() + 30
    while not set(mounts()) <= set(staying):
        expect(time.monotonic() < deadline, f"mounts stay: {mounts()}")
        time.sleep(0.05)
    # Until its server has gone, too, and the kernel has freed what the machine had.
    time.sleep(0.5)


def read_through(directory):
    """Pages of the images that were read, that are not zero, and all."""
    found = {}
    for name in ("memory.bin", "disk0.img"):
        path = f"{directory}/{name}"
        status = os.stat(path)
        found[name] = resident_pages(path)
        found[f"{name} not zero"] = status.st_blocks * 512 // PAGE_BYTES
        found[f"{name} all"] = status.st_size // PAGE_BYTES
    return found


libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)


def resident_pages(path):
    """How many of a file's pages are in the page cache. Reads none."""
    size = os.stat(path).st_size
    file = os.open(path, os.O_RDONLY)
    try:
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file, 0)
        expect(address != ctypes.c_void_p(-1).value, f"mmap of {path}: {os.strerror(ctypes.get_errno())}")
        pages = ctypes.create_string_buffer(size // PAGE_BYTES)
        code = libc.mincore(address, size, pages)
        expect(code == 0, f"mincore of {path}: {os.strerror(ctypes.get_errno())}")
        libc.munmap(address, size)
        return pages.raw.count(b"\1")
    finally:
        os.close(file)


def memory_of(*machines):
    """Bytes of host memory of the machines' processes together."""
    pss = anonymous = 0
    for machine in machines:
        with open(f"/proc/{json.loads(snap('ps', machine, '--json'))['pid']}/smaps_rollup", encoding="utf-8") as file:
            kib = {line.split(":")[0]: int(line.split()[1]) for line in file if line.endswith("kB\n")}
        pss += kib["Pss"] * 1024
        anonymous += kib["Anonymous"] * 1024
    return {"PSS": pss, "anonymous": anonymous}


def cloned():
    """Clones that have all answered."""
    no_mount_is_left()
    restore("d0", "many", "-n", str(CLONES))
    names = [f"many.{n}" for n in range(1, CLONES + 1)]
    for name in names:
        equal(guest(name, "echo", "here", wait=150).strip(), "here", f"{name}'s first answer")
    found = {**memory_of(*names), **read_through(mount_of_machines())}
    stop(*names)
    return found


# --- Restores until work is done ---------------------------------------------


class Warm:
    """A snapshot and what its machines do when they are restored."""

    def __init__(self, tag):
        self.tag = tag
        self.work, _ = WORKS[tag]
        with machine(tag):
            if tag == "service":
                guest(tag, "sh", "-c", 'setsid python3 -c "$1" </dev/null >/dev/null 2>&1 &', "sh", SERVICE)
            self.answer = self.worked(tag)
            expect(self.answer, f"{tag} says nothing")
            equal(self.worked(tag), self.answer, f"{tag}'s second answer")
            commit(tag, tag)
            # The same once more, to be mounted all the time: restores of it find that mount.
            commit(f"{tag}-there", tag)
        self.sets = f"{WORK}/sets-{tag}"
        self.staying = f"{WORK}/{tag}-there"
        os.makedirs(self.staying)
        snap("mount", f"{tag}-there", self.staying, "--no-prefetch")
        with open(f"{self.staying}/memory.bin", "rb", buffering=0) as image:
            while image.read(1 << 20):
                pass
        shutil.rmtree(WORKING_SETS, ignore_errors=True)
        for _ in range(RECORDINGS):
            self.restored(tag)
            no_mounts_of_machines_are_left()
        shutil.copytree(WORKING_SETS, self.sets)
        self.set = self.memory_set()
        # Of the last of these restores.
        note(f"{tag}: {self.set['pages']} pages in the working set, hit rate {self.set['hit_rate'] or 0:.2f}")

    def worked(self, name):
        return guest(name, *self.work, wait=150).strip()

    def memory_set(self):
        (found,) = (one for one in json.loads(snap("show", self.tag, "--json"))["working_sets"] if one["image"] == "memory")
        return found

    def restored(self, tag, *options):
        """Seconds until a first answer and until the work is done."""
        begin = time.monotonic()
        first, _ = first_answer("one", lambda: restore(tag, "one", *options))
        equal(self.worked("one"), self.answer, f"{tag}'s answer after a restore")
        done = time.monotonic() - begin
        stop("one")
        return {"answer": first, "work": done}

    def cold(self, *options):
        """Through a new mount, which finds the set."""
        no_mounts_of_machines_are_left()
        shutil.rmtree(WORKING_SETS, ignore_errors=True)
        shutil.copytree(self.sets, WORKING_SETS, dirs_exist_ok=True)
        forget_packs()
        found = self.restored(self.tag, *options)
        no_mounts_of_machines_are_left()
        return found

    def pushed(self):
        found = self.cold()
        # The mount's server writes it once the mount is gone.
        deadline = time.monotonic() + 30
        while (now := self.memory_set()) == self.set:
            expect(time.monotonic() < deadline, f"nothing is recorded of {self.tag}")
            time.sleep(0.05)
        note(f"{self.tag}: {now['last_mount']['pushed']} pages pushed")
        return found | {"pages": self.set["pages"], "all": os.stat(f"{self.staying}/memory.bin").st_size // PAGE_BYTES}

    def not_pushed(self):
        return self.cold("--no-prefetch")

    def all_there(self):
        no_mounts_of_machines_are_left()
        return self.restored(f"{self.tag}-there")


def no_mounts_of_machines_are_left():
    no_mount_is_left([f"{WORK}/{tag}-there" for tag in WORKS])


def forget_packs():
    """Has the kernel drop what it holds of the store's pages."""
    os.sync()
    packs = f"{STORE}/packs"
    for name in os.listdir(packs):
        file = os.open(f"{packs}/{name}", os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


# --- What it is measured on --------------------------------------------------


@contextlib.contextmanager
def machine(name):
    boot(name, mem=SMALL)
    try:
        yield
    finally:
        stop(name)


def make_snapshots():
    """A chain of commits of a machine that does a little between them, and one
    of a larger machine."""
    boot("chain", mem=SMALL)
    commit("d0", "chain")
    for depth in range(1, DEPTHS[-1] + 1):
        guest("chain", "sh", "-c", f"echo {depth} >>/root/steps; head -c 65536 /dev/urandom >/tmp/step; sync")
        commit(f"d{depth}", "chain")
    stop("chain")
    boot("large", mem=LARGE)
    commit(LARGE, "large")
    stop("large")


def take_turns(subjects):
    """Each round begins with the next subject. Returns the rounds' figures by subject and name."""
    names, found = list(subjects), {}
    for turn in range(ROUNDS):
        for place in range(len(names)):
            name = names[(place + turn) % len(names)]
            for figure, value in subjects[name]().items():
                found.setdefault((name, figure), []).append(value)
        note(f"round {turn + 1} of {ROUNDS}")
    return found


# --- The table ---------------------------------------------------------------

HEAD = ("measured", "figure", "baseline", "its figure", "ratio")


class Table:
    """As that of the benchmarks in bench/src: an aim is the largest median of ratios that is good
    enough. Ratios are those of each round's figures; what was measured once is compared with the
    other's median."""

    def __init__(self, found):
        self.found = found
        self.rows = []
        self.head = HEAD

    def add(self, what, unit, of, figure, against, to, its_figure=None, aim=None):
        figures, baseline = self.found[of, figure], self.found[to, its_figure or figure]
        if len(figures) == 1:
            baseline = [statistics.median(baseline)]
        low, middle, high = spread([a / b for a, b in zip(figures, baseline, strict=True)])
        ratio = f"{middle:.3f}" if low == high else f"{digits(middle)} ({digits(low)}..{digits(high)})"
        met = ()
        if aim is not None:
            self.head = (*HEAD, "aim", "met")
            met = (f"≤ {aim:.3f}", "yes" if middle <= aim else "NO")
        self.rows.append((what, unit(figures), against, unit(baseline), ratio, *met))

    def all_rows(self):
        """With as many cells each as the head has."""
        return [(*row, *[""] * (len(self.head) - len(row))) for row in (self.head, *self.rows)]

    def text(self):
        rows = self.all_rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)

    def markdown(self):
        head, *rows = self.all_rows()
        rows = [head, ("---", "---:", "---", "---:", "---:", "---:", "---")[: len(head)], *rows]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def spread(figures):
    return min(figures), statistics.median(figures), max(figures)


def digits(ratio):
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.3f}"


def shown(figures, one, unit):
    low, middle, high = spread(figures)
    return f"{one(middle)} {unit}" if low == high else f"{one(low)} / {one(middle)} / {one(high)} {unit}"


def seconds(figures):
    # An emulated CPU's time is no figure.
    return "emulated" if EMULATED else shown(figures, lambda s: f"{s:.2f}", "s")


def pages(figures):
    return shown(figures, lambda n: f"{n:.0f}", "pages")


def megabytes(figures):
    return shown(figures, lambda n: f"{n / 1e6:.1f}", "MB")


def answers(found):
    table = Table(found)
    add = table.add
    add("a restored guest's first answer", seconds, "d0", "answer", "a booted guest's", "boot")
    add("of it, the command", seconds, "d0", "command", "the whole", "d0", "answer")
    for depth in DEPTHS[1:]:
        add(f"a restored guest's first answer, depth {depth}", seconds, f"d{depth}", "answer", "depth 0", "d0")
    add(f"a restored guest's first answer, {LARGE} of RAM", seconds, LARGE, "answer", f"{SMALL} of RAM", "d0")
    for size, tag in ((SMALL, "d0"), (LARGE, LARGE)):
        what = f"memory read for it, {size} of RAM"
        add(what, pages, tag, "memory.bin", "all of it", tag, "memory.bin all")
        add(what, pages, tag, "memory.bin", "its pages that are not zero", tag, "memory.bin not zero")
    for depth in DEPTHS[1:]:
        add(f"memory read for it, depth {depth}", pages, f"d{depth}", "memory.bin", "depth 0", "d0")
    add("disk read for it", pages, "d0", "disk0.img", "its pages that are not zero", "d0", "disk0.img not zero")
    return table


def clones(found):
    table = Table(found)
    add = table.add
    add("memory read for a first answer, one page a read", pages, "single", "memory.bin", "four pages a read", "d0")
    add(f"memory read for {CLONES} clones' answers", pages, "clones", "memory.bin", "for one's", "d0")
    found["ten", "PSS"] = [CLONES * pss for pss in found["d0", "PSS"]]
    add(f"PSS of {CLONES} clones", megabytes, "clones", "PSS", f"{CLONES} times that of one", "ten")
    add("of it, what they wrote", megabytes, "clones", "anonymous", "the whole", "clones", "PSS")
    return table


def warm(found):
    table = Table(found)
    add = table.add
    for tag, (_, done) in WORKS.items():
        pushed, bare, there = ((tag, which) for which in ("pushed", "not", "there"))
        for what, figure in ((f"restore until {done}", "work"), (f"of it, the first answer ({tag})", "answer")):
            add(what, seconds, pushed, figure, "--no-prefetch", bare, aim=0.4)
            add(what, seconds, pushed, figure, "all pages are in memory", there, aim=1.2)
        add(f"pages in the working set ({tag})", pages, pushed, "pages", "all of the memory", pushed, "all")
    return table


def show(name, table):
    """At once, so that an interruption leaves what is known."""
    print(name + (" (emulated: of times, only ratios mean something)" if EMULATED else ""))
    print(table.markdown() if "--markdown" in sys.argv[1:] else table.text(), end="\n\n", flush=True)


def measure_answers():
    tags = [*(f"d{depth}" for depth in DEPTHS), LARGE]
    found = take_turns({"boot": booted} | {tag: lambda tag=tag: restored(tag) for tag in tags})
    show("linux-answers", answers(found))
    return found


def measure_clones(found):
    for subject, measure in (("single", restored_page_by_page), ("clones", cloned)):
        found |= {(subject, figure): [value] for figure, value in measure().items()}
    show("linux-clones", clones(found))


def measure_warm():
    subjects, works = {}, [Warm(tag) for tag in WORKS]
    for one in works:
        subjects |= {(one.tag, "pushed"): one.pushed, (one.tag, "not"): one.not_pushed, (one.tag, "there"): one.all_there}
    note("restores until work is done")
    found = take_turns(subjects)
    for one in works:
        snap("umount", one.staying)
    show("linux-warm", warm(found))


def main():
    wanted = [name for name in sys.argv[1:] if name != "--markdown"] or ["answers", "clones", "warm"]
    unknown = set(wanted) - {"answers", "clones", "warm"}
    expect(not unknown, f"there is no table {unknown}")
    with laboratory():
        if "answers" in wanted or "clones" in wanted:
            make_snapshots()
            # The clones are compared with what is measured for the first table.
            found = measure_answers()
            if "clones" in wanted:
                measure_clones(found)
        if "warm" in wanted:
            measure_warm()


main()
