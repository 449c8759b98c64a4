"""Trees of every kind of leaf and node, and a comparison of two that sees every bit."""

import reprlib
import struct
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from vibe_store.interfaces import PyTree

__all__ = [
    "IMPLS",
    "JAX_DTYPES",
    "NUMPY_DTYPES",
    "TREES",
    "Model",
    "Pair",
    "Point",
    "any_tree",
    "assert_same",
    "dtype_of",
    "key_of",
    "on_device",
    "sample",
]

NDArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]

IMPLS = ("threefry2x32", "rbg", "unsafe_rbg")
"""The PRNG implementations of typed keys."""

JAX_DTYPES = (
    "bool", "int8", "int16", "int32", "uint8", "uint16", "uint32", "float16", "float32", "complex64",
    "bfloat16", "int4", "uint4", "int2", "uint2", "float8_e3m4", "float8_e4m3", "float8_e4m3fn",
    "float8_e4m3fnuz", "float8_e4m3b11fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
    "float4_e2m1fn",
)  # fmt: skip
"""The element types that a jax.Array may have without ``jax_enable_x64``."""

NUMPY_DTYPES = (
    *JAX_DTYPES, "int64", "uint64", "float64", "complex128", "float6_e2m3fn", ">f4", ">i8", ">c16",
    "datetime64[ns]", "timedelta64[D]", ">M8[s]",
)  # fmt: skip
"""Those of the NumPy arrays that are tried, as a leaf table names them."""


class Point(NamedTuple):
    """A node that is a named tuple."""

    x: Any
    y: Any


@jax.tree_util.register_dataclass
@dataclass
class Pair:
    """A node that is a dataclass."""

    first: Any
    second: Any


class Model(eqx.Module):
    """A node that is an Equinox module."""

    weight: jax.Array
    activation: Callable[..., Any]
    scale: float
    label: str = eqx.field(static=True)


def dtype_of(name: str) -> np.dtype[Any]:
    """Return the dtype of one of the names above."""
    return np.dtype(getattr(ml_dtypes, name, name))


def sample(dtype: np.dtype[Any], shape: tuple[int, ...] = (3, 2)) -> NDArray:
    """Return an array of small values that every dtype has, not all of them the same."""
    if dtype.kind in "mM":
        return np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    return np.resize(np.array([0, 1, 1, 0, 1], np.int8), shape).astype(dtype)


def on_device(array: NDArray | np.generic) -> jax.Array:
    """Return an array of JAX, without compiling a program for each shape and dtype as ``jnp`` does."""
    placed: jax.Array = jax.device_put(array)
    return placed


def key_of(seed: int, impl: str = "threefry2x32", shape: tuple[int, ...] = ()) -> jax.Array:
    """Return typed keys of any data, likewise."""
    words = 2 if impl == "threefry2x32" else 4
    data = np.random.default_rng(seed).integers(0, 2**32, (*shape, words), np.uint32)
    key: jax.Array = jax.random.wrap_key_data(on_device(data), impl=impl)
    return key


def _jax_arrays(refused: Set[str]) -> PyTree:
    shapes = [(), (0,), (2, 0, 3), (5,), (2, 3)]
    names = [name for name in JAX_DTYPES if name not in refused]
    return {name: [on_device(sample(dtype_of(name), shape)) for shape in shapes] for name in names}


def _numpy_arrays(refused: Set[str]) -> PyTree:
    arrays = {name: sample(dtype_of(name)) for name in NUMPY_DTYPES if name not in refused}
    return {name: [a, a[:0], np.array(a[0, 1]), a[1, 0], 7] for name, a in arrays.items()}


def _every_byte(refused: Set[str]) -> PyTree:
    """For each dtype, an array of each pattern that a byte may have, in every byte of an element."""
    patterns = np.arange(256, dtype=np.uint8)
    return {
        name: np.stack([patterns] * dtype_of(name).itemsize, axis=-1).reshape(-1).view(dtype_of(name))
        for name in NUMPY_DTYPES
        if name != "bool" and name not in refused
    }


def _keys() -> PyTree:
    keys = {impl: key_of(7, impl, ()) for impl in IMPLS}
    shapes = [(4,), (2, 3), (0,)]
    arrays = [key_of(seed, impl, shape) for impl in IMPLS for seed, shape in enumerate(shapes)]
    return [(keys, on_device(np.array([0, 1], np.uint32))), arrays]


def _scalars() -> PyTree:
    return [
        True, False, 0, -1, 2**63 - 1, -(2**63), 2**63, 2**64 - 1, 0.0, -0.0, float("inf"), float("nan"),
        5e-324, 1 - 2j, complex(-0.0, float("nan")),
    ]  # fmt: skip


def _float_bits() -> PyTree:
    bits = np.array([0x7FC00001, 0xFFC12345, 0x7F800001, 0x80000000, 0x7F800000, 0x00000001], np.uint32)
    return [bits.view(np.float32), on_device(bits.view(np.float32)), bits.view(np.float32)[1]]


def _nodes() -> PyTree:
    shapes = eqx.filter_eval_shape(eqx.nn.MLP, 3, 2, 4, 1, key=jax.random.key(0))
    one = on_device(np.float32(1))
    return {
        "model": jax.tree.map(
            lambda leaf: (
                on_device(sample(leaf.dtype, leaf.shape)) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf
            ),
            shapes,
        ),
        "module": Model(on_device(np.ones((2, 2), np.float32)), jax.nn.relu, 0.5, "label"),
        "tuple": Point(on_device(np.arange(3, dtype=np.int32)), (None, np.ones(2))),
        "dataclass": Pair({"b": 1, "a": 2.0}, [None, [], {}, ()]),
        "numbers": {3: one, 500: 1},
        "pairs": {(1, "x"): one, (1, "y"): 2},
    }


def _odd_names() -> PyTree:
    """Names that mean something to a file system or to JSON."""
    names = [
        "", ".", "..", "/", "a/b", "a.b", "a b", "%20", "'", '"', "\\", "\n", "\ud800", "é", "[0]", "c/0",
    ]  # fmt: skip
    return {name: {name: np.full(1 + i, i)} for i, name in enumerate(names)}


def _names_that_collide() -> PyTree:
    return {"a.b": 1, "a": {"b": 2, "c": [3], "c.0": 4}, "x": np.ones(1), "x/y": np.ones(2)}


TREES: dict[str, Callable[[Set[str]], PyTree]] = {
    "jax arrays": _jax_arrays,
    "numpy arrays": _numpy_arrays,
    "every byte": _every_byte,
    "keys": lambda _: _keys(),
    "scalars": lambda _: _scalars(),
    "texts": lambda _: ["", "text", 'naïve \U0001f600 \ud800 \x00 "', b"", b"\x00\xff'"],
    "float bits": lambda _: _float_bits(),
    "nodes": lambda _: _nodes(),
    "odd names": lambda _: _odd_names(),
    "names that collide": lambda _: _names_that_collide(),
    "None": lambda _: None,
    "empty tuple": lambda _: (),
    "empty dict": lambda _: {},
    "no leaf": lambda _: [None, {}],
    "one string": lambda _: "only",
    "one callable": lambda _: jax.nn.relu,
    "one number": lambda _: 3,
    "one array": lambda _: on_device(np.arange(3, dtype=np.int32)),
    "one empty array": lambda _: np.zeros((0, 2)),
    "many leaves": lambda _: [np.full((i % 3,), i) for i in range(500)],
}
"""Makers of trees that every serializer stores, each without the dtypes that it is given."""


@st.composite
def _arrays(draw: st.DrawFn, refused: Set[str]) -> Any:
    is_jax = draw(st.booleans())
    names = [name for name in (JAX_DTYPES if is_jax else NUMPY_DTYPES) if name not in refused]
    dtype = dtype_of(draw(st.sampled_from(names)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    if is_jax:
        return on_device(sample(dtype, shape))
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


def any_tree(refused: Set[str] = frozenset()) -> st.SearchStrategy[PyTree]:
    """Return a strategy for trees of every kind of leaf and node, without arrays of the refused dtypes."""
    leaves: st.SearchStrategy[Any] = st.one_of(
        _arrays(refused),
        st.builds(key_of, st.integers(0, 99), st.sampled_from(IMPLS), st.sampled_from([(), (1,), (2, 1)])),
        st.booleans(),
        st.integers(-(2**63), 2**64 - 1),
        st.floats(),
        st.complex_numbers(),
        st.text(max_size=5),
        st.binary(max_size=5),
        st.none(),
        st.sampled_from([jax.nn.relu, jnp.sin, int]),
    )
    return st.recursive(
        leaves,
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
        data = np.asarray(jax.random.key_data(leaf)).tobytes()
        return "key", str(jax.random.key_impl(leaf)), leaf.shape, data
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


def assert_same(left: PyTree, right: PyTree) -> None:
    """Compare two trees: structure, and the type, dtype, shape and every bit of each leaf."""
    one_structure: object = jax.tree.structure(left)
    assert one_structure == jax.tree.structure(right)
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True
    ):
        # Not by a plain assert: where CI is set, pytest takes minutes to show all that differs of long data.
        if _bits(one) != _bits(other):
            place = jax.tree_util.keystr(path) or "<root>"
            raise AssertionError(f"{place}: {_shown(one)} is not {_shown(other)}")


def _shown(leaf: Any) -> str:
    """A leaf for a message: what it is, and the beginning of its data."""
    *what, data = _bits(leaf)
    return f"{' '.join(map(str, what))} {reprlib.repr(data)}"
