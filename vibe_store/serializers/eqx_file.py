"""The ``.eqx`` file: the npy records that Equinox writes, then a trailer with the leaf table and checksums.

====================  =====================================================================================
records               one npy record for each stored leaf in tree order, as ``eqx.tree_serialise_leaves``
                      writes them (always in C order); the key data of typed keys in the same way
leaf table            JSON; each row says where its data begins and what its xxh3-128 is
footer                :data:`_FOOTER`, of a fixed size: magic, version, length of the JSON, xxh3-128 of the
                      records, xxh3-128 of the JSON and of the footer up to here
====================  =====================================================================================

Plain Equinox reads the records and ignores what follows its last leaf. A reader of ours begins at the end:
the table is verified before it is believed, and the records while they are read. The footer is the same in
every version of the format.
"""

import functools
import io
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import xxhash

from vibe_store.errors import CorruptCheckpointError, InvalidValueError, NewerFormatError
from vibe_store.interfaces import Leaf
from vibe_store.serializers.rows import (
    MAX_JSON_BYTES,
    STORED_KINDS,
    strict_json,
    table_from_json,
    table_to_json,
)
from vibe_store.serializers.tree import HostCopy, NDArray, show_path
from vibe_store.serializers.verifying_reader import CHUNK, Readable

__all__ = [
    "Trailer",
    "Written",
    "read_parts",
    "read_records",
    "read_trailer",
    "write_file",
]

_FOOTER = struct.Struct("<8sIQ16s16s")
_MAGIC = b"\x89vstore\n"
_VERSION = 1
_ALIGNMENT = 64


class Writable(Protocol):
    """What saving needs of an open file."""

    def write(self, data: Any, /) -> int:
        """Write all of it."""


@dataclass(frozen=True, slots=True)
class Written:
    """What :func:`write_file` wrote: the length and xxh3-128 of the file, and its leaf table with offsets."""

    size: int
    checksum: str
    leaves: tuple[Leaf, ...]


@dataclass(frozen=True, slots=True)
class Trailer:
    """A verified trailer: the leaf table, and the length and xxh3-128 of the records."""

    leaves: tuple[Leaf, ...]
    data_size: int
    data_checksum: bytes


def write_file(file: Writable, rows: Sequence[Leaf], values: Sequence[Any]) -> Written:
    """Write one ``.eqx`` file in one pass over the data, checksums included.

    Args:
        file: an empty file.
        rows: the leaf table of a tree.
        values: its leaves, as ``to_host`` returns them.

    Raises:
        InvalidValueError: the leaf table would be longer than any that is read.
    """
    whole = xxhash.xxh3_128()
    size = 0
    table: list[Leaf] = []
    for row, value in zip(rows, values, strict=True):
        if row.kind not in STORED_KINDS:
            table.append(row)
            continue
        array = value.data if isinstance(value, HostCopy) else np.asarray(value, dtype=_native(row, value))
        header = _npy_header(array.dtype.str, array.shape)
        whole.update(header)
        file.write(header)
        offset = size + len(header)
        size = offset + array.nbytes
        checksum = _write_data(file, array, whole)
        table.append(Leaf(row.path, row.kind, row.dtype, row.shape, row.impl, row.value, offset, checksum))
    trailer = _trailer(table, whole.digest())
    whole.update(trailer)
    file.write(trailer)
    return Written(size + len(trailer), whole.hexdigest(), tuple(table))


def read_trailer(file: io.BufferedIOBase, size: int, name: str) -> Trailer | None:
    """Return the verified trailer of an ``.eqx`` file, or None where the file has none of ours.

    Args:
        file: the open file; it is left at its beginning.
        size: its length.
        name: what to call it in messages.

    Raises:
        CorruptCheckpointError: the trailer is damaged.
        NewerFormatError: it was written in a later format.
    """
    start = size - _FOOTER.size
    footer = b""
    if start >= 0:
        file.seek(start)
        footer = file.read(_FOOTER.size)
    if footer[: len(_MAGIC)] != _MAGIC or len(footer) != _FOOTER.size:
        file.seek(0)
        return None
    _, version, length, data_checksum, table_checksum = _FOOTER.unpack(footer)
    if length > start:
        raise CorruptCheckpointError(f"{name} is damaged: its leaf table would be longer than the file.")
    if length > MAX_JSON_BYTES:
        raise CorruptCheckpointError(
            f"{name} says that its leaf table has {length} bytes, and more than {MAX_JSON_BYTES} are never "
            "written."
        )
    file.seek(start - length)
    text = file.read(length)
    file.seek(0)
    if xxhash.xxh3_128_digest(text + footer[:-16]) != table_checksum:
        raise CorruptCheckpointError(f"{name} is damaged: its leaf table does not match its checksum.")
    if version > _VERSION:
        raise NewerFormatError(
            f"{name} has format version {version}, but this vibe_store reads up to {_VERSION}; upgrade it."
        )
    try:
        leaves = table_from_json(strict_json(text))
    except ValueError as error:
        raise CorruptCheckpointError(f"{name} has a leaf table that cannot be read: {error}") from error
    return Trailer(leaves, start - length, data_checksum)


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
    wanted = [row for row in rows if row.path in dtypes]
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
    wanted = [row for row in rows if row.path in dtypes]
    _check_places(wanted, dtypes, size, name)
    arrays: dict[str, NDArray] = {}
    for row in wanted:
        offset, shape = _place(row)
        if row.checksum is None:
            raise CorruptCheckpointError(f"The leaf table has no checksum of {show_path(row.path)}.")
        arrays[row.path] = _empty(shape, dtypes[row.path])
        read(offset, arrays[row.path].reshape(-1).view(np.uint8).data, row.checksum)
    return arrays


def _native(row: Leaf, value: Any) -> Any:
    """Return the dtype that a Python scalar is written with; arrays and NumPy scalars have their own."""
    return None if isinstance(value, np.ndarray | np.generic) else row.dtype


@functools.lru_cache(maxsize=4096)
def _npy_header(descr: str, shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


def _write_data(file: Writable, array: NDArray, whole: xxhash.xxh3_128) -> str:
    """Write the bytes of an array in C order, and return their checksum."""
    # A view where the array is contiguous; as bytes, since not every dtype has a buffer of its own.
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    if len(data) <= CHUNK:
        whole.update(data)
        file.write(data)
        return xxhash.xxh3_128_hexdigest(data)
    leaf = xxhash.xxh3_128()
    for start in range(0, len(data), CHUNK):
        chunk = data[start : start + CHUNK]
        leaf.update(chunk)
        whole.update(chunk)
        file.write(chunk)
    return leaf.hexdigest()


def _trailer(table: Sequence[Leaf], data_checksum: bytes) -> bytes:
    text = json.dumps(table_to_json(table), separators=(",", ":")).encode()
    if len(text) > MAX_JSON_BYTES:
        raise InvalidValueError(
            f"The leaf table of this tree would have {len(text)} bytes, and at most {MAX_JSON_BYTES} are "
            "read. Strings and bytes are kept in it, so store large ones as arrays of numpy.uint8."
        )
    footer = _FOOTER.pack(_MAGIC, _VERSION, len(text), data_checksum, bytes(16))[:-16]
    return text + footer + xxhash.xxh3_128_digest(text + footer)


def _place(row: Leaf) -> tuple[int, tuple[int, ...]]:
    if row.offset is None or row.shape is None:
        raise CorruptCheckpointError(
            f"The leaf table does not say where the data of {show_path(row.path)} begins."
        )
    return row.offset, row.shape


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
