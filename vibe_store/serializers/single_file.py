"""One file for each item: how a serializer writes it, and how it is loaded by its leaf table."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np

from vibe_store.durable_files import EarlyWriter, explained
from vibe_store.errors import CorruptCheckpointError
from vibe_store.interfaces import Leaf, PyTree, Source
from vibe_store.serializers.host import rebuild, table_values
from vibe_store.serializers.leaf_data import LeafWriter, read_parts, read_records
from vibe_store.serializers.rows import STORED_KINDS
from vibe_store.serializers.tree import Flat, compare, dtype_named, flatten, warn_of_other_callables
from vibe_store.serializers.verifying_reader import Readable

__all__ = ["item_file", "load_item_file", "wanted_dtypes"]

_BUFFER = 1 << 18


@contextmanager
def item_file(path: Path) -> Iterator[LeafWriter]:
    """Give the writer of a new file, which is complete when the block ends, and removed if it fails.

    Raises:
        OSError: the file exists, or cannot be written.
    """
    with explained(f"write '{path}'"), path.open("xb", buffering=_BUFFER) as file:
        try:
            early = EarlyWriter(file)
            yield LeafWriter(early)
            early.flush()
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def load_item_file(source: Source, name: str, item: str, like: PyTree, *, partial: bool = False) -> PyTree:
    """Load an item whose leaf table says where in a file the data of each leaf begins.

    Each array is read into its own memory, from which JAX on CPU takes it over without a copy. Where
    ``like`` has only a part of the leaves, only the bytes of that part are read.

    Args:
        source: the files of the item, and the leaf table as :meth:`LeafWriter.write_leaf` made it.
        name: the file.
        item: the item, for messages.
        like: the template.
        partial: allow the table to have leaves that the template does not.

    Returns:
        A tree of the structure of ``like``.

    Raises:
        TemplateMismatchError: a leaf differs in path, shape, dtype or kind; all differences are in it.
        CorruptCheckpointError: what is stored is not what was saved.
        InvalidValueError: an array cannot be put where the template wants it.
    """
    entry = source.files.get(name)
    if entry is None:
        raise CorruptCheckpointError(f"The checkpoint names no file {name!r} for its item {item!r}.")
    saved, flat = source.leaves, flatten(like)
    compare(saved, flat, partial=partial, what=f"saved item {item!r}")
    dtypes = wanted_dtypes(saved, flat)
    if len(flat.rows) < len(saved):
        arrays = read_parts(functools.partial(source.read_part, name), entry.size, saved, dtypes, name)
    else:
        with source.open(name) as stream:
            arrays = read_records(cast(Readable, stream), entry.size, saved, dtypes, name)
    warn_of_other_callables(saved, flat, stacklevel=4)
    return rebuild(flat, {**table_values(saved), **arrays})


def wanted_dtypes(saved: Sequence[Leaf], like: Flat) -> dict[str, np.dtype[Any]]:
    """Return the dtypes of the stored leaves that the template has, by path."""
    wanted = {row.path for row in like.rows}
    return {
        row.path: dtype_named(row.dtype) for row in saved if row.path in wanted and row.kind in STORED_KINDS
    }
