"""Cloud Hypervisor's API as its published description has it: requests that it does not
describe are refused. There is no guest: memory is mapped and written as Cloud Hypervisor does,
and a test has pages written by PUT /api/v1/test.write. With DOUBLE_COPIES it does not know how
to map a snapshot's memory, as releases do not."""

import argparse
import json
import mmap
import os
import socket

from rest import PAGE, Failed, Refused, check, listen

MODES = ("Copy", "OnDemand") if os.environ.get("DOUBLE_COPIES") else ("Copy", "OnDemand", "CopyOnWrite")
VERSION = os.environ.get("DOUBLE_VERSION", "53.0")
# Until 51 a restore has nothing to choose.
CHOICES = {"memory_restore_mode": MODES, "resume": bool} if float(VERSION) >= 52 else {}
# Path: the fields of the body; none if there is no body.
REQUESTS = {
    "vm.pause": None,
    "vm.resume": None,
    "vm.snapshot": {"destination_url": str},
    "vm.restore": {"*source_url": str, "prefault": bool, **CHOICES},
    "test.write": {"*page": int, "*fill": int},
}


class Machine:
    FAILURE = Failed.status

    @staticmethod
    def told(error):
        return ["Error from API", error]

    def __init__(self, boot):
        self.state = None
        self.config = None
        self.memory = None
        self.disks = []
        # Where it has clusters of qcow2 images of which its file says nothing until the guest flushes.
        self.unwritten = []
        self.refuses = os.environ.get("DOUBLE_FAILS") == "resume"
        if boot:
            self.config = json.load(open(boot))
            self.memory = mmap.mmap(-1, self.config["memory"]["size"], mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self.open_disks()
            self.state = "Running"

    def open_disks(self):
        self.disks = [open(disk["path"], "r+b", buffering=0) for disk in self.config["disks"]]

    def open_lines(self):
        for name in ("serial", "console", "debug_console"):
            line = self.config.get(name, {"mode": "Off"})
            if line["mode"] == "File":
                open(line["file"], "w").close()
            elif line["mode"] == "Socket":
                if name != "serial":
                    raise Failed(f"{name} cannot be a socket")
                self.serial = socket.socket(socket.AF_UNIX)
                self.serial.bind(line["socket"])

    def needs(self, *states):
        if self.state not in states:
            raise Failed(f"the VM is in the state {self.state}")

    def answer(self, method, path, body):
        if not path.startswith("/api/v1/"):
            raise Refused(f"no such path: {path}")
        path = path[len("/api/v1/"):]
        if method == "GET" and path == "vmm.ping":
            return {"build_version": f"v{VERSION}", "version": f"{VERSION}.0", "pid": os.getpid(), "features": ["kvm"]}
        if method == "GET" and path == "vm.info":
            self.needs("Running", "Paused")
            return {"config": self.config, "state": self.state, "memory_actual_size": len(self.memory)}
        if method != "PUT" or path not in REQUESTS:
            raise Refused(f"no such request: {method} {path}")
        if REQUESTS[path] is None and body is not None:
            raise Refused("a body is not expected")
        if REQUESTS[path] is not None:
            check(body, REQUESTS[path], "the body")
        if path == "vm.pause":
            self.needs("Running")
            self.state = "Paused"
            if VERSION != "53.0":
                self.flush()
        elif path == "vm.resume":
            self.needs("Paused")
            if self.refuses:
                self.refuses = False
                raise Failed("not now")
            self.state = "Running"
        elif path == "vm.snapshot":
            self.needs("Paused")
            self.snapshot(self.directory(body["destination_url"]))
        elif path == "vm.restore":
            if self.state is not None:
                raise Failed("the VM is created already")
            self.restore(self.directory(body["source_url"]), body.get("memory_restore_mode", "Copy"))
            self.state = "Running" if body.get("resume") else "Paused"
        else:
            at = body["page"] * PAGE
            self.memory[at:at + PAGE] = bytes([body["fill"]]) * PAGE
            for disk in self.disks:
                self.write_disk(disk, at, bytes([body["fill"]]) * PAGE)
        return None

    @staticmethod
    def directory(url):
        if not url.startswith("file:///"):
            raise Failed(f"{url} is no URL of a directory")
        return url[len("file://"):]

    def snapshot(self, target):
        for name, text in (("config.json", self.config), ("state.json", {"state": "of the double"})):
            with open(os.path.join(target, name), "x") as file:
                json.dump(text, file)
        if os.environ.get("DOUBLE_FAILS") == "snapshot":
            os.unlink(os.path.join(target, "state.json"))
            raise Failed("no space left")
        with open(os.path.join(target, "memory-ranges"), "xb") as file:
            file.write(self.memory)

    def restore(self, source, mode):
        self.config = json.load(open(os.path.join(source, "config.json")))
        json.load(open(os.path.join(source, "state.json")))
        if any(net.get("fds") for net in self.config.get("net") or []):
            raise Refused("a network interface lacks its files")
        self.open_lines()
        with open(os.path.join(source, "memory-ranges"), "rb") as file:
            size = self.config["memory"]["size"]
            if os.fstat(file.fileno()).st_size != size:
                raise Failed("the memory's length is wrong")
            if mode == "CopyOnWrite" and not self.config["memory"].get("shared"):
                self.memory = mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
            else:
                self.memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                self.memory[:] = file.read()
        self.open_disks()

    def table(self, disk, at, data):
        """An entry of a table of a qcow2 image stays in memory until the guest flushes, or with
        versions after 53.0 until it is paused."""
        self.unwritten.append((disk, at, data))

    def flush(self):
        for disk, at, data in self.unwritten:
            os.pwrite(disk.fileno(), data, at)
        self.unwritten = []

    def write_disk(self, disk, at, data):
        """Into a raw image, or a new cluster of a qcow2 image whose first table is not there."""
        head = os.pread(disk.fileno(), 104, 0)
        if head[:4] != b"QFI\xfb":
            os.pwrite(disk.fileno(), data, at)
            return
        number = lambda at, size: int.from_bytes(head[at:at + size], "big")
        cluster = 1 << number(20, 4)
        l1 = number(40, 8)
        mask = 0x00fffffffffffe00

        def entry(at):
            held = [data for one, place, data in self.unwritten if (one, place) == (disk, at)]
            data = held[-1] if held else os.pread(disk.fileno(), 8, at)
            return int.from_bytes(data, "big") & mask

        def new(at):
            end = os.fstat(disk.fileno()).st_size
            os.ftruncate(disk.fileno(), end + cluster)
            self.table(disk, at, (end | 1 << 63).to_bytes(8, "big"))
            return end
        l2 = entry(l1) or new(l1)
        place = l2 + at // cluster * 8
        found = entry(place)
        if not found:
            found = new(place)
            name = os.pread(disk.fileno(), number(16, 4), number(8, 8)).decode()
            with open(name, "rb") as backing:
                start = at // cluster * cluster
                os.pwrite(disk.fileno(), os.pread(backing.fileno(), cluster, start), found)
        os.pwrite(disk.fileno(), data, found + at % cluster)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--api-socket")
    parser.add_argument("--boot")
    options = parser.parse_args()
    if options.version:
        print(f"cloud-hypervisor v{VERSION}")
        return
    listen(Machine(options.boot), options.api_socket)


if __name__ == "__main__":
    main()
