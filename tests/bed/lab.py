"""What proof.py and bench.py do with machines: a store and a runtime directory of their own,
and guests that are booted, asked, committed, restored and stopped.

Lies beside them in the directory that scripts/handover.sh fills.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time

HERE = os.path.abspath(os.environ["BED_IN"])
GUEST = os.environ["BED_GUEST"]
# The first-level machine of scripts/bed.sh has its files here.
EMULATED = HERE == "/in"
# By this much longer is waited: an emulated CPU may have to share its host's with others.
PATIENCE = 4 if EMULATED else 1
SNAPSTORE = f"{HERE}/snapstore"
KERNEL = f"{GUEST}/vmlinuz"
INITRD = f"{HERE}/initrd"
CMDLINE = "console=ttyS0 panic=1 quiet"
if EMULATED:
    # QEMU's SVM does not intercept XSETBV: KVM never learns of the guest's XCR0, CPUID does not follow it,
    # and Linux says "XSAVE consistency problem" and goes on without XSAVE. Here it does without from the start.
    CMDLINE += " noxsave"
# Sockets have short names, so not where TMPDIR may be.
WORK = tempfile.mkdtemp(prefix="lab.", dir="/tmp")
DISK = f"{WORK}/root.img"
ENV = dict(os.environ, SNAPSTORE_DIR=f"{WORK}/store", SNAPSTORE_RUNTIME_DIR=f"{WORK}/run")
BEGIN = time.monotonic()


class Wrong(Exception):
    """Something is not as it must be."""


def expect(condition, message):
    if not condition:
        raise Wrong(message)


def equal(found, wanted, what):
    expect(found == wanted, f"{what}: {found!r} instead of {wanted!r}")


def number(name, default):
    """A setting from the environment."""
    return int(os.environ.get(name) or default)


def note(text):
    print(f"    [{time.monotonic() - BEGIN:6.1f}] {text}", flush=True)


@contextlib.contextmanager
def laboratory():
    """Within, there is an empty store and a disk; afterwards nothing is left."""
    try:
        subprocess.run(["cp", "--sparse=always", f"{GUEST}/root.img", DISK], check=True)
        snap("init")
        yield
    finally:
        subprocess.run([SNAPSTORE, "stop", "--all"], env=ENV, timeout=60, stdin=subprocess.DEVNULL)
        shutil.rmtree(WORK, ignore_errors=True)


def snap(*arguments, timeout=200, code=0, stdin=None):
    """Runs snapstore; returns what it printed."""
    done = subprocess.run(
        [SNAPSTORE, *arguments], env=ENV, timeout=timeout * PATIENCE, capture_output=True, input=stdin,
        **({} if stdin is not None else {"stdin": subprocess.DEVNULL}),
    )
    out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    if code is not None and done.returncode != code:
        raise Wrong(f"snapstore {' '.join(a[:60] for a in arguments)}: exit code {done.returncode} "
                    f"instead of {code}\n{out[-800:]}{err[-800:]}")
    return out


def guest(machine, *command, wait=60, code=0, timeout=200):
    return snap("exec", machine, "--wait", str(wait * PATIENCE), "--", *command, code=code, timeout=timeout)


def python(machine, source, *arguments, **options):
    return guest(machine, "python3", "-c", source, *arguments, **options)


def run(machine, *options, mem="256M", cmdline=CMDLINE, kernel=KERNEL):
    snap("run", machine, "--kernel", kernel, "--initrd", INITRD, "--cmdline", cmdline,
         "--mem", mem, "--disk", DISK, "-d", *options)


def boot(machine, *options, wait=120, **settings):
    """Runs a machine until its guest answers."""
    run(machine, *options, **settings)
    guest(machine, "true", wait=wait)


def commit(tag, machine, *options):
    out = snap("commit", tag, "--vm", machine, *options)
    note("; ".join(line.strip() for line in out.splitlines() if "stood still" in line or "stored" in line))


def restore(tag, name=None, *options):
    snap("restore", tag, "-d", *(["--name", name] if name else []), *options)


def stop(*machines):
    snap("stop", *machines)
