#!/usr/bin/env python3
"""Looks for faults of machines: random commands against small guests that check themselves.

    scripts/soak-machines.py SECONDS [SEED]

Several operators at once run, restore, commit, pause, resume, stop, list and remove
whatever they find. Commands, machines, supervisors and mounts are killed meanwhile, mounts
are stopped, and the disk of the store fills and empties. Working sets are recorded and pushed
beside all of that, warmed, damaged and lost. Every other commit is compared
with the memory that was frozen, whole (SNAPSTORE_CHECK_COMMITS).

A fault is: a guest that says BAD, prints a line twice or leaves one out, or another sum
than a sibling at the same step; a command that panics, is ended by a signal, reports damage
or takes longer than ten minutes; a machine that ends for a reason that nobody gave it. At
the end everything is stopped: then no process, mount, lease, socket or file may be left, the
store must be whole, and each snapshot that is left must go on where it was.

Needs /dev/kvm, /dev/fuse, and root for the small disk. SNAPSTORE names the program (default
target/debug/snapstore), MACHINES how many run at a time (40). Ends with 1 after a fault.
"""
import glob, json, os, random, re, shutil, signal, subprocess, sys, tempfile, threading, time

SECONDS = float(sys.argv[1]) if len(sys.argv) > 1 else 600
SEED = int(sys.argv[2]) if len(sys.argv) > 2 else int(time.time())
HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAM = os.environ.get("SNAPSTORE", os.path.join(HERE, "target/debug/snapstore"))
MACHINES = int(os.environ.get("MACHINES", "40"))
OPERATORS = int(os.environ.get("OPERATORS", "6"))
DISK_BYTES = 512 << 20
# Longer than anything takes on a machine that is busy with forty guests.
PATIENCE = 600

# What a machine may die of when its mount or its disk was taken away.
EXPECTED_ENDINGS = ("memory", "killed", "mount", "stopped")


def say(*what):
    print("soak machines:", *what, flush=True)


class Soak:
    def __init__(self):
        self.work = tempfile.mkdtemp(prefix="snapstore-soak-")
        self.disk = os.path.join(self.work, "disk")
        self.run_dir = os.path.join(self.work, "run")
        os.mkdir(self.disk)
        os.mkdir(self.run_dir, 0o700)
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "soak", self.disk], check=True
        )
        self.environment = dict(
            os.environ,
            SNAPSTORE_DIR=os.path.join(self.disk, "store"),
            SNAPSTORE_RUNTIME_DIR=self.run_dir,
        )
        self.guests = {}
        for name in ("table", "churn"):
            found = glob.glob(os.path.join(HERE, f"target/*/build/snapstore-guests-*/out/{name}.bin"))
            newest = max(found, key=os.path.getmtime)
            self.guests[name] = shutil.copy(newest, self.work)
        self.disk_image = os.path.join(self.work, "disk.img")
        with open(self.disk_image, "wb") as image:
            image.truncate(4 << 20)
        self.lock = threading.Lock()
        self.faults = []
        self.counts = {}
        self.sums = {}
        self.pushed = {}
        # Machines that were ended on purpose, by name, and whether mounts were hurt.
        self.hurt = False
        self.over = time.monotonic() + SECONDS

    def fault(self, what):
        with self.lock:
            self.faults.append(what)
        say("FAULT:", what)

    def count(self, what):
        with self.lock:
            self.counts[what] = self.counts.get(what, 0) + 1

    def command(self, *arguments, env=None, kill_after=None, allowed=(0, 1, 3, 5)):
        """Runs the program; returns its exit code and answer."""
        environment = dict(self.environment, **(env or {}))
        process = subprocess.Popen(
            [PROGRAM, *arguments, "--json"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        killed = False
        try:
            out, err = process.communicate(timeout=kill_after or PATIENCE)
        except subprocess.TimeoutExpired:
            killed = True
            if kill_after is None:
                self.fault(f"{arguments} takes longer than {PATIENCE} s: {self.stack(process.pid)}")
            process.kill()
            out, err = process.communicate()
        code = process.returncode
        self.count(f"{arguments[0]} {'killed' if killed else code}")
        if not killed and (code not in allowed or "panicked" in err):
            self.fault(f"{arguments} ended with {code}: {err.strip()[-600:]}")
        try:
            answer = json.loads(out)
        except ValueError:
            answer = None
        return code, answer, err

    @staticmethod
    def stack(pid):
        try:
            tasks = os.listdir(f"/proc/{pid}/task")
            return [open(f"/proc/{pid}/task/{task}/wchan").read() for task in tasks]
        except OSError as error:
            return error

    # What is there.

    def machines(self):
        _, answer, _ = self.command("ps")
        return (answer or {}).get("machines", [])

    def tags(self):
        _, answer, _ = self.command("tags")
        return [tag["tag"] for tag in (answer or {}).get("tags", [])] if answer else []

    def processes(self):
        """Those of this soak: number, arguments, name."""
        mark = f"SNAPSTORE_RUNTIME_DIR={self.run_dir}\0".encode()
        found = []
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            try:
                if mark not in open(f"/proc/{entry}/environ", "rb").read():
                    continue
                arguments = open(f"/proc/{entry}/cmdline", "rb").read().split(b"\0")
                name = open(f"/proc/{entry}/comm").read().strip()
                state = open(f"/proc/{entry}/stat").read().rsplit(")", 1)[1].split()[0]
            except OSError:
                continue
            if state != "Z":
                found.append((int(entry), [a.decode(errors="replace") for a in arguments], name))
        return found

    def some_process(self, word):
        found = [pid for pid, arguments, _ in self.processes() if word in arguments]
        return random.choice(found) if found else None

    # What guests say.

    def listen(self, name):
        code, said = self.console(name)
        if code != 0:
            return 0
        return self.judge(name, said)

    def console(self, name):
        process = subprocess.run(
            [PROGRAM, "console", name, "--print"],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PATIENCE,
        )
        return process.returncode, process.stdout.decode(errors="replace")

    def judge(self, name, said):
        """How many good lines there are."""
        if "BAD" in said:
            self.fault(f"the guest of {name} is damaged: {said[-300:]}")
            return 0
        good, last = 0, None
        kind = "churn" if "churn" in said else "table"
        # Output may begin and end within a line.
        for line in said.split("\n")[1:-1]:
            found = re.fullmatch(r"(?:step|churn) (\d{8}) sum ([0-9a-f]{8}) ok", line.strip())
            if not found:
                continue
            number, total = int(found[1]), found[2]
            if last is not None and number != last + 1:
                self.fault(f"{name} printed {number} after {last}")
            last = number
            good += 1
            with self.lock:
                before = self.sums.setdefault((kind, number), total)
            if before != total:
                self.fault(f"{name}: {kind} {number} has sum {total}, and had {before}")
        return good

    # What operators do.

    def start(self):
        if len(self.machines()) >= MACHINES:
            return
        name = random.choice("abcdefgh") + str(random.randrange(10))
        guest = random.choice(["table", "table", "churn"])
        memory = "32M" if guest == "churn" else random.choice(["8M", "16M"])
        more = random.choice([[], [], ["--cpus", "2"], ["--disk", self.disk_image]])
        if guest == "churn":
            more = []
        self.command(
            "run", name, "--kernel", self.guests[guest], "--mem", memory, "--detach", *more
        )

    def restore(self):
        tags = self.tags()
        room = MACHINES - len(self.machines())
        if not tags or room < 1:
            return
        count = str(random.randint(1, min(room, 8)))
        more = random.choice([[], [], ["--paused"], ["--share-layout"], ["--no-confine"]])
        more += random.choice([[], [], [], ["--no-prefetch"], ["--no-common-memory"]])
        kill_after = random.random() if random.random() < 0.15 else None
        self.command(
            "restore", random.choice(tags), "-n", count, "--detach", *more, kill_after=kill_after
        )

    def commit(self):
        machines = self.machines()
        if not machines:
            return
        name = random.choice(machines)["name"]
        tag = "t" + str(random.randrange(12))
        env = {"SNAPSTORE_CHECK_COMMITS": "1"} if random.random() < 0.5 else None
        kill_after = random.random() * 2 if random.random() < 0.2 else None
        self.command("commit", tag, "--vm", name, "--replace", env=env, kill_after=kill_after)

    def of_one(self, *commands):
        machines = self.machines()
        if machines:
            self.command(random.choice(commands), random.choice(machines)["name"])

    def hear(self):
        machines = [m for m in self.machines() if m.get("state") in ("running", "paused")]
        if machines:
            self.listen(random.choice(machines)["name"])

    def look(self):
        for machine in self.machines():
            ending = machine.get("ending")
            # Why it ended is known where it is said.
            bad = ("forbidden", "panic", "triple", "KVM")
            if ending and any(word in str(ending) for word in bad):
                self.fault(f"{machine['name']} ended: {ending}")
        for pid, arguments, _ in self.processes():
            if "vm-machine" in arguments:
                try:
                    open_files = len(os.listdir(f"/proc/{pid}/fd"))
                except OSError:
                    continue
                if open_files > 150:
                    self.fault(f"process {pid} has {open_files} descriptors")

    def remove(self):
        tags = self.tags()
        if len(tags) > 3:
            self.command("rm", random.choice(tags))

    def collect(self):
        optimize = ["--optimize", "--max-seconds", str(random.randint(1, 3))]
        self.command("gc", *random.choice([[], optimize]))

    # What is touched first.

    def warm(self):
        tags = self.tags()
        if tags:
            self.command("warm", random.choice(tags))

    def recall(self):
        """Stops what was restored and restores it again: what it touched first is pushed."""
        tags = self.tags()
        if not tags or len(self.machines()) >= MACHINES:
            return
        tag, name = random.choice(tags), f"recalled{random.randrange(1000)}"
        for _ in range(2):
            code, _, _ = self.command("restore", tag, "--name", name, "--detach")
            if code != 0:
                return
            time.sleep(random.random() * 2)
            self.listen(name)
            self.command("stop", name)

    def count_pushed(self):
        _, page, _ = self.command("metrics")
        for family in (page or {}).get("metrics", []):
            for sample in family.get("samples", []):
                if sample.get("name") == "snapstore_mount_prefetch_pushed_pages_total":
                    mount = sample["labels"]["mount"]
                    with self.lock:
                        self.pushed[mount] = max(self.pushed.get(mount, 0), sample["value"])

    def spoil(self):
        """What is recorded may be damaged, cut, of another snapshot, or gone."""
        sets = glob.glob(os.path.join(self.environment["SNAPSTORE_DIR"], "working-sets", "*.memory"))
        if not sets:
            return
        path = random.choice(sets)
        how = random.choice(["damage", "cut", "exchange", "remove"])
        try:
            said = bytearray(open(random.choice(sets) if how == "exchange" else path, "rb").read())
            if how == "damage" and said:
                said[random.randrange(len(said))] ^= 1 << random.randrange(8)
            if how == "remove":
                os.remove(path)
            else:
                with open(path, "wb") as out:
                    out.write(said[: len(said) // 2] if how == "cut" else said)
            self.count(f"working set: {how}")
        except OSError:
            # Gone meanwhile, or the disk is full.
            pass

    def kill(self):
        word = random.choice(["vm-machine"] * 4 + ["--while-locked", "vm-host"])
        pid = self.some_process(word)
        if pid:
            try:
                os.kill(pid, signal.SIGKILL)
                self.count(f"killed {word}")
            except ProcessLookupError:
                pass

    def hang(self):
        pid = self.some_process(random.choice(["--while-locked", "vm-machine"]))
        if not pid:
            return
        try:
            os.kill(pid, signal.SIGSTOP)
            self.count("stopped a process")
            time.sleep(random.random() * 4)
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            pass

    def stop_all(self):
        self.command("stop", "--all")

    def operate(self, number):
        random.seed(SEED * 1000 + number)
        actions = (
            [self.start] * 6
            + [self.restore] * 6
            + [self.commit] * 10
            + [lambda: self.of_one("pause", "resume", "resume")] * 4
            + [lambda: self.of_one("stop")] * 4
            + [self.hear] * 10
            + [self.look] * 4
            + [self.remove] * 2
            + [self.collect] * 2
            + [self.recall] * 2
            + [self.warm] * 3
            + [self.count_pushed] * 2
            + [self.spoil]
            + [self.kill]
            + [self.hang]
            + ([self.stop_all] if number == 0 else [])
        )
        while time.monotonic() < self.over and len(self.faults) < 5:
            try:
                random.choice(actions)()
            except Exception as error:  # what this program did not expect is a fault, too
                self.fault(f"{type(error).__name__}: {error}")

    def fill(self):
        """The store's disk fills and empties."""
        path = os.path.join(self.disk, "filler")
        while time.monotonic() < self.over:
            time.sleep(random.uniform(5, 20))
            try:
                with open(path, "wb") as filler:
                    while True:
                        filler.write(bytes(1 << 20))
            except OSError:
                self.count("disk full")
            time.sleep(random.uniform(1, 4))
            os.remove(path)

    # The end.

    def finish(self):
        filler = os.path.join(self.disk, "filler")
        if os.path.exists(filler):
            os.remove(filler)
        for pid, _, _ in self.processes():
            try:
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                pass
        for machine in self.machines():
            if machine.get("state") == "running":
                self.listen(machine["name"])
        self.command("stop", "--all", allowed=(0,))
        self.nothing_left()
        self.command("gc", allowed=(0,))
        self.command("verify", "--read-data", allowed=(0,))
        leases = os.listdir(os.path.join(self.environment["SNAPSTORE_DIR"], "leases"))
        if leases:
            self.fault(f"leases are left: {leases}")
        for tag in self.tags():
            self.command("restore", tag, "--name", "last", "--detach", allowed=(0,))
            end = time.monotonic() + PATIENCE
            while self.listen("last") < 2 and time.monotonic() < end:
                time.sleep(0.2)
            if time.monotonic() >= end:
                self.fault(f"the snapshot {tag} does not go on")
            self.command("stop", "last", allowed=(0,))
        self.nothing_left()

    def nothing_left(self):
        end = time.monotonic() + 40
        while True:
            # What was killed with its supervisor is cleared away by whoever lists machines.
            self.machines()
            left = {
                "processes": self.processes(),
                "mounts": [
                    line.split()[1]
                    for line in open("/proc/self/mounts")
                    if line.split()[1].startswith(self.run_dir)
                ],
                "files": [
                    os.path.join(path, name)
                    for sub in ("vms", "mounts")
                    for path, dirs, files in os.walk(os.path.join(self.run_dir, sub))
                    for name in dirs + files
                ],
            }
            if not any(left.values()):
                return
            if time.monotonic() > end:
                self.fault(f"something is left: {left}")
                return
            time.sleep(0.5)

    def clean(self):
        for pid, _, _ in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        for line in reversed(open("/proc/self/mounts").read().splitlines()):
            if line.split()[1].startswith(self.work):
                subprocess.run(["umount", "-l", line.split()[1]], check=False)
        if self.faults and not os.environ.get("SOAK_CLEAN"):
            say("what there is of files stays in", self.work)
        else:
            shutil.rmtree(self.work, ignore_errors=True)

    def soak(self):
        self.command("init", allowed=(0,))
        threads = [threading.Thread(target=self.operate, args=(n,)) for n in range(OPERATORS)]
        threads.append(threading.Thread(target=self.fill))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if len(self.faults) < 5:
            self.finish()


def main():
    for device in ("/dev/kvm", "/dev/fuse"):
        if not os.access(device, os.R_OK | os.W_OK):
            say(f"SKIPPED: no {device}")
            return 0
    if os.geteuid() != 0:
        say("SKIPPED: the small disk needs root")
        return 0
    soak = Soak()
    say(f"seed {SEED}, {SECONDS:.0f} s, {MACHINES} machines, in {soak.work}")
    try:
        soak.soak()
    finally:
        soak.clean()
    for what, count in sorted(soak.counts.items()):
        say(f"{count:6} {what}")
    say(f"{len(soak.sums)} different lines of guests")
    say(f"{sum(soak.pushed.values()):.0f} pages of working sets were pushed in {len(soak.pushed)} mounts")
    if soak.faults:
        say(f"{len(soak.faults)} faults, the first: {soak.faults[0]}")
        return 1
    say("nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
