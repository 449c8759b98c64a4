"""What the tests of serializers share: trees, a comparison that sees every bit, and a verifying source."""

import io
import itertools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import xxhash
from hypothesis import strategies as st

from vibe_store.interfaces import FileEntry, Leaf, SavedItem, Serializer, Source
from vibe_store.registry import get_serializer
from vibe_store.serializers.verifying_reader import VerifyingReader

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


def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name, name))


def _sample(dtype: np.dtype[Any], shape: tuple[int, ...] = (3, 2)) -> np.ndarray[Any, Any]:
    """An array of small values that every dtype has, of both signs where there are two."""
    if dtype.kind in "mM":
        return np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    return np.resize(np.array([0, 1, 1, 0, 1], np.int8), shape).astype(dtype)


def _jax_arrays() -> Any:
    shapes = [(), (0,), (2, 0, 3), (5,), (2, 3)]
    return {name: [jnp.asarray(_sample(_dtype(name), shape)) for shape in shapes] for name in JAX_DTYPES}


def _numpy_arrays() -> Any:
    arrays = {name: _sample(_dtype(name)) for name in NUMPY_DTYPES}
    return {name: [a, a[:0], np.array(a[0, 1]), a[1, 0], 7] for name, a in arrays.items()}


def _every_byte() -> Any:
    """For each dtype, an array of each pattern that a byte may have, in every byte of an element."""
    patterns = np.arange(256, dtype=np.uint8)
    return {
        name: np.stack([patterns] * _dtype(name).itemsize, axis=-1).reshape(-1).view(_dtype(name))
        for name in NUMPY_DTYPES
        if name != "bool"
    }


def _keys() -> Any:
    shapes = [(4,), (2, 3), (0,)]
    keys = {impl: jax.random.key(7, impl=impl) for impl in IMPLS}
    return [(keys, jax.random.PRNGKey(1)), [jax.random.split(k, s) for k in keys.values() for s in shapes]]


def _scalars() -> Any:
    return [
        True, False, 0, -1, 2**63 - 1, -(2**63), 2**63, 2**64 - 1, 0.0, -0.0, float("inf"), float("nan"),
        5e-324, 1 - 2j, complex(-0.0, float("nan")),
    ]  # fmt: skip


def _texts() -> Any:
    return ["", "text", 'naïve \U0001f600 \ud800 \x00 "', b"", b"\x00\xff'"]


def _float_bits() -> Any:
    bits = np.array([0x7FC00001, 0xFFC12345, 0x7F800001, 0x80000000, 0x7F800000, 0x00000001], np.uint32)
    return [bits.view(np.float32), jnp.asarray(bits.view(np.float32)), bits.view(np.float32)[1]]


def _nodes() -> Any:
    params = eqx.filter(eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0)), eqx.is_array)
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1e-3, 0.0, 10)))
    return {
        "model": eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0)),
        "optimiser": chain.init(params),
        "masked": optax.masked(optax.sgd(0.1, momentum=0.9), {"w": True, "b": False}).init(
            {"w": jnp.ones(2), "b": jnp.ones(1)}
        ),
        "module": Model(jnp.ones((2, 2)), jax.nn.relu, 0.5, "label"),
        "tuple": Point(jnp.arange(3), (None, np.ones(2))),
        "dataclass": Pair({"b": 1, "a": 2.0}, [None, [], {}, ()]),
        "numbers": {3: jnp.zeros(()), 500: 1},
        "pairs": {(1, "x"): jnp.ones(()), (1, "y"): 2},
    }


def _odd_names() -> Any:
    """Names that mean something to a file system, to Orbax or to JSON."""
    names = [
        "",
        ".",
        "..",
        "/",
        "a/b",
        "a.b",
        "a b",
        "%20",
        "'",
        '"',
        "\\",
        "\n",
        "\ud800",
        "é",
        "[0]",
        "c/0",
    ]
    return {name: {name: np.full(1 + i, i)} for i, name in enumerate(names)}


def _names_that_collide() -> Any:
    return {"a.b": 1, "a": {"b": 2, "c": [3], "c.0": 4}, "x": np.ones(1), "x/y": np.ones(2)}


TREES: dict[str, Callable[[], Any]] = {
    "jax arrays": _jax_arrays,
    "numpy arrays": _numpy_arrays,
    "every byte": _every_byte,
    "keys": _keys,
    "scalars": _scalars,
    "texts": _texts,
    "float bits": _float_bits,
    "nodes": _nodes,
    "odd names": _odd_names,
    "names that collide": _names_that_collide,
    "None": lambda: None,
    "empty tuple": lambda: (),
    "empty dict": dict,
    "no leaf": lambda: [None, {}],
    "one string": lambda: "only",
    "one callable": lambda: jax.nn.relu,
    "one number": lambda: 3,
    "one array": lambda: jnp.arange(3),
    "one empty array": lambda: np.zeros((0, 2)),
    "many leaves": lambda: [np.full((i % 3,), i) for i in range(500)],
}


@st.composite
def _arrays(draw: st.DrawFn) -> Any:
    on_device = draw(st.booleans())
    dtype = _dtype(draw(st.sampled_from(JAX_DTYPES if on_device else NUMPY_DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    if on_device:
        return jnp.asarray(_sample(dtype, shape))
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


def _key(seed: int, impl: str, shape: tuple[int, ...]) -> jax.Array:
    words = 2 if impl == "threefry2x32" else 4
    data = np.random.default_rng(seed).integers(0, 2**32, (*shape, words), np.uint32)
    return jax.random.wrap_key_data(data, impl=impl)


LEAVES = st.one_of(
    _arrays(),
    st.builds(_key, st.integers(0, 99), st.sampled_from(IMPLS), st.sampled_from([(), (1,), (2, 1)])),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.none(),
    st.sampled_from([jax.nn.relu, jnp.sin, int]),
)
ANY_TREE = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.text(max_size=3), inner, max_size=4),
        st.dictionaries(st.integers(-2, 40), inner, max_size=4),
        st.builds(Point, inner, inner),
        st.builds(Pair, inner, inner),
        st.tuples(inner, inner),
    ),
    max_leaves=8,
)


def _bits(leaf: Any) -> Any:
    """Everything that makes a leaf what it is, its type and every bit of its data included."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return (
            "key",
            str(jax.random.key_impl(leaf)),
            leaf.shape,
            np.asarray(jax.random.key_data(leaf)).tobytes(),
        )
    if isinstance(leaf, jax.Array):
        return "jax", leaf.dtype.name, leaf.shape, np.asarray(leaf).tobytes()
    if isinstance(leaf, np.ndarray | np.generic):
        kind = np.ndarray if isinstance(leaf, np.ndarray) else type(leaf)
        return kind, leaf.dtype.str, leaf.dtype.name, leaf.shape, leaf.tobytes()
    if isinstance(leaf, float):
        return float, struct.pack("d", leaf)
    if isinstance(leaf, complex):
        return complex, struct.pack("dd", leaf.real, leaf.imag)
    return type(leaf), leaf


def _assert_same(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True):
        assert _bits(a) == _bits(b), jax.tree_util.keystr(path)


class FolderSource(Source):
    """Serves a saved item from the folder that it was saved into."""

    def __init__(self, folder: Path, saved: SavedItem) -> None:
        self.folder = folder
        self._saved = saved

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        return self._saved.leaves

    @property
    def files(self) -> Mapping[str, FileEntry]:
        return {entry.name: entry for entry in self._saved.files}

    def path(self, name: str) -> Path:
        data = (self.folder / name).read_bytes()
        assert xxhash.xxh3_128_hexdigest(data) == self.files[name].checksum
        return self.folder / name

    def open(self, name: str) -> BinaryIO:
        entry, data = self.files[name], io.BytesIO((self.folder / name).read_bytes())
        return cast(BinaryIO, VerifyingReader(data, entry.size, entry.checksum, name))

    def read_part(self, name: str, start: int, buffer: memoryview, checksum: str) -> None:
        data = (self.folder / name).read_bytes()[start : start + len(buffer)]
        assert xxhash.xxh3_128_hexdigest(data) == checksum
        buffer[:] = data


@pytest.fixture(scope="session")
def assert_same() -> Callable[[Any, Any], None]:
    """Return a function that compares two trees bit for bit."""
    return _assert_same


@pytest.fixture(scope="session")
def folder_source() -> type[FolderSource]:
    """Return a source that reads a saved item where it was saved."""
    return FolderSource


class Through:
    """A serializer, and folders to save into and load from."""

    def __init__(self, serializer: Serializer, folder: Path) -> None:
        self.serializer = serializer
        self._folder = folder
        self._numbers = itertools.count()

    def save(self, tree: Any) -> FolderSource:
        """Save a tree, and return what it can be loaded from."""
        folder = self._folder / f"saved_{next(self._numbers)}"
        folder.mkdir()
        return FolderSource(folder, self.serializer.save(tree, folder, "state"))

    def load(self, source: Source, like: Any, *, partial: bool = False) -> Any:
        return self.serializer.load(source, "state", like, partial=partial)

    def __call__(self, tree: Any, like: Any = None) -> Any:
        """Save a tree, and return what is loaded."""
        return self.load(self.save(tree), tree if like is None else like)


@pytest.fixture(params=["eqx", "orbax"], scope="session")
def through(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Through:
    """Each serializer in turn."""
    if request.param == "orbax":
        pytest.importorskip("orbax.checkpoint", reason='needs pip install "vibe-store[orbax]"')
    return Through(get_serializer(request.param), tmp_path_factory.mktemp(request.param))


@pytest.fixture(params=TREES)
def tree(request: pytest.FixtureRequest) -> Any:
    """Each of the trees that every serializer must store."""
    return TREES[request.param]()


@pytest.fixture(scope="session")
def any_tree() -> st.SearchStrategy[Any]:
    """A strategy for trees of every kind of leaf and node."""
    return ANY_TREE


@pytest.fixture(scope="session")
def nodes() -> dict[str, type[Any]]:
    """Node types by name: Point, Pair and Model."""
    return {"Point": Point, "Pair": Pair, "Model": Model}
