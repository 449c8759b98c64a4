"""Reads files that plain Equinox wrote: npy records without a table, taken in the order of the template."""

import io
import math
import warnings
from typing import Any

import numpy as np

from vibe_store.errors import CorruptCheckpointError, UnverifiedCheckpointWarning
from vibe_store.interfaces import Leaf, PyTree
from vibe_store.serializers.host import HostValue, rebuild, table_values
from vibe_store.serializers.rows import SCALAR_DTYPES, STORED_KINDS
from vibe_store.serializers.tree import Flat, NDArray, compare, dtype_name, dtype_named, mismatch, show_path

__all__ = ["load_plain"]

_READ_HEADER = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


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
    values = table_values(like.rows)
    found: list[Leaf] = []
    for index, row in enumerate(wanted):
        if file.tell() == size:
            missing = [(later.path, f"the file ends before it ({size} bytes)") for later in wanted[index:]]
            raise mismatch(missing, f"file {name}")
        values[row.path], saved = _read(file, size, row, name)
        found.append(saved)
    others = [row for row in like.rows if row.kind not in STORED_KINDS]
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
    return rebuild(like, values)


def _read(file: io.BufferedIOBase, size: int, row: Leaf, name: str) -> tuple[HostValue, Leaf]:
    """Read one record, and describe it as if it had been saved at this row's path."""
    start = file.tell()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about ways to write a dtype that no version of Equinox used
            shape, fortran, dtype = _READ_HEADER[np.lib.format.read_magic(file)](file)
    except OSError:
        raise
    except (
        Exception
    ) as error:  # what NumPy's parser raises for damaged text is whatever Python's parser raises
        raise CorruptCheckpointError(
            f"{name} is damaged, or no Equinox file: at byte {start}, where the leaf {show_path(row.path)} "
            f"should be, there is no array ({error})."
        ) from error
    composed = dtype.names is not None or dtype.subdtype is not None
    if composed or dtype.hasobject or dtype.itemsize == 0 or min(shape, default=0) < 0:
        raise CorruptCheckpointError(
            f"{name} holds a record of dtype {dtype} and shape {shape} where the leaf {show_path(row.path)} "
            "should be; that cannot be read safely."
        )
    count = dtype.itemsize * math.prod(shape)
    left = size - file.tell()
    if count > left:
        raise CorruptCheckpointError(
            f"{name} is damaged or cut short: the leaf {show_path(row.path)} should be {count} bytes from "
            f"byte {file.tell()} on, and {left} are left."
        )
    data = np.empty(count, np.uint8)
    file.readinto(data.data)
    view = _as_wanted(dtype, row)
    array: NDArray = data.view(view).reshape(shape[::-1] if fortran else shape)
    return np.array(array.T if fortran else array, order="C", copy=None), _described(row, view, shape)


def _as_wanted(dtype: np.dtype[Any], row: Leaf) -> np.dtype[Any]:
    """Return the ml_dtype that the template names, where NumPy could only write it as bytes of no type."""
    if dtype.kind == "V" and row.dtype is not None:
        wanted = dtype_named(row.dtype)
        if dtype_name(dtype) is None and wanted.kind == "V" and wanted.itemsize == dtype.itemsize:
            return wanted
    return dtype


def _described(row: Leaf, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Leaf:
    """Describe a record as the template's kind of leaf where it may be one: the file itself does not say."""
    name = dtype_name(dtype) or str(dtype)
    scalar = row.kind in SCALAR_DTYPES and name in SCALAR_DTYPES[row.kind] and shape == ()
    return Leaf(row.path, row.kind if scalar else "numpy", name, shape)
