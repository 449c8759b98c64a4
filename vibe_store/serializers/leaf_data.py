"""The data of leaves within one file: written one after another, and read from where a leaf table says.

Any serializer whose file holds the bytes of arrays as they are in memory, in C order, whatever lies between
them, has here what it needs to hash them while they are written, and to read them straight to where they are
used.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import xxhash

from vibe_store.errors import CorruptCheckpointError
from vibe_store.interfaces import Leaf
from vibe_store.serializers.tree import HostCopy, NDArray, show_path
from vibe_store.serializers.verifying_reader import CHUNK, Readable

__all__ = ["LeafWriter", "Writable", "read_parts", "read_records", "stored_array"]

_ALIGNMENT = 64


class Writable(Protocol):
    """What saving needs of an open file."""

    def write(self, data: Any, /) -> int:
        """Write all of it."""


class LeafWriter:
    """Writes the data of leaves to an empty file, and knows what was written: its length and its xxh3-128."""

    def __init__(self, file: Writable) -> None:
        self._file = file
        self._hash = xxhash.xxh3_128()
        self._size = 0

    @property
    def size(self) -> int:
        """How many bytes were written so far."""
        return self._size

    @property
    def checksum(self) -> str:
        """The xxh3-128 of all that was written so far, as 32 hexadecimal digits."""
        return self._hash.hexdigest()

    def write(self, data: bytes) -> None:
        """Write what is no leaf's: a header, say."""
        self._hash.update(data)
        self._file.write(data)
        self._size += len(data)

    def write_leaf(self, row: Leaf, value: Any) -> Leaf:
        """Write the data of a leaf in C order, without a copy of it where it is in that order already.

        Args:
            row: what the leaf is, of a kind that has data.
            value: the leaf, as :func:`~vibe_store.serializers.to_host` returns it.

        Returns:
            The row, with where the data begins and its checksum.
        """
        # A view where the array is contiguous; as bytes, since not every dtype has a buffer of its own.
        data = np.ascontiguousarray(stored_array(row, value)).reshape(-1).view(np.uint8).data
        offset = self._size
        self._size += len(data)
        if len(data) <= CHUNK:
            self._hash.update(data)
            self._file.write(data)
            return replace(row, offset=offset, checksum=xxhash.xxh3_128_hexdigest(data))
        leaf = xxhash.xxh3_128()
        for start in range(0, len(data), CHUNK):
            chunk = data[start : start + CHUNK]
            leaf.update(chunk)
            self._hash.update(chunk)
            self._file.write(chunk)
        return replace(row, offset=offset, checksum=leaf.hexdigest())


def stored_array(row: Leaf, value: Any) -> NDArray:
    """Return the data of a leaf as an array of the dtype and shape that its row says."""
    if isinstance(value, HostCopy):
        return value.data
    # A Python scalar has no dtype of its own.
    dtype = None if isinstance(value, np.ndarray | np.generic) else row.dtype
    return np.asarray(value, dtype=dtype)


def read_records(
    stream: Readable, size: int, rows: Sequence[Leaf], dtypes: Mapping[str, np.dtype[Any]], name: str
) -> dict[str, NDArray]:
    """Read the data of the leaves that are wanted, and the stream to its end.

    Args:
        stream: verifies what it gives when its end is reached.
        size: its length at most.
        rows: the whole leaf table.
        dtypes: for the path of each wanted leaf, the dtype that its row names.
        name: what to call the file in messages.

    Returns:
        The data by path, in new C-ordered arrays.

    Raises:
        CorruptCheckpointError: the table and the file do not belong together.
    """
    wanted = _in_order(row for row in rows if row.path in dtypes)
    _check_places(wanted, dtypes, size, name)
    scratch = memoryview(bytearray(min(size, CHUNK) or 1))
    arrays: dict[str, NDArray] = {}
    position = 0
    for row in wanted:
        offset, shape = _place(row)
        _skip(stream, offset - position, scratch, name)
        array = _empty(shape, dtypes[row.path])
        _fill(stream, array, name)
        arrays[row.path] = array
        position = offset + array.nbytes
    while stream.readinto(scratch):
        pass
    return arrays


def read_parts(
    read: Callable[[int, memoryview, str], None],
    size: int,
    rows: Sequence[Leaf],
    dtypes: Mapping[str, np.dtype[Any]],
    name: str,
) -> dict[str, NDArray]:
    """Read the data of the leaves that are wanted, and nothing else; the rest is as :func:`read_records`.

    Args:
        read: fills a buffer from a place in the file, and verifies it against a checksum.
        size: the length of the file at most.
        rows: the whole leaf table.
        dtypes: for the path of each wanted leaf, the dtype that its row names.
        name: what to call the file in messages.
    """
    wanted = _in_order(row for row in rows if row.path in dtypes)
    _check_places(wanted, dtypes, size, name)
    arrays: dict[str, NDArray] = {}
    for row in wanted:
        offset, shape = _place(row)
        if row.checksum is None:
            raise CorruptCheckpointError(f"The leaf table has no checksum of {show_path(row.path)}.")
        arrays[row.path] = _empty(shape, dtypes[row.path])
        read(offset, arrays[row.path].reshape(-1).view(np.uint8).data, row.checksum)
    return arrays


def _place(row: Leaf) -> tuple[int, tuple[int, ...]]:
    if row.offset is None or row.shape is None:
        raise CorruptCheckpointError(
            f"The leaf table does not say where the data of {show_path(row.path)} begins."
        )
    return row.offset, row.shape


def _in_order(rows: Iterable[Leaf]) -> list[Leaf]:
    """Return rows as their data lies in the file; what has none comes before what begins at its place."""
    return sorted(rows, key=lambda row: (_place(row)[0], 0 not in _place(row)[1]))


def _check_places(rows: Sequence[Leaf], dtypes: Mapping[str, np.dtype[Any]], size: int, name: str) -> None:
    """Refuse a table whose data overlaps, or does not fit into the file, before anything is allocated."""
    end = 0
    for row in rows:
        offset, shape = _place(row)
        if offset < end:
            raise CorruptCheckpointError(
                f"The leaf table of {name} says that the data of {show_path(row.path)} begins at byte "
                f"{offset}, within what comes before it."
            )
        end = offset + dtypes[row.path].itemsize * functools.reduce(int.__mul__, shape, 1)
        if end > size:
            raise CorruptCheckpointError(
                f"The leaf table of {name} says that the data of {show_path(row.path)} ends at byte {end}, "
                f"but there are only {size}."
            )


def _empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray:
    """Return a new array at an address that JAX on CPU can take over without a copy."""
    size = functools.reduce(int.__mul__, shape, dtype.itemsize)
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.__array_interface__["data"][0] % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _fill(stream: Readable, array: NDArray, name: str) -> None:
    data = array.reshape(-1).view(np.uint8).data
    position = 0
    while position < len(data):
        count = stream.readinto(data[position:])
        if not count:
            raise CorruptCheckpointError(f"{name} ended early, in the middle of a leaf.")
        position += count


def _skip(stream: Readable, count: int, scratch: memoryview, name: str) -> None:
    while count:
        read = stream.readinto(scratch[:count])
        if not read:
            raise CorruptCheckpointError(f"{name} ended early, before its last leaf.")
        count -= read
