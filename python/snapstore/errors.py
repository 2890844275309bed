"""Failures of the program, by its exit code."""

from __future__ import annotations


class SnapstoreError(Exception):
    """The program ended with a failure.

    ``code`` is its exit code, or ``None`` if it could not be started; the message is what it said.
    """

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code


class UsageError(SnapstoreError):
    """What was asked for cannot be meant (exit code 2)."""


class NotFound(SnapstoreError):
    """There is no such tag, snapshot, machine or mount (exit code 3)."""


class Damaged(SnapstoreError):
    """Stored data is damaged (exit code 4). ``answer`` is what the program found, if it told."""

    answer: dict[str, object] | None = None


class Busy(SnapstoreError):
    """Another process holds what is needed (exit code 5); trying again may help."""


class Unanswered(SnapstoreError):
    """A remote did not answer (exit code 6): what was asked for may have happened."""


_BY_CODE: dict[int, type[SnapstoreError]] = {
    2: UsageError,
    3: NotFound,
    4: Damaged,
    5: Busy,
    6: Unanswered,
}


def of(code: int, message: str) -> SnapstoreError:
    """The exception for an exit code."""
    return _BY_CODE.get(code, SnapstoreError)(message, code)
