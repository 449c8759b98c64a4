"""Reads the arrays that Orbax stored, once each is known to be what the leaf table says, and no larger.

Orbax keeps the arrays of an item in one database (OCDBT) of zarr 3 arrays, written by TensorStore, which also
reads it here: when Orbax itself fails to read, its event loops are closed on what is still being read, and
that prints errors and warnings at some later time.

The files may be made to do harm, and their checksums hold all the same. TensorStore decodes no more of a
chunk than the array's metadata says, so it is enough to know that this is right; of the database's own nodes
it decodes all that there is, so that their size is found first.
"""

import contextlib
import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tensorstore as ts

from vibe_store.errors import CorruptCheckpointError
from vibe_store.interfaces import Leaf
from vibe_store.serializers.orbax_tree import array_type, from_orbax
from vibe_store.serializers.rows import brief, strict_json
from vibe_store.serializers.tree import NDArray, show_path

__all__ = ["read_arrays"]

_CACHE_BYTES = 100_000_000
_BYTES_AT_A_TIME = 256 << 20
_MOST_METADATA = 1 << 16
"""Bytes of the metadata of one array, which takes some hundreds."""

_INLINE = 1024
"""Values of at most so many bytes lie in the nodes, which are compressed; others are stored as they are."""

_MOST_COMPRESSED = 1 << 16
"""Zstandard makes of no byte more than half as many."""

_NODE = re.compile(rb"\x0c\xdb(?:\x3a\x2a|\x12\x34|\x20\xde)")  # manifest, node of versions, node of keys
_MOST_NODES_BYTES = 64 << 20
_MOST_NODES_BYTES_A_LEAF = 16 << 10
_LEAST_NODE = 1 << 10
_ZSTD = 1
_ZSTD_BLOCK = 128 << 10
_SCAN = 16 << 20

_PLAIN_CODECS = (["bytes"], ["bytes", "zstd"])


def read_arrays(folder: Path, wanted: Mapping[str, Leaf], *, leaves: int) -> dict[str, NDArray]:
    """Read some arrays of an item.

    Args:
        folder: the folder of the item, on a local disk, in which nothing is but files that were verified.
        wanted: the row of the leaf table for each array, by the name that it has in Orbax.
        leaves: how many leaves the whole item has.

    Returns:
        The arrays by the paths of their leaves, of the shape and dtype of ``array_type(row)``.

    Raises:
        CorruptCheckpointError: what is stored for a leaf is not what its row says, or cannot be read.
    """
    size = _check_nodes(folder, most=_MOST_NODES_BYTES + leaves * _MOST_NODES_BYTES_A_LEAF)
    context = ts.Context({"cache_pool#ocdbt": {"total_bytes_limit": _CACHE_BYTES}})
    database = {
        "driver": "ocdbt",
        "base": {"driver": "file", "path": f"{folder}/"},
        "cache_pool": "cache_pool#ocdbt",
    }
    with _readable(folder, None):
        store = ts.KvStore.open(database, context=context).result()
        found = [(name, row, store.read(_key(name))) for name, row in wanted.items()]
    specs = [(row, _spec(database, name, row, future, folder, size)) for name, row, future in found]
    _check_size(folder, specs, size)
    return dict(_read(folder, specs, context))


def _key(name: str) -> str:
    return f"{name}/zarr.json" if name and not name.endswith("/") else f"{name}zarr.json"


def _read(
    folder: Path, specs: Sequence[tuple[Leaf, dict[str, Any]]], context: Any
) -> Iterator[tuple[str, NDArray]]:
    """Read the arrays, as many at a time as take some memory beside their own."""
    opened = []
    for row, spec in specs:
        with _readable(folder, row):
            opened.append((row, ts.open(spec, context=context, open=True, read=True, assume_metadata=True)))
    begun: list[tuple[Leaf, Any]] = []
    nbytes = 0
    for row, future in opened:
        with _readable(folder, row):
            begun.append((row, future.result().read()))
        nbytes += _nbytes(row)
        if nbytes > _BYTES_AT_A_TIME:
            yield from _finish(folder, begun)
            begun, nbytes = [], 0
    yield from _finish(folder, begun)


def _finish(folder: Path, begun: Sequence[tuple[Leaf, Any]]) -> Iterator[tuple[str, NDArray]]:
    for row, future in begun:
        with _readable(folder, row):
            array = np.asarray(future.result())
        if (array.shape, array.dtype) != array_type(row):
            raise _corrupt(folder, row, f"it is read as {array.dtype} of shape {array.shape}")
        yield row.path, from_orbax(row, array)


@contextlib.contextmanager
def _readable(folder: Path, row: Leaf | None) -> Iterator[None]:
    """Say of what TensorStore refuses that it is not what was saved: where files are verified, it is not."""
    try:
        yield
    except (CorruptCheckpointError, MemoryError):
        raise
    except Exception as error:
        reason = re.split(r" \[(?:tensorstore_spec|source locations|os_error_code)", str(error))[0]
        raise _corrupt(folder, row, f"TensorStore says {brief(reason)}") from error


def _spec(
    database: Mapping[str, Any], name: str, row: Leaf, future: Any, folder: Path, size: int
) -> dict[str, Any]:
    """Return how to open an array whose metadata, checked here, is in the database."""
    with _readable(folder, row):
        value = future.result()
    if value.state != "value":
        raise _corrupt(folder, row, f"{brief(_key(name))} is not there")
    if len(value.value) > _MOST_METADATA:
        raise _corrupt(folder, row, f"{brief(_key(name))} has {len(value.value)} bytes")
    try:
        metadata = strict_json(value.value)
    except CorruptCheckpointError as error:
        raise _corrupt(folder, row, f"{brief(_key(name))}: {error}") from error
    problem = _difference(metadata, row, size)
    if problem is not None:
        raise _corrupt(folder, row, f"{brief(_key(name))} {problem}")
    return {
        "driver": "zarr3",
        "kvstore": {**database, "path": name},
        "metadata": metadata,
        "fill_missing_data_reads": False,  # every chunk was stored, also of zeros
    }


def _difference(metadata: Any, row: Leaf, size: int) -> str | None:
    """Say in what an array's metadata is not what is written for a leaf, or return None."""
    shape, dtype = array_type(row)
    if not isinstance(metadata, dict):
        return f"is {brief(metadata)}"
    for name, expected in (
        ("zarr_format", 3),
        ("node_type", "array"),
        ("data_type", ts.dtype(dtype).name),
        ("shape", list(shape)),
    ):
        if not _same(metadata.get(name), expected):
            return f"has the {name} {brief(metadata.get(name))}, where {brief(expected)} was saved"
    grid = metadata.get("chunk_grid")
    chunk: Any = _configuration(grid, "regular").get("chunk_shape")
    if not _fits(chunk, shape):
        return f"has the chunk_grid {brief(grid)}, which does not fit an array of shape {shape}"
    codecs: Any = metadata.get("codecs")
    inner, names = chunk, _names(codecs)
    if names == ["sharding_indexed"]:
        shards = _configuration(codecs[0], "sharding_indexed")
        inner, names = shards.get("chunk_shape"), _names(shards.get("codecs"))
        if _names(shards.get("index_codecs")) != ["bytes", "crc32c"] or not _fits(inner, chunk):
            names = None
    if names not in _PLAIN_CODECS:
        return f"has the codecs {brief(codecs)}, which are never written"
    count = math.prod(-(-length // part) for length, part in zip(shape, inner, strict=True))
    if count > 1 and 16 * count > size:  # the index of a shard says of each of its chunks where it is
        return f"is of {count} chunks, more than {size} bytes can hold"
    return None


def _same(value: object, expected: object) -> bool:
    return repr(value) == repr(expected)  # which keeps True apart from 1


def _fits(part: object, whole: Sequence[int]) -> bool:
    return (
        isinstance(part, list)
        and len(part) == len(whole)
        and all(type(size) is int and 1 <= size <= most for size, most in zip(part, whole, strict=True))
    )


def _configuration(value: object, name: str) -> Mapping[str, Any]:
    inner = value.get("configuration") if isinstance(value, dict) and value.get("name") == name else None
    return inner if isinstance(inner, dict) else {}


def _names(codecs: object) -> list[Any] | None:
    if not isinstance(codecs, list):
        return None
    return [codec.get("name") if isinstance(codec, dict) else codec for codec in codecs]


def _nbytes(row: Leaf) -> int:
    shape, dtype = array_type(row)
    return math.prod(shape) * dtype.itemsize


def _check_size(folder: Path, specs: Sequence[tuple[Leaf, dict[str, Any]]], size: int) -> None:
    """Refuse arrays that so few bytes cannot hold: TensorStore ends the process when it gets no memory."""
    needed = 0
    for row, spec in specs:
        nbytes = _nbytes(row)
        if nbytes > _INLINE:
            needed += nbytes // (_MOST_COMPRESSED if "'zstd'" in str(spec["metadata"]["codecs"]) else 1)
        if needed > size:
            raise _corrupt(folder, row, f"an array of {nbytes} bytes is not in files of {size} bytes")


def _check_nodes(folder: Path, *, most: int) -> int:
    """Refuse a database whose nodes would decompress to too much; return the size of its files."""
    size = total = 0
    for path in sorted(each for each in folder.rglob("*") if not each.is_dir()):
        size += path.stat().st_size
        for decoded in _nodes(path, most):
            total += decoded
            if total > most:
                file = brief(path.relative_to(folder.parent).as_posix())
                raise _corrupt(
                    folder, None, f"the nodes in {file} would decompress to more than {most} bytes"
                )
    return size


def _nodes(path: Path, most: int) -> Iterator[int]:
    """Yield how many bytes each of the nodes in a file decompresses to, or somewhat more."""
    with path.open("rb") as file:
        for start in itertools.count(0, _SCAN):
            file.seek(start)
            data = file.read(_SCAN + 3)
            for match in _NODE.finditer(data, 0, _SCAN + 3):
                file.seek(start + match.end())
                yield max(_decoded_size(file, most), _LEAST_NODE)
            if len(data) <= _SCAN:
                return


def _decoded_size(file: BinaryIO, most: int) -> int:
    """Return how many bytes a node decompresses to, or somewhat more; at ``most``, counting ends.

    After its magic number, which was read already, a node has its length (8 bytes), a version, the kind of
    compression, and then frames of Zstandard. In these are blocks (RFC 8878, section 3.1), each of which
    decompresses to 128 KiB at most.
    """
    file.seek(8, os.SEEK_CUR)
    _varint(file)
    if _varint(file) != _ZSTD:
        return 0
    size = 0
    while size <= most:
        magic = file.read(4)
        if magic[1:] == b"\x2a\x4d\x18" and magic[0] >> 4 == 5:  # a frame to skip
            file.seek(int.from_bytes(file.read(4), "little"), os.SEEK_CUR)
            size += _ZSTD_BLOCK
            continue
        flags = file.read(1)
        if magic != b"\x28\xb5\x2f\xfd" or not flags:
            break
        alone = flags[0] >> 5 & 1
        file.seek((1 - alone) + (0, 1, 2, 4)[flags[0] & 3] + (alone, 2, 4, 8)[flags[0] >> 6], os.SEEK_CUR)
        last = False
        while not last and size <= most:
            head = file.read(3)
            last, kind = not head or bool(head[0] & 1), int.from_bytes(head, "little") >> 1 & 3
            file.seek(1 if kind == 1 else int.from_bytes(head, "little") >> 3, os.SEEK_CUR)
            size += _ZSTD_BLOCK
        file.seek(4 * (flags[0] >> 2 & 1), os.SEEK_CUR)
    return size


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 35, 7):
        byte = (file.read(1) or b"\0")[0]
        value |= (byte & 127) << shift
        if byte < 128:
            break
    return value


def _corrupt(folder: Path, row: Leaf | None, problem: str) -> CorruptCheckpointError:
    what = f"item {folder.name!r}"
    if row is not None:
        what = f"leaf {show_path(row.path)} of the {what}"
    return CorruptCheckpointError(
        f"Orbax's database {folder.name}/manifest.ocdbt does not hold the {what} as it was saved: {problem}."
    )
