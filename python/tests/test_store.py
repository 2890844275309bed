"""The package against the real program."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest

from snapstore import Damaged, NotFound, SnapstoreError, Store, UsageError

PAGE = 4096


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    store.init()
    return store


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    path = tmp_path / "memory"
    path.write_bytes(os.urandom(16 * PAGE))
    return path


@pytest.fixture
def mounted_dir(tmp_path: Path) -> Iterator[None]:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        print("SKIPPED python mount: no usable /dev/fuse")
        pytest.skip("no usable /dev/fuse")
    yield


def change(path: Path, page: int) -> None:
    with path.open("r+b") as file:
        file.seek(page * PAGE)
        file.write(os.urandom(PAGE))


def test_commit_and_diff(store: Store, memory: Path) -> None:
    base = store.commit("base", memory=memory, labels={"env": "test"})
    assert base.images[0].nonzero_pages == 16
    change(memory, 3)
    step = store.commit("step", memory=memory, parent="base")
    assert step.parent == base.id
    [image] = store.diff("base", "step")
    assert image.ranges == ((3 * PAGE, PAGE),)
    assert store.show("step").id == step.id
    tags = {tag.name: tag for tag in store.tags()}
    assert tags["base"].labels == {"env": "test"}
    assert tags["step"].parent == base.id


def test_mounted_memory_is_an_array(store: Store, memory: Path, mounted_dir: None) -> None:
    store.commit("base", memory=memory)
    with store.mount("base") as mounted:
        pages = mounted.pages()
        assert pages.shape == (16, PAGE)
        expected = numpy.frombuffer(memory.read_bytes(), dtype=numpy.uint8)
        assert numpy.array_equal(pages.ravel(), expected)
        with pytest.raises(ValueError):
            pages[0, 0] = 1
        del pages
    assert not mounted.dir.exists()


def test_failures_are_exceptions_by_kind(store: Store, memory: Path) -> None:
    with pytest.raises(NotFound, match="no tag"):
        store.show("none")
    with pytest.raises(UsageError):
        store.forget()
    store.commit("base", memory=memory)
    with pytest.raises(SnapstoreError, match="already names"):
        store.commit("base", memory=memory)
    assert store.path is not None
    [pack] = sorted((store.path / "packs").glob("*.pack"))
    pack.chmod(0o600)
    damaged = bytearray(pack.read_bytes())
    damaged[3 * PAGE] ^= 1
    pack.write_bytes(damaged)
    with pytest.raises(Damaged) as found:
        store.verify()
    assert found.value.answer is not None and found.value.answer["findings"]
    with pytest.raises(SnapstoreError, match="install it"):
        Store(store.path, program="/nowhere/snapstore").tags()


def test_retention_and_protection(store: Store, memory: Path) -> None:
    for number in range(4):
        change(memory, number)
        store.commit(f"t{number}", memory=memory)
    store.protect("t0")
    with pytest.raises(SnapstoreError, match="protected"):
        store.remove("t0")
    assert store.forget(keep_tags=["t3"], dry_run=True) == ["t1", "t2"]
    assert store.forget(keep_tags=["t3"]) == ["t1", "t2"]
    assert store.gc()["deleted_packs"] >= 0
    assert [tag.name for tag in store.tags()] == ["t0", "t3"]
    store.verify()


def test_export_and_import(store: Store, memory: Path, tmp_path: Path) -> None:
    base = store.commit("base", memory=memory)
    store.export("base", output=tmp_path / "stream")
    other = Store(tmp_path / "other")
    other.init()
    other.import_(tmp_path / "stream")
    assert other.show("base").id == base.id
    other.verify()
