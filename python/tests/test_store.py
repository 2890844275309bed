"""The package against the real program."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest

import snapstore
from snapstore import Damaged, NotFound, SnapstoreError, Store, Unanswered, UsageError
from snapstore.program import Program

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


@pytest.fixture
def guest(mounted_dir: None) -> Path:
    """A small guest, which runs no agent."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        print("SKIPPED python machines: no usable /dev/kvm")
        pytest.skip("no usable /dev/kvm")
    if "SNAPSTORE_GUEST" not in os.environ:
        print("SKIPPED python machines: SNAPSTORE_GUEST names no guest (scripts/small-guest.sh)")
        pytest.skip("SNAPSTORE_GUEST names no guest")
    return Path(os.environ["SNAPSTORE_GUEST"])


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


def test_the_rest_of_a_mount(store: Store, memory: Path, mounted_dir: None, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(os.urandom(2 * PAGE))
    store.commit("base", memory=memory, disks={"root": disk})
    place = tmp_path / "place"
    place.mkdir()
    mounted = store.mount("base", place)
    assert mounted.memory.read_bytes() == memory.read_bytes()
    assert mounted.disk("root").read_bytes() == disk.read_bytes()
    assert mounted.pages(mounted.disk("root")).shape == (2, PAGE)
    assert [image["name"] for image in mounted.manifest()["images"]] == ["memory", "root"]
    mounted.unmount()
    assert place.exists() and not any(place.iterdir())
    with pytest.raises(NotFound):
        store.mount("none", place)


def test_diffs_of_images_and_other_names(store: Store, memory: Path, tmp_path: Path) -> None:
    base = store.commit("base", memory=memory)
    changes = tmp_path / "changes"
    with changes.open("wb") as file:
        file.truncate(16 * PAGE)
        file.seek(5 * PAGE)
        file.write(os.urandom(PAGE))
    store.commit("step", memory_diff=changes, parent="base", expires="1d")
    [image] = store.diff("base", "step")
    assert (image.name, image.changed_pages) == ("memory", 1)
    store.tag("base", "kept", protect=True)
    assert {tag.name: tag.protected for tag in store.tags()}["kept"]
    store.protect("kept", False)
    store.remove("base", "kept")
    with pytest.raises(NotFound):
        store.remove("kept")
    assert store.forget(expired=True) == []
    store.tag(base.id, "again")
    assert store.stats()["snapshots"] == 2
    store.repair()
    store.verify(read_data=False)


def test_machines(store: Store, guest: Path) -> None:
    web = store.run("web", "--mem", "16M", kernel=guest)
    try:
        assert [machine.name for machine in store.machines()] == ["web"]
        warm = store.commit("warm", vm="web")
        assert {image.role for image in warm.images} == {"memory", "file"}
        web.pause()
        assert web.status()["state"] == "paused"
        web.resume()
        assert web.status()["state"] == "running"
    finally:
        web.stop()
    with store.restore("warm", count=2) as machines:
        assert [machine.name for machine in machines] == ["warm.1", "warm.2"]
        assert machines[1].status()["origin"]["snapshot"] == warm.id
        # The names that are taken are passed over.
        with store.restore("warm", count=2) as more:
            assert [machine.name for machine in more[:2]] == ["warm.3", "warm.4"]
    assert store.machines() == []
    # No agent, no machine: no exit code of a command.
    with store.restore("warm", name="one") as machines:
        with pytest.raises(SnapstoreError, match="agent"):
            machines[0].exec("true")
    with pytest.raises(NotFound):
        machines[0].exec("true")


def test_what_a_command_in_a_guest_came_to(tmp_path: Path) -> None:
    program = tmp_path / "program"
    answer = (
        '{"exit_code":%s,"signal":%s,"timed_out":false,"stdout":"out","stderr":"",'
        '"stdout_omitted_bytes":1,"stderr_omitted_bytes":2}'
    )
    for code, signal, said in (("3", "null", 3), ("null", "9", 137)):
        text = answer % (code, signal)
        program.write_text(f"#!/bin/sh\necho '{text}'\nexit {said}\n")
        program.chmod(0o700)
        machine = snapstore.Machine(Program(None, program), "web")
        output = machine.exec("false")
        assert (output.code, output.stdout, output.omitted_bytes) == (said, "out", 3)


def test_a_remote_that_does_not_answer(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho 'error: no answer' >&2\nexit 6\n")
    program.chmod(0o700)
    with pytest.raises(Unanswered, match="^no answer$"):
        Store(program=program).mount("site/base")


def test_all_that_is_public_is_told_in_the_readme() -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text()
    for name in snapstore.__all__:
        assert f"`{name}" in text, name
        thing = getattr(snapstore, name)
        if issubclass(thing, Exception):
            continue
        for member in vars(thing):
            if not member.startswith("_") and callable(getattr(thing, member)):
                assert f"`{member}(" in text, f"{name}.{member}"
                assert getattr(thing, member).__doc__, f"{name}.{member}"
