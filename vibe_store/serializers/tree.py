"""The leaf table of a pytree: what each leaf is, and how a saved table and a template differ."""

import base64
import contextlib
import functools
import numbers
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from vibe_store.errors import (
    CorruptCheckpointError,
    TemplateMismatchError,
    UnsupportedLeafError,
    VibeStoreWarning,
)
from vibe_store.interfaces import Leaf, PyTree
from vibe_store.serializers.rows import leaf_from_json, leaf_to_json, table_from_json, table_to_json

__all__ = [
    "Flat",
    "HostCopy",
    "NDArray",
    "compare",
    "describe",
    "dtype_name",
    "dtype_named",
    "flatten",
    "key_type",
    "leaf_from_json",
    "leaf_to_json",
    "mismatch",
    "show_path",
    "table_from_json",
    "table_to_json",
    "warn_of_other_callables",
]

NDArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_SHOWN_DIFFERENCES = 20

# What NumPy may be asked for by name: it would also parse records, and more.
_DTYPE_NAME = re.compile(r"[<>]?[a-zA-Z][a-zA-Z0-9]*(\[[0-9a-zA-Z/]+\])?")

# A jax.Array, a NumPy array and a NumPy scalar of one dtype and shape stand for the same data.
_FAMILY = {"numpy": "array", "numpy_scalar": "array"}

_NOUNS = {
    "array": "an array",
    "key": "a typed PRNG key",
    "bool": "a Python bool",
    "int": "a Python int",
    "float": "a Python float",
    "complex": "a Python complex",
    "str": "a string",
    "bytes": "a bytes object",
    "callable": "a callable",
}


@dataclass(frozen=True, slots=True, eq=False)
class HostCopy:
    """A leaf of a snapshot: a JAX array, or the data of a typed PRNG key array, copied to the host.

    Attributes:
        data: the array, or the key data.
        impl: the PRNG implementation of a key; None for an array.
    """

    data: NDArray
    impl: str | None = None

    @property
    def nbytes(self) -> int:
        """How many bytes the data has."""
        return self.data.nbytes


@dataclass(frozen=True, slots=True)
class Flat:
    """A pytree taken apart. For JAX it is a single leaf; :func:`flatten` returns it as it is.

    Attributes:
        rows: its leaf table, without offsets and checksums.
        leaves: its leaves, in the same order.
        treedef: its structure.
    """

    rows: tuple[Leaf, ...]
    leaves: list[Any]
    treedef: jax.tree_util.PyTreeDef

    @property
    def nbytes(self) -> int:
        """How many bytes the data of its arrays has."""
        return sum(getattr(leaf, "nbytes", 0) for leaf in self.leaves)


def describe(tree: PyTree) -> tuple[Leaf, ...]:
    """Return the leaf table of a tree or a template, without offsets and checksums.

    Raises:
        UnsupportedLeafError: leaves cannot be stored; the message names the path and type of each of them.
    """
    return flatten(tree).rows


def flatten(tree: PyTree, *, to_save: bool = False) -> Flat:
    """Take a tree apart and describe its leaves.

    Args:
        tree: arrays, templates (``jax.ShapeDtypeStruct``), or what was taken apart before: a snapshot.
        to_save: the leaves must have data that this process can read, too.

    Raises:
        UnsupportedLeafError: leaves cannot be stored; the message names the path and type of each of them.
    """
    if isinstance(tree, Flat):
        return tree
    leaves, treedef = jax.tree_util.tree_flatten(tree)
    rows: list[Leaf] = []
    problems: list[str] = []
    seen: set[str] = set()
    for path, leaf in zip(_paths(tree, treedef), leaves, strict=True):
        try:
            if path in seen:
                raise UnsupportedLeafError("another leaf has the same path, so the two cannot be told apart")
            rows.append(_classify(path, leaf, to_save=to_save))
        except UnsupportedLeafError as error:
            problems.append(f"{show_path(path)}: {error}")
        seen.add(path)
    if len(problems) == 1:
        raise UnsupportedLeafError(f"A leaf cannot be stored. {problems[0]}.")
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise UnsupportedLeafError(f"{len(problems)} leaves cannot be stored:\n{lines}")
    return Flat(tuple(rows), leaves, treedef)


def compare(saved: Sequence[Leaf], like: Flat, *, partial: bool = False, what: str = "checkpoint") -> None:
    """Raise one error with every difference between a saved leaf table and a template; leaves match by path.

    A ``jax.Array``, a NumPy array and a NumPy scalar of one dtype and shape are the same; nothing else is.

    Args:
        saved: the table that was saved.
        like: the template.
        partial: allow ``saved`` to have leaves that the template does not.
        what: what to call the saved side in the message.

    Raises:
        TemplateMismatchError: they differ.
    """
    by_path = {row.path: row for row in saved}
    found: list[tuple[str, str]] = []
    for row, leaf in zip(like.rows, like.leaves, strict=True):
        old = by_path.pop(row.path, None)
        if old is None:
            found.append((row.path, f"the template has {_summary(row)}, but nothing was saved there"))
        elif difference := _difference(old, row) or _jax_cannot_hold(row, leaf):
            found.append((row.path, difference))
    if not partial:
        found += [
            (old.path, f"{_summary(old)} was saved, but the template has nothing there")
            for old in by_path.values()
        ]
    if found:
        raise mismatch(found, what)


def mismatch(found: Sequence[tuple[str, str]], what: str) -> TemplateMismatchError:
    """Return the error that reports these differences, given as paths and the words that follow them."""
    differences = [f"{show_path(path)}: {text}" for path, text in found]
    lines = [f"  {difference}" for difference in differences[:_SHOWN_DIFFERENCES]]
    if len(differences) > len(lines):
        lines.append(f"  ... and {len(differences) - len(lines)} more")
    leaves = "1 leaf" if len(differences) == 1 else f"{len(differences)} leaves"
    return TemplateMismatchError(
        "\n".join([f"The {what} and the template differ in {leaves}:", *lines]),
        differences=differences,
        paths=[path for path, _ in found],
    )


def warn_of_other_callables(saved: Sequence[Leaf], like: Flat, *, stacklevel: int) -> None:
    """Warn of each callable of a template that has another name than the one that was saved in its place.

    ``stacklevel`` is that of :func:`warnings.warn`, as seen from the caller.
    """
    names = {row.path: row.value for row in saved if row.kind == "callable"}
    for row in like.rows:
        if row.kind == "callable" and names[row.path] != row.value:
            warnings.warn(
                f"The leaf {show_path(row.path)} was the callable {names[row.path]} when it was saved, and "
                f"is {row.value} in the template. Callables are not stored; the template's is used.",
                VibeStoreWarning,
                stacklevel=stacklevel + 1,
            )


def show_path(path: str) -> str:
    """Return a path for a message; the root of a tree has no text of its own."""
    return path or "<root>"


@functools.lru_cache(maxsize=64)
def key_type(dtype: Any) -> tuple[Any, tuple[int, ...], str]:
    """Return the implementation of a key dtype, and the shape and dtype of the data of one key."""
    impl: list[Any] = []

    def data(key: jax.Array) -> jax.Array:
        impl.append(jax.random.key_impl(key))
        return jax.random.key_data(key)

    struct = jax.eval_shape(data, jax.ShapeDtypeStruct((), dtype))
    return impl[0], struct.shape, struct.dtype.name


@functools.lru_cache(maxsize=256)
def dtype_name(dtype: np.dtype[Any]) -> str | None:
    """Return the name of a dtype that can be stored faithfully (``">f4"`` for a big-endian one), or None."""
    if dtype in _ml_dtypes():
        return dtype.name
    # Long doubles are left out: what their bytes mean depends on the machine.
    limit = {"b": 1, "i": 8, "u": 8, "m": 8, "M": 8, "f": 8, "c": 16}.get(dtype.kind, 0)
    if 0 < dtype.itemsize <= limit:
        return dtype.name if dtype.isnative else dtype.str
    return None


@functools.lru_cache(maxsize=256)
def dtype_named(name: str | None) -> np.dtype[Any]:
    """Return the dtype of a name that :func:`dtype_name` gave.

    Raises:
        CorruptCheckpointError: it never gave such a name.
    """
    dtype = next((known for known in _ml_dtypes() if known.name == name), None)
    if dtype is None and name is not None and _DTYPE_NAME.fullmatch(name):
        with contextlib.suppress(TypeError, ValueError):
            dtype = np.dtype(name)
    if dtype is None or dtype_name(dtype) != name:
        raise CorruptCheckpointError(f"The leaf table names a dtype {name!r:.80}, which is none.")
    return dtype


def _paths(tree: PyTree, treedef: Any) -> tuple[str, ...]:
    """Return the path of each leaf; remembered, since a run saves one structure over and over.

    To JAX, structures are equal whose dict keys are: so what was remembered of one is also found for others.
    """
    try:
        known = _known_paths.get(treedef)
    except (TypeError, ValueError):  # a static field that cannot be hashed, or compared
        return _paths_of(_keys(tree))
    if known is None:
        keys = _keys(tree)
        known = _paths_of(keys)
        if all(_is_usual(key) for path in keys for key in path):
            while len(_known_paths) >= _MOST_KNOWN_PATHS:
                _known_paths.pop(next(iter(_known_paths)), None)
            _known_paths[treedef] = known
    return known


_known_paths: dict[Any, tuple[str, ...]] = {}
_MOST_KNOWN_PATHS = 16


def _keys(tree: PyTree) -> list[tuple[Any, ...]]:
    return [keys for keys, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _paths_of(keys: list[tuple[Any, ...]]) -> tuple[str, ...]:
    return tuple("".join(map(_level, path)) for path in keys)


def _level(key: Any) -> str:
    return f"[{_plain_key(key.key)!r}]" if isinstance(key, DictKey) else str(key)


def _is_usual(key: Any) -> bool:
    """Whether a key can be compared with any other, and those that equal it are the same text in a path."""
    if isinstance(key, DictKey):
        return type(key.key) in (str, int)
    return isinstance(key, SequenceKey | GetAttrKey | FlattenedIndexKey)


def _plain_key(key: Any) -> Any:
    """Return the text or the whole number that equals a dict key, as 1 does True; else one that equals it."""
    if isinstance(key, str):
        return str.__str__(key)
    if isinstance(key, tuple):
        return tuple(map(_plain_key, key))
    if isinstance(key, numbers.Number | np.generic):
        with contextlib.suppress(TypeError, ValueError, OverflowError):  # it is not finite, or no number
            whole = int(getattr(key, "real", 0))
            if whole == key:
                return whole
    return key.item() if isinstance(key, np.generic) else key


def _classify(path: str, leaf: Any, *, to_save: bool) -> Leaf:
    if isinstance(leaf, jax.Array):
        _check_array(leaf, to_save=to_save)
        return _jax_row(path, leaf.shape, leaf.dtype)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        if to_save:
            raise UnsupportedLeafError("it is a jax.ShapeDtypeStruct, which can only stand in a template")
        return _jax_row(path, leaf.shape, leaf.dtype)
    if isinstance(leaf, HostCopy):
        return Leaf(
            path,
            "array" if leaf.impl is None else "key",
            dtype_name(leaf.data.dtype),
            leaf.data.shape,
            leaf.impl,
        )
    if isinstance(leaf, np.ndarray | np.generic):
        return _numpy_row(path, leaf)
    if type(leaf) is bool:
        return Leaf(path, "bool", "bool", ())
    if type(leaf) is int:
        return Leaf(path, "int", _int_dtype(leaf), ())
    if type(leaf) is float:
        return Leaf(path, "float", "float64", ())
    if type(leaf) is complex:
        return Leaf(path, "complex", "complex128", ())
    if type(leaf) is str:
        return Leaf(path, "str", value=leaf)
    if type(leaf) is bytes:
        return Leaf(path, "bytes", value=base64.b64encode(leaf).decode())
    if callable(leaf) and not hasattr(leaf, "__jax_array__"):
        return Leaf(path, "callable", value=_callable_name(leaf))
    raise UnsupportedLeafError(
        f"it is a {_type_name(type(leaf))}; leaves may be arrays, typed keys, callables, and bool, int, "
        "float, complex, str, bytes (exactly these types); convert it, or make it a static field"
    )


def _check_array(leaf: jax.Array, *, to_save: bool) -> None:
    if isinstance(leaf, jax.core.Tracer):
        raise UnsupportedLeafError(
            f"it is a tracer ({_type_name(type(leaf))}): this was called inside jit, grad, vmap or scan, "
            "where arrays have no values yet; call it outside"
        )
    if to_save and leaf.is_deleted():
        raise UnsupportedLeafError(
            f"it is a jax.Array ({leaf.dtype.name}) that has been deleted or donated; "
            "save the arrays that took its place"
        )
    if to_save and not _is_addressable(leaf):
        raise UnsupportedLeafError(
            f"it is a jax.Array ({leaf.dtype.name}) with parts on the devices of other processes; gather "
            "it first, with jax.experimental.multihost_utils.process_allgather"
        )


def _is_addressable(leaf: jax.Array) -> bool:
    if _is_alone():
        return True
    if isinstance(leaf.dtype, np.dtype):
        return _addressable(leaf.sharding)
    # JAX takes long to find out the sharding of keys, and no time for their devices.
    return all(device.process_index == device.client.process_index() for device in leaf.devices())


@functools.cache
def _is_alone() -> bool:
    """Whether this process has all devices; it cannot change once there are arrays."""
    return bool(jax.process_count() == 1)


@functools.lru_cache(maxsize=64)
def _addressable(sharding: Any) -> bool:
    return bool(sharding.is_fully_addressable)


@functools.lru_cache(maxsize=4096)
def _jax_row(path: str, shape: tuple[int, ...], dtype: Any) -> Leaf:
    if not isinstance(dtype, np.dtype) and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        impl, key_shape, data_dtype = key_type(dtype)
        return Leaf(path, "key", data_dtype, (*shape, *key_shape), str(impl))
    name = dtype_name(dtype) if isinstance(dtype, np.dtype) else None
    if name is None:
        raise UnsupportedLeafError(f"it is a JAX array of dtype {dtype}, which cannot be stored")
    return Leaf(path, "array", name, shape)


def _numpy_row(path: str, leaf: NDArray | np.generic) -> Leaf:
    if isinstance(leaf, np.ndarray) and type(leaf) not in (np.ndarray, np.memmap):
        raise UnsupportedLeafError(
            f"it is a {_type_name(type(leaf))}, of which only the plain array would be stored; convert it "
            "with numpy.array(..., subok=False)"
        )
    name = dtype_name(leaf.dtype)
    if name is None:
        raise UnsupportedLeafError(
            f"it is a {_type_name(type(leaf))} of dtype {leaf.dtype}; stored are booleans, integers, floats "
            "and complex numbers of up to 64 bits a part, datetime64, timedelta64 and the types of ml_dtypes"
        )
    return Leaf(path, "numpy" if isinstance(leaf, np.ndarray) else "numpy_scalar", name, leaf.shape)


@functools.cache
def _ml_dtypes() -> frozenset[np.dtype[Any]]:
    types = [getattr(ml_dtypes, name) for name in dir(ml_dtypes) if not name.startswith("_")]
    return frozenset(
        np.dtype(kind) for kind in types if isinstance(kind, type) and issubclass(kind, np.generic)
    )


def _int_dtype(value: int) -> str:
    if -(2**63) <= value < 2**63:
        return "int64"
    if 0 <= value < 2**64:
        return "uint64"
    raise UnsupportedLeafError(f"it is an int of {value.bit_length()} bits; at most 64 can be stored")


def _callable_name(function: Callable[..., Any]) -> str:
    """Name a callable so that the name is the same in another process (no addresses)."""
    if isinstance(function, functools.partial):
        bound = [_argument(value) for value in function.args]
        bound += [f"{name}={_argument(value)}" for name, value in function.keywords.items()]
        return f"functools.partial({', '.join([_callable_name(function.func), *bound])})"
    name = getattr(function, "__qualname__", None) or getattr(function, "__name__", None)
    if not isinstance(name, str):
        return _type_name(type(function))
    module = getattr(function, "__module__", None)
    return f"{module}.{name}" if isinstance(module, str) else name


def _argument(value: Any) -> str:
    if isinstance(value, jax.Array | np.ndarray):
        raise UnsupportedLeafError(
            "it is a functools.partial that holds an array, which would not be stored; use "
            "jax.tree_util.Partial"
        )
    if value is None or type(value) in (bool, int, float, complex, str, bytes):
        return repr(value)
    return _callable_name(value) if callable(value) else _type_name(type(value))


def _type_name(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _difference(old: Leaf, new: Leaf) -> str | None:
    """Say how two rows of one path differ, or return None."""
    if _FAMILY.get(old.kind, old.kind) != _FAMILY.get(new.kind, new.kind):
        return f"{_summary(old)} was saved, but the template has {_summary(new)}"
    if new.kind not in ("array", "numpy", "numpy_scalar", "key"):
        return None
    found = []
    if old.impl != new.impl:
        found.append(f"the key implementation {old.impl!r} was saved, but the template's is {new.impl!r}")
    if old.dtype != new.dtype:
        found.append(f"dtype {old.dtype} was saved, but the template has {new.dtype}")
    if old.shape != new.shape:
        found.append(f"shape {old.shape} was saved, but the template has {new.shape}")
    return "; ".join(found) or None


def _jax_cannot_hold(row: Leaf, leaf: Any) -> str | None:
    """Say why JAX would cast what was saved on its way into the template's array, or return None."""
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | HostCopy) or row.kind != "array":
        return None
    dtype = leaf.data.dtype if isinstance(leaf, HostCopy) else leaf.dtype
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        return (
            f"JAX would cast {row.dtype} to 32 bits; set jax_enable_x64, or use a NumPy array in the template"
        )
    if not dtype.isnative or dtype.kind in "mM":
        return f"JAX has no arrays of dtype {row.dtype}; use a NumPy array in the template"
    return None


def _summary(row: Leaf) -> str:
    noun = _NOUNS[_FAMILY.get(row.kind, row.kind)]
    if row.kind == "key":
        return f"{noun} ({row.impl}, key data of shape {row.shape})"
    if noun == _NOUNS["array"]:
        return f"{noun} of dtype {row.dtype} and shape {row.shape}"
    return f"{noun} ({row.value})" if row.kind == "callable" else noun
