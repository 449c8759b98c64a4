"""One writer at a time of a directory that cannot be locked: whoever comes later stops the one before."""

import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from vibe_store.checkpoint import CheckpointManager, initialize_checkpoint_dir, save_checkpoint
from vibe_store.errors import CheckpointsExistError, SaveFailedError, WriterSupersededError
from vibe_store.interfaces import StorageBackend
from vibe_store.storage.memory import MemoryStorage
from vibe_store.testing import Fault, FaultyStorage

_WRITER = ".vibe_store/writer.json"


@pytest.fixture
def bucket(request: pytest.FixtureRequest) -> StorageBackend:
    return MemoryStorage(f"memory://{request.node.name}/run")


def _as_another_process(monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr("vibe_store.checkpoint.writer_id._id", "another")
        return act()


def test_the_writer_before_stops_at_its_next_save_and_leaves_nothing_of_it(
    bucket: StorageBackend, scenarios: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    zombie = CheckpointManager(bucket)
    zombie.save(1, scenarios.tree(1))
    zombie.wait()
    _as_another_process(monkeypatch, lambda: CheckpointManager(bucket).become_writer())
    before = scenarios.keys_of(bucket)
    zombie.save(2, scenarios.tree(2))
    with pytest.raises(WriterSupersededError, match=r"Step 2 was not saved: .* written to by process \d+ on"):
        zombie.wait()
    assert zombie.all_steps() == [1]
    assert {key for key in scenarios.keys_of(bucket) - before if "/steps/" not in key} == set()
    with pytest.raises(WriterSupersededError):
        zombie.save(3, scenarios.tree(3))


def test_a_writer_that_was_superseded_stays_so_whoever_writes_later(
    bucket: StorageBackend, scenarios: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    zombie = CheckpointManager(bucket)
    zombie.become_writer()
    _as_another_process(monkeypatch, lambda: CheckpointManager(bucket).become_writer())
    zombie.save(1, scenarios.tree(1))
    with pytest.raises(WriterSupersededError):
        zombie.wait()
    with CheckpointManager(bucket) as next_one:
        next_one.save(1, scenarios.tree(1))
        next_one.wait()
    with pytest.raises(WriterSupersededError):
        zombie.save(2, scenarios.tree(2))
    with pytest.raises(WriterSupersededError):
        zombie.pin(1)


def test_a_writer_that_is_superseded_after_its_commit_deletes_nothing(
    bucket: StorageBackend, scenarios: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save_checkpoint(bucket, scenarios.tree(step), step=step)

    def superseded(call: Any) -> bool:
        if call.method == "list" and bucket.read(_WRITER):
            _as_another_process(monkeypatch, lambda: CheckpointManager(bucket).become_writer())
        return False

    faulty = FaultyStorage(bucket)
    zombie = CheckpointManager(faulty, max_to_keep=1)
    zombie.become_writer()
    assert zombie.all_steps() == [1, 2]
    zombie.save(3, scenarios.tree(3))
    zombie.wait()
    assert zombie.all_steps() == [3]
    faulty.faults = (Fault(superseded),)
    zombie.save(4, scenarios.tree(4))
    with pytest.raises(WriterSupersededError, match="Step 4 was saved, and is the last: "):
        zombie.wait()
    assert zombie.all_steps() == [3, 4]


def test_whoever_resumes_or_wipes_a_directory_is_its_writer_before_it_looks(
    bucket: StorageBackend, scenarios: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    zombie = CheckpointManager(bucket)
    for step, how in enumerate(("resume", "overwrite", "nothing there")):
        zombie.save(step, scenarios.tree(step))
        zombie.wait()
        if how == "nothing there":
            bucket.delete([blob.key for blob in bucket.list("step_")])
        arguments: dict[str, Any] = {} if how == "nothing there" else {how: True}
        _as_another_process(monkeypatch, lambda a=arguments: initialize_checkpoint_dir(bucket, **a))
        zombie.save(10, scenarios.tree(10))
        with pytest.raises(WriterSupersededError):
            zombie.wait()
        zombie = CheckpointManager(bucket)


def test_whoever_is_refused_a_directory_stops_nobody(
    bucket: StorageBackend, scenarios: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CheckpointManager(bucket) as manager:
        manager.save(1, scenarios.tree(1))
        manager.wait()
        with pytest.raises(CheckpointsExistError):
            _as_another_process(monkeypatch, lambda: initialize_checkpoint_dir(bucket))
        _as_another_process(monkeypatch, lambda: save_checkpoint(bucket, scenarios.tree(9), step=9))
        _as_another_process(monkeypatch, lambda: CheckpointManager(bucket).restore(None, scenarios.tree(0)))
        manager.save(2, scenarios.tree(2))


def test_a_writer_whose_id_was_removed_goes_on(bucket: StorageBackend, scenarios: ModuleType) -> None:
    with CheckpointManager(bucket) as manager:
        manager.save(1, scenarios.tree(1))
        manager.wait()
        bucket.delete([_WRITER])
        manager.save(2, scenarios.tree(2))
        manager.wait()
        assert json.loads(bucket.read(_WRITER))["pid"] > 0


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"id": 1', b"\xff", b'{"pid": 3}'])
def test_a_damaged_id_is_another_writers(
    bucket: StorageBackend, scenarios: ModuleType, damage: bytes
) -> None:
    with CheckpointManager(bucket) as manager:
        manager.save(1, scenarios.tree(1))
        manager.wait()
        bucket.write(_WRITER, damage)
        manager.save(2, scenarios.tree(2))
        with pytest.raises(WriterSupersededError):
            manager.wait()


def test_a_storage_that_cannot_say_who_writes_fails_that_save_only(
    bucket: StorageBackend, scenarios: ModuleType
) -> None:
    faulty = FaultyStorage(bucket)
    with CheckpointManager(faulty) as manager:
        manager.save(1, scenarios.tree(1))
        manager.wait()
        faulty.faults = (Fault(lambda call: call.method == "read" and call.keys == (_WRITER,)),)
        manager.save(2, scenarios.tree(2))
        with pytest.raises(SaveFailedError, match="The save of step 2 failed"):
            manager.wait()
        faulty.faults = ()
        manager.save(2, scenarios.tree(2))
        manager.wait()
        assert manager.all_steps() == [1, 2]


def test_pinning_from_another_process_does_not_stop_the_writer(
    bucket: StorageBackend, scenarios: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = CheckpointManager(bucket, max_to_keep=1)
    trainer.save(1, scenarios.tree(1))
    trainer.wait()
    _as_another_process(monkeypatch, lambda: CheckpointManager(bucket).pin(1))
    for step in (2, 3):
        trainer.save(step, scenarios.tree(step))
    assert trainer.all_steps() == [1, 3]
    _as_another_process(monkeypatch, lambda: CheckpointManager(bucket).unpin(1))
    trainer.save(4, scenarios.tree(4))
    assert trainer.all_steps() == [4]
    trainer.close()


def test_a_writer_that_was_superseded_pins_nothing(
    bucket: StorageBackend, scenarios: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = CheckpointManager(bucket)
    manager.save(1, scenarios.tree(1))
    manager.wait()
    _as_another_process(monkeypatch, lambda: CheckpointManager(bucket).become_writer())
    with pytest.raises(WriterSupersededError):
        manager.pin(1)
