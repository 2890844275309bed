"""A store."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .machine import Machine, Machines
from .mount import Mount
from .program import Program, StrPath


@dataclass(frozen=True)
class Image:
    """An image of a snapshot."""

    name: str
    #: ``memory``, ``disk`` or ``file``.
    role: str
    size_bytes: int
    #: Pages that are not zero.
    nonzero_pages: int
    #: Pages that differ from the parent's.
    changed_pages: int

    @staticmethod
    def _of(value: Mapping[str, Any]) -> Image:
        return Image(**{name: value[name] for name in Image.__dataclass_fields__})


@dataclass(frozen=True)
class Snapshot:
    """A snapshot with one of its tags."""

    tag: str
    id: str
    parent: str | None
    images: tuple[Image, ...]
    #: What its commit added to the store.
    added_bytes: int
    #: What the commit warned of.
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tag:
    """A tag, as :meth:`Store.tags` lists it."""

    name: str
    id: str
    parent: str | None
    created: datetime
    labels: Mapping[str, str]
    protected: bool


@dataclass(frozen=True)
class ImageDiff:
    """How an image differs between two snapshots."""

    name: str
    changed_pages: int
    #: Offset and length of each range, in bytes.
    ranges: tuple[tuple[int, int], ...]


class Store:
    """A store of snapshots.

    :param path: its directory; without one the program's default.
    :param program: the program; else ``$SNAPSTORE``, else ``snapstore`` in ``PATH``.
    """

    def __init__(self, path: StrPath | None = None, program: StrPath | None = None) -> None:
        self._program = Program(path, program)

    @property
    def path(self) -> Path | None:
        """The store's directory, if one was named."""
        return self._program.store

    def init(self, page_size: str | None = None) -> None:
        """Creates the store. A page is ``4K`` (the default), ``16K`` or ``64K``."""
        size = [] if page_size is None else ["--page-size", page_size]
        self._program.json("init", *size)

    def commit(
        self,
        tag: str,
        *,
        memory: StrPath | None = None,
        memory_diff: StrPath | None = None,
        disks: Mapping[str, StrPath] | None = None,
        disk_diffs: Mapping[str, StrPath] | None = None,
        files: Mapping[str, StrPath] | None = None,
        vmstate: StrPath | None = None,
        vm: str | None = None,
        parent: str | None = None,
        no_parent: bool = False,
        inherit: bool = False,
        labels: Mapping[str, str] | None = None,
        expires: str | None = None,
        replace: bool = False,
    ) -> Snapshot:
        """Stores images as a snapshot, or a running machine (``vm``)."""
        options: list[StrPath] = ["commit", tag]
        for name, value in (
            ("--memory", memory),
            ("--memory-diff", memory_diff),
            ("--vmstate", vmstate),
            ("--vm", vm),
            ("--parent", parent),
            ("--expires", expires),
        ):
            if value is not None:
                options += [name, value]
        for name, images in (("--disk", disks), ("--disk-diff", disk_diffs), ("--file", files)):
            for image, path in (images or {}).items():
                options += [name, f"{image}={os.fspath(path)}"]
        for key, text in (labels or {}).items():
            options += ["--label", f"{key}={text}"]
        options += _flags(no_parent=no_parent, inherit=inherit, replace=replace)
        answer = self._program.json(*options)
        return Snapshot(
            tag=answer["tag"],
            id=answer["id"],
            parent=answer.get("parent"),
            images=tuple(map(Image._of, answer["images"])),
            added_bytes=answer["added_bytes"],
            warnings=tuple(answer.get("warnings", ())),
        )

    def tags(self) -> list[Tag]:
        """All tags, oldest snapshot first."""
        return [
            Tag(
                name=tag["tag"],
                id=tag["id"],
                parent=tag["parent"],
                created=datetime.fromtimestamp(tag["created_unix_seconds"], timezone.utc),
                labels=tag["labels"],
                protected=tag["protected"],
            )
            for tag in self._program.json("tags")["tags"]
        ]

    def show(self, snapshot: str) -> Snapshot:
        """What a snapshot holds."""
        answer = self._program.json("show", snapshot)
        manifest = answer["manifest"]
        tags: list[str] = answer["tags"]
        return Snapshot(
            tag=snapshot if snapshot in tags else (tags or [snapshot])[0],
            id=answer["id"],
            parent=manifest["parent"],
            images=tuple(map(Image._of, manifest["images"])),
            added_bytes=manifest["added_bytes"],
        )

    def diff(self, old: str, new: str) -> list[ImageDiff]:
        """What differs between two snapshots, image by image."""
        return [
            ImageDiff(
                name=image["name"],
                changed_pages=image["changed_pages"],
                ranges=tuple((it["offset_bytes"], it["length_bytes"]) for it in image["ranges"]),
            )
            for image in self._program.json("diff", old, new)["images"]
        ]

    def tag(self, source: str, tag: str, *, replace: bool = False, protect: bool = False) -> None:
        """Gives a snapshot another name."""
        self._program.json("tag", source, tag, *_flags(replace=replace, protect=protect))

    def protect(self, tag: str, protected: bool = True) -> None:
        """Protects a tag from being removed or moved, or ends that."""
        self._program.json("tag", "--protect" if protected else "--unprotect", tag)

    def remove(self, *tags: str) -> None:
        """Removes tags: all or none."""
        self._program.json("rm", *tags)

    def forget(
        self,
        *,
        keep_last: int | None = None,
        keep_within: str | None = None,
        keep_tags: Iterable[str] = (),
        keep_labels: Mapping[str, str] | None = None,
        group_by: str | None = None,
        expired: bool = False,
        dry_run: bool = False,
    ) -> list[str]:
        """Removes tags by rules; the tags that were removed, or would be."""
        options = ["forget", *_flags(expired=expired, dry_run=dry_run)]
        if keep_last is not None:
            options += ["--keep-last", str(keep_last)]
        if keep_within is not None:
            options += ["--keep-within", keep_within]
        for pattern in keep_tags:
            options += ["--keep-tag", pattern]
        for key, value in (keep_labels or {}).items():
            options += ["--keep-label", f"{key}={value}"]
        if group_by is not None:
            options += ["--group-by", group_by]
        answer = self._program.json(*options)
        if dry_run:
            return [tag["tag"] for tag in answer["tags"] if not tag["keep"]]
        removed: list[str] = answer["removed"]
        return removed

    def gc(self, *, dry_run: bool = False) -> dict[str, Any]:
        """Frees what nothing needs."""
        return self._program.json("gc", *_flags(dry_run=dry_run))

    def verify(self, *, read_data: bool = True) -> dict[str, Any]:
        """Checks the store.

        :raises Damaged: if anything is damaged; its ``answer`` has the findings.
        """
        return self._program.json("verify", *_flags(read_data=read_data))

    def repair(self) -> dict[str, Any]:
        """Rebuilds what can be rebuilt."""
        return self._program.json("repair")

    def stats(self) -> dict[str, Any]:
        """Counts what is stored."""
        return self._program.json("stats")

    def export(self, *snapshots: str, output: StrPath, chain: bool = False) -> dict[str, Any]:
        """Writes snapshots to one file, for any store."""
        return self._program.json("export", *snapshots, *_flags(chain=chain), "-o", output)

    def import_(self, file: StrPath) -> dict[str, Any]:
        """Takes the snapshots of such a file."""
        return self._program.json("import", file)

    def mount(self, snapshot: str, dir: StrPath | None = None) -> Mount:
        """Shows a snapshot as files; in a directory of its own unless one is named."""
        owns_dir = dir is None
        place = Path(dir) if dir is not None else Path(tempfile.mkdtemp(prefix="snapstore-"))
        try:
            self._program.json("mount", snapshot, place)
        except BaseException:
            if owns_dir:
                place.rmdir()
            raise
        return Mount(self._program, place, owns_dir)

    def run(self, name: str, *options: str, kernel: StrPath) -> Machine:
        """Starts a machine. ``options`` are those of ``snapstore run``."""
        self._program.json("run", name, "--kernel", kernel, "--detach", *options)
        return Machine(self._program, name)

    def restore(
        self, snapshot: str, *options: str, name: str | None = None, count: int = 1
    ) -> Machines:
        """Starts machines from a snapshot. ``options`` are those of ``snapstore restore``.

        They are called after ``name``, or after the tag, with numbers where names are taken.
        """
        named = [] if name is None else ["--name", name]
        answer = self._program.json(
            "restore", snapshot, "--detach", "-n", str(count), *named, *options
        )
        return Machines([Machine(self._program, it["name"]) for it in answer["machines"]])

    def machines(self) -> Sequence[Machine]:
        """All machines of this user."""
        entries = self._program.json("ps")["machines"]
        return [Machine(self._program, entry["name"]) for entry in entries]


def _flags(**flags: bool) -> list[str]:
    return ["--" + name.replace("_", "-") for name, wanted in flags.items() if wanted]
