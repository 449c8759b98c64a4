"""The folder that a checkpoint passes through on its way to a bucket."""

import os
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from vibe_store.checkpoint import CheckpointManager, load_checkpoint, save_checkpoint
from vibe_store.errors import InvalidValueError, SaveFailedError
from vibe_store.interfaces import StorageBackend
from vibe_store.storage.memory import MemoryStorage
from vibe_store.testing import Call, Fault, FaultyStorage

_TREE = {"w": np.zeros(1000)}
_LONG_AGO = time.time() - 3600


@pytest.fixture
def bucket(request: pytest.FixtureRequest) -> StorageBackend:
    return MemoryStorage(f"memory://{request.node.name}/run")


@pytest.fixture
def staging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VIBE_STORE_STAGING_DIR", str(tmp_path))
    return tmp_path


def test_files_pass_through_the_folder_that_is_named_and_none_stays(
    bucket: StorageBackend, staging: Path
) -> None:
    seen: list[Path] = []

    def note(call: Call) -> bool:
        if call.method == "put":
            seen.extend(staging.rglob("*.eqx"))
        return False

    save_checkpoint(FaultyStorage(bucket, Fault(note)), _TREE, step=1)
    assert seen
    assert list(staging.iterdir()) == []


def test_a_failed_save_leaves_nothing_there_either(bucket: StorageBackend, staging: Path) -> None:
    with pytest.raises(OSError, match="injected fault"):
        save_checkpoint(FaultyStorage(bucket, Fault(lambda call: call.method == "put")), _TREE, step=1)
    assert list(staging.iterdir()) == []


def test_a_folder_that_is_none_is_named(bucket: StorageBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIBE_STORE_STAGING_DIR", "/no/such/folder")
    with pytest.raises(InvalidValueError, match="STAGING_DIR is '/no/such/folder', which is no folder"):
        save_checkpoint(bucket, _TREE, step=1)


def test_a_checkpoint_for_which_there_is_no_room_is_refused_before_anything_is_written(
    bucket: StorageBackend, staging: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 7999})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage if Path(path) == staging else None)
    faulty = FaultyStorage(bucket)
    said = r"has 7,999 bytes free, and a checkpoint on its way to memory://.* with 8,000"
    with pytest.raises(OSError, match=said):
        save_checkpoint(faulty, _TREE, step=1)
    assert faulty.calls == []
    with CheckpointManager(bucket) as manager:
        manager.save(1, _TREE)
        with pytest.raises(SaveFailedError, match=r"save of step 1 failed.* set VIBE_STORE_STAGING_DIR"):
            manager.wait()
        manager.save(2, {"weights": jnp.zeros(2000)})
        with pytest.raises(SaveFailedError, match=said):
            manager.wait()


def test_what_a_killed_process_left_there_is_removed_and_what_a_living_one_uses_is_not(
    bucket: StorageBackend, staging: Path
) -> None:
    dead, foreign = staging / "vibe_store-staging-dead", staging / "mine"
    for folder in (dead, foreign):
        (folder / "files").mkdir(parents=True)
        (folder / "lock").write_bytes(b"")
        os.utime(folder, (_LONG_AGO, _LONG_AGO))

    def other(call: Call) -> bool:
        if call.method == "put":
            for folder in staging.glob("vibe_store-staging-*"):
                os.utime(folder, (_LONG_AGO, _LONG_AGO))
            save_checkpoint(bucket, _TREE, step=2)
        return False

    save_checkpoint(FaultyStorage(bucket, Fault(other)), _TREE, step=1)
    assert not dead.exists()
    assert foreign.exists()
    assert np.array_equal(load_checkpoint(bucket, _TREE, step=1)["w"], _TREE["w"])


def test_what_a_process_left_that_was_killed_as_it_loaded_orbax_files_is_removed_by_the_next(
    staging: Path, processes: Any
) -> None:
    pytest.importorskip("orbax.checkpoint", reason='needs pip install "vibe-store[orbax]"')
    save_checkpoint(staging / "run", _TREE, serializer="orbax")
    dies = """
import os, signal
from vibe_store.checkpoint import load_checkpoint
from vibe_store.serializers import orbax
os.environ["VIBE_STORE_STAGING_DIR"] = arguments["staging"]
orbax.read_arrays = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
load_checkpoint(arguments["staging"] + "/run")
"""
    processes.start(dies, staging=str(staging)).wait()
    [left] = staging.glob("vibe_store-*")
    os.utime(left, (_LONG_AGO, _LONG_AGO))
    assert np.array_equal(load_checkpoint(staging / "run")["w"], _TREE["w"])
    assert [path.name for path in staging.iterdir()] == ["run"]


def test_a_folder_that_was_just_made_is_spared(bucket: StorageBackend, staging: Path) -> None:
    (staging / "vibe_store-staging-new").mkdir()
    (staging / "vibe_store-staging-new" / "lock").write_bytes(b"")
    save_checkpoint(bucket, _TREE, step=1)
    assert (staging / "vibe_store-staging-new" / "lock").exists()


def test_orbax_files_are_fetched_into_it_and_none_stays(bucket: StorageBackend, staging: Path) -> None:
    pytest.importorskip("orbax.checkpoint", reason='needs pip install "vibe-store[orbax]"')
    save_checkpoint(bucket, _TREE, step=1, serializer="orbax")
    seen: list[Path] = []

    def note(call: Call) -> bool:
        if call.method == "get":
            seen.extend(staging.rglob("*"))
        return False

    loaded: Any = load_checkpoint(FaultyStorage(bucket, Fault(note)), _TREE, step=1)
    assert np.array_equal(loaded["w"], _TREE["w"])
    assert seen
    assert list(staging.iterdir()) == []
