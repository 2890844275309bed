"""Content-addressed snapshots of virtual machines.

A :class:`Store` calls the program ``snapstore`` and reads its JSON.
"""

from .errors import Busy, Damaged, NotFound, SnapstoreError, UsageError
from .machine import Machine, Output
from .mount import Mount
from .store import Image, ImageDiff, Snapshot, Store

__all__ = [
    "Busy",
    "Damaged",
    "Image",
    "ImageDiff",
    "Machine",
    "Mount",
    "NotFound",
    "Output",
    "Snapshot",
    "SnapstoreError",
    "Store",
    "UsageError",
]
