"""Loading a part of what was saved: only when asked to, and reading only that part's bytes."""

import uuid
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

from vibe_store import CheckpointManager, load_checkpoint, load_eqx, save_checkpoint, save_eqx
from vibe_store.errors import CorruptCheckpointError, InvalidValueError, TemplateMismatchError
from vibe_store.storage.memory import MemoryStorage

TREE = {"actor": {"w": jnp.arange(6.0).reshape(2, 3), "name": "pi"}, "critic": np.full(1000, 7)}
PART = {"actor": {"w": jnp.zeros((2, 3)), "name": ""}}
WANTED = {"actor": TREE["actor"]}


def damage(path: Path, array: np.ndarray[Any, Any]) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(array.tobytes()) + 3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("serializer", ["eqx", "orbax"])
def test_a_part_loads_when_asked_for(tmp_path: Path, serializer: str) -> None:
    save_checkpoint(tmp_path, TREE, serializer=serializer)
    assert eqx.tree_equal(load_checkpoint(tmp_path, PART, partial=True), WANTED)


@pytest.mark.parametrize("serializer", ["eqx", "orbax"])
def test_a_part_never_loads_by_accident(tmp_path: Path, serializer: str) -> None:
    save_checkpoint(tmp_path, TREE, serializer=serializer)
    with pytest.raises(TemplateMismatchError, match=r"\['critic'\].*the template has nothing there"):
        load_checkpoint(tmp_path, PART)


@pytest.mark.parametrize("serializer", ["eqx", "orbax"])
def test_a_leaf_that_was_not_saved_is_missed_all_the_same(tmp_path: Path, serializer: str) -> None:
    save_checkpoint(tmp_path, TREE, serializer=serializer)
    with pytest.raises(TemplateMismatchError, match=r"\['other'\].*nothing was saved there"):
        load_checkpoint(tmp_path, {**PART, "other": jnp.ones(1)}, partial=True)


def test_the_rest_is_not_read(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, TREE)
    damage(tmp_path / "state.eqx", np.asarray(TREE["critic"]))
    assert eqx.tree_equal(load_checkpoint(tmp_path, PART, partial=True), WANTED)


def test_what_is_read_of_a_part_is_verified(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, TREE)
    damage(tmp_path / "state.eqx", np.asarray(TREE["actor"]["w"]))  # type: ignore[index] # it is a dict
    with pytest.raises(CorruptCheckpointError, match=r"state\.eqx is damaged: the 24 bytes from byte 128"):
        load_checkpoint(tmp_path, PART, partial=True)


def test_a_file_that_is_too_short_is_no_part_of_a_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, TREE)
    with (tmp_path / "state.eqx").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CorruptCheckpointError, match=r"has 1000 bytes instead of"):
        load_checkpoint(tmp_path, PART, partial=True)


class Metered(MemoryStorage):
    """Counts the bytes that were read."""

    def __init__(self) -> None:
        super().__init__(f"memory://{uuid.uuid4().hex}")
        self.count = 0

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        data = super().read(key, start, end)
        self.count += 0 if key.endswith(".json") else len(data)
        return data

    def get(self, key: str, target: Path) -> None:
        super().get(key, target)
        self.count += target.stat().st_size


def test_only_the_bytes_of_the_part_are_fetched_from_a_bucket() -> None:
    storage = Metered()
    save_checkpoint(storage, TREE)
    assert eqx.tree_equal(load_checkpoint(storage, PART, partial=True), WANTED)
    assert storage.count == 24


def test_the_manager_loads_a_part(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, TREE)
        assert eqx.tree_equal(manager.restore(1, PART, partial=True), WANTED)


def test_a_part_of_a_single_file_loads(tmp_path: Path) -> None:
    save_eqx(tmp_path / "tree.eqx", TREE)
    damage(tmp_path / "tree.eqx", np.asarray(TREE["critic"]))
    assert eqx.tree_equal(load_eqx(tmp_path / "tree.eqx", PART, partial=True), WANTED)
    with pytest.raises(CorruptCheckpointError, match=r"tree\.eqx is damaged"):
        load_eqx(tmp_path / "tree.eqx", TREE)


def test_a_damaged_part_of_a_single_file_is_noticed(tmp_path: Path) -> None:
    save_eqx(tmp_path / "tree.eqx", TREE)
    damage(tmp_path / "tree.eqx", np.asarray(TREE["actor"]["w"]))  # type: ignore[index] # it is a dict
    with pytest.raises(CorruptCheckpointError, match=r"tree\.eqx is damaged: the 24 bytes from byte 128"):
        load_eqx(tmp_path / "tree.eqx", PART, partial=True)


def test_a_file_of_plain_equinox_has_no_parts(tmp_path: Path) -> None:
    eqx.tree_serialise_leaves(tmp_path / "tree.eqx", TREE)
    with pytest.raises(InvalidValueError, match=r"tree\.eqx has no leaf table"):
        load_eqx(tmp_path / "tree.eqx", PART, partial=True)
