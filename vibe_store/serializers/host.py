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


def snapshot(tree: PyTree, *, reuse: PyTree = None) -> PyTree:
    """Return a tree of the same structure whose leaves are on the host and shared with nobody.

    A ``jax.Array`` (or typed key array) becomes a :class:`~vibe_store.serializers.tree.HostCopy`; a NumPy
    array becomes a copy in C order; every other leaf is immutable, or a callable, and stays.

    Args:
        tree: the tree.
        reuse: an earlier snapshot that nobody uses any more; where the leaf at a place has the same shape and
            dtype, its memory becomes the new one's.

    Raises:
        UnsupportedLeafError: leaves cannot be stored; the message names the path and type of each of them.
    """
    flat = flatten(tree, to_save=True)
    spare = [leaf.data if isinstance(leaf, HostCopy) else leaf for leaf in jax.tree.leaves(reuse)]
    if len(spare) != len(flat.leaves):
        spare = [None] * len(flat.leaves)
    values: list[Any] = []
    with Copier() as copier:
        started = [_start(leaf) if isinstance(leaf, jax.Array) else None for leaf in flat.leaves]
        for index, (row, leaf, begun) in enumerate(zip(flat.rows, flat.leaves, started, strict=True)):
            if begun is not None:
                host, shared = _finish(*begun)
                values.append(HostCopy(copier.copy(host, spare[index]) if shared else host, row.impl))
                started[index] = None
                del host, begun
            else:
                values.append(copier.copy(leaf, spare[index]) if isinstance(leaf, np.ndarray) else leaf)
    return flat.treedef.unflatten(values)


def to_host(flat: Flat) -> list[Any]:
    """Return the leaves as a snapshot has them, except that arrays may share memory with the tree.

    Every transfer is started before the first is waited for.
    """
    started = [_start(leaf) if isinstance(leaf, jax.Array) else None for leaf in flat.leaves]
    return [
        leaf if begun is None else HostCopy(_finish(*begun)[0], row.impl)
        for row, leaf, begun in zip(flat.rows, flat.leaves, started, strict=True)
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


_Transfer: TypeAlias = tuple[jax.Array, bool]
"""An array whose data is on its way to the host, and whether it lives there already."""


def _start(leaf: jax.Array) -> _Transfer:
    """Begin to copy an array, or the data of keys, to the host; return what to finish that with."""
    data = leaf if isinstance(leaf.dtype, np.dtype) else jax.random.key_data(leaf)
    on_cpu = _on_cpu(data.sharding)
    if not on_cpu:
        data.copy_to_host_async()
    return data, on_cpu


def _finish(data: jax.Array, on_cpu: bool) -> tuple[NDArray, bool]:
    """Return an array's data on the host, and whether that is the very memory in which the array lives.

    Nothing of it stays in the caller's array object: what JAX remembers of a value that was asked for would
    keep the memory from being donated.
    """
    if on_cpu:
        try:
            return np.asarray(memoryview(data)), True
        except BufferError:  # several devices, or a dtype that the buffer protocol has no name for
            pass
    if data.is_fully_replicated:
        data = data.addressable_data(0)
    return np.asarray(data), on_cpu


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
