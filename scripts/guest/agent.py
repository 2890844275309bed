"""The program whose memory the guest images show.

It imports what a service typically imports, builds live objects, and then waits
on the second serial port for one command per line. It answers `ok COMMAND` when
the work is done and stays quiet until the next line, so that the host can stop
the machine at a known point.
"""

import array
import asyncio
import hashlib
import importlib
import inspect
import json
import logging
import os
import random
import sqlite3
import ssl
import sys
import tty

import pygments
import pygments.formatters
import pygments.lexers
import yaml
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

PORT = "/dev/ttyS1"
HOME = "/var/lib/agent"
MIB = 1 << 20

# Everything reachable from here stays alive from one image to the next.
live = {}


def log_lines(size):
    """Yields about `size` bytes of lines that look like a service's log."""
    done = 0
    while done < size:
        line = (
            f"2024-05-{random.randint(1, 31):02d}T{random.randint(0, 23):02d}:"
            f"{random.randint(0, 59):02d}:{random.randint(0, 59):02d}.{random.randint(0, 999):03d}Z "
            f"{random.choice(('INFO', 'INFO', 'DEBUG', 'WARN'))} worker-{random.randint(1, 16)} "
            f"request={random.getrandbits(64):016x} path=/v1/items/{random.randint(1, 50000)} "
            f"status={random.choice((200, 200, 200, 304, 404, 500))} bytes={random.randint(80, 90000)}\n"
        )
        done += len(line)
        yield line


def start():
    """What a freshly started service holds: parsed documents, tables, keys."""
    documents = [
        {"id": i, "name": f"item-{i}", "tags": [f"t{i % 7}", f"t{i % 11}"], "price": i * 1.25}
        for i in range(20000)
    ]
    text = json.dumps(documents)
    live["documents"] = json.loads(text)
    live["text"] = text

    database = sqlite3.connect(os.path.join(HOME, "items.db"))
    database.execute("create table items (id integer primary key, name text, price real)")
    database.executemany(
        "insert into items values (?, ?, ?)",
        ((d["id"], d["name"], d["price"]) for d in documents),
    )
    database.execute("create index by_name on items (name)")
    database.commit()
    live["database"] = database
    live["rows"] = database.execute("select * from items order by name limit 2000").fetchall()

    live["config"] = yaml.safe_load(yaml.safe_dump(documents[:200]))
    live["page"] = pygments.highlight(
        inspect.getsource(json.decoder),
        pygments.lexers.PythonLexer(),
        pygments.formatters.HtmlFormatter(full=True),
    )
    key = ec.generate_private_key(ec.SECP256R1())
    live["key"] = key
    live["signature"] = key.sign(text.encode(), ec.ECDSA(hashes.SHA256()))
    live["sealed"] = AESGCM(AESGCM.generate_key(128)).encrypt(os.urandom(12), text[:65536].encode(), None)
    live["tls"] = ssl.create_default_context()
    logging.basicConfig(filename=os.path.join(HOME, "agent.log"), level=logging.INFO)
    logging.info("started with %d documents", len(documents))
    os.sync()


def small():
    """Writes a module to the disk, imports it and runs it."""
    path = os.path.join(HOME, "plugin.py")
    with open(path, "w", encoding="utf-8") as out:
        out.write("import collections\nimport hashlib\n\n")
        for i in range(60):
            out.write(
                f"def rule_{i}(item):\n"
                f"    '''Rule {i}: keeps the item unless its price says otherwise.'''\n"
                f"    if item['price'] > {i * 37} and 't{i % 7}' in item['tags']:\n"
                f"        return {{'rule': {i}, 'id': item['id'], 'score': item['price'] / {i + 1}}}\n"
                f"    return None\n\n"
            )
        out.write(
            "RULES = [value for name, value in list(globals().items()) if name.startswith('rule_')]\n\n"
            "def run(items):\n"
            "    found = collections.defaultdict(list)\n"
            "    for item in items:\n"
            "        for rule in RULES:\n"
            "            hit = rule(item)\n"
            "            if hit:\n"
            "                found[hit['rule']].append(hit)\n"
            "    return found\n"
        )
        out.flush()
        os.fsync(out.fileno())
    sys.path.insert(0, HOME)
    importlib.invalidate_caches()
    plugin = importlib.import_module("plugin")
    live["plugin"] = plugin
    live["found"] = plugin.run(live["documents"][:40])
    logging.info("plugin found %d rules", len(live["found"]))


def medium():
    """Dirties about 8 MiB: log text, part in the process and part in a file."""
    live["log"] = list(log_lines(2 * MIB))
    with open(os.path.join(HOME, "requests.log"), "w", encoding="ascii") as out:
        out.writelines(log_lines(3 * MIB))


def large():
    """Dirties about 64 MiB: random bytes, numbers and small objects."""
    live["random"] = os.urandom(16 * MIB)
    # Filled in place: an array that grows leaves copies of itself in freed memory.
    numbers = live["numbers"] = array.array("d", bytes(16 * MIB))
    for i in range(len(numbers)):
        numbers[i] = random.gauss(0, 1)
    live["objects"] = [
        {"id": i, "name": f"object-{i}", "digest": hashlib.sha1(b"%d" % i).hexdigest(), "value": i / 7}
        for i in range(56000)
    ]


COMMANDS = {"small": small, "medium": medium, "large": large}


async def serve():
    port = open(PORT, "r+b", buffering=0)
    tty.setraw(port.fileno())
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), port)
    os.set_blocking(port.fileno(), True)
    port.write(b"ok start\n")
    while line := await reader.readline():
        command = line.decode("ascii", "replace").strip()
        try:
            COMMANDS[command]()
            answer = f"ok {command}\n"
        except Exception as error:
            logging.exception("command %s", command)
            answer = f"failed {command}: {error!r}\n"
        port.write(answer.encode())


start()
asyncio.run(serve())
