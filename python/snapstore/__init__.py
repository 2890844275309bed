"""Content-addressed snapshots of virtual machines.

A :class:`Store` calls the program ``snapstore`` and reads its JSON.
"""

from .errors import Busy, Damaged, NotFound, SnapstoreError, Unanswered, UsageError
from .machine import Machine, Machines, Output
from .mount import Mount
from .store import Image, ImageDiff, Snapshot, Store, Tag

__all__ = [
    "Busy",
    "Damaged",
    "Image",
    "ImageDiff",
    "Machine",
    "Machines",
    "Mount",
    "NotFound",
    "Output",
    "Snapshot",
    "SnapstoreError",
    "Store",
    "Tag",
    "Unanswered",
    "UsageError",
]
