"""Running machines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, overload

from .program import Program


@dataclass(frozen=True)
class Output:
    """What a command in a guest printed, and how it ended."""

    #: That of the command; 128 and the signal's number if a signal ended it.
    code: int
    stdout: str
    stderr: str
    #: Whether it was killed since its time was over.
    timed_out: bool = False
    #: Bytes of both outputs that are not here: of each, 16 MiB are.
    omitted_bytes: int = 0


class Machine:
    """A machine by its name."""

    def __init__(self, program: Program, name: str) -> None:
        self._program = program
        self.name = name

    def status(self) -> dict[str, Any]:
        """All that ``ps`` tells of it."""
        return self._program.json("ps", self.name)

    def exec(self, *command: str, timeout_seconds: int | None = None) -> Output:
        """Runs a command in the guest, through its agent, to its end, however it ends.

        :raises SnapstoreError: if it was not run: there is no such machine, agent or command.
        """
        limit = [] if timeout_seconds is None else ["--timeout", str(timeout_seconds)]
        answer = self._program.json("exec", self.name, *limit, "--", *command, told="exit_code")
        code, signal = answer["exit_code"], answer["signal"]
        return Output(
            code=128 + signal if code is None else code,
            stdout=answer["stdout"],
            stderr=answer["stderr"],
            timed_out=answer["timed_out"],
            omitted_bytes=answer["stdout_omitted_bytes"] + answer["stderr_omitted_bytes"],
        )

    def pause(self) -> None:
        """Stops its vCPUs."""
        self._program.json("pause", self.name)

    def resume(self) -> None:
        """Lets it run."""
        self._program.json("resume", self.name)

    def stop(self) -> None:
        """Ends it."""
        self._program.json("stop", self.name)

    def __repr__(self) -> str:
        return f"Machine({self.name!r})"


class Machines(Sequence[Machine]):
    """Machines that were restored together. A context manager: they are stopped in the end."""

    def __init__(self, machines: Sequence[Machine]) -> None:
        self._machines = list(machines)

    @overload
    def __getitem__(self, at: int) -> Machine: ...

    @overload
    def __getitem__(self, at: slice) -> list[Machine]: ...

    def __getitem__(self, at: int | slice) -> Machine | list[Machine]:
        return self._machines[at]

    def __len__(self) -> int:
        return len(self._machines)

    def __iter__(self) -> Iterator[Machine]:
        return iter(self._machines)

    def __enter__(self) -> Machines:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for machine in self._machines:
            machine.stop()
