"""A snapshot is on the host, and nothing that happens to the tree afterwards reaches it."""

import functools
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vibe_store.errors import UnsupportedLeafError
from vibe_store.serializers import Flat, HostCopy, snapshot
from vibe_store.serializers.eqx import save_eqx


def test_a_snapshot_shares_no_memory_with_the_tree() -> None:
    arrays = [
        jnp.arange(4096.0),
        jnp.ones(()),
        np.arange(10),
        np.asfortranarray(np.ones((3, 4))),
        np.ones(9)[::2],
    ]
    for array, leaf in zip(arrays, snapshot(arrays).leaves, strict=True):
        data = leaf if isinstance(leaf, np.ndarray) else leaf.data
        assert not np.shares_memory(data, np.asarray(array))
        assert data.flags.c_contiguous


@pytest.mark.parametrize("reused", [False, True])
def test_a_snapshot_of_large_arrays_is_whole_when_it_is_returned(reused: bool) -> None:
    arrays = [np.full(megabytes << 17, megabytes, np.float64) for megabytes in (64, 8, 8)]
    earlier = snapshot(arrays) if reused else None
    wanted = [array + 1 for array in arrays]
    for array in arrays:
        array += 1
    taken = snapshot(arrays, reuse=earlier)
    for array in arrays:
        array[-1] = -1
    assert all(map(np.array_equal, taken.leaves, wanted))
    if earlier is not None:
        assert all(map(np.shares_memory, taken.leaves, earlier.leaves))


@pytest.mark.parametrize("megabytes", [1, 16])
def test_a_snapshot_leaves_the_buffers_of_the_tree_free_to_be_donated(megabytes: int) -> None:
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    array = step(jnp.zeros(megabytes << 18))
    address = array.unsafe_buffer_pointer()
    snapshot(array)
    assert step(array).unsafe_buffer_pointer() == address


def test_a_snapshot_has_the_structure_of_the_tree_and_knows_its_size() -> None:
    tree = {
        "m": eqx.nn.Linear(2, 2, key=jax.random.key(0)),
        "k": jax.random.key(1),
        "n": None,
        "s": "x",
        "i": 3,
    }
    taken = snapshot(tree)
    assert taken.treedef == jax.tree.structure(tree)
    assert taken.treedef.unflatten(taken.leaves)["i"] == 3
    assert taken.nbytes == 4 * (2 * 2 + 2) + 8


def test_every_leaf_that_cannot_be_stored_is_named_in_one_error() -> None:
    deleted = jnp.ones(3)
    deleted.delete()
    deleted_key = jax.random.key(0)
    deleted_key.delete()
    tree = {
        "object": object(),
        "objects": np.array([None, 1], dtype=object),
        "structured": np.zeros(2, [("a", "f4")]),
        "texts": np.array(["a"]),
        "text": np.str_("a"),
        "bytes": np.array([b"a"]),
        "void": np.zeros(2, "V3"),
        "long": np.ones(2, np.longdouble),
        "masked": np.ma.masked_array([1, 2], [True, False]),
        "int": 2**64,
        "negative": -(2**63) - 1,
        "set": {1},
        "deleted": deleted,
        "deleted key": deleted_key,
        "struct": jax.ShapeDtypeStruct((), jnp.float32),
        "partial": functools.partial(jnp.add, jnp.ones(3)),
        "fine": 1,
    }
    with pytest.raises(UnsupportedLeafError) as caught:
        snapshot(tree)
    message = str(caught.value)
    assert message.startswith("16 leaves cannot be stored")
    assert all(f"['{name}']: it is a" in message for name in tree if name != "fine")
    assert "fine" not in message
    for word in ("object", "numpy.str_", "float128", "MaskedArray", "65 bits", "donated", "ShapeDtypeStruct"):
        assert word in message


def test_one_leaf_that_cannot_be_stored_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedLeafError, match=r"^A leaf cannot be stored\. \['a'\]: it is a set"
    ) as caught:
        save_eqx(tmp_path / "tree.eqx", {"a": {1}})
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_snapshot_inside_jit_says_so() -> None:
    def inside(x: jax.Array) -> jax.Array:
        snapshot({"x": x})
        return x

    with pytest.raises(UnsupportedLeafError, match=r"\['x'\]: it is a tracer .* inside jit"):
        jax.jit(inside)(jnp.ones(3))


def test_two_leaves_of_one_path_are_refused() -> None:
    class Twins:
        def __init__(self, *children: Any) -> None:
            self.children = children

    same = jax.tree_util.GetAttrKey("x")
    jax.tree_util.register_pytree_with_keys(
        Twins, lambda t: ([(same, child) for child in t.children], None), lambda _, c: Twins(*c)
    )
    with pytest.raises(UnsupportedLeafError, match=r"\.x: another leaf has the same path"):
        snapshot(Twins(1, 2))


def test_an_array_with_parts_on_other_processes_is_refused_by_path() -> None:
    code = """
import sys, jax, numpy as np
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from vibe_store.serializers import snapshot
sharding = NamedSharding(Mesh(np.array(jax.devices()), ("a",)), PartitionSpec("a"))
array = jax.make_array_from_callback((4,), sharding, lambda index: np.arange(4.0)[index])
try:
    snapshot({"array": array, "fine": 1})
except TypeError as error:
    print(error)
"""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    both = [
        subprocess.Popen([sys.executable, "-c", code, port, rank], stdout=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    for process in both:
        output, _ = process.communicate(timeout=120)
        assert "['array']: it is a jax.Array (float32) with parts on the devices of other processes" in output
        assert "gather it first" in output


def _by_name(taken: Flat) -> dict[str, Any]:
    """The data of a snapshot of a flat dict."""
    pairs = zip(taken.rows, taken.leaves, strict=True)
    return {row.path[2:-2]: leaf.data if isinstance(leaf, HostCopy) else leaf for row, leaf in pairs}


def test_a_snapshot_takes_the_memory_of_one_that_is_no_longer_used() -> None:
    def tree(seed: int) -> dict[str, Any]:
        return {"jax": jnp.arange(4096.0) + seed, "numpy": np.arange(10) + seed, "key": jax.random.key(seed)}

    earlier = snapshot(tree(1))
    first, second = _by_name(earlier), _by_name(snapshot(tree(2), reuse=earlier))
    assert all(np.shares_memory(second[name], first[name]) for name in first)
    assert np.array_equal(second["jax"], np.arange(4096.0, dtype=np.float32) + 2)
    assert np.array_equal(second["numpy"], np.arange(10) + 2)
    assert np.array_equal(second["key"], jax.random.key_data(jax.random.key(2)))


def test_memory_that_does_not_fit_is_not_taken() -> None:
    kept = snapshot({"a": np.arange(4), "b": np.arange(4), "c": 1, "d": jnp.ones(3)})
    now = {"a": np.arange(5), "b": np.arange(4.0), "c": np.arange(2), "d": jnp.ones(3, jnp.int32)}
    taken = _by_name(snapshot(now, reuse=kept))
    for name in ("a", "b", "c"):
        assert taken[name].dtype == now[name].dtype
        assert np.array_equal(taken[name], now[name])
    assert taken["d"].dtype == np.int32
    assert np.array_equal(_by_name(kept)["a"], np.arange(4))
    assert np.array_equal(snapshot([np.arange(3)], reuse=kept).leaves[0], np.arange(3))
