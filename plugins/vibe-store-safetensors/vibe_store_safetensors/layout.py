"""The layout of a safetensors file, from a leaf table alone: the tensors' names, dtypes, shapes and places.

A file is the length of its header (8 bytes, little-endian), the header (JSON, filled up with spaces) and the
tensors, one right after another. The format is described at https://huggingface.co/docs/safetensors.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vibe_store.errors import InvalidValueError
from vibe_store.interfaces import Leaf
from vibe_store.serializers import STORED_KINDS, dtype_named, natural_places, table_to_json

__all__ = ["DTYPES", "LEAVES", "Tensor", "header", "tensors"]

DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}
"""What safetensors calls the dtypes that it knows. (Its floats of 4 and 6 bits are packed; NumPy's are not.)
"""

LEAVES = "vibe_store.leaves"
"""The key of the leaf table in the file's own metadata."""

_METADATA = "__metadata__"
_MOST_HEADER_BYTES = 100_000_000
"""What the library safetensors reads at most."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a file.

    Attributes:
        leaf: the index of its leaf in the leaf table.
        name: its name, which no other tensor of the file has.
        dtype: what safetensors calls its dtype.
        shape: its shape.
        size: its length in bytes.
    """

    leaf: int
    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int


def tensors(rows: Sequence[Leaf], item: str) -> tuple[Tensor, ...]:
    """Return the tensors for the leaves that have data, in the order in which they lie in the file.

    The wider elements come first, so that the elements of every tensor are aligned.
    A dtype that safetensors lacks is stored as U8, with one more axis that is as long as an element:
    ``array.view(dtype)[..., 0]`` is the array.

    Args:
        rows: the leaf table.
        item: the name of a tensor that is the whole tree.
    """
    stored = [
        (index, row, dtype_named(row.dtype)) for index, row in enumerate(rows) if row.kind in STORED_KINDS
    ]
    names = _names([row.path for _, row, _ in stored], item)
    found = [
        _tensor(index, name, row, dtype) for (index, row, dtype), name in zip(stored, names, strict=True)
    ]
    widths = {index: dtype.itemsize for index, _, dtype in stored}
    return tuple(sorted(found, key=lambda tensor: -widths[tensor.leaf]))


def header(layout: Sequence[Tensor], rows: Sequence[Leaf]) -> bytes:
    """Return the beginning of the file, up to the first tensor.

    Its metadata holds the leaf table (:data:`LEAVES`, as JSON): the strings, key implementations and true
    dtypes of the tree, for whoever has the file alone.

    Raises:
        InvalidValueError: it would be longer than the library safetensors reads.
    """
    entries: dict[str, Any] = {_METADATA: {LEAVES: json.dumps(table_to_json(rows), separators=(",", ":"))}}
    end = 0
    for tensor in layout:
        begin, end = end, end + tensor.size
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (begin, end)}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MOST_HEADER_BYTES:
        raise InvalidValueError(
            f"The header of this file would have {len(text)} bytes, and safetensors reads at most "
            f"{_MOST_HEADER_BYTES}. Strings and bytes are kept in it, so store large ones as arrays of "
            "numpy.uint8."
        )
    return len(text).to_bytes(8, "little") + text


def _tensor(index: int, name: str, row: Leaf, dtype: np.dtype[Any]) -> Tensor:
    shape = row.shape or ()
    size = math.prod(shape) * dtype.itemsize
    known = DTYPES.get(row.dtype or "")
    if known is None:
        return Tensor(index, name, "U8", (*shape, dtype.itemsize), size)
    return Tensor(index, name, known, shape, size)


def _names(paths: Sequence[str], item: str) -> Sequence[str]:
    """Return a name for each path: ``layers.0.weight``, or, where that won't do for all, the path itself."""
    places = natural_places(paths)
    dotted = [] if places is None else [".".join(map(str, places[path])) or item for path in paths]
    plain = [path or item for path in paths]
    numbers = [str(number) for number in range(len(paths))]
    return next(names for names in (dotted, plain, numbers) if _usable(names, len(paths)))


def _usable(names: Sequence[str], count: int) -> bool:
    """Whether these are names of so many tensors: no two alike, none of another meaning, all of them text."""
    try:
        "".join(names).encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return len(set(names)) == count and _METADATA not in names
