"""One flipped bit, anywhere in any file of a checkpoint, is found, and the step before restores."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vibe_store.checkpoint import (
    CheckpointManager,
    load_checkpoint,
    load_eqx,
    load_metadata,
    save_eqx,
    verify_checkpoint,
)
from vibe_store.errors import CorruptCheckpointError, DamagedCheckpointWarning, TemplateMismatchError

pytestmark = pytest.mark.proof

FLIPS = 1000
STEP = 2


def tree(seed: int) -> dict[str, Any]:
    """A small tree of every kind of leaf that has bytes in a file."""
    random = np.random.default_rng(seed)
    return {
        "w": jnp.asarray(random.normal(size=(5, 4)), jnp.float32),
        "half": jnp.arange(seed, seed + 6, dtype=jnp.bfloat16),
        "key": jax.random.key(seed),
        "n": random.integers(0, 2**60, 7),
        "list": [np.float64(seed), seed, float(seed), True, f"tree {seed}", b"bytes"],
    }


LIKE, BEFORE, AUX_LIKE = tree(0), tree(1), {"m": jnp.zeros(9, jnp.int32)}


def bits(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).dtype, np.asarray(leaf).tobytes()


def same(one: Any, other: Any) -> bool:
    return list(map(bits, jax.tree.leaves(one))) == list(map(bits, jax.tree.leaves(other)))


@pytest.fixture(scope="module")
def root(serializer: str, fast_path: Path) -> Path:
    """Two steps with all that a step can have."""
    root = fast_path / serializer
    with CheckpointManager(root, serializer=serializer, async_timeout_secs=None) as manager:
        for step in (1, STEP):
            manager.save(
                step,
                tree(step),
                items={"aux": {"m": jnp.full(9, step)}},
                metrics={"score": step},
                metadata={"environment": "CartPole-v1", "step": step},
            )
    return root


def damage(files: list[Path], flips: int) -> Iterator[tuple[Path, int]]:
    """Flip one bit at a time: as often in each file as in any other, and anywhere in it."""
    dice = random.Random(20_260_101)
    contents = {path: path.read_bytes() for path in files if path.stat().st_size}
    for number in range(flips):
        path = list(contents)[number % len(contents)]
        bit = dice.randrange(8 * len(contents[path]))
        with path.open("r+b", buffering=0) as file:
            file.seek(bit // 8)
            file.write(bytes([contents[path][bit // 8] ^ 1 << bit % 8]))
            yield path, bit
            file.seek(bit // 8)
            file.write(contents[path][bit // 8 : bit // 8 + 1])
    assert all(path.read_bytes() == data for path, data in contents.items())


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def ask_for_all(manager: CheckpointManager) -> None:
    manager.metadata(STEP)
    manager.restore(STEP, LIKE, items={"aux": AUX_LIKE})


def check_the_newest(manager: CheckpointManager, path: Path) -> None:
    with pytest.warns(DamagedCheckpointWarning, match=rf"Step {STEP} .*{path.name}"):
        state, items = manager.restore(None, LIKE, items={"aux": AUX_LIKE})
    assert same(state, BEFORE)
    assert items["aux"]["m"].tolist() == [1] * 9


def test_one_flipped_bit_anywhere_is_found_and_named_and_the_step_before_restores(
    root: Path, serializer: str
) -> None:
    files = files_of(root / f"step_{STEP}")
    assert {"manifest.json", "metadata.json"} <= {path.name for path in files}
    assert len(files) >= (4 if serializer == "eqx" else 10)
    manager = CheckpointManager(root, serializer=serializer)
    flipped = set()
    for number, (path, bit) in enumerate(damage(files, FLIPS)):
        with pytest.raises(CorruptCheckpointError, match=path.name):
            ask_for_all(manager)
        if serializer == "eqx" or number % 31 == 0:  # what Orbax reads of the step before takes it its time
            check_the_newest(manager, path)
        if number % 11 == 0:
            faults = verify_checkpoint(root, step=STEP)
            assert [fault.file for fault in faults] == [str(path.relative_to(root))], bit
        flipped.add(path)
    assert flipped == {path for path in files if path.stat().st_size}
    assert verify_checkpoint(root) == []
    ask_for_all(manager)


def test_what_one_asks_for_is_as_it_was_saved_though_another_item_is_damaged(root: Path) -> None:
    files = [path for path in files_of(root / f"step_{STEP}") if "aux" in str(path.relative_to(root))]
    for path, _ in damage(files, 2 * len(files)):
        assert same(load_checkpoint(root, LIKE, step=STEP), tree(STEP)), path
        assert load_metadata(root, step=STEP) == {"environment": "CartPole-v1", "step": STEP}


def test_a_part_is_as_it_was_saved_or_refused_whichever_bit_is_flipped(root: Path, serializer: str) -> None:
    manager = CheckpointManager(root, serializer=serializer)
    like, want = ({name: each[name] for name in ("half", "key", "list")} for each in (LIKE, tree(STEP)))
    refused = 0
    for _ in damage(files_of(root / f"step_{STEP}"), FLIPS // 5):
        try:
            assert same(manager.restore(STEP, like, partial=True), want)
        except CorruptCheckpointError:
            refused += 1
    assert 0 < refused < FLIPS // 5


def test_one_flipped_bit_anywhere_in_a_single_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "state.eqx"
    save_eqx(path, BEFORE)
    for _ in damage([path], FLIPS):
        with pytest.raises((CorruptCheckpointError, TemplateMismatchError), match=path.name):
            load_eqx(path, LIKE)
    assert same(load_eqx(path, LIKE), BEFORE)
