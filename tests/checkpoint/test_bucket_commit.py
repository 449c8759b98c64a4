"""How a checkpoint is stored where a directory cannot be locked: names, order, and what a save asks for."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from vibe_store.checkpoint import (
    CheckpointManager,
    list_checkpoints,
    load_checkpoint,
    load_manifest,
    save_checkpoint,
    verify_checkpoint,
)
from vibe_store.checkpoint.unnamed import sweep_unnamed
from vibe_store.errors import CorruptCheckpointError, InvalidValueError, SaveFailedError
from vibe_store.interfaces import Blob, SavedItem, StorageBackend
from vibe_store.serializers.eqx import EqxSerializer
from vibe_store.storage.memory import MemoryStorage
from vibe_store.testing import Call, Fault, FaultyStorage

_TREE = {"w": np.arange(1000.0)}


@pytest.fixture
def bucket(request: pytest.FixtureRequest) -> MemoryStorage:
    return MemoryStorage(f"memory://{request.node.name}/run")


class AtOnce(FaultyStorage):
    """A storage where calls may be under way at once, and which remembers how many were."""

    def __init__(self, inner: StorageBackend, *faults: Fault, seconds: float = 0.0) -> None:
        super().__init__(inner, *faults)
        self.concurrency, self.seconds = 8, seconds
        self.under_way, self.most = 0, 0
        self._counting = threading.Lock()

    def put(self, source: Path, key: str, *, move: bool = False, durable: bool = True) -> None:
        with self._counting:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        time.sleep(self.seconds)
        try:
            super().put(source, key, move=move, durable=durable)
        finally:
            with self._counting:
                self.under_way -= 1


def test_every_file_has_the_id_of_its_attempt_in_its_key(bucket: StorageBackend) -> None:
    save_checkpoint(bucket, _TREE, step=1, items={"aux": 1}, metadata={"a": 1})
    manifest = load_manifest(bucket, step=1)
    assert all(f".{manifest.attempt}." in file.key for file in manifest.files)
    assert {blob.key for blob in bucket.list("step_1/")} == {
        "step_1/manifest.json",
        *(f"step_1/{file.key}" for file in manifest.files),
    }


def test_files_without_a_manifest_are_no_step_to_anyone(bucket: StorageBackend) -> None:
    _left_by(bucket)
    assert [blob.key for blob in bucket.list("step_1/state")]
    assert list_checkpoints(bucket) == []
    assert CheckpointManager(bucket).all_steps() == []


def test_the_first_item_goes_up_while_the_next_is_serialized(bucket: StorageBackend) -> None:
    stored = threading.Event()

    class Patient(EqxSerializer):
        def save(self, tree: Any, directory: Path, item: str) -> SavedItem:
            if item == "aux":
                assert stored.wait(30), "state.eqx was not stored before aux.eqx was written"
            return super().save(tree, directory, item)

    def notes(call: Call) -> bool:
        if call.method == "put" and "/state." in call.keys[0]:
            stored.set()
        return False

    save_checkpoint(AtOnce(bucket, Fault(notes)), _TREE, step=1, items={"aux": 1}, serializer=Patient())
    assert verify_checkpoint(bucket) == []


def test_files_go_up_several_at_once_and_the_manifest_after_all_of_them(bucket: StorageBackend) -> None:
    items = {f"item{number}": number for number in range(20)}
    storage = AtOnce(bucket, seconds=0.01)
    save_checkpoint(storage, _TREE, step=1, items=items)
    assert storage.most == 8
    assert storage.calls[-1].keys == ("step_1/manifest.json",)
    assert verify_checkpoint(bucket) == []


def test_one_file_that_cannot_be_stored_fails_the_save_and_none_of_the_others_stays(
    bucket: StorageBackend,
) -> None:
    fault = Fault(lambda call: call.method == "put" and "item3." in call.keys[0])
    items = {f"item{number}": number for number in range(20)}
    with pytest.raises(OSError, match="injected fault"):
        save_checkpoint(AtOnce(bucket, fault, seconds=0.01), _TREE, step=1, items=items)
    assert list(bucket.list("step_")) == []


def test_a_manifest_that_arrives_after_its_save_was_given_up_still_finds_its_files(
    bucket: StorageBackend,
) -> None:
    late: list[Any] = []

    class Late(FaultyStorage):
        def write(self, key: str, data: bytes, *, overwrite: bool = True, durable: bool = True) -> None:
            if key == "step_1/manifest.json":
                late.append(lambda: bucket.write(key, data, overwrite=overwrite))
                raise TimeoutError("no answer")
            super().write(key, data, overwrite=overwrite, durable=durable)

    with pytest.raises(TimeoutError):
        save_checkpoint(Late(bucket), _TREE, step=1)
    late[0]()
    assert verify_checkpoint(bucket, step=1) == []


def test_a_save_on_the_way_makes_the_training_thread_ask_for_nothing(
    bucket: StorageBackend, scenarios: ModuleType
) -> None:
    asked: list[Call] = []

    def here(call: Call) -> bool:
        if threading.current_thread() is threading.main_thread():
            asked.append(call)
        return False

    with CheckpointManager(FaultyStorage(bucket, Fault(here))) as manager:
        manager.save(1, scenarios.tree(1))
        assert [call.keys for call in asked] == [("step_1/manifest.json",)]
        manager.wait()
        asked.clear()
        manager.save(2, scenarios.tree(2))
        manager.wait()
        assert asked == []


def test_a_steady_save_asks_for_what_it_needs_and_no_more(
    bucket: StorageBackend, scenarios: ModuleType
) -> None:
    calls: list[str] = []

    def note(call: Call) -> bool:
        what = call.keys[0] if len(call.keys) == 1 else f"{len(call.keys)} keys"
        calls.append(f"{call.method} {what.partition('.2')[0]}")
        return False

    faulty = FaultyStorage(bucket, Fault(note))
    with CheckpointManager(faulty, max_to_keep=1) as manager:
        for step in (1, 2):
            manager.save(step, scenarios.tree(step))
            manager.wait()
        calls.clear()
        manager.save(3, scenarios.tree(3))
        manager.wait()
    assert calls == [
        "write .vibe_store/steps/999999999999999996",
        "put step_3/state",
        "read .vibe_store/writer.json",
        "write step_3/manifest.json",
        "list step_",  # these three at once, where the storage lets them
        "read best",
        "read .vibe_store/writer.json",
        "delete 3 keys",  # the manifest, a pin if there is one, and the mark
        "delete step_2/state",
        "read step_3/manifest.json",  # meanwhile
    ]


def test_manifests_are_read_several_at_once(bucket: StorageBackend) -> None:
    for step in range(20):
        save_checkpoint(bucket, _TREE, step=step)
    began = threading.Barrier(4, timeout=30)

    class Reading(AtOnce):
        def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
            if key.endswith("manifest.json"):
                with suppress(threading.BrokenBarrierError):
                    began.wait()  # nobody passes alone
            return super().read(key, start, end)

    assert len(list_checkpoints(Reading(bucket))) == 20
    assert not began.broken


@pytest.mark.parametrize("serializer", ["eqx", "orbax"])
def test_an_item_of_the_longest_name_comes_back(bucket: StorageBackend, serializer: str) -> None:
    if serializer == "orbax":
        pytest.importorskip("orbax.checkpoint", reason='needs pip install "vibe-store[orbax]"')
    name = "x" * 200
    with CheckpointManager(bucket, serializer=serializer) as manager:
        manager.save(1, _TREE, items={name: {"a": 1}})
        assert manager.restore(1, _TREE, items={name: {"a": 0}})[1] == {name: {"a": 1}}


def test_a_file_that_no_reader_would_take_is_refused_before_the_commit(bucket: StorageBackend) -> None:
    class Verbose(EqxSerializer):
        def save(self, tree: Any, directory: Path, item: str) -> SavedItem:
            saved = super().save(tree, directory, item)
            (file,) = saved.files
            long = "x" * 240
            (directory / file.name).rename(directory / long)
            return replace(saved, files=(replace(file, name=long),))

    save_checkpoint(bucket, _TREE, step=1)
    before = [blob.key for blob in bucket.list("step_")]
    with pytest.raises(InvalidValueError, match="'state' cannot be saved, since nobody could read it again"):
        save_checkpoint(bucket, {"w": 1}, step=1, serializer=Verbose())
    assert [blob.key for blob in bucket.list("step_")] == before
    assert verify_checkpoint(bucket) == []


# What no manifest names.


def _left_by(bucket: StorageBackend, *, step: int = 1) -> set[str]:
    """Let a save die before its manifest, and return what it left."""
    fault = Fault(lambda call: call.keys == (f"step_{step}/manifest.json",), error=KeyboardInterrupt)
    before = {blob.key for blob in bucket.list()}
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(FaultyStorage(bucket, fault), _TREE, step=step, items={"aux": 1})
    return {blob.key for blob in bucket.list()} - before


class Clock(FaultyStorage):
    """A storage whose clock is hours ahead, and shows some objects as older than they are."""

    def __init__(self, inner: StorageBackend, ages: dict[str, float]) -> None:
        super().__init__(inner)
        self.ages = ages

    def list(self, prefix: str = "") -> Iterator[Blob]:
        for blob in super().list(prefix):
            yield Blob(blob.key, blob.size, blob.modified + 7200.0 - self.ages.get(blob.key, 0.0))


def test_what_a_dead_writer_left_is_swept_once_it_is_old_by_the_clock_of_the_storage(
    bucket: StorageBackend, scenarios: ModuleType
) -> None:
    old, young = _left_by(bucket, step=1), _left_by(bucket, step=2)
    assert len(old) == len(young) == 3
    clock = Clock(bucket, dict.fromkeys(old, 3700.0) | dict.fromkeys(young, 3500.0))
    with CheckpointManager(clock, dead_after_secs=3600.0) as manager:
        manager.save(5, scenarios.tree(5))
    keys = {blob.key for blob in bucket.list()}
    assert not keys & old
    assert young <= keys
    assert verify_checkpoint(bucket) == []


def test_sweeping_takes_what_a_replaced_step_left_and_nothing_that_a_manifest_names(
    bucket: StorageBackend,
) -> None:
    for step in (1, 2, 3):
        save_checkpoint(bucket, _TREE, step=step, metadata={"step": step})
    left = _left_by(bucket, step=2)
    bucket.write("step_2/notes.txt", b"mine")
    bucket.write("state.20200101T000000-0123456789.eqx", b"of a dead save without a step")
    bucket.write("metrics.jsonl", b"{}")
    sweep_unnamed(bucket, older_than=0.0)
    keys = {blob.key for blob in bucket.list()}
    assert not keys & {key for key in left if "/steps/" not in key}
    assert {"step_2/notes.txt", "metrics.jsonl"} <= keys
    assert "state.20200101T000000-0123456789.eqx" not in keys
    assert verify_checkpoint(bucket) == []
    assert len(list_checkpoints(bucket)) == 3


def test_sweeping_takes_nothing_from_beside_a_manifest_that_cannot_be_read(bucket: StorageBackend) -> None:
    save_checkpoint(bucket, _TREE, step=1)
    left = _left_by(bucket, step=1)
    bucket.write("step_1/manifest.json", b"rotten")
    sweep_unnamed(bucket, older_than=0.0)
    assert {key for key in left if "/steps/" not in key} <= {blob.key for blob in bucket.list()}


def test_sweeping_spares_a_save_of_this_process_that_is_under_way(bucket: StorageBackend) -> None:
    def sweep(call: Call) -> bool:
        if call.keys == ("step_1/manifest.json",) and call.method == "write":
            sweep_unnamed(bucket, older_than=0.0)
        return False

    save_checkpoint(FaultyStorage(bucket, Fault(sweep)), _TREE, step=1)
    assert verify_checkpoint(bucket, step=1) == []


def test_steps_that_were_copied_from_a_local_directory_are_deleted_whole(
    bucket: StorageBackend, tmp_path: Path, scenarios: ModuleType
) -> None:
    save_checkpoint(tmp_path, _TREE, step=1)
    for path in (tmp_path / "step_1").iterdir():
        bucket.write(f"step_1/{path.name}", path.read_bytes())
    assert np.array_equal(load_checkpoint(bucket, _TREE, step=1)["w"], _TREE["w"])
    fault = Fault(lambda call: call.method == "delete" and "step_1/manifest.json" in call.keys, "after")
    with CheckpointManager(FaultyStorage(bucket, fault), max_to_keep=1) as manager:
        manager.save(2, scenarios.tree(2))
        with pytest.raises(SaveFailedError, match="was saved, but deleting"):
            manager.wait()
    assert [status.step for status in list_checkpoints(bucket)] == [2]  # state.eqx is no unverified step
    sweep_unnamed(bucket, older_than=0.0)
    assert list(bucket.list("step_1/")) == []


# Large objects.


class Parts(FaultyStorage):
    concurrency = 4


def test_a_large_object_is_read_in_parts_that_come_several_at_once(
    bucket: StorageBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_SMALLEST_PART", "_LARGEST_PART"):
        monkeypatch.setattr(f"vibe_store.checkpoint.range_reader.{name}", 1000)
    tree = {"w": np.arange(10_000)}
    save_checkpoint(bucket, tree, step=1)
    ranges: list[tuple[int, int | None]] = []

    class Reading(AtOnce):
        def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
            ranges.append((start, end))
            return super().read(key, start, end)

    loaded = load_checkpoint(Reading(bucket), tree, step=1)
    assert np.array_equal(loaded["w"], tree["w"])
    size = load_manifest(bucket, step=1).size
    parts = sorted((start, end) for start, end in ranges if end is not None and end <= size + 1)
    assert parts[0] == (0, 1000)
    assert parts[-1][1] == size + 1
    assert len(parts) == -(-(size + 1) // 1000)


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 2000, 5000])
@pytest.mark.parametrize("change", [-1, 0, 1, 1000])
def test_an_object_is_read_whole_or_refused_whatever_its_size(
    bucket: StorageBackend, monkeypatch: pytest.MonkeyPatch, size: int, change: int
) -> None:
    for name in ("_SMALLEST_PART", "_LARGEST_PART"):
        monkeypatch.setattr(f"vibe_store.checkpoint.range_reader.{name}", 1000)
    tree = {"w": np.zeros(size, np.uint8)}
    save_checkpoint(bucket, tree, step=1)
    [key] = [blob.key for blob in bucket.list("step_1/state")]
    data = bucket.read(key)
    bucket.write(key, data[:change] if change < 0 else data + bytes(change))
    storage = AtOnce(bucket)
    if change == 0:
        assert load_checkpoint(storage, tree, step=1)["w"].shape == (size,)
    else:
        with pytest.raises(CorruptCheckpointError):
            load_checkpoint(storage, tree, step=1)
        with pytest.raises(CorruptCheckpointError):
            load_checkpoint(storage, tree, step=1, verify="sizes")


def test_many_threads_save_different_steps_of_one_directory(bucket: StorageBackend) -> None:
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda step: save_checkpoint(bucket, _TREE, step=step), range(40)))
    assert len(list_checkpoints(bucket)) == 40
    assert verify_checkpoint(bucket) == []
