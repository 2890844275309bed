"""A mounted snapshot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .program import Program

if TYPE_CHECKING:
    import numpy
    import numpy.typing

    Pages = numpy.typing.NDArray[numpy.uint8]


class Mount:
    """A snapshot as files. A context manager: it is unmounted in the end."""

    def __init__(self, program: Program, dir: Path, owns_dir: bool) -> None:
        self._program = program
        self._owns_dir = owns_dir
        self.dir = dir

    @property
    def memory(self) -> Path:
        """The guest's memory, ``memory.bin``."""
        return self.dir / "memory.bin"

    def disk(self, name: str) -> Path:
        """The disk of this name."""
        return self.dir / f"{name}.img"

    def manifest(self) -> dict[str, Any]:
        """What the snapshot holds."""
        manifest: dict[str, Any] = json.loads((self.dir / "manifest.json").read_bytes())
        return manifest

    def pages(self, file: Path | None = None) -> Pages:
        """The memory, or another file, as a read-only array of shape (pages, page size in bytes).

        Bytes are read when they are touched. The file's length has to be a multiple of a page.
        The array keeps the mount busy: drop it before the mount is undone.
        """
        import numpy

        path = file or self.memory
        page_size = int(self.manifest()["page_size_bytes"])
        bytes_ = numpy.memmap(path, dtype=numpy.uint8, mode="r")
        return bytes_.reshape(-1, page_size)

    def unmount(self, lazy: bool = True) -> None:
        """Undoes the mount. If lazy, who still has a file open keeps it."""
        self._program.json("umount", *(["--lazy"] if lazy else []), self.dir)
        if self._owns_dir:
            shutil.rmtree(self.dir, ignore_errors=True)

    def __enter__(self) -> Mount:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.unmount()
