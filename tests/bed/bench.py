#!/usr/bin/env python3
"""Measures stock Debian guests: how soon they answer, what a restore reads, what clones take.

Runs where scripts/bed.sh puts it, as root, with /dev/kvm and /dev/fuse; scripts/linux-bench.sh
starts it. Its directory holds lab.py, `snapstore`, and `initrd`, which carries the guest agent.

    bench.py [--markdown]      prints two tables

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
"""

import ctypes
import json
import mmap
import os
import statistics
import sys
import time

from lab import (
    EMULATED, WORK, boot, commit, equal, expect, guest, laboratory, note, number,
    restore, run, snap, stop,
)

ROUNDS = number("BENCH_ROUNDS", 3)
# Of the snapshots that are restored, in commits after the first.
DEPTHS = (0, 3, 20)
CLONES = number("BENCH_CLONES", 10)
# The memory of the chain's guest, and of one with a snapshot of its own.
SMALL, LARGE = "256M", "1G"
PAGE_BYTES = 4096


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


def no_mount_is_left():
    deadline = time.monotonic() + 30
    while mounts():
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


# --- What it is measured on --------------------------------------------------


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
    """As that of the benchmarks in bench/src. Ratios are those of each round's figures; what
    was measured once is compared with the other's median."""

    def __init__(self, found):
        self.found = found
        self.rows = []

    def add(self, what, unit, of, figure, against, to, its_figure=None):
        figures, baseline = self.found[of, figure], self.found[to, its_figure or figure]
        if len(figures) == 1:
            baseline = [statistics.median(baseline)]
        low, middle, high = spread([a / b for a, b in zip(figures, baseline, strict=True)])
        ratio = f"{middle:.3f}" if low == high else f"{digits(middle)} ({digits(low)}..{digits(high)})"
        self.rows.append((what, unit(figures), against, unit(baseline), ratio))

    def text(self):
        rows = [HEAD, *self.rows]
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
        return "\n".join("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)

    def markdown(self):
        rows = [HEAD, ("---", "---:", "---", "---:", "---:"), *self.rows]
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


def show(name, table):
    """At once, so that an interruption leaves what is known."""
    print(name + (" (emulated: of times, only ratios mean something)" if EMULATED else ""))
    print(table.markdown() if "--markdown" in sys.argv[1:] else table.text(), end="\n\n", flush=True)


def main():
    with laboratory():
        make_snapshots()
        tags = [*(f"d{depth}" for depth in DEPTHS), LARGE]
        found = take_turns({"boot": booted} | {tag: lambda tag=tag: restored(tag) for tag in tags})
        show("linux-answers", answers(found))
        for subject, measure in (("single", restored_page_by_page), ("clones", cloned)):
            found |= {(subject, figure): [value] for figure, value in measure().items()}
        show("linux-clones", clones(found))


main()
