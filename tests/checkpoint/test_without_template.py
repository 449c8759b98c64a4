"""Loading without a template: plain containers after the paths of the leaves, for every serializer."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vibe_store import CheckpointManager, load_checkpoint, load_eqx, save_checkpoint, save_eqx
from vibe_store.checkpoint.looking import load_manifest
from vibe_store.checkpoint.manifest import encode
from vibe_store.errors import InvalidValueError

SERIALIZERS = ["eqx", "orbax"]


class Pair(NamedTuple):
    first: Any
    second: Any


class Model(eqx.Module):
    weights: tuple[jax.Array, ...]
    activation: Any
    width: int = eqx.field(static=True)


def same(got: Any, wanted: Any) -> bool:
    """Whether two trees have one structure, and leaves of the same types, dtypes and bits."""
    return bool(eqx.tree_equal(got, wanted, typematch=True))


@pytest.mark.parametrize("serializer", SERIALIZERS)
def test_a_tree_comes_back_in_dicts_and_lists_after_its_paths(tmp_path: Path, serializer: str) -> None:
    model = Model((jnp.ones(2), jnp.zeros((0, 3))), jax.nn.relu, 5)
    tree = {
        "model": model,
        "optimizer": optax.adam(0.1).init(jnp.ones(2)),
        "pair": Pair(1, [None, "text", b"\x00\xff"]),
    }
    save_checkpoint(tmp_path, tree, serializer=serializer)
    got = load_checkpoint(tmp_path)
    activation = got["model"].pop("activation")
    assert activation.name == "jax._src.nn.functions.relu"
    assert same(
        got,
        {
            "model": {"weights": [jnp.ones(2), jnp.zeros((0, 3))]},
            "optimizer": [{"count": jnp.zeros((), jnp.int32), "mu": jnp.zeros(2), "nu": jnp.zeros(2)}],
            "pair": {"first": 1, "second": [None, "text", b"\x00\xff"]},
        },
    )


@pytest.mark.parametrize("serializer", SERIALIZERS)
def test_keys_that_a_path_escapes_come_back_as_they_were(tmp_path: Path, serializer: str) -> None:
    tree = {"a\nb": {"back\\slash": np.ones(1)}, 'it\'s "q"': np.ones(2), "\x00": np.ones(3)}
    save_checkpoint(tmp_path, tree, serializer=serializer)
    assert same(load_checkpoint(tmp_path), tree)


@pytest.mark.parametrize("serializer", SERIALIZERS)
def test_each_leaf_comes_back_as_what_it_was(tmp_path: Path, serializer: str) -> None:
    tree = {
        "bfloat16": jnp.arange(3, dtype=jnp.bfloat16),
        "key": jax.random.key(1),
        "keys": jax.random.split(jax.random.key(2, impl="rbg"), 3),
        "numpy": np.arange(4, dtype=np.int64).reshape(2, 2),
        "scalar": np.float16(1.5),
        "when": np.array(["2020-01-01"], "M8[D]"),
        "bool": True,
        "int": 2**63,
        "float": float("inf"),
        "complex": 1 - 2j,
    }
    save_checkpoint(tmp_path, tree, serializer=serializer)
    assert same(load_checkpoint(tmp_path), tree)


@pytest.mark.parametrize("serializer", SERIALIZERS)
def test_what_jax_cannot_hold_as_it_is_configured_comes_back_as_numpy(
    tmp_path: Path, serializer: str
) -> None:
    with jax.enable_x64(True):
        save_checkpoint(tmp_path, {"wide": jnp.array([0.1], jnp.float64)}, serializer=serializer)
        assert isinstance(load_checkpoint(tmp_path)["wide"], jax.Array)
    assert same(load_checkpoint(tmp_path), {"wide": np.array([0.1])})


@pytest.mark.parametrize("leaf", [3, np.ones(2), jnp.ones(2)])
@pytest.mark.parametrize("serializer", SERIALIZERS)
def test_a_leaf_alone_comes_back_alone(tmp_path: Path, leaf: Any, serializer: str) -> None:
    save_checkpoint(tmp_path, leaf, serializer=serializer)
    assert same(load_checkpoint(tmp_path), leaf)


@pytest.mark.parametrize("serializer", SERIALIZERS)
def test_a_tree_without_leaves_comes_back_as_none(tmp_path: Path, serializer: str) -> None:
    save_checkpoint(tmp_path, {"empty": ()}, serializer=serializer)
    assert load_checkpoint(tmp_path) is None


def test_paths_that_make_no_containers_are_the_keys_of_a_flat_dict(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"a.b": 1, "a": {"b": 2}})
    assert load_checkpoint(tmp_path) == {"['a.b']": 1, "['a']['b']": 2}


def test_the_manager_loads_every_item_without_a_template(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"a": 1}, items={"rest": (2, 3)})
        assert manager.restore(None) == {"a": 1}
        assert manager.restore(1, items={"rest": None}) == ({"a": 1}, {"rest": [2, 3]})


def test_a_single_file_loads_without_a_template(tmp_path: Path) -> None:
    save_eqx(tmp_path / "model.eqx", {"a": np.arange(3)})
    assert same(load_eqx(tmp_path / "model.eqx"), {"a": np.arange(3)})


def test_a_file_of_plain_equinox_needs_a_template(tmp_path: Path) -> None:
    eqx.tree_serialise_leaves(tmp_path / "model.eqx", {"a": np.arange(3)})
    with pytest.raises(InvalidValueError, match=r"model\.eqx has no leaf table.*like="):
        load_eqx(tmp_path / "model.eqx")


def test_what_was_loaded_without_a_template_can_be_saved_again(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "one", {"activation": jax.nn.relu, "a": jnp.ones(2)})
    once = load_checkpoint(tmp_path / "one")
    save_checkpoint(tmp_path / "two", once)
    assert same(load_checkpoint(tmp_path / "two"), once)


def test_a_callable_of_a_checkpoint_cannot_be_called(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, [jax.nn.relu])
    with pytest.raises(InvalidValueError, match="relu cannot be called: a checkpoint holds only the names"):
        load_checkpoint(tmp_path)[0](1)


def test_a_key_of_an_unknown_implementation_is_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"key": jax.random.key(0)})
    manifest = load_manifest(tmp_path)
    item = manifest.items["state"]
    (row,) = item.leaves
    item = dataclasses.replace(item, leaves=(dataclasses.replace(row, impl="homemade"),))
    (tmp_path / "manifest.json").write_bytes(encode(dataclasses.replace(manifest, items={"state": item})))
    with pytest.raises(InvalidValueError, match=r"\['key'\].*'homemade', which is not registered"):
        load_checkpoint(tmp_path)


def test_replicate_to_works_without_a_template(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"a": jnp.arange(2.0), "b": 1})
    assert same(load_checkpoint(tmp_path, replicate_to=2), {"a": jnp.array([[0.0, 1.0], [0.0, 1.0]]), "b": 1})
