"""The default serializer: one ``.eqx`` file a pytree, readable by plain Equinox, verified when loaded."""

import contextlib
import io
import os
import secrets
import stat
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, cast

from vibe_store.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    InvalidValueError,
    VibeStoreWarning,
)
from vibe_store.interfaces import FileEntry, Leaf, PyTree, SavedItem, Serializer, Source
from vibe_store.serializers.eqx_file import (
    Readable,
    VerifyingReader,
    read_records,
    read_trailer,
    write_file,
)
from vibe_store.serializers.eqx_plain import load_plain
from vibe_store.serializers.host import rebuild, snapshot, table_values, to_host
from vibe_store.serializers.rows import STORED_KINDS
from vibe_store.serializers.tree import Flat, compare, dtype_named, flatten, show_path

__all__ = ["EqxSerializer", "load_eqx", "save_eqx"]

_BUFFER = 1 << 20


class EqxSerializer(Serializer):
    """Stores each item as ``<item>.eqx``, in the format of :mod:`vibe_store.serializers.eqx_file`."""

    name = "eqx"

    def snapshot(self, tree: PyTree, *, reuse: PyTree = None) -> PyTree:
        """Return the tree with every leaf on the host and owned by the snapshot alone.

        Arrays become records that :meth:`save` knows; the structure stays. The arrays of ``reuse`` are
        written over where shape and dtype are the same.

        Raises:
            UnsupportedLeafError: leaves cannot be stored; the message names the path and type of each.
        """
        return snapshot(tree, reuse=reuse)

    def save(self, tree: PyTree, directory: Path, item: str) -> SavedItem:
        """Write ``<item>.eqx``, from a tree or a snapshot of one.

        Raises:
            UnsupportedLeafError: leaves cannot be stored; the message names the path and type of each.
            OSError: the file cannot be written; nothing of it is left.
        """
        path = directory / f"{item}.eqx"
        flat = flatten(tree, to_save=True)
        values = to_host(flat)
        with _new_file(path, path) as file:
            written = write_file(file, flat.rows, values)
        return SavedItem((FileEntry(path.name, written.size, written.checksum),), written.leaves)

    def load(self, source: Source, item: str, like: PyTree, *, partial: bool = False) -> PyTree:
        """Return a tree of the structure of ``like`` with the saved leaves.

        Raises:
            TemplateMismatchError: a leaf differs in path, shape, dtype or kind; all differences are in it.
            CorruptCheckpointError: what is stored is not what was saved.
            InvalidValueError: an array cannot be put where the template wants it.
        """
        name = f"{item}.eqx"
        entry = source.files.get(name)
        if entry is None:
            raise CorruptCheckpointError(f"The checkpoint names no file {name!r} for its item {item!r}.")
        flat = flatten(like)
        compare(source.leaves, flat, partial=partial, what=f"saved item {item!r}")
        with source.open(name) as stream:
            return _load(cast(Readable, stream), entry.size, source.leaves, flat, name)


def save_eqx(path: str | os.PathLike[str], pytree: PyTree) -> None:
    """Save a pytree to one file, whole or not at all; folders are created, and a file there is replaced.

    ``eqx.tree_deserialise_leaves`` reads the file too, as far as plain Equinox can store the leaves.

    Args:
        path: the file, taken as it is (no suffix is added).
        pytree: any pytree of arrays, typed PRNG keys, Python scalars, strings, bytes and callables (which are
            recorded by name only).

    Raises:
        UnsupportedLeafError: leaves cannot be stored; the message names the path and type of each of them.
        InvalidValueError: the path is a folder, or another thing that is no file.
        OSError: the file cannot be written; the one that was there is as it was.
    """
    # A symbolic link stays one: the file that it leads to is replaced.
    target = Path(os.path.realpath(path))
    flat = flatten(pytree, to_save=True)
    values = to_host(flat)
    mode = _mode(target)
    _make_folder(target.parent)
    temporary = target.parent / f".vibe_store-{secrets.token_hex(8)}.tmp"
    with _new_file(temporary, target) as file:
        write_file(file, flat.rows, values)
        file.flush()
        if mode is not None:
            os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())
        temporary.replace(target)
    _sync_folder(target.parent)


def load_eqx(path: str | os.PathLike[str], like: PyTree) -> PyTree:
    """Load a pytree from a file of :func:`save_eqx` or of plain ``eqx.tree_serialise_leaves``.

    Args:
        path: the file.
        like: a pytree of the same structure, of arrays or of ``jax.ShapeDtypeStruct``; its leaves decide the
            types of the new ones, and where arrays go.

    Returns:
        A new tree of the structure of ``like``. A file of plain Equinox gives an
        :class:`~vibe_store.errors.UnverifiedCheckpointWarning`.

    Raises:
        CheckpointNotFoundError: there is no such file.
        TemplateMismatchError: the file and ``like`` differ; all differences are in it, by path.
        CorruptCheckpointError: the file is not what was written.
        NewerFormatError: the file was written by a later vibe_store.
        InvalidValueError: the path is a folder, or an array cannot be put where ``like`` wants it.
    """
    name = os.fspath(path)
    flat = flatten(like)
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        trailer = read_trailer(file, size, name)
        if trailer is None:
            return load_plain(file, size, flat, name)
        compare(trailer.leaves, flat, what=f"file {name}")
        reader = VerifyingReader(file, trailer.data_size, trailer.data_checksum, name)
        return _load(reader, trailer.data_size, trailer.leaves, flat, name)


def _open(path: str | os.PathLike[str]) -> io.BufferedReader:
    try:
        return Path(path).open("rb")
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"There is no file {os.fspath(path)}.") from error
    except IsADirectoryError as error:
        raise InvalidValueError(f"{os.fspath(path)} is a folder; load_eqx reads a single file.") from error


def _load(stream: Readable, size: int, saved: Sequence[Leaf], like: Flat, name: str) -> PyTree:
    """Read and verify a stream, and rebuild the template, which fits the saved table."""
    wanted = {row.path for row in like.rows}
    dtypes = {
        row.path: dtype_named(row.dtype)
        for row in saved
        if row.path in wanted and row.kind in STORED_KINDS and row.dtype is not None
    }
    arrays = read_records(stream, size, saved, dtypes, name)
    _warn_of_other_callables(saved, like)
    return rebuild(like, {**table_values(saved), **arrays})


def _warn_of_other_callables(saved: Sequence[Leaf], like: Flat) -> None:
    names = {row.path: row.value for row in saved if row.kind == "callable"}
    for row in like.rows:
        if row.kind == "callable" and names[row.path] != row.value:
            warnings.warn(
                f"The leaf {show_path(row.path)} was the callable {names[row.path]} when it was saved, and "
                f"is {row.value} in the template. Callables are not stored; the template's is used.",
                VibeStoreWarning,
                stacklevel=4,
            )


@contextlib.contextmanager
def _new_file(path: Path, target: Path) -> Iterator[IO[bytes]]:
    """Open a file to write; if anything goes wrong in the block, it is removed; errors name the target."""
    try:
        with path.open("wb", buffering=_BUFFER) as file:
            yield file
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, os.fspath(target)) from error
        raise


def _mode(target: Path) -> int | None:
    """Return the permissions of the file that is to be replaced, or None where there is none."""
    try:
        status = target.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise InvalidValueError(f"{target} is {what}; save_eqx writes a single file.")
    return stat.S_IMODE(status.st_mode)


def _make_folder(folder: Path) -> None:
    """Create a folder and its parents, durably."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        _sync_folder(new.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
