"""What every version wrote loads for ever."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest

from vibe_store import CheckpointManager, load_checkpoint, load_eqx, load_metadata
from vibe_store.checkpoint.looking import load_manifest, verify_checkpoint

HERE = Path(__file__).parent
VERSIONS = sorted(path for path in HERE.iterdir() if path.name.startswith("v"))
SERIALIZERS = ["eqx", "orbax"]

pytestmark = pytest.mark.parametrize("version", VERSIONS, ids=lambda path: path.name)


@pytest.fixture(scope="module")
def golden() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_trees", HERE / "trees.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_same(got: Any, wanted: Any) -> None:
    """Compare two trees leaf by leaf, bit for bit."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for (path, mine), theirs in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True
    ):
        where = jax.tree_util.keystr(path)
        assert type(mine) is type(theirs), where
        if isinstance(mine, jax.Array) and not isinstance(mine.dtype, np.dtype):
            assert mine.dtype == theirs.dtype, where
            mine, theirs = jax.random.key_data(mine), jax.random.key_data(theirs)
        if isinstance(mine, jax.Array | np.ndarray | np.generic):
            assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape), where
            assert np.asarray(mine).tobytes() == np.asarray(theirs).tobytes(), where
        else:
            assert mine == theirs, where


@pytest.mark.parametrize("serializer", SERIALIZERS)
def test_a_checkpoint_loads(version: Path, serializer: str, golden: ModuleType) -> None:
    folder = version / serializer
    assert verify_checkpoint(folder) == []
    assert load_manifest(folder, step=golden.STEP).format == int(version.name[1:])
    assert load_metadata(folder, step=golden.STEP) == golden.METADATA
    manager = CheckpointManager(folder, best_fn=lambda metrics: metrics["eval_return"])
    assert manager.best_step() == golden.STEP
    got, items = manager.restore(None, golden.state(), items={"runner": golden.runner()})
    assert_same(got, golden.state())
    assert_same(items["runner"], golden.runner())


@pytest.mark.parametrize("serializer", SERIALIZERS)
def test_a_checkpoint_loads_without_a_template(version: Path, serializer: str, golden: ModuleType) -> None:
    wanted = golden.state()
    (*numbers,), (text, data, nothing, _) = wanted.pop("python")
    got = load_checkpoint(version / serializer, step=golden.STEP)
    assert got["python"]["first"] == numbers
    *values, function = got.pop("python")["second"]
    assert values == [text, data, nothing]
    assert function.name == "builtins.len"
    assert_same(got, wanted)


def test_a_single_file_loads(version: Path, golden: ModuleType) -> None:
    assert_same(load_eqx(version / "single.eqx", golden.state()), golden.state())


def test_plain_equinox_reads_what_it_can_hold(version: Path, golden: ModuleType) -> None:
    got = eqx.tree_deserialise_leaves(version / "eqx" / f"step_{golden.STEP}" / "runner.eqx", golden.runner())
    assert_same(got, golden.runner())
