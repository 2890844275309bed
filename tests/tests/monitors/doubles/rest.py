"""What doubles of monitors have in common: a REST interface on a UNIX socket, and bodies that
are checked against what is described."""

import json
import socket

PAGE = 4096


class Refused(Exception):
    status = "400 Bad Request"


class Failed(Refused):
    """A request that was understood."""

    status = "500 Internal Server Error"


def check(value, wanted, what):
    if isinstance(wanted, tuple):
        if value not in wanted:
            raise Refused(f"{what} is {value!r}, none of {wanted}")
    elif isinstance(wanted, list):
        if not isinstance(value, list):
            raise Refused(f"{what} is no list")
        for one in value:
            check(one, wanted[0], what)
    elif isinstance(wanted, dict):
        if not isinstance(value, dict):
            raise Refused(f"{what} is no object")
        known = {name.lstrip("*"): kind for name, kind in wanted.items()}
        for name, one in value.items():
            if name not in known:
                raise Refused(f"unknown field `{name}` in {what}")
            check(one, known[name], f"{what}.{name}")
        for name in wanted:
            if name.startswith("*") and name[1:] not in value:
                raise Refused(f"missing field `{name[1:]}` in {what}")
    elif not isinstance(value, wanted):
        raise Refused(f"{what} is {value!r}")


def serve(machine, client):
    data = b""
    while b"\r\n\r\n" not in data:
        part = client.recv(65536)
        if not part:
            return
        data += part
    head, body = data.split(b"\r\n\r\n", 1)
    lines = head.decode().split("\r\n")
    method, path, version = lines[0].split(" ")
    headers = {key.lower(): value.strip() for key, value in (line.split(":", 1) for line in lines[1:])}
    length = int(headers.get("content-length", 0))
    while len(body) < length:
        body += client.recv(65536)
    try:
        if version != "HTTP/1.1":
            raise Refused("the version of HTTP")
        answer = machine.answer(method, path, json.loads(body) if body else None)
        status = "204 No Content" if answer is None else "200 OK"
        text = b"" if answer is None else json.dumps(answer).encode()
    except (Refused, OSError, ValueError) as error:
        status = getattr(error, "status", machine.FAILURE)
        text = json.dumps(machine.told(str(error))).encode()
    client.sendall(
        f"HTTP/1.1 {status}\r\nConnection: keep-alive\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text)


def listen(machine, path):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    while True:
        client, _ = listener.accept()
        with client:
            try:
                serve(machine, client)
            except OSError:
                pass  # who asked has gone
