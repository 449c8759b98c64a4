"""What is saved comes back, bit for bit."""

import functools
import os
import resource
import stat
import subprocess
import sys
import tempfile
import warnings
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vibe_store.errors import InvalidValueError, VibeStoreWarning
from vibe_store.serializers.eqx import EqxSerializer, load_eqx, save_eqx
from vibe_store.serializers.tree import describe

Same = Callable[[Any, Any], None]

IMPLS = ["threefry2x32", "rbg", "unsafe_rbg"]
JAX_DTYPES = [
    "bool", "int8", "int16", "int32", "uint8", "uint16", "uint32", "float16", "float32", "complex64",
    "bfloat16", "int4", "uint4", "int2", "uint2", "float8_e3m4", "float8_e4m3", "float8_e4m3fn",
    "float8_e4m3fnuz", "float8_e4m3b11fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
    "float4_e2m1fn",
]  # fmt: skip
NUMPY_DTYPES = [
    *JAX_DTYPES, "int64", "uint64", "float64", "complex128", "float6_e2m3fn", ">f4", ">i8", ">c16", "M8[ns]",
    "m8[D]", ">M8[s]",
]  # fmt: skip


class Point(NamedTuple):
    x: Any
    y: Any


@jax.tree_util.register_dataclass
@dataclass
class Pair:
    first: Any
    second: Any


class Model(eqx.Module):
    weight: jax.Array
    activation: Callable[..., Any]
    scale: float
    label: str = eqx.field(static=True)


def dtype_named(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name, name))


def sample(dtype: np.dtype[Any], shape: tuple[int, ...] = (3, 2)) -> np.ndarray[Any, Any]:
    """An array of small values that every dtype has, of both signs where there are two."""
    if dtype.kind in "mM":
        return np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    return np.resize(np.array([0, 1, 1, 0, 1], np.int8), shape).astype(dtype)


def through_file(tree: Any, tmp_path: Path, like: Any = None) -> Any:
    save_eqx(tmp_path / "tree.eqx", tree)
    return load_eqx(tmp_path / "tree.eqx", tree if like is None else like)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (5,), (2, 3)])
@pytest.mark.parametrize("name", JAX_DTYPES)
def test_a_jax_array_of_every_dtype_comes_back(
    name: str, shape: tuple[int, ...], tmp_path: Path, assert_same: Same
) -> None:
    tree = {"a": jnp.asarray(sample(dtype_named(name), shape)), "after": jnp.arange(3)}
    assert_same(through_file(tree, tmp_path), tree)


@pytest.mark.parametrize("name", NUMPY_DTYPES)
def test_a_numpy_array_and_scalar_of_every_dtype_come_back(
    name: str, tmp_path: Path, assert_same: Same
) -> None:
    array = sample(dtype_named(name))
    tree = [array, array[:0], np.array(array[0, 1]), array[1, 0], 7]
    assert_same(through_file(tree, tmp_path), tree)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,)])
@pytest.mark.parametrize("impl", IMPLS)
def test_typed_keys_of_every_implementation_come_back_and_draw_the_same(
    impl: str, shape: tuple[int, ...], tmp_path: Path, assert_same: Same
) -> None:
    key = jax.random.key(7, impl=impl)
    tree = {"key": jax.random.split(key, shape) if shape else key, "raw": jax.random.PRNGKey(1)}
    loaded = through_file(tree, tmp_path)
    assert_same(loaded, tree)
    if not shape:
        assert jax.random.bits(loaded["key"]) == jax.random.bits(key)


@pytest.mark.parametrize(
    "leaf",
    [
        True, False, 0, -1, 2**63 - 1, -(2**63), 2**63, 2**64 - 1, 0.0, -0.0, float("inf"), float("nan"),
        5e-324, 1 - 2j, complex(-0.0, float("nan")), "", "text",
        "naïve \U0001f600 \ud800 \x00 \"", b"", b"\x00\xff'",
    ],
    ids=repr,
)  # fmt: skip
def test_python_scalars_strings_and_bytes_come_back(leaf: Any, tmp_path: Path, assert_same: Same) -> None:
    like = type(leaf)() if type(leaf) is not int else 3
    assert_same(through_file({"leaf": leaf}, tmp_path, {"leaf": like}), {"leaf": leaf})


def test_every_bit_of_a_float_comes_back_nan_payloads_included(tmp_path: Path, assert_same: Same) -> None:
    bits = np.array([0x7FC00001, 0xFFC12345, 0x7F800001, 0x80000000, 0x7F800000, 0x00000001], np.uint32)
    tree = [bits.view(np.float32), jnp.asarray(bits.view(np.float32)), bits.view(np.float32)[1]]
    loaded = through_file(tree, tmp_path)
    assert_same(loaded, tree)
    assert np.asarray(loaded[1]).view(np.uint32).tolist() == bits.tolist()


def test_all_kinds_of_nodes_come_back(tmp_path: Path, assert_same: Same) -> None:
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_array)
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1e-3, 0.0, 10)))
    tree = {
        "model": model,
        "optimiser": chain.init(params),
        "masked": optax.masked(optax.sgd(0.1, momentum=0.9), {"w": True, "b": False}).init(
            {"w": jnp.ones(2), "b": jnp.ones(1)}
        ),
        "module": Model(jnp.ones((2, 2)), jax.nn.relu, 0.5, "label"),
        "tuple": Point(jnp.arange(3), (None, np.ones(2))),
        "dataclass": Pair({"b": 1, "a": 2.0}, [None, [], {}, ()]),
        3: jnp.zeros(()),
        (1, "x"): jnp.ones(()),
    }
    tree = {str(name): value for name, value in tree.items()}
    assert_same(through_file(tree, tmp_path), tree)


@pytest.mark.parametrize("tree", [None, (), {}, [None, None], "only", jax.nn.relu, 3])
def test_a_tree_of_few_or_no_leaves_comes_back(tree: Any, tmp_path: Path) -> None:
    save_eqx(tmp_path / "tree.eqx", tree)
    assert load_eqx(tmp_path / "tree.eqx", tree) == tree


def test_a_tree_that_is_one_array_comes_back(tmp_path: Path, assert_same: Same) -> None:
    assert_same(through_file(jnp.arange(3), tmp_path), jnp.arange(3))


def test_a_leaf_of_many_chunks_and_a_tree_of_many_leaves_come_back(tmp_path: Path, assert_same: Same) -> None:
    rng = np.random.default_rng(0)
    tree = {
        "large": jnp.asarray(rng.integers(0, 255, (9 << 20) + 13, np.uint8)),
        "many": [np.full((i % 3,), i) for i in range(3000)],
    }
    assert_same(through_file(tree, tmp_path), tree)


@pytest.mark.parametrize("order", ["F", "strided", "transposed", "read-only", "broadcast"])
def test_numpy_arrays_of_any_layout_come_back_by_value(order: str, tmp_path: Path, assert_same: Same) -> None:
    base = np.arange(24, dtype=np.int16).reshape(4, 6)
    array = {
        "F": np.asfortranarray(base),
        "strided": base[::-2, ::3],
        "transposed": np.arange(24).reshape(2, 3, 4).transpose(1, 2, 0),
        "read-only": np.frombuffer(base.tobytes(), np.int16),
        "broadcast": np.broadcast_to(np.int32(5), (2, 3)),
    }[order]
    for tree in (array, EqxSerializer().snapshot(array)):
        loaded = through_file(tree, tmp_path, array)
        assert_same(loaded, array)
        assert loaded.flags.c_contiguous
        assert loaded.flags.writeable


def test_a_memory_mapped_array_comes_back_as_an_ordinary_one(tmp_path: Path) -> None:
    mapped = np.memmap(tmp_path / "data", np.float32, "w+", shape=(3,))
    mapped[:] = [1, 2, 3]
    loaded = through_file(mapped, tmp_path)
    assert type(loaded) is np.ndarray
    assert loaded.tolist() == [1, 2, 3]


def test_the_template_decides_between_jax_arrays_numpy_arrays_and_numpy_scalars(tmp_path: Path) -> None:
    save_eqx(
        tmp_path / "tree.eqx", [jnp.float32(1), np.array(2, np.float32), np.float32(3), np.ones(2, np.int8)]
    )
    like = [np.float32(0), jnp.float32(0), np.array(0, np.float32), jax.ShapeDtypeStruct((2,), jnp.int8)]
    loaded = load_eqx(tmp_path / "tree.eqx", like)
    assert type(loaded[0]) is np.float32
    assert isinstance(loaded[1], jax.Array)
    assert type(loaded[2]) is np.ndarray
    assert isinstance(loaded[3], jax.Array)
    assert [float(x) for x in loaded[:3]] == [1, 2, 3]


def test_a_template_of_shapes_gives_the_saved_tree(tmp_path: Path, assert_same: Same) -> None:
    def make() -> Any:
        keys = jax.random.split(jax.random.key(3, impl="rbg"), 2)
        return {"model": eqx.nn.MLP(3, 2, 4, 1, key=keys[0]), "keys": keys, "half": jnp.ones(3, jnp.bfloat16)}

    tree = make()
    assert_same(through_file(tree, tmp_path, eqx.filter_eval_shape(make)), tree)


def test_a_template_whose_arrays_were_donated_still_serves(tmp_path: Path, assert_same: Same) -> None:
    tree = {"a": jnp.arange(3), "key": jax.random.key(0)}
    like = {"a": jnp.zeros(3, jnp.int32), "key": jax.random.key(1)}
    save_eqx(tmp_path / "tree.eqx", tree)
    like["a"].delete()
    like["key"].delete()
    assert_same(load_eqx(tmp_path / "tree.eqx", like), tree)


def test_loaded_arrays_are_strongly_typed_uncommitted_and_can_be_donated(tmp_path: Path) -> None:
    tree = {f"{size}": jnp.full((size,), 2.0) for size in (1, 16, 1 << 20)} | {"weak": jnp.asarray(1.0)}
    assert tree["weak"].weak_type
    loaded = through_file(tree, tmp_path)
    assert not any(leaf.weak_type or leaf.committed for leaf in loaded.values())
    doubled = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2, tree), donate_argnums=0)(loaded)
    assert all(leaf.is_deleted() for leaf in loaded.values())
    assert float(doubled["16"].sum()) == 64


def test_a_committed_template_commits_what_is_loaded(tmp_path: Path) -> None:
    device = jax.devices()[0]
    tree = {"a": jax.device_put(jnp.arange(3), device), "key": jax.device_put(jax.random.key(0), device)}
    loaded = through_file(tree, tmp_path)
    assert loaded["a"].committed
    assert loaded["key"].committed


def test_leaves_are_matched_by_path_so_a_reordered_namedtuple_loads_right(tmp_path: Path) -> None:
    old = namedtuple("Old", ["a", "b", "c"])
    new = namedtuple("New", ["c", "a", "b"])
    tree = old(jnp.arange(3), np.arange(3, 6), jnp.arange(6, 9))
    like = new(jnp.zeros(3, jnp.int32), jnp.zeros(3, jnp.int32), np.zeros(3, np.int64))
    loaded = through_file(tree, tmp_path, like)
    assert [list(map(int, leaf)) for leaf in (loaded.a, loaded.b, loaded.c)] == [
        [0, 1, 2],
        [3, 4, 5],
        [6, 7, 8],
    ]


def test_callables_are_the_templates_without_a_warning_when_the_names_agree(tmp_path: Path) -> None:
    leaky = functools.partial(jax.nn.leaky_relu, negative_slope=0.1)
    tree = [jax.nn.relu, jax.jit(jnp.sin), np.add, int, leaky, abs, [].append]
    assert through_file(tree, tmp_path) == tree


def test_a_callable_of_another_name_is_warned_about_by_path(tmp_path: Path) -> None:
    tree = Model(jnp.ones(2), jax.nn.relu, 0.5, "label")
    like = Model(jnp.zeros(2), jnp.tanh, 0.0, "label")
    save_eqx(tmp_path / "tree.eqx", tree)
    with pytest.warns(VibeStoreWarning, match=r"\.activation was the callable .*relu .*tanh"):
        assert load_eqx(tmp_path / "tree.eqx", like).activation is jnp.tanh


def test_a_partial_with_another_argument_is_warned_about(tmp_path: Path) -> None:
    save_eqx(tmp_path / "tree.eqx", functools.partial(jax.nn.leaky_relu, negative_slope=0.1))
    with pytest.warns(VibeStoreWarning, match=r"negative_slope=0\.1.*negative_slope=0\.2"):
        load_eqx(tmp_path / "tree.eqx", functools.partial(jax.nn.leaky_relu, negative_slope=0.2))


def test_the_serializer_returns_what_it_wrote_and_loads_it(
    tmp_path: Path, assert_same: Same, folder_source: Any
) -> None:
    serializer = EqxSerializer()
    tree = {"a": jnp.arange(3), "key": jax.random.key(1), "s": "x", "b": b"y", "n": np.ones(2), "f": jnp.sin}
    saved = serializer.save(serializer.snapshot(tree), tmp_path, "state")
    assert [entry.name for entry in saved.files] == ["state.eqx"]
    assert [path.name for path in tmp_path.iterdir()] == ["state.eqx"]
    assert [leaf.path for leaf in saved.leaves] == [leaf.path for leaf in describe(tree)]
    source = folder_source(tmp_path, saved)
    source.path("state.eqx")  # checks the size and the checksum that were computed while writing
    assert_same(serializer.load(source, "state", tree), tree)


def test_each_row_says_where_the_data_of_its_leaf_begins_and_what_its_checksum_is(tmp_path: Path) -> None:
    tree = [jnp.arange(3), np.arange(9 << 20, dtype=np.uint8), 0.5, "text", np.asfortranarray(np.eye(3)[:2])]
    saved = EqxSerializer().save(tree, tmp_path, "state")
    data = (tmp_path / "state.eqx").read_bytes()
    for leaf, row in zip(tree, saved.leaves, strict=True):
        if isinstance(leaf, str):
            assert row.offset is row.checksum is None
            continue
        raw = np.asarray(leaf).tobytes()
        assert row.offset is not None
        assert data[row.offset : row.offset + len(raw)] == raw
        assert row.checksum == xxhash.xxh3_128_hexdigest(raw)


def test_a_live_tree_and_its_snapshot_are_stored_alike(tmp_path: Path) -> None:
    serializer = EqxSerializer()
    tree = {"a": jnp.arange(3), "key": jax.random.key(1), "n": np.asfortranarray(np.ones((2, 3)))}
    live = serializer.save(tree, tmp_path, "live")
    snapshot = serializer.save(serializer.snapshot(serializer.snapshot(tree)), tmp_path, "snapshot")
    assert live.leaves == snapshot.leaves
    assert (tmp_path / "live.eqx").read_bytes() == (tmp_path / "snapshot.eqx").read_bytes()


def test_a_partial_template_gets_its_leaves_and_the_rest_is_still_verified(
    tmp_path: Path, assert_same: Same, folder_source: Any
) -> None:
    serializer = EqxSerializer()
    tree = {
        "a": jnp.arange(3),
        "big": np.ones(6 << 20, np.uint8),
        "c": {"d": jnp.ones(2), "e": "text"},
        "z": 1,
    }
    saved = serializer.save(tree, tmp_path, "state")
    like = {"a": jnp.zeros(3, jnp.int32), "c": {"d": jnp.zeros(2)}}
    loaded = serializer.load(folder_source(tmp_path, saved), "state", like, partial=True)
    assert_same(loaded, {"a": tree["a"], "c": {"d": tree["c"]["d"]}})


def test_save_eqx_makes_folders_and_replaces_a_file_through_a_link_keeping_its_permissions(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a" / "b" / "tree"
    save_eqx(path, jnp.arange(3))
    path.chmod(0o600)
    link = tmp_path / "link"
    link.symlink_to(path)
    save_eqx(str(link), jnp.arange(4))
    assert link.is_symlink()
    assert load_eqx(path, jnp.zeros(4, jnp.int32)).tolist() == [0, 1, 2, 3]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["tree"]


def test_a_new_file_has_the_permissions_that_the_umask_leaves(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        save_eqx(tmp_path / "tree.eqx", 1)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "tree.eqx").stat().st_mode) == 0o640


@pytest.mark.parametrize("function", [save_eqx, load_eqx])
def test_a_folder_is_refused(function: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match=f"{tmp_path} is a folder"):
        function(tmp_path, 1)


def test_a_disk_that_is_full_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "tree.eqx"
    save_eqx(path, np.arange(3))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"too large.*{path}"):
            save_eqx(path, np.ones(9_000_000, np.uint8))
        with pytest.raises(OSError, match="too large"):
            EqxSerializer().save(np.ones(9_000_000, np.uint8), tmp_path, "state")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_eqx(path, np.zeros(3, np.int64)).tolist() == [0, 1, 2]
    assert list(tmp_path.iterdir()) == [path]


def test_sharded_arrays_and_keys_come_back_where_the_template_wants_them(tmp_path: Path) -> None:
    code = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from vibe_store.errors import InvalidValueError
from vibe_store.serializers.eqx import EqxSerializer, load_eqx, save_eqx
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
split, whole = NamedSharding(mesh, P("a", "b")), NamedSharding(mesh, P())
row = NamedSharding(mesh, P("a"))
x = jnp.arange(16.0).reshape(4, 4)
keys = jax.random.split(jax.random.key(0), 4)
tree = jax.device_put({"split": x, "whole": x, "keys": keys}, {"split": split, "whole": whole, "keys": row})
want = {name: np.asarray(x if name != "keys" else jax.random.key_data(keys)) for name in tree}
snapshot = EqxSerializer().snapshot(tree)
jax.jit(lambda t: jax.tree.map(lambda a: a, t), donate_argnums=0)(tree)
save_eqx(sys.argv[1], snapshot)
struct = lambda shape, dtype, sharding: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
like = {"split": struct((4, 4), jnp.float32, row), "whole": struct((4, 4), jnp.float32, None),
        "keys": struct((4,), keys.dtype, row)}
loaded = load_eqx(sys.argv[1], like)
assert loaded["split"].sharding == row, loaded["split"].sharding
assert len(loaded["whole"].devices()) == 1 and not loaded["whole"].committed
assert loaded["keys"].sharding == row and loaded["keys"].dtype == keys.dtype
again = load_eqx(sys.argv[1], loaded)
assert again["split"].sharding == row and again["keys"].sharding == row
for tree in (loaded, again):
    for name, leaf in tree.items():
        data = jax.random.key_data(leaf) if name == "keys" else leaf
        assert np.asarray(data).tobytes() == want[name].tobytes(), name
save_eqx(sys.argv[1], {"odd": jnp.arange(3.0)})
for wanted in (row, NamedSharding(mesh.abstract_mesh, P())):
    try:
        load_eqx(sys.argv[1], {"odd": struct((3,), jnp.float32, wanted)})
    except InvalidValueError as error:
        assert "['odd'] cannot be placed" in str(error), error
    else:
        raise AssertionError("an impossible sharding was accepted")
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, tmp_path / "tree.eqx"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
    )
    assert done.returncode == 0, done.stderr


def test_int64_comes_back_when_x64_is_enabled(tmp_path: Path) -> None:
    with jax.enable_x64(True):
        tree = {"i": jnp.asarray([2**40]), "f": jnp.asarray([1 + 2**-50])}
        loaded = through_file(tree, tmp_path, jax.eval_shape(lambda: tree))
        assert loaded["i"].dtype == jnp.int64
        assert int(loaded["i"][0]) == 2**40
        assert float(loaded["f"][0]) == 1 + 2**-50


@st.composite
def arrays(draw: st.DrawFn) -> Any:
    on_device = draw(st.booleans())
    dtype = dtype_named(draw(st.sampled_from(JAX_DTYPES if on_device else NUMPY_DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    if on_device:
        return jnp.asarray(sample(dtype, shape))
    size = int(np.prod(shape))
    data = draw(st.binary(min_size=size * dtype.itemsize, max_size=size * dtype.itemsize))
    if dtype.kind == "b":
        data = bytes(byte % 2 for byte in data)
    array = np.frombuffer(data, dtype).reshape(shape)
    layout = draw(st.sampled_from(["C", "F", "reversed", "scalar"]))
    if layout == "scalar" and size:
        return array.reshape(-1)[0]
    if layout == "reversed" and shape:
        return array[::-1]
    return np.asfortranarray(array) if layout == "F" else array


def keys() -> Any:
    def make(seed: int, impl: str, shape: tuple[int, ...]) -> jax.Array:
        words = 2 if impl == "threefry2x32" else 4
        data = np.random.default_rng(seed).integers(0, 2**32, (*shape, words), np.uint32)
        return jax.random.wrap_key_data(data, impl=impl)

    return st.builds(make, st.integers(0, 99), st.sampled_from(IMPLS), st.sampled_from([(), (1,), (2, 1)]))


LEAVES = st.one_of(
    arrays(),
    keys(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.none(),
    st.sampled_from([jax.nn.relu, jnp.sin, int]),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.text(max_size=3), inner, max_size=4),
        st.builds(Point, inner, inner),
        st.builds(Pair, inner, inner),
        st.tuples(inner, inner),
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(tree=TREES)
def test_any_tree_comes_back_bit_for_bit(tree: Any, assert_same: Same) -> None:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        serializer = EqxSerializer()
        assert_same(through_file(tree, Path(folder)), tree)
        assert_same(through_file(serializer.snapshot(tree), Path(folder), tree), tree)
