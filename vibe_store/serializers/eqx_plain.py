"""Reads files that plain Equinox wrote: npy records without a table, taken in the order of the template.

The headers of npy records are Python source, which NumPy has Python's own compiler parse. Here they are
matched against the one form that NumPy writes, and all of them against the template before any data is read.
"""

import io
import math
import re
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from vibe_store.errors import CorruptCheckpointError, UnverifiedCheckpointWarning
from vibe_store.interfaces import Leaf, PyTree
from vibe_store.serializers.host import rebuild, table_values
from vibe_store.serializers.rows import SCALAR_DTYPES, STORED_KINDS, brief
from vibe_store.serializers.tree import Flat, NDArray, compare, dtype_name, dtype_named, mismatch, show_path

__all__ = ["load_plain"]

_LENGTH_BYTES = {(1, 0): 2, (2, 0): 4}
"""How many bytes the length of the header takes, by version of the npy format."""

_LONGEST_HEADER = 10_000
_HEADER = re.compile(
    r"""\{'descr':\ '(?P<dtype>[<>|][biufcmMSUV][0-9]{0,9}(?:\[[0-9]{0,9}[A-Za-z]{1,2}\])?)',
    \ 'fortran_order':\ (?P<fortran>True|False),
    \ 'shape':\ \((?P<shape>|[0-9]{1,19},|[0-9]{1,19}(?:,\ [0-9]{1,19}){1,63})\),?\ *\}\ *\n""",
    re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class _Record:
    """Where a record's data is, and what its header says that it is."""

    start: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool


def load_plain(file: io.BufferedIOBase, size: int, like: Flat, name: str) -> PyTree:
    """Load what ``eqx.tree_serialise_leaves`` wrote, with a warning that nothing vouches for the bytes.

    Unlike ``eqx.tree_deserialise_leaves`` this casts nothing, reads ml_dtypes that were written from host
    copies, and refuses a file that holds more than the template asks for. Such a file has no strings,
    bytes and callables: they are the template's.

    Args:
        file: the open file, at its beginning.
        size: its length.
        like: the template.
        name: what to call the file in messages.

    Raises:
        TemplateMismatchError: the file holds other leaves than the template, as far as it says what it holds.
        CorruptCheckpointError: it is not such a file, or only a part of one.
    """
    wanted = [row for row in like.rows if row.kind in STORED_KINDS]
    if size == 0 and wanted:
        raise CorruptCheckpointError(f"{name} is empty.")
    records: list[_Record] = []
    for index, row in enumerate(wanted):
        if file.tell() == size:
            missing = [(later.path, f"the file ends before it ({size} bytes)") for later in wanted[index:]]
            raise mismatch(missing, f"file {name}")
        records.append(_read_header(file, size, row, name))
    others = [row for row in like.rows if row.kind not in STORED_KINDS]
    found = [_described(row, record) for row, record in zip(wanted, records, strict=True)]
    compare([*found, *others], like, what=f"file {name}")
    left = size - file.tell()
    if left:
        if file.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX:
            last = wanted[-1].path if wanted else ""
            raise mismatch([(last, f"{left} bytes follow it, which hold further leaves")], f"file {name}")
        raise CorruptCheckpointError(
            f"{name} is damaged, or no Equinox file: {left} bytes that are no leaf follow the last leaf."
        )
    warnings.warn(
        f"{name} was written by plain Equinox: it has no leaf table and no checksum, so neither damage nor "
        "leaves that changed places would be noticed. Save it again with save_eqx.",
        UnverifiedCheckpointWarning,
        stacklevel=3,
    )
    values = table_values(like.rows)
    for row, record in zip(wanted, records, strict=True):
        values[row.path] = _read_data(file, record, name)
    return rebuild(like, values)


def _read_header(file: io.BufferedIOBase, size: int, row: Leaf, name: str) -> _Record:
    """Read the header of one record, and skip its data."""
    start = file.tell()
    place = f"at byte {start}, where the leaf {show_path(row.path)} should be"
    prefix = np.lib.format.MAGIC_PREFIX
    magic = file.read(len(prefix) + 2)
    width = _LENGTH_BYTES.get((magic[-2], magic[-1]), 0) if len(magic) == len(prefix) + 2 else 0
    if not magic.startswith(prefix) or not width:
        raise CorruptCheckpointError(
            f"{name} is damaged, or no Equinox file: {place}, there is no array (of npy 1.0 or 2.0)."
        )
    length = int.from_bytes(file.read(width), "little")
    text = file.read(min(length, _LONGEST_HEADER)).decode("latin-1")
    match = _HEADER.fullmatch(text) if len(text) == length else None
    if match is None:
        raise CorruptCheckpointError(
            f"{name} is damaged, or no Equinox file: {place}, there is an array whose header is none that "
            f"can be read safely: {brief(text)}."
        )
    shape = tuple(int(digits) for digits in match["shape"].replace(",", " ").split())
    dtype = _safe_dtype(match["dtype"])
    if dtype is None:
        raise CorruptCheckpointError(
            f"{name} holds {place}, a record of dtype {match['dtype']} and shape {brief(shape)}; that cannot "
            "be read safely."
        )
    count, data = dtype.itemsize * math.prod(shape), file.tell()
    if count > size - data:
        raise CorruptCheckpointError(
            f"{name} is damaged or cut short: the leaf {show_path(row.path)} should be {count} bytes from "
            f"byte {data} on, and {size - data} are left."
        )
    file.seek(data + count)
    return _Record(data, _as_wanted(dtype, row), shape, match["fortran"] == "True")


def _safe_dtype(text: str) -> np.dtype[Any] | None:
    """Return the dtype of a header if its elements are bytes that mean nothing but themselves."""
    try:
        dtype = np.dtype(text)
    except (TypeError, ValueError):
        return None
    # NumPy 2.0 lets the size of a long text overflow.
    return None if dtype.hasobject or dtype.itemsize <= 0 else dtype


def _read_data(file: io.BufferedIOBase, record: _Record, name: str) -> NDArray:
    data = np.empty(record.dtype.itemsize * math.prod(record.shape), np.uint8)
    file.seek(record.start)
    if file.readinto(data.data) != len(data):
        raise CorruptCheckpointError(f"{name} became shorter while it was read.")
    shape = record.shape[::-1] if record.fortran else record.shape
    array: NDArray = data.view(record.dtype).reshape(shape)
    return np.array(array.T if record.fortran else array, order="C", copy=None)


def _as_wanted(dtype: np.dtype[Any], row: Leaf) -> np.dtype[Any]:
    """Return the ml_dtype that the template names, where NumPy could only write it as bytes of no type."""
    if dtype.kind == "V" and row.dtype is not None:
        wanted = dtype_named(row.dtype)
        if wanted.kind == "V" and wanted.itemsize == dtype.itemsize:
            return wanted
    return dtype


def _described(row: Leaf, record: _Record) -> Leaf:
    """Describe a record as the template's kind of leaf where it may be one: the file itself does not say."""
    name = dtype_name(record.dtype) or str(record.dtype)
    scalar = row.kind in SCALAR_DTYPES and name in SCALAR_DTYPES[row.kind] and record.shape == ()
    return Leaf(row.path, row.kind if scalar else "numpy", name, record.shape)
