"""Firecracker's API as its published descriptions have it (swagger, of 1.12 to 1.17; DOUBLE_VERSION
says of which): requests that this version does not describe are refused. There is no guest: memory
is mapped and written as Firecracker does, and a test has pages written by PUT /test/write, and
taken from the guest, as its balloon does, by PUT /test/discard. It goes into a chroot, as under
the jailer, if DOUBLE_JAIL names one."""

import argparse
import ctypes
import json
import mmap
import os
import re
import sys

from rest import PAGE, Refused, check, listen

VERSION = os.environ.get("DOUBLE_VERSION", "1.16.0")
MAP_FIXED = 0x10
NUMBERS = tuple(int(number) for number in re.findall(r"\d+", VERSION)[:2])


def since(major, minor, fields):
    return fields if NUMBERS >= (major, minor) else {}


# Path and method: the fields, with their types; those that are needed have a star.
REQUESTS = {
    ("PATCH", "/vm"): {"*state": ("Paused", "Resumed")},
    ("PUT", "/snapshot/create"): {
        "*mem_file_path": str, "*snapshot_path": str, "snapshot_type": ("Full", "Diff")},
    ("PUT", "/snapshot/load"): {
        "*snapshot_path": str, "enable_diff_snapshots": bool,
        "mem_file_path": str, "mem_backend": {"*backend_type": ("File", "Uffd"), "*backend_path": str},
        "resume_vm": bool, "network_overrides": [{"*iface_id": str, "*host_dev_name": str}],
        **since(1, 13, {"track_dirty_pages": bool}),
        **since(1, 16, {"vsock_override": {"*uds_path": str}, "clock_realtime": bool}),
        **since(1, 17, {"huge_pages": ("Snapshot", "None", "Transparent", "2M")})},
    ("PATCH", "/drives/{id}"): {"*drive_id": str, "path_on_host": str},
    ("PUT", "/test/write"): {"*page": int, "*fill": int},
    ("PUT", "/test/discard"): {"*page": int, "*count": int},
}
READABLE = ["/", "/version", "/vm/config", "/machine-config"]


class Machine:
    FAILURE = "400 Bad Request"

    @staticmethod
    def told(error):
        return {"fault_message": error}

    def __init__(self, options):
        self.options = options
        self.state = "Not started"
        self.memory = None
        self.dirty = set()
        self.config = {}
        self.drives = {}
        if options.boot:
            self.config = json.load(open(options.boot))
            size = self.config["machine-config"]["mem_size_mib"] << 20
            self.memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            for drive in self.config["drives"]:
                self.open_drive(drive["drive_id"], drive["path_on_host"], drive["is_read_only"])
            self.state = "Running"

    def open_drive(self, name, path, read_only=False):
        self.drives[name] = open(path, "rb" if read_only else "r+b", buffering=0)

    def needs(self, *states):
        if self.state not in states:
            raise Refused(f"the operation is not supported in the state {self.state}")

    def answer(self, method, path, body):
        if method == "GET" and path in READABLE and body is None:
            return {
                "/": {"id": "double", "state": self.state, "vmm_version": VERSION, "app_name": "Firecracker"},
                "/version": {"firecracker_version": VERSION},
                "/vm/config": self.config,
                "/machine-config": self.config.get("machine-config", {}),
            }[path]
        described = re.sub(r"^/drives/[A-Za-z0-9_]+$", "/drives/{id}", path)
        wanted = REQUESTS.get((method, described))
        if wanted is None:
            raise Refused(f"Invalid request method and/or path: {method} {path}.")
        check(body, wanted, "the body")
        if path == "/vm":
            self.needs("Running", "Paused")
            if os.environ.get("DOUBLE_FAILS") == "pause":
                raise Refused("it was asked to pause")
            self.state = {"Paused": "Paused", "Resumed": "Running"}[body["state"]]
        elif path == "/snapshot/create":
            self.needs("Paused")
            self.create(body)
        elif path == "/snapshot/load":
            self.needs("Not started")
            self.load(body)
        elif path.startswith("/drives/"):
            self.needs("Running", "Paused")
            if body["drive_id"] != path.rsplit("/", 1)[1] or body["drive_id"] not in self.drives:
                raise Refused("no such drive")
            self.open_drive(body["drive_id"], body["path_on_host"])
            for drive in self.config["drives"]:
                if drive["drive_id"] == body["drive_id"]:
                    drive["path_on_host"] = body["path_on_host"]
        elif path == "/test/discard":
            self.discard(body["page"] * PAGE, body["count"] * PAGE)
        else:
            at = body["page"] * PAGE
            self.memory[at:at + PAGE] = bytes([body["fill"]]) * PAGE
            self.dirty.add(body["page"])
            for drive in self.drives.values():
                if drive.writable():
                    os.pwrite(drive.fileno(), bytes([body["fill"]]) * PAGE, at)
        return None

    def discard(self, at, length):
        """Memory without a file takes the place of a mapped one's part: only so is it zero."""
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory)) + at
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        wanted = mmap.PROT_READ | mmap.PROT_WRITE
        how = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
        numbers = (ctypes.c_size_t(length), wanted, how, -1, ctypes.c_long(0))
        if libc.mmap(ctypes.c_void_p(start), *numbers) != start:
            raise Refused(os.strerror(ctypes.get_errno()))

    def create(self, body):
        # From 1.13 on a diff without a log has whatever mincore(2) says is at hand.
        if body.get("snapshot_type") == "Diff" and not self.tracks and NUMBERS < (1, 13):
            raise Refused("Diff snapshots are not allowed on uVMs with dirty page tracking disabled.")
        if os.environ.get("DOUBLE_FAILS") == "create":
            raise Refused("no space left")
        state = {"config": self.config, "state": "of the double"}
        with open(body["snapshot_path"], "wb") as file:
            file.write(json.dumps(state).encode())
        file = os.open(body["mem_file_path"], os.O_WRONLY | os.O_CREAT)
        os.ftruncate(file, len(self.memory))
        pages = range(len(self.memory) // PAGE)
        if body.get("snapshot_type") == "Diff" and self.tracks:
            pages = sorted(self.dirty)
        for page in pages:
            part = self.memory[page * PAGE:(page + 1) * PAGE]
            if part.strip(b"\0"):
                os.pwrite(file, part, page * PAGE)
        os.close(file)
        self.dirty.clear()

    @property
    def tracks(self):
        return self.config["machine-config"].get("track_dirty_pages", False)

    def load(self, body):
        if ("mem_file_path" in body) == ("mem_backend" in body):
            raise Refused("either mem_backend or mem_file_path")
        state = json.load(open(body["snapshot_path"]))
        self.config = state["config"]
        machine = self.config["machine-config"]
        machine["track_dirty_pages"] = bool(
            body.get("enable_diff_snapshots") or body.get("track_dirty_pages"))
        if body.get("huge_pages", "Snapshot") != "Snapshot":
            machine["huge_pages"] = body["huge_pages"]
        if machine.get("huge_pages") == "2M" and body["mem_backend"]["backend_type"] == "File":
            raise Refused("Cannot restore hugetlbfs backed snapshot by mapping the memory file.")
        for drive in self.config["drives"]:
            self.open_drive(drive["drive_id"], drive["path_on_host"], drive["is_read_only"])
        known = {net["iface_id"] for net in self.config["network-interfaces"]}
        for net in body.get("network_overrides", []):
            if net["iface_id"] not in known:
                raise Refused("no such interface")
        file = os.open(body["mem_backend"]["backend_path"], os.O_RDONLY)
        self.memory = mmap.mmap(file, 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        if len(self.memory) != self.config["machine-config"]["mem_size_mib"] << 20:
            raise Refused("the memory's length is wrong")
        os.close(file)
        self.state = "Running" if body.get("resume_vm") else "Paused"


def enter_jail(dir):
    """As the jailer does: a mount namespace whose root is the directory, and another user."""
    new_namespace, bind, recursive, slave, detach = 0x20000, 0x1000, 0x4000, 0x80000, 2
    pivot_root = 155
    libc = ctypes.CDLL(None, use_errno=True)

    def done(result):
        if result != 0:
            raise OSError(ctypes.get_errno(), "the jail")

    path = dir.encode()
    done(libc.unshare(new_namespace))
    done(libc.mount(None, b"/", None, slave | recursive, None))
    done(libc.mount(path, path, None, bind | recursive, None))
    os.chdir(dir)
    os.mkdir("old_root")
    done(libc.syscall(pivot_root, b".", b"old_root"))
    os.chdir("/")
    done(libc.umount2(b"old_root", detach))
    os.rmdir("old_root")
    user = int(os.environ["DOUBLE_USER"])
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--api-sock")
    parser.add_argument("--id")
    parser.add_argument("--boot")
    options = parser.parse_args()
    if options.version:
        print(f"Firecracker v{VERSION}\n\nSupported snapshot data format versions: v8.0.0")
        return
    if "DOUBLE_JAIL" in os.environ:
        enter_jail(os.environ["DOUBLE_JAIL"])
    if options.id and not re.fullmatch(r"[A-Za-z0-9-]{1,64}", options.id):
        sys.exit("the id is not valid")
    listen(Machine(options), options.api_sock)


if __name__ == "__main__":
    main()
