"""Brings the leaves of a pytree from their devices to the host, and back to where a template wants them."""

import base64
import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from vibe_store.errors import InvalidValueError
from vibe_store.interfaces import Leaf, PyTree
from vibe_store.serializers.copier import Copier
from vibe_store.serializers.rows import STORED_KINDS
from vibe_store.serializers.tree import Flat, HostCopy, NDArray, flatten, key_type, show_path

__all__ = ["HostValue", "rebuild", "snapshot", "table_values", "to_host"]

HostValue: TypeAlias = NDArray | str | bytes


def snapshot(tree: PyTree, *, reuse: PyTree = None) -> Flat:
    """Return a tree taken apart, with every leaf on the host and shared with nobody.

    A ``jax.Array`` (or typed key array) becomes a :class:`~vibe_store.serializers.tree.HostCopy`; a NumPy
    array becomes a copy in C order; every other leaf is immutable, or a callable, and stays. For
    :func:`flatten`, and so for all that takes a tree, it stands for the tree.

    Args:
        tree: the tree.
        reuse: an earlier snapshot that nobody uses any more; where the leaf at a place has the same shape and
            dtype, its memory becomes the new one's.

    Raises:
        UnsupportedLeafError: leaves cannot be stored; the message names the path and type of each of them.
    """
    flat = flatten(tree, to_save=True)
    spare: list[Any] = [None] * len(flat.leaves)
    if isinstance(reuse, Flat) and len(reuse.leaves) == len(spare):
        spare = reuse.leaves
    values: list[Any] = []
    with Copier() as copier:
        started = _started(flat)
        for index, (row, leaf, old) in enumerate(zip(flat.rows, flat.leaves, spare, strict=True)):
            begun = started[index]
            if begun is not None:
                host, shared = _finish(begun)
                old = old.data if isinstance(old, HostCopy) else None
                values.append(HostCopy(copier.copy(host, old) if shared else host, row.impl))
                started[index] = begun = None
            else:
                values.append(copier.copy(leaf, old) if isinstance(leaf, np.ndarray) else leaf)
    return Flat(flat.rows, values, flat.treedef)


def to_host(flat: Flat) -> list[Any]:
    """Return the leaves as a snapshot has them, except that arrays may share memory with the tree.

    Every transfer is started before the first is waited for.
    """
    return [
        leaf if begun is None else HostCopy(_finish(begun)[0], row.impl)
        for row, leaf, begun in zip(flat.rows, flat.leaves, _started(flat), strict=True)
    ]


def rebuild(like: Flat, values: Mapping[str, HostValue]) -> PyTree:
    """Return a tree of the template's structure and leaf types from host values that fit it.

    Args:
        like: the template, which ``compare`` has accepted. An array that is committed to a sharding, and a
            ``jax.ShapeDtypeStruct`` that has one, decide where the new array goes; callables are taken over.
        values: for each path the array, key data, string or bytes that was saved. The arrays are given away.

    Raises:
        InvalidValueError: an array cannot be put where the template wants it.
    """
    new: list[Any] = [_host_leaf(row, leaf, values) for row, leaf in zip(like.rows, like.leaves, strict=True)]
    on_device = [index for index, row in enumerate(like.rows) if _is_jax(like.leaves[index], row)]
    free = [index for index in on_device if _sharding(like.leaves[index]) is None]
    for index, array in zip(free, jax.device_put([new[index] for index in free]), strict=True):
        new[index] = array
    for index in on_device:
        leaf, row = like.leaves[index], like.rows[index]
        if row.kind == "key":
            impl = row.impl if isinstance(leaf, HostCopy) else key_type(leaf.dtype)[0]
            new[index] = jax.random.wrap_key_data(new[index], impl=impl)
        sharding = _sharding(leaf)
        if sharding is not None:
            new[index] = _place(new[index], sharding, row.path)
    return like.treedef.unflatten(new)


def table_values(rows: Sequence[Leaf]) -> dict[str, HostValue]:
    """Return, by path, the strings and bytes that a leaf table itself holds."""
    values: dict[str, HostValue] = {}
    for row in rows:
        if row.value is not None and row.kind == "str":
            values[row.path] = row.value
        elif row.value is not None and row.kind == "bytes":
            values[row.path] = base64.b64decode(row.value)
    return values


def _started(flat: Flat) -> list[NDArray | jax.Array | None]:
    """Begin to bring every JAX array to the host, and return for each leaf what to finish that with."""
    return [
        _start(leaf if row.kind == "array" else jax.random.key_data(leaf))
        if row.kind in ("array", "key") and not isinstance(leaf, HostCopy)
        else None
        for row, leaf in zip(flat.rows, flat.leaves, strict=True)
    ]


def _start(data: jax.Array) -> NDArray | jax.Array:
    """Return the memory in which an array lives; where that is not the host's, begin to copy it.

    Nothing of it stays in the caller's array object: what JAX remembers of a value that was asked for would
    keep the memory from being donated.
    """
    try:
        return np.asarray(memoryview(data))
    except BufferError:  # another device, several, or a dtype that the buffer protocol cannot name
        if not _on_cpu(data.sharding):
            data.copy_to_host_async()
        return data


def _finish(begun: NDArray | jax.Array) -> tuple[NDArray, bool]:
    """Return an array's data on the host, and whether that may be the memory in which it lives."""
    if isinstance(begun, np.ndarray):
        return begun, True
    data = begun.addressable_data(0) if begun.is_fully_replicated else begun
    return np.asarray(data), _on_cpu(data.sharding)


@functools.lru_cache(maxsize=64)
def _on_cpu(sharding: Any) -> bool:
    """Whether arrays placed like this live in the host's memory."""
    return sharding.memory_kind != "device" or any(d.platform == "cpu" for d in sharding.device_set)


def _is_jax(leaf: Any, row: Leaf) -> bool:
    return row.kind in ("array", "key") and isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | HostCopy)


def _host_leaf(row: Leaf, leaf: Any, values: Mapping[str, HostValue]) -> Any:
    if row.kind == "callable":
        return leaf
    value = values[row.path]
    if row.kind == "numpy_scalar" and isinstance(value, np.ndarray):
        return value[()]
    if row.kind in STORED_KINDS - {"array", "numpy", "key"} and isinstance(value, np.ndarray):
        return value.item()
    return value


def _sharding(leaf: Any) -> Any:
    """Return the sharding that a template asks for, or None."""
    if isinstance(leaf, jax.Array):
        return leaf.sharding if leaf.committed else None
    return getattr(leaf, "sharding", None)


def _place(array: Any, sharding: Any, path: str) -> jax.Array:
    try:
        placed: jax.Array = jax.device_put(array, sharding)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InvalidValueError(
            f"The leaf {show_path(path)} cannot be placed as its template asks, on {sharding}: {error}"
        ) from error
    return placed
