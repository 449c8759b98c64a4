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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from vibe_store.errors import CorruptCheckpointError, InvalidValueError, NewerFormatError
from vibe_store.interfaces import Leaf
from vibe_store.serializers.leaf_data import LeafWriter, stored_array
from vibe_store.serializers.rows import (
    MAX_JSON_BYTES,
    STORED_KINDS,
    strict_json,
    table_from_json,
    table_to_json,
)

__all__ = [
    "Trailer",
    "read_trailer",
    "write_file",
]

_FOOTER = struct.Struct("<8sIQ16s16s")
_MAGIC = b"\x89vstore\n"
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Trailer:
    """A verified trailer: the leaf table, and the length and xxh3-128 of the records."""

    leaves: tuple[Leaf, ...]
    data_size: int
    data_checksum: bytes


def write_file(writer: LeafWriter, rows: Sequence[Leaf], values: Sequence[Any]) -> tuple[Leaf, ...]:
    """Write one ``.eqx`` file in one pass over the data, and return its leaf table with offsets.

    Args:
        writer: writes to an empty file.
        rows: the leaf table of a tree.
        values: its leaves, as ``to_host`` returns them.

    Raises:
        InvalidValueError: the leaf table would be longer than any that is read.
    """
    table: list[Leaf] = []
    for row, value in zip(rows, values, strict=True):
        if row.kind in STORED_KINDS:
            array = stored_array(row, value)
            writer.write(_npy_header(array.dtype.str, array.shape))
            table.append(writer.write_leaf(row, array))
        else:
            table.append(row)
    writer.write(_trailer(table, bytes.fromhex(writer.checksum)))
    return tuple(table)


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


@functools.lru_cache(maxsize=4096)
def _npy_header(descr: str, shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


def _trailer(table: Sequence[Leaf], data_checksum: bytes) -> bytes:
    text = json.dumps(table_to_json(table), separators=(",", ":")).encode()
    if len(text) > MAX_JSON_BYTES:
        raise InvalidValueError(
            f"The leaf table of this tree would have {len(text)} bytes, and at most {MAX_JSON_BYTES} are "
            "read. Strings and bytes are kept in it, so store large ones as arrays of numpy.uint8."
        )
    footer = _FOOTER.pack(_MAGIC, _VERSION, len(text), data_checksum, bytes(16))[:-16]
    return text + footer + xxhash.xxh3_128_digest(text + footer)
