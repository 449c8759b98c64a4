"""The storage that fails on demand does what it says, and nothing else."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from vibe_store.interfaces import StorageBackend
from vibe_store.storage.local import LocalStorage
from vibe_store.testing import EXIT_STATUS, Fault, FaultyStorage


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(b"0123456789")
    return path


def test_without_faults_every_call_is_passed_on_and_changes_are_counted(
    storage: StorageBackend, source: Path, tmp_path: Path
) -> None:
    faulty = FaultyStorage(storage)
    faulty.write("a", b"a")
    with pytest.raises(FileExistsError):
        faulty.write("a", b"b", overwrite=False)
    faulty.put(source, "b/c", move=True)
    assert not source.exists()
    faulty.get("b/c", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == faulty.read("b/c") == b"0123456789"
    assert faulty.read("b/c", 2, 4) == b"23"
    assert [blob.key for blob in faulty.list()] == ["a", "b/c"]
    faulty.delete(iter(["a", "b/c"]))
    faulty.sweep()
    assert list(storage.list()) == []
    assert [(call.method, call.keys) for call in faulty.calls] == [
        ("write", ("a",)),
        ("write", ("a",)),
        ("put", ("b/c",)),
        ("delete", ("a", "b/c")),
        ("sweep", ()),
    ]
    assert [call.index for call in faulty.calls] == [0, 1, 2, 3, 4]
    assert faulty.url == storage.url
    assert faulty.local_path("a") == storage.local_path("a")


def test_a_fault_before_after_or_cut_leaves_none_all_or_half(storage: StorageBackend, source: Path) -> None:
    left: dict[str, list[bytes]] = {}
    for how in ("before", "after", "cut"):
        faulty = FaultyStorage(storage, Fault(lambda call: call.index is not None, how))  # type: ignore[arg-type]  # a wrong type, or any, is the point
        with pytest.raises(OSError, match="injected fault"):
            faulty.write("written", b"0123456789")
        with pytest.raises(OSError, match="injected fault"):
            faulty.put(source, "put")
        left[how] = [storage.read(blob.key) for blob in storage.list()]
        with pytest.raises(OSError, match="injected fault"):
            faulty.delete(["put", "written"])
        left[f"{how} delete"] = [storage.read(blob.key) for blob in storage.list()]
        storage.delete(["put", "written"])
    whole, half = b"0123456789", b"01234"
    assert left == {
        "before": [],
        "before delete": [],
        "after": [whole, whole],
        "after delete": [],
        "cut": [half, half],
        "cut delete": [half],
    }
    assert source.exists()


def test_a_fault_meets_the_call_of_its_index_and_reads_by_a_predicate(storage: StorageBackend) -> None:
    faulty = FaultyStorage(storage, Fault(1), Fault(lambda call: call.method == "read", error=MemoryError))
    faulty.write("a", b"")
    with pytest.raises(OSError, match="injected fault"):
        faulty.write("b", b"")
    with pytest.raises(MemoryError):
        faulty.read("a")
    faulty.write("c", b"")
    assert [blob.key for blob in faulty.list()] == ["a", "c"]


def test_a_delay_only_delays(storage: StorageBackend) -> None:
    began = time.monotonic()
    FaultyStorage(storage, Fault(0, "delay", seconds=0.05)).write("a", b"a")
    assert time.monotonic() - began >= 0.05
    assert storage.read("a") == b"a"


def test_a_fault_without_an_error_ends_the_process_at_once(tmp_path: Path, processes: Any) -> None:
    code = """
    from vibe_store.storage.local import LocalStorage
    from vibe_store.testing import Fault, FaultyStorage

    try:
        FaultyStorage(LocalStorage(arguments["root"]), Fault(0, "after", error=None)).write("a", b"a")
    finally:
        print("still here")
    """
    child = processes.start(code, root=os.fspath(tmp_path))
    assert child.wait() == EXIT_STATUS
    assert child.output == ""
    assert LocalStorage(str(tmp_path)).read("a") == b"a"
