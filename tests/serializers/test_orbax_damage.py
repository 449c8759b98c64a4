"""Damage to any file of Orbax is found before anything is returned."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vibe_store import CheckpointManager
from vibe_store.errors import CorruptCheckpointError, DamagedCheckpointWarning
from vibe_store.interfaces import SavedItem

pytest.importorskip("orbax.checkpoint", reason='needs pip install "vibe-store[orbax]"')

from vibe_store.serializers.orbax import OrbaxSerializer


def tree(step: int) -> dict[str, Any]:
    return {"w": jnp.full((40, 5), step), "key": jax.random.key(step), "text": "x", "b": [step, 0.5 * step]}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    with CheckpointManager(folder, serializer="orbax") as manager:
        for step in (1, 2):
            manager.save(step, tree(step))
    return folder


@pytest.fixture
def manager(original: Path, tmp_path: Path) -> Iterator[CheckpointManager]:
    shutil.copytree(original, tmp_path / "copy")
    with CheckpointManager(tmp_path / "copy", serializer="orbax") as manager:
        yield manager


@pytest.fixture
def files(manager: CheckpointManager, tmp_path: Path) -> list[Path]:
    del manager
    step = tmp_path / "copy" / "step_2"
    return sorted(path for path in step.rglob("*") if path.is_file() and path.name != "manifest.json")


def falls_back(manager: CheckpointManager) -> bool:
    with pytest.warns(DamagedCheckpointWarning, match="2"):
        return bool(manager.restore(None, tree(0))["b"] == [1, 0.5])


def test_one_flipped_bit_at_random_places_of_every_file_is_found(
    manager: CheckpointManager, files: list[Path]
) -> None:
    dice = random.Random(0)
    assert len(files) >= 7
    for path in files:
        data = path.read_bytes()
        for _ in range(min(40, 8 * len(data))):
            bit = dice.randrange(8 * len(data))
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            with pytest.raises(CorruptCheckpointError, match=path.name):
                manager.restore(2, tree(0))
            with pytest.raises(CorruptCheckpointError, match=path.name):
                manager.restore(2, {"text": ""}, partial=True)
        path.write_bytes(data)
    assert manager.restore(2, tree(0))["b"] == [2, 1.0]


def test_after_damage_to_any_file_the_step_before_is_restored(
    manager: CheckpointManager, files: list[Path]
) -> None:
    for path in files:
        data = path.read_bytes()
        path.write_bytes(data[:-1] if data else b"x")
        assert falls_back(manager), path
        path.unlink()
        assert falls_back(manager), path
        path.write_bytes(data)


def test_files_swapped_between_steps_are_found(manager: CheckpointManager, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    swapped = 0
    for one in sorted(path for path in (root / "step_1").rglob("*") if path.is_file()):
        pattern = one.name if one.parent.name != "d" else "*"
        two = next((root / "step_2" / one.relative_to(root / "step_1").parent).glob(pattern))
        data = one.read_bytes(), two.read_bytes()
        if data[0] == data[1]:
            continue
        one.write_bytes(data[1])
        two.write_bytes(data[0])
        swapped += 1
        for step in (1, 2):
            with pytest.raises(CorruptCheckpointError):
                manager.restore(step, tree(0))
        one.write_bytes(data[0])
        two.write_bytes(data[1])
    assert swapped >= 4


def test_files_that_verify_but_are_no_orbax_item_are_refused(tmp_path: Path, folder_source: Any) -> None:
    serializer = OrbaxSerializer()
    saved = serializer.save({"a": np.ones(3), "b": 1}, tmp_path, "state")
    kept = [entry for entry in saved.files if entry.name == "state/_METADATA"]
    for files, words in (
        ([], "names no file of Orbax"),
        (kept, r"does not hold the leaf \['a'\] of the item 'state'"),
        ([entry for entry in saved.files if "/d/" not in entry.name], "does not hold the leaf"),
    ):
        source = folder_source(tmp_path, SavedItem(tuple(files), saved.leaves))
        with pytest.raises(CorruptCheckpointError, match=words):
            serializer.load(source, "state", {"a": np.ones(3), "b": 1})


def test_a_leaf_table_that_is_not_the_trees_own_is_refused(tmp_path: Path, folder_source: Any) -> None:
    serializer = OrbaxSerializer()
    saved = serializer.save({"a": np.ones(3)}, tmp_path, "state")
    for like in ({"a": np.ones(4)}, {"b": np.ones(3)}, [np.ones(3)]):
        other = tmp_path / f"other_{len(list(tmp_path.iterdir()))}"
        other.mkdir()
        leaves = serializer.save(like, other, "state").leaves
        source = folder_source(tmp_path, SavedItem(saved.files, leaves))
        with pytest.raises(CorruptCheckpointError, match="does not hold the leaf"):
            serializer.load(source, "state", like)
