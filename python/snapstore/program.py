"""Calling the program."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import errors

StrPath = str | os.PathLike[str]


class Program:
    """The program and the store that it is to use."""

    def __init__(self, store: StrPath | None, program: StrPath | None) -> None:
        self._program = os.fspath(program or os.environ.get("SNAPSTORE") or "snapstore")
        self.store = None if store is None else Path(store)

    def command(self, *arguments: StrPath) -> list[str]:
        """The whole command line."""
        store = [] if self.store is None else ["--store", os.fspath(self.store)]
        return [self._program, *store, *(os.fspath(argument) for argument in arguments)]

    def json(self, *arguments: StrPath, told: str | None = None) -> dict[str, Any]:
        """Runs a command to its end; its answer.

        An answer with the field ``told`` is one, whatever the exit code.

        :raises SnapstoreError: as its exit code says. A finding of damage carries the answer.
        """
        done = self._run(self.command("--json", *arguments))
        answer = _parse(done.stdout)
        if answer is not None and told in answer:
            return answer
        if done.returncode != 0:
            error = errors.of(done.returncode, _said(done.stderr))
            if isinstance(error, errors.Damaged):
                error.answer = answer
            raise error
        return answer or {}

    def _run(self, command: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
        try:
            return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        except OSError as error:
            raise errors.SnapstoreError(
                f"cannot start {self._program}: {error.strerror}; install it, or set SNAPSTORE"
            ) from error


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        answer = json.loads(text)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def _said(stderr: bytes) -> str:
    text = stderr.decode(errors="replace").strip()
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    return lines[-1].removeprefix("error: ") if lines else text or "it did not say why"
