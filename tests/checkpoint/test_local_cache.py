"""The newest steps of a bucket on a local disk too."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vibe_store.checkpoint import (
    CheckpointManager,
    initialize_checkpoint_dir,
    list_checkpoints,
    load_metadata,
    save_checkpoint,
    verify_checkpoint,
)
from vibe_store.checkpoint.looking import load_manifest
from vibe_store.errors import CorruptCheckpointError, DamagedCheckpointWarning, InvalidValueError
from vibe_store.interfaces import StorageBackend
from vibe_store.storage.memory import MemoryStorage
from vibe_store.testing import Call, Fault, FaultyStorage


@pytest.fixture
def bucket(request: pytest.FixtureRequest) -> StorageBackend:
    return MemoryStorage(f"memory://{request.node.name}/run")


def _fetches_files(call: Call) -> bool:
    return call.method in {"read", "get"} and call.keys[0].endswith(".eqx")


def _saved(storage: StorageBackend, cache: Path, scenarios: ModuleType, steps: int = 1, **how: Any) -> None:
    with CheckpointManager(storage, local_cache=cache, **how) as manager:
        for step in range(1, steps + 1):
            manager.save(step, scenarios.tree(step), metadata={"seed": step}, metrics={"loss": float("nan")})


def test_a_step_that_is_on_the_local_disk_too_is_not_fetched(
    bucket: StorageBackend, tmp_path: Path, scenarios: ModuleType
) -> None:
    _saved(bucket, tmp_path, scenarios)
    faulty = FaultyStorage(bucket, Fault(_fetches_files))
    manager = CheckpointManager(faulty, local_cache=tmp_path)
    assert scenarios.same(manager.restore(None, scenarios.tree(0)), scenarios.tree(1))
    with pytest.raises(OSError, match="injected fault"):
        CheckpointManager(faulty).restore(None, scenarios.tree(0))


def test_what_is_kept_is_a_checkpoint_like_any_other(
    bucket: StorageBackend, tmp_path: Path, scenarios: ModuleType
) -> None:
    _saved(bucket, tmp_path, scenarios, steps=4)
    [folder] = tmp_path.iterdir()
    assert sorted(path.name for path in folder.glob("step_*")) == ["step_3", "step_4"]
    assert verify_checkpoint(folder) == []
    assert load_metadata(folder, step=4) == {"seed": 4}
    assert (folder / "step_4" / "state.eqx").is_file()
    kept, there = (load_manifest(place, step=4).items["state"] for place in (folder, bucket))
    assert (kept.distribution, kept.leaves) == (there.distribution, there.leaves)
    assert verify_checkpoint(bucket) == []


def test_a_run_that_begins_again_keeps_its_own_steps(
    bucket: StorageBackend, tmp_path: Path, scenarios: ModuleType
) -> None:
    with CheckpointManager(bucket, local_cache=tmp_path) as manager:
        for step in (100, 110):
            manager.save(step, scenarios.tree(step))
    manager, _ = initialize_checkpoint_dir(bucket, overwrite=True, local_cache=tmp_path)
    [folder] = tmp_path.iterdir()
    with manager:
        for step, kept in ((10, [10]), (20, [10, 20]), (30, [20, 30])):
            manager.save(step, scenarios.tree(step))
            manager.wait()
            assert [info.step for info in list_checkpoints(folder)] == kept


def test_a_run_resumes_without_fetching_what_the_local_disk_has(
    bucket: StorageBackend, tmp_path: Path, scenarios: ModuleType
) -> None:
    _saved(bucket, tmp_path, scenarios)
    faulty = FaultyStorage(bucket, Fault(_fetches_files))
    manager, resumed = initialize_checkpoint_dir(faulty, resume=True, local_cache=tmp_path)
    assert resumed
    assert scenarios.same(manager.restore(None, scenarios.tree(0)), scenarios.tree(1))


def test_a_run_resumes_from_the_bucket_where_the_copy_is_damaged(
    bucket: StorageBackend, tmp_path: Path, scenarios: ModuleType
) -> None:
    _saved(bucket, tmp_path, scenarios, steps=2)
    [copy] = tmp_path.glob("*/step_2/state.eqx")
    copy.write_bytes(b"rotten")
    [key] = [blob.key for blob in bucket.list("step_2/state")]
    bucket.write(key, bytes(len(bucket.read(key))))
    with pytest.warns(DamagedCheckpointWarning, match="Step 2 in .* does not verify"):
        manager, _ = initialize_checkpoint_dir(bucket, resume=True, local_cache=tmp_path)
    assert manager.latest_step() == 1


@pytest.mark.parametrize("how", ["flipped", "gone", "manifest"])
def test_a_damaged_copy_is_passed_over_for_the_bucket(
    bucket: StorageBackend, tmp_path: Path, scenarios: ModuleType, how: str
) -> None:
    _saved(bucket, tmp_path, scenarios)
    [path] = tmp_path.glob(f"*/step_1/{'manifest.json' if how == 'manifest' else 'state.eqx'}")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink() if how == "gone" else path.write_bytes(data)
    manager = CheckpointManager(bucket, local_cache=tmp_path)
    assert scenarios.same(manager.restore(1, scenarios.tree(0)), scenarios.tree(1))


def test_a_copy_of_another_save_of_that_step_is_passed_over(
    bucket: StorageBackend, tmp_path: Path, scenarios: ModuleType
) -> None:
    _saved(bucket, tmp_path, scenarios)
    save_checkpoint(bucket, scenarios.tree(2), step=1)
    manager = CheckpointManager(bucket, local_cache=tmp_path)
    assert scenarios.same(manager.restore(1, scenarios.tree(0)), scenarios.tree(2))


def test_a_step_that_is_damaged_in_the_bucket_is_restored_from_the_copy(
    bucket: StorageBackend, tmp_path: Path, scenarios: ModuleType
) -> None:
    _saved(bucket, tmp_path, scenarios)
    [key] = [blob.key for blob in bucket.list("step_1/state")]
    bucket.write(key, b"rotten")
    with pytest.raises(CorruptCheckpointError):
        CheckpointManager(bucket).restore(1, scenarios.tree(0))
    manager = CheckpointManager(bucket, local_cache=tmp_path)
    assert scenarios.same(manager.restore(1, scenarios.tree(0)), scenarios.tree(1))


def test_directories_share_a_cache_folder_without_meeting(tmp_path: Path, scenarios: ModuleType) -> None:
    one, other = MemoryStorage("memory://cached/a-b"), MemoryStorage("memory://cached/a/b")
    _saved(one, tmp_path, scenarios)
    _saved(other, tmp_path, scenarios, steps=2)
    manager = CheckpointManager(one, local_cache=tmp_path)
    assert manager.all_steps() == [1]
    assert scenarios.same(manager.restore(1, scenarios.tree(0)), scenarios.tree(1))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_cache_that_cannot_be_written_costs_no_save(
    bucket: StorageBackend, tmp_path: Path, scenarios: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    _saved(bucket, tmp_path / "file", scenarios)
    assert verify_checkpoint(bucket) == []
    assert "Step 1 is in memory://" in caplog.text


def test_a_cache_for_a_local_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match=r"local_cache=.* is of no use"):
        CheckpointManager(tmp_path, local_cache=tmp_path / "cache")


def test_orbax_files_are_kept_too(bucket: StorageBackend, tmp_path: Path, scenarios: ModuleType) -> None:
    pytest.importorskip("orbax.checkpoint", reason='needs pip install "vibe-store[orbax]"')
    _saved(bucket, tmp_path, scenarios, serializer="orbax")
    faulty = FaultyStorage(bucket, Fault(lambda call: call.method == "get"))
    manager = CheckpointManager(faulty, local_cache=tmp_path, serializer="orbax")
    assert scenarios.same(manager.restore(None, scenarios.tree(0)), scenarios.tree(1))
    [manifest] = tmp_path.glob("*/step_1/manifest.json")
    assert json.loads(manifest.read_bytes())["items"]["state"]["serializer"] == "orbax"
