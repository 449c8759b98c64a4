"""What lies in a file, for whoever reads it without vibe_store."""

import json
import subprocess
import sys
import tracemalloc
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.flax
from safetensors import safe_open
from safetensors.numpy import load_file
from vibe_store_safetensors import layout
from vibe_store_safetensors.serializer import SafetensorsSerializer

from vibe_store import CheckpointManager
from vibe_store.errors import CorruptCheckpointError, InvalidValueError, TemplateMismatchError
from vibe_store.interfaces import SavedItem
from vibe_store.storage.memory import MemoryStorage

DTYPES = {
    "bool": "BOOL",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}
"""What the documentation of safetensors calls each dtype."""


class Layer(NamedTuple):
    weight: Any
    bias: Any


def save(tree: Any, folder: Path) -> SavedItem:
    """Save a tree as the item ``state``."""
    return SafetensorsSerializer().save(tree, folder, "state")


def plain(tree: Any, folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Save a tree, and return what the library finds."""
    save(tree, folder)
    return load_file(folder / "state.safetensors")


def test_plain_safetensors_reads_every_array_by_the_path_of_its_leaf(tmp_path: Path) -> None:
    layers = [Layer(np.full((2, 3), i, np.float32), jnp.arange(3) + i) for i in range(2)]
    found = plain({"params": {"layers": layers}, "step": np.int32(7)}, tmp_path)
    assert set(found) == {
        "params.layers.0.weight",
        "params.layers.0.bias",
        "params.layers.1.weight",
        "params.layers.1.bias",
        "step",
    }
    assert found["step"].shape == ()
    assert found["step"] == 7
    for i in range(2):
        np.testing.assert_array_equal(found[f"params.layers.{i}.weight"], layers[i].weight)
        np.testing.assert_array_equal(found[f"params.layers.{i}.bias"], np.asarray(layers[i].bias))


def test_a_process_without_vibe_store_and_jax_reads_it(tmp_path: Path) -> None:
    save({"a": jnp.arange(3.0), "key": jax.random.key(0), "s": "text"}, tmp_path)
    code = """
import sys
from safetensors.numpy import load_file
print({name: tensor.tolist() for name, tensor in sorted(load_file(sys.argv[1]).items())})
assert not {"jax", "vibe_store"} & set(sys.modules)
"""
    file = tmp_path / "state.safetensors"
    done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, check=True)
    assert done.stdout == "{'a': [0.0, 1.0, 2.0], 'key': [0, 0]}\n"


@pytest.mark.parametrize(("name", "code"), DTYPES.items())
def test_a_dtype_that_safetensors_has_is_stored_as_that(name: str, code: str, tmp_path: Path) -> None:
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    array = np.resize(np.array([0, 1, 1, 0, 1]), (2, 3)).astype(dtype)
    save({"x": array, "none": array[:0]}, tmp_path)
    with safe_open(tmp_path / "state.safetensors", "np") as file:
        assert file.get_slice("x").get_dtype() == code
        assert file.get_slice("none").get_shape() == [0, 3]
    raw = safetensors.deserialize((tmp_path / "state.safetensors").read_bytes())
    assert {name: bytes(tensor["data"]) for name, tensor in raw} == {"x": array.tobytes(), "none": b""}


def test_plain_safetensors_gives_jax_its_bfloat16(tmp_path: Path) -> None:
    save({"b": jnp.arange(3, dtype=jnp.bfloat16)}, tmp_path)
    (found,) = safetensors.flax.load_file(tmp_path / "state.safetensors").values()
    assert (found.dtype, found.tolist()) == (jnp.bfloat16, [0, 1, 2])


@pytest.mark.parametrize(
    "name", ["complex128", "int4", "uint2", "float4_e2m1fn", "float6_e2m3fn", "float8_e3m4", ">f4", "M8[ns]"]
)
def test_a_dtype_that_safetensors_lacks_is_stored_as_bytes_that_give_it_back(
    name: str, tmp_path: Path
) -> None:
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    array = np.array([[0, 1], [1, 0], [1, 1]], np.int8).astype(dtype)
    found = plain({"x": array, "one": np.array(array[0, 1], dtype)}, tmp_path)
    assert (found["x"].dtype, found["x"].shape) == (np.uint8, (3, 2, dtype.itemsize))
    np.testing.assert_array_equal(found["x"].view(dtype)[..., 0], array)
    np.testing.assert_array_equal(found["one"].view(dtype)[0], array[0, 1])


def test_python_scalars_are_tensors_without_dimensions(tmp_path: Path) -> None:
    found = plain({"b": True, "i": -3, "u": 2**64 - 1, "f": 0.5, "c": 1 - 2j}, tmp_path)
    assert [found[name].item() for name in "biuf"] == [True, -3, 2**64 - 1, 0.5]
    assert found["c"].view(np.complex128)[0] == 1 - 2j


def test_what_has_no_data_is_in_the_leaf_table_in_the_metadata(tmp_path: Path) -> None:
    saved = save({"s": "text", "k": jax.random.key(0, impl="rbg"), "f": jax.nn.relu}, tmp_path)
    with safe_open(tmp_path / "state.safetensors", "np") as file:
        assert list(file.keys()) == ["k"]
        rows = json.loads(file.metadata()[layout.LEAVES])
    assert (
        [row["path"] for row in rows] == [leaf.path for leaf in saved.leaves] == ["['f']", "['k']", "['s']"]
    )
    assert rows[1] == {"path": "['k']", "kind": "key", "dtype": "uint32", "shape": [4], "impl": "rbg"}
    assert rows[2] == {"path": "['s']", "kind": "str", "value": "text"}


@pytest.mark.parametrize(
    ("tree", "names"),
    [
        (np.ones(1), ["state"]),
        ({"": np.ones(1)}, ["state"]),
        ({"": np.ones(1), "state": np.ones(1)}, ["['']", "['state']"]),
        ({"a.b": 1, "a": {"b": 2}}, ["['a']['b']", "['a.b']"]),
        ({"__metadata__": 1}, ["['__metadata__']"]),
        ({"\ud800": 1, "é": 2}, ["['\\ud800']", "['é']"]),
        ({}, []),
        ([None, "text"], []),
    ],
    ids=str,
)
def test_no_two_tensors_have_one_name_and_none_is_taken_for_the_metadata(
    tree: Any, names: list[str], tmp_path: Path
) -> None:
    assert sorted(plain(tree, tmp_path)) == names


def test_a_path_that_is_no_text_for_others_gives_way_to_a_number(tmp_path: Path) -> None:
    class Key:
        def __str__(self) -> str:
            return "\ud800"

    class Node:
        """A node with one leaf, under that key."""

    jax.tree_util.register_pytree_with_keys(Node, lambda _: ([(Key(), 1)], None), lambda *_: Node())
    assert set(plain(Node(), tmp_path)) == {"0"}


def test_every_tensor_lies_where_its_elements_are_aligned(tmp_path: Path) -> None:
    tree = [np.ones(3, np.int8), np.ones(3, np.float64), np.ones(1, np.float16), np.float32(1), 1j, True]
    for row in save(tree, tmp_path).leaves:
        assert row.offset is not None
        assert row.offset % np.dtype(row.dtype).alignment == 0


def test_a_header_that_safetensors_would_not_read_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "_MOST_HEADER_BYTES", 1000)
    with pytest.raises(InvalidValueError, match=r"would have \d+ bytes, and safetensors reads at most 1000"):
        save("x" * 1000, tmp_path)
    assert list(tmp_path.iterdir()) == []


# In a checkpoint.


def managed(storage: Any, tree: Any) -> CheckpointManager:
    """A manager that has saved a tree as step 1."""
    manager = CheckpointManager(storage, serializer=SafetensorsSerializer(), async_timeout_secs=None)
    manager.save(1, tree)
    return manager


def test_a_checkpoint_comes_back_with_and_without_a_template(tmp_path: Path) -> None:
    tree = {"layers": [Layer(jnp.ones((2, 2)), None)], "n": 3, "name": "x", "z": np.zeros((0, 2))}
    manager = managed(tmp_path, tree)
    with_template, without = manager.restore(1, tree), manager.restore(1)
    assert jax.tree.structure(with_template) == jax.tree.structure(tree)
    np.testing.assert_array_equal(with_template["layers"][0].weight, np.ones((2, 2)))
    assert (without["n"], without["name"], without["z"].shape) == (3, "x", (0, 2))
    np.testing.assert_array_equal(without["layers"][0]["weight"], np.ones((2, 2)))


class CountingStorage(MemoryStorage):
    """A storage that remembers how many bytes of tensors were asked for."""

    asked = 0

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        data = super().read(key, start, end)
        self.asked += len(data) if "safetensors" in key else 0
        return data


def test_of_a_template_with_a_part_of_the_leaves_only_that_part_is_read(tmp_path: Path) -> None:
    tree = {"large": np.ones(100_000), "small": np.arange(10, dtype=np.int16), "text": "x"}
    storage = CountingStorage(f"memory://{tmp_path.name}-{uuid.uuid4().hex}")
    loaded = managed(storage, tree).restore(1, {"small": tree["small"], "text": ""}, partial=True)
    assert loaded["text"] == "x"
    np.testing.assert_array_equal(loaded["small"], tree["small"])
    assert storage.asked == 20


def test_a_flipped_bit_is_noticed_in_what_is_read_and_only_there(tmp_path: Path) -> None:
    tree = {"a": np.ones(4), "b": np.zeros(4)}
    manager = managed(tmp_path, tree)
    file = tmp_path / "step_1" / "state.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # the last element of b
    file.write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match="is damaged"):
        manager.restore(1, tree)
    with pytest.raises(CorruptCheckpointError, match="do not match their checksum"):
        manager.restore(1, {"b": tree["b"]}, partial=True)
    np.testing.assert_array_equal(manager.restore(1, {"a": tree["a"]}, partial=True)["a"], tree["a"])


def test_another_template_is_refused_with_every_difference_by_path(tmp_path: Path) -> None:
    manager = managed(tmp_path, {"a": jnp.ones(3), "b": jnp.ones(2, jnp.bfloat16), "k": jax.random.key(0)})
    like = {"a": jnp.ones(4), "b": jnp.ones(2, jnp.float16), "k": jax.random.key(0, impl="rbg"), "new": 1}
    with pytest.raises(TemplateMismatchError) as caught:
        manager.restore(1, like)
    assert caught.value.paths == ("['a']", "['b']", "['k']", "['new']")
    assert "dtype bfloat16 was saved, but the template has float16" in str(caught.value)


def test_what_is_loaded_is_memory_that_jax_takes_over_and_numpy_may_write(tmp_path: Path) -> None:
    tree = {"n": np.ones(1 << 16), "j": jnp.ones(1 << 16)}
    loaded = managed(tmp_path, tree).restore(1, tree)
    loaded["n"][0] = 2
    assert not loaded["j"].committed
    assert jax.jit(lambda x: x + 1, donate_argnums=0)(loaded["j"])[0] == 2


@contextmanager
def peak_of_allocations(most: int) -> Iterator[None]:
    """Fail where more bytes than these are allocated at one time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def test_saving_takes_no_second_copy_of_the_state_and_loading_one(tmp_path: Path) -> None:
    tree = {"a": np.ones(2 << 20), "b": np.ones(2 << 20)}
    manager = CheckpointManager(tmp_path, serializer=SafetensorsSerializer(), async_timeout_secs=None)
    size = sum(leaf.nbytes for leaf in tree.values())
    with peak_of_allocations(size // 4):
        manager.save(1, tree)
    with peak_of_allocations(size * 5 // 4):
        manager.restore(1, tree)
