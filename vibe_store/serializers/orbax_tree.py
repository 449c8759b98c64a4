"""How a leaf table looks to Orbax: where each leaf is in a tree of dicts and lists, and as which array.

Both follow from the leaf table alone, so that what was saved is found again without asking Orbax, and both
are part of the format: what is written today must be found for ever.
"""

from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

import numpy as np

from vibe_store.interfaces import Leaf
from vibe_store.serializers.places import Place, natural_places
from vibe_store.serializers.rows import STORED_KINDS
from vibe_store.serializers.tree import NDArray, dtype_named

__all__ = ["array_type", "from_orbax", "has_array", "places", "stored_name", "to_orbax"]

# Of these types Orbax stores every bit pattern of every element.
_NATIVE = frozenset(
    {
        "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
        "float16", "float32", "float64", "complex64", "complex128", "bfloat16", "int2", "int4",
        "float4_e2m1fn", "float8_e3m4", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz",
        "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
    }
)  # fmt: skip


def places(paths: Iterable[str]) -> dict[str, Place]:
    """Return the place of each leaf in Orbax, given the paths of all leaves of a tree.

    Where the natural places would not be certain to be told apart, or have names that UTF-8 cannot hold, the
    tree is a flat dict instead, by path, in the characters that a URL may hold.
    """
    paths = tuple(paths)
    natural = natural_places(paths)
    if natural is not None and all(map(_is_utf8, map(stored_name, natural.values()))):
        return natural
    return {path: (quote(path, safe="[]<>()'\". ,:", errors="surrogatepass"),) for path in paths}


def stored_name(place: Place) -> str:
    """Return the name that Orbax stores the array at a place by."""
    return ".".join(map(str, place))


def _is_utf8(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)


def has_array(row: Leaf) -> bool:
    """Whether a leaf has data that Orbax is given; it takes no arrays without elements."""
    return row.kind in STORED_KINDS and 0 not in (row.shape or ())


def to_orbax(row: Leaf, value: Any) -> Any:
    """Return the data of a leaf as Orbax stores it; no bit is changed.

    An int or a float stays one. All else becomes an array: where Orbax lacks its type, of unsigned bytes and
    of the shape ``(*shape, itemsize)``, the bytes as they are in memory. (Orbax would store a bool too, but
    then can't tell what the checkpoint holds.)
    """
    if type(value) in (int, float):
        return value
    array: NDArray = np.asarray(value, order="C")
    if row.dtype in _NATIVE:
        return array
    return array.reshape(-1).view(np.uint8).reshape(*array.shape, array.dtype.itemsize)


def array_type(row: Leaf) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return the shape and dtype of the array that Orbax has for a leaf whose dtype can be trusted."""
    dtype, shape = dtype_named(row.dtype), row.shape or ()
    return (shape, dtype) if row.dtype in _NATIVE else ((*shape, dtype.itemsize), np.dtype(np.uint8))


def from_orbax(row: Leaf, array: NDArray) -> NDArray:
    """Return the data of a leaf from the array that Orbax gave back for it."""
    if row.dtype in _NATIVE:
        return array
    return array.reshape(-1).view(dtype_named(row.dtype)).reshape(row.shape or ())
